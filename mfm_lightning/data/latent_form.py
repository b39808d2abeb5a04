"""Latents of other tools to states: what their arrays hold, and how they are scaled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mfm_lightning.utils.distributed import is_first_rank

log = logging.getLogger(__name__)
Holds = Literal["latent", "mean_std", "mean_logvar"]
MOMENTS = "mean-std"  # in names of files that hold both
HOLDS = ("latent", "mean_std", "mean_logvar")


@dataclass(frozen=True)
class LatentForm:
    """x = (z - shift) scale, where z is the latent, or mean + std noise.

    Args:
        holds: "latent" `(C, H, W)`; or its posterior's moments "mean_std" or "mean_logvar", `(2C, H, W)` or
            `(2, C, H, W)`, the mean first.
        scale: a number, or one for each channel.
        shift: a number, or one for each channel; taken away before the scale.
        stored_shape: of an array.

    Raises:
        ValueError: for an unknown `holds`, an array that cannot hold it, or other numbers of channels.
    """

    holds: Holds
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    stored_shape: tuple[int, ...]

    @classmethod
    def of(
        cls,
        array: np.ndarray | Tensor,
        place: str,
        holds: Holds | None,
        scale: float | Sequence[float],
        shift: float | Sequence[float] = 0.0,
    ) -> LatentForm:
        """Of arrays like this one; raises as the class and `check`, naming its place.

        Args:
            holds: None: latents, which is said where they could be moments, too: of an even number of channels.

        Raises:
            ValueError: also without `holds`, for a file whose name says mean and deviation, as EDM2's and REPA's do.
        """
        if holds is None and MOMENTS in place.rpartition("/")[2]:
            raise ValueError(f"{place}: its name says mean and deviation: set holds: mean_std (or what else it holds)")
        form = cls(holds or "latent", _numbers(scale), _numbers(shift), tuple(array.shape))
        try:
            form._check()
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        form.check(array, place)
        if holds is None and is_first_rank() and (channels := form.stored_shape[0]) % 2 == 0:
            log.warning(
                "%s: arrays %s are taken for latents of %d channels (holds: latent); if they are moments of %d "
                "channels, set holds: mean_std, or mean_logvar", place, form.stored_shape, channels, channels // 2,
            )  # fmt: skip
        return form

    @property
    def state_shape(self) -> tuple[int, ...]:
        """`(C, H, W)`."""
        if self.holds == "latent":
            return self.stored_shape
        if len(self.stored_shape) == 4:
            return self.stored_shape[1:]
        return self.stored_shape[0] // 2, *self.stored_shape[1:]

    def _check(self) -> None:
        check_holds(self.holds)
        shape, moments = self.stored_shape, self.holds != "latent"
        fits = len(shape) == 3 and (not moments or shape[0] % 2 == 0)
        fits = fits or (moments and len(shape) == 4 and shape[0] == 2)
        if not fits:
            wanted = "(2C, H, W) or (2, C, H, W)" if moments else "(C, H, W)"
            raise ValueError(f"an array {shape}, expected {wanted} for holds: {self.holds}")
        for name, values in (("scale", self.scale), ("shift", self.shift)):
            if len(values) not in (1, self.state_shape[0]):
                raise ValueError(f"{name} has {len(values)} numbers, latents {self.state_shape[0]} channels")
            if not np.isfinite(values).all() or (name == "scale" and 0.0 in values):
                raise ValueError(f"{name} {list(values)}: expected finite numbers" + ", not 0" * (name == "scale"))

    def states(self, arrays: Tensor, noise: torch.Generator) -> Tensor:
        """Stored arrays `(B, *stored_shape)` to states `(B, C, H, W)` float32.

        Args:
            noise: what is drawn with, where they are moments.
        """
        arrays = arrays.float()
        if self.holds != "latent":
            mean, std = arrays.reshape(len(arrays), 2, *self.state_shape).unbind(1)
            if self.holds == "mean_logvar":
                std = (0.5 * std.clamp(-30.0, 20.0)).exp()  # clamped as diffusers' DiagonalGaussianDistribution
            arrays = mean + std * torch.randn(mean.shape, generator=noise)
        scale, shift = (torch.tensor(values).reshape(-1, 1, 1) for values in (self.scale, self.shift))
        return (arrays - shift) * scale

    def check(self, array: np.ndarray | Tensor, place: str) -> None:
        """Raise ValueError, naming the place, unless an array has this shape and finite floats."""
        try:
            given = torch.as_tensor(array)
        except (TypeError, ValueError) as error:  # texts, dates and other kinds that torch does not have
            raise ValueError(f"{place} has {array.dtype}, expected floats") from error
        if not given.is_floating_point():
            raise ValueError(f"{place} has {given.dtype}, expected floats: float16, bfloat16, float32 or float64")
        if tuple(given.shape) != self.stored_shape:
            raise ValueError(
                f"{place} has {given.dtype} {tuple(given.shape)}, expected floats {self.stored_shape} as of the first"
            )
        if not torch.isfinite(given).all():
            raise ValueError(f"{place} has numbers that are not finite")
        if self.holds == "mean_std" and bool((given.reshape(2, -1)[1] < 0).any()):
            raise ValueError(f"{place} has deviations below 0: are they logarithms (holds: mean_logvar)?")


def native(array: np.ndarray) -> np.ndarray:
    """The array in this machine's order of bytes, the one that torch takes.

    Raises:
        ValueError: for what `np.load` gives of an `.npz`.
    """
    if not isinstance(array, np.ndarray):
        raise ValueError("it is an .npz, an archive of arrays; expected one array")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def check_holds(holds: str) -> None:
    """Raise ValueError for what is none of `HOLDS`."""
    if holds not in HOLDS:
        raise ValueError(f"holds {holds!r}: expected one of {', '.join(HOLDS)}")


def _numbers(given: float | Sequence[float]) -> tuple[float, ...]:
    return (float(given),) if isinstance(given, int | float) else tuple(float(value) for value in given)
