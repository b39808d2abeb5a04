"""Small images in the files that people have, some of them written here byte by byte, so that no library's idea of a
format is tested against itself."""

import contextlib
import io
import logging
import re
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from mfm_lightning.commands.main import main
from mfm_lightning.data.latents.index import LatentIndex


def picture(size: int = 40, seed: int = 0, width: int | None = None) -> np.ndarray:
    """A smooth colour picture, `(H, W, 3)` uint8."""
    small = np.random.default_rng(seed).integers(20, 230, (5, 5, 3)).astype(np.uint8)
    return np.array(Image.fromarray(small).resize((width or size, size), Image.Resampling.BICUBIC))


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def encoded(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    Image.fromarray(array).save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


def png(values: np.ndarray, colour: int, bits: int = 16, width: int | None = None) -> bytes:
    """A PNG of `(H, W)` or `(H, W, C)`; colour type 0 grey, 2 RGB, 4 grey with alpha, 6 RGB with alpha."""
    kind = ">u2" if bits == 16 else "u1"
    rows = b"".join(b"\0" + row.astype(kind).tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width or values.shape[1], len(values), bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def empty_png(width: int, height: int) -> bytes:
    """A PNG that says it has so many grey pixels, all black; of a few hundred bytes even for many."""
    compressor = zlib.compressobj(9)
    row, parts = bytes(width + 1), []
    for _ in range(height):
        parts.append(compressor.compress(row))
    data = b"".join([*parts, compressor.flush()])
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    )


def tiff(data: bytes, shape: tuple[int, int], bits: int = 16, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A grey TIFF, little endian, one strip; photometric 0: white is 0; sample format 1 unsigned, 2 signed, 3 float."""
    height, width = shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height, 279: len(data),
            339: sample_format}  # fmt: skip
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + data


def packed_12_bits(values: np.ndarray) -> bytes:
    """Two numbers in three bytes, high bits first."""
    pairs = values.reshape(-1, 2).astype(int)
    return bytes(b for x, y in pairs for b in (x >> 4, (x & 15) << 4 | y >> 8, y & 255))


def shard(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    """A tar of files by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def mfm(*arguments: object) -> tuple[int, str]:
    """Status and message of `mfm ARGUMENTS`, with what was logged; a traceback is no message, and raises."""
    heard, stderr = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger().addHandler(handler)
    status = 0
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.INFO)
    try:
        with contextlib.redirect_stderr(stderr):
            main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        stderr.write(stop.code if isinstance(stop.code, str) else "")
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(level)
    return status or 0, heard.getvalue() + stderr.getvalue()


def refused(said: tuple[int, str], *parts: str) -> str:
    """The one-line message of a command that failed, in which all parts must be."""
    status, text = said
    assert status not in (0, None), text
    message, *rest = text[text.index("mfm: ") :].strip().splitlines()
    assert [line for line in rest if not line.startswith("  raised at ")] == [], text  # that is a test's own patch
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    return message


def prepare(made: Path, source: Path | str, output: Path, *more: object, size: int = 16) -> tuple[int, str]:
    """`mfm prepare-latents`, small, with the VAE of the fixture `made`."""
    sizes = ["--image-size", size, "--shard-size", 8, "--batch-size", 4, "--threads", 1, "--device", "cpu"]
    return mfm("prepare-latents", "--input", source, "--output", output, "--vae", made / "vae", *sizes, *more)


def moments(folder: Path) -> dict[str, tuple[int, np.ndarray]]:
    """Label and moments of each key of a folder of shards, by tarfile and numpy alone."""
    found: dict[str, list] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, kind = member.name.rsplit(".", 1)
                content = tar.extractfile(member).read()
                found.setdefault(key, [0, None])[kind == "npy"] = (
                    np.load(io.BytesIO(content)) if kind == "npy" else int(content)
                )
    assert len(found) == LatentIndex.load(folder).samples
    return {key: (label, array) for key, (label, array) in found.items()}


def brightness(folder: Path, capsys) -> dict[str, float]:
    """What `mfm rewards --score brightness` prints, by file name."""
    capsys.readouterr()
    status, said = mfm("rewards", "--score", "brightness", "--images", folder, "--device", "cpu")
    assert status == 0, said
    return {m[1]: float(m[2]) for m in re.finditer(r"(\w+)\.\w+\s*[│|]\s*([\d.e-]+)", capsys.readouterr().out)}
