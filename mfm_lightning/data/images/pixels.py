"""Images to states: one size, one number of channels, numbers in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mfm_lightning.data.images.source import LabelledImages
from mfm_lightning.utils.decoding import ImageError, cropped


class OtherForm(ImageError):
    """An image that could be decoded, and is not as the settings say: no damage, so it is raised with `corrupt: skip`,
    too."""


@dataclass(frozen=True)
class PixelForm:
    """What all images are made to be.

    Args:
        size: height and width.
        channels: 1 (grey) or 3 (colour).
        given_size: whether the size was asked for; else images of another size are refused.
        given_channels: whether the channels were asked for; else images with others are refused.
    """

    size: int
    channels: int
    given_size: bool
    given_channels: bool

    @classmethod
    def of(cls, source: LabelledImages, size: int | None, channels: int | None, first: int = 0) -> PixelForm:
        """Where they are not given, those of the image `first`.

        Raises:
            ValueError: if it is not square, and no size is given; as `LabelledImages.image`.
        """
        if size is not None and channels is not None:
            return cls(size, channels, True, True)
        return cls.of_image(source.image(first), source.place(first), size, channels)

    @classmethod
    def of_image(cls, first: Image.Image, place: str, size: int | None, channels: int | None) -> PixelForm:
        """Where they are not given, those of this image; raises as `of`."""
        if size is None and first.width != first.height:
            raise ValueError(f"{place} has {first.width} x {first.height} pixels: give a size to cut it to")
        return cls(size or first.width, channels or len(first.getbands()), size is not None, channels is not None)

    def read(self, source: LabelledImages, i: int) -> np.ndarray:
        """The image i by `pixels`; raises as that and `LabelledImages.image`."""
        return self.pixels(source.image(i), source.place(i))

    def pixels(self, image: Image.Image, place: str) -> np.ndarray:
        """An image as `(channels, size, size)` uint8: `cropped`, grey levels by ITU-R 601.

        Args:
            place: of the image, for messages.

        Raises:
            OtherForm: if it is not of the size or the colour of the first one.
            ImageError: if it cannot be cut.
        """
        wanted = (self.size, self.size)
        if not self.given_size and image.size != wanted:
            raise OtherForm(
                f"{place} has {image.width} x {image.height} pixels, the first {self.size} x {self.size}: "
                "give a size to cut all to"
            )
        if not self.given_channels and self.channels == 1 and image.mode != "L":
            raise OtherForm(f"{place} is in colour, the first image is grey: give channels, 1 or 3")
        if image.size != wanted:
            image = Image.fromarray(cropped(image, self.size, place))
        pixels = np.asarray(image.convert("L" if self.channels == 1 else "RGB"))
        return pixels[None] if self.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def to_states(pixels: Tensor) -> Tensor:
    """Bytes to float32 in [-1, 1]."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_images(x: Tensor) -> Tensor:
    """States in [-1, 1] to images in [0, 1]."""
    return (x.float() / 2 + 0.5).clamp(0, 1)
