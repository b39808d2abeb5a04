"""Image files to 8-bit pixels: the one way in which all commands do it, and the one list of what can go wrong."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import logging
import multiprocessing
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, PngImagePlugin

from mfm_lightning.utils.distributed import is_first_rank

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
MOST_PIXELS = 178_956_970  # of a file: where Pillow takes it for a decompression bomb
MOST_RESIZED = 2**26  # pixels, while an image is cut to its size
_NO_PICTURES = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "IPTC"}  # run programs, or need another library to decode
_GREY = ("1", "L", "LA", "La", "I", "F")  # and all kinds of I;16
_PAUSES = (0.1, 0.5, 2.0)  # seconds before reading is tried again
# no second attempt helps: the file is not there, is no file, or may not be read
_FINAL = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class ImageError(ValueError):
    """A file that is no image, or one that cannot be decoded."""


class ReadError(OSError):
    """A file whose storage fails: nothing is said of what is in it."""


@cache
def image_endings() -> frozenset[str]:
    """Endings of files (".png") that hold images for Pillow, and for its plug-ins that are imported."""
    formats = _formats()
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in formats)


def read_image(path: Path) -> Image.Image:
    """The file's picture as `decode` gives it. A storage that fails is tried again.

    Raises:
        ImageError: as `decode`.
        FileNotFoundError, PermissionError: if it is not there, or may not be read.
        ReadError: if the storage fails each time.
    """
    for pause in (*_PAUSES, None):
        try:
            return decode(path.read_bytes(), str(path))
        except OSError as error:
            if error.errno in _FINAL:
                raise
            if pause is None:
                reason = f"{path} cannot be read ({error.strerror or error}), tried {len(_PAUSES) + 1} times"
                raise ReadError(f"{reason}: mend the storage and run the command again") from error
            log.warning("%s cannot be read (%s): tried again", path, error.strerror or error)
            time.sleep(pause)
    raise AssertionError("the loop returns or raises")


def load_image(path: Path) -> Tensor:
    """An image file as `(C, H, W)` in [0, 1]; grey files have one channel, others three. Raises as `read_image`."""
    from torchvision.transforms.functional import to_tensor

    return to_tensor(read_image(path))


def decode(content: bytes, name: str) -> Image.Image:
    """An image in mode "L" (grey) or "RGB".

    More than 8 bits are scaled by their range: 16 bits by 65535, a TIFF's 12 by 4095, floats from [0, 1]. As in ADM and
    torchvision, transparency is dropped, the orientation in EXIF is not applied, and of several frames the first is
    taken; each is said once.

    Args:
        name: of the file, for messages.

    Raises:
        ImageError: naming it, if it is no image, is damaged, has more than `MOST_PIXELS`, or numbers of unknown range.
        OSError: with its `errno`, of the storage.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ImageError(f"{image.width} x {image.height} pixels, at most {MOST_PIXELS:,} are read")
            _say_what_is_dropped(image, name)
            return _eight_bits(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes of them
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ImageError(f"{name} cannot be decoded: {_reason(content, error)}") from error


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """`(size, size, 3)` uint8 as in ADM and DiT: halved by boxes while twice too large, resized (bicubic), cropped.

    Raises:
        ImageError: for an image so long and thin that resizing would take more than `MOST_RESIZED` pixels.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > max(MOST_RESIZED, 16 * size**2):
        raise ImageError(f"too long and thin for size {size}: {width} x {height} pixels before it is cropped")
    pixels = np.array(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


_enlarged = multiprocessing.Value(ctypes.c_bool, False)  # whether it was said, by this process or a worker of it


def cropped(image: Image.Image, size: int, place: str) -> np.ndarray:
    """As `center_crop`. The first image that is smaller, and so enlarged, is said, by the first rank.

    Args:
        place: of the image, for messages.

    Raises:
        ImageError: as `center_crop`, naming the image.
    """
    if min(image.size) < size and not _enlarged.value and is_first_rank():
        _enlarged.value = True
        log.warning(
            "%s has %d x %d pixels: images smaller than %d are enlarged, of which this is the first",
            place, image.width, image.height, size,
        )  # fmt: skip
    try:
        return center_crop(image, size)
    except ImageError as error:
        raise ImageError(f"{place}: {error}") from error


def _formats() -> list[str]:
    Image.init()
    # a colour profile or a note of more than 1 MB makes a whole image unreadable; their sum stays bounded
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    return [kind for kind in Image.OPEN if kind not in _NO_PICTURES]


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_scaled(image))
    if image.mode in ("La", "RGBa", "P", "PA") and (image.mode != "P" or "transparency" in image.info):
        image = image.convert("LA" if image.mode == "La" else "RGBA")  # straight to RGB, colours would be multiplied
    return image.convert("L" if image.mode in _GREY else "RGB")


def _scaled(image: Image.Image) -> np.ndarray:
    """Grey levels of 16 bits, 32 bits or floats as `(H, W)` uint8."""
    values = np.asarray(image).astype(np.float64)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode == "F":
        top = 1.0
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise ImageError(
                f"floats in {values.min():.3g}..{values.max():.3g}, expected 0..1: save it in 8 or 16 bits"
            )
    elif image.mode != "I":
        top = 2.0 ** int(tags.get(258, (16,))[0]) - 1  # bits of a sample
        if tags.get(262) == 0:  # white is 0, which Pillow inverts for 8 bits only
            values = top - values
    elif image.format in ("PNG", "PPM"):  # Pillow scales a PPM's own range to this one
        top = 65535.0
    else:
        raise ImageError(
            f"integers in {values.min():.0f}..{values.max():.0f} of unknown range: save it in 8 or 16 bits"
        )
    return (values / top * 255).round().clip(0, 255).astype(np.uint8)


def _say_what_is_dropped(image: Image.Image, name: str) -> None:
    if image.has_transparency_data:
        _say_once("transparency, which is dropped", name)
    if image.format != "MPO" and getattr(image, "is_animated", False):  # a camera's MPO has previews
        _say_once("several frames, of which the first is taken", name)
    turned = False
    with contextlib.suppress(Exception):  # what is damaged here is not the picture
        turned = "exif" in image.info and image.getexif().get(0x0112, 1) != 1
    if turned:
        _say_once("an orientation in its EXIF, which is not applied (as in ADM and torchvision)", name)


@cache
def _said(what: str) -> list[str]:
    return []


def _say_once(what: str, name: str) -> None:
    if not _said(what):
        _said(what).append(name)
        log.warning("%s has %s; so for all such images", name, what)


def _reason(content: bytes, error: Exception) -> str:
    if not content:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image that Pillow knows, or its header is damaged"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MOST_PIXELS:,} pixels"
    return str(error) if isinstance(error, ImageError | OSError | ValueError) else f"{type(error).__name__}: {error}"
