"""The log-likelihood of a noisy linear measurement: the reward of inverse problems (paper, F.1).

The measurement may be any matrix, or one of the operators below on images: inpainting, super-resolution, blur, colour
removal, ray sums. Each is a function of the image; only ray sums form a matrix.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfm_rewards.protocol import Reward
from mfm_rewards.registry import register


@register("linear_gaussian")
class LinearGaussianLikelihood(Reward):
    """r(x1) = log N(y; A x1, noise_std^2 I), for any matrix A.

    Args:
        operator: A, `(M, D)` or `(D,)`; D is the number of values of one image (or state).
        observation: y, `(M,)` or a number.
        noise_std: standard deviation of the measurement noise, positive.
    """

    operator: Tensor
    observation: Tensor

    def __init__(
        self, operator: Tensor | Sequence[Any], observation: Tensor | float | Sequence[float], noise_std: float
    ) -> None:
        super().__init__()
        self.noise_std = _positive(noise_std)
        self.register_buffer("operator", torch.atleast_2d(torch.as_tensor(operator, dtype=torch.float32)))
        self.register_buffer("observation", torch.atleast_1d(torch.as_tensor(observation, dtype=torch.float32)))
        if len(self.operator) != len(self.observation):
            raise ValueError(f"{len(self.operator)} measurements but {len(self.observation)} observations")

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        if x.shape[1] != self.operator.shape[1]:
            raise ValueError(f"images of {x.shape[1]} values, but the operator takes {self.operator.shape[1]}")
        return _log_normal(self.observation.to(x) - x @ self.operator.to(x).T, self.noise_std)


class ImageMeasurement(Reward):
    """Base class of the likelihoods below: `measure` is the linear operator A.

    Args:
        observation: y, the measurement of one image: numbers, or the path of a `.pt` or `.safetensors` file (tensor
            "observation").
        noise_std: standard deviation of the measurement noise, positive.
    """

    observation: Tensor

    def __init__(self, observation: Tensor | Sequence[Any] | str, noise_std: float) -> None:
        super().__init__()
        self.noise_std = _positive(noise_std)
        self.register_buffer("observation", _tensor(observation))

    @abstractmethod
    def measure(self, images: Tensor) -> Tensor:
        """Measurements `(B, ...)` of images `(B, C, H, W)`."""

    def residuals(self, images: Tensor) -> Tensor:
        """y - A x `(B, M)` of images `(B, C, H, W)`.

        Raises:
            ValueError: for images whose measurement is not of the observation's shape.
        """
        measured = self.measure(images)
        if measured.shape[1:] != self.observation.shape:
            raise ValueError(
                f"the measurement of an image has shape {tuple(measured.shape[1:])}, the observation "
                f"{tuple(self.observation.shape)}"
            )
        return (self.observation.to(measured) - measured).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return _log_normal(self.residuals(images), self.noise_std)


@register("inpainting")
class Inpainting(ImageMeasurement):
    """Likelihood of the pixels that a mask shows.

    Args:
        observation: the measurement, `(C, H, W)`: numbers, or the path of a `.pt` or `.safetensors` file (tensor
            "observation").
        mask: `(H, W)` or `(C, H, W)` of ones (seen) and zeros, at least one of them one; numbers, or the path of a file
            as above (tensor "mask").
        noise_std: standard deviation of the measurement noise, positive.
    """

    mask: Tensor
    seen: Tensor

    def __init__(
        self, observation: Tensor | Sequence[Any] | str, mask: Tensor | Sequence[Any] | str, noise_std: float = 0.1
    ) -> None:
        super().__init__(observation, noise_std)
        self.register_buffer("mask", _tensor(mask, "mask"))
        if not ((self.mask == 0) | (self.mask == 1)).all() or not self.mask.any():
            raise ValueError("a mask must hold ones (seen) and zeros only, at least one of them a one")
        self.register_buffer("seen", self.mask.expand_as(self.observation).bool())
        self.observation = self.observation * self.mask

    def measure(self, images: Tensor) -> Tensor:
        return images * self.mask.to(images)

    def residuals(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.observation.shape:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}, observed {tuple(self.observation.shape)}")
        return (self.observation.to(images) - images)[:, self.seen]


@register("super_resolution")
class SuperResolution(ImageMeasurement):
    """Likelihood of the image averaged over blocks of `factor` x `factor` pixels.

    Args:
        observation: the measurement, `(C, H / factor, W / factor)`: numbers, or the path of a `.pt` or
            `.safetensors` file (tensor "observation").
        factor: side of the blocks in pixels, at least 1.
        noise_std: standard deviation of the measurement noise, positive.
    """

    def __init__(self, observation: Tensor | Sequence[Any] | str, factor: int, noise_std: float = 0.1) -> None:
        super().__init__(observation, noise_std)
        if factor < 1:
            raise ValueError(f"factor {factor} must be at least 1")
        self.factor = factor

    def measure(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, self.factor)


@register("blur")
class Blur(ImageMeasurement):
    """Likelihood of the image blurred by a Gaussian, edges replicated.

    Args:
        observation: the measurement, `(C, H, W)`: numbers, or the path of a `.pt` or `.safetensors` file (tensor
            "observation").
        blur_std: standard deviation of the Gaussian in pixels, positive.
        noise_std: standard deviation of the measurement noise, positive.
    """

    kernel: Tensor

    def __init__(self, observation: Tensor | Sequence[Any] | str, blur_std: float, noise_std: float = 0.1) -> None:
        super().__init__(observation, noise_std)
        radius = max(1, math.ceil(3 * _positive(blur_std)))
        kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / blur_std) ** 2)
        self.register_buffer("kernel", kernel / kernel.sum())

    def measure(self, images: Tensor) -> Tensor:
        channels, radius = images.shape[1], len(self.kernel) // 2
        kernel = self.kernel.to(images).expand(channels, 1, -1)
        padded = F.pad(images, (radius,) * 4, mode="replicate")
        with torch.autocast(images.device.type, enabled=False):  # a likelihood of small noise is lost in 16 bits
            rows = F.conv2d(padded, kernel[:, :, None, :], groups=channels)
            return F.conv2d(rows, kernel[:, :, :, None], groups=channels)


@register("colour_removal")
class ColourRemoval(ImageMeasurement):
    """Likelihood of the image's grey version, the mean over channels: colourisation as an inverse problem.

    Args:
        observation: the measurement, `(1, H, W)`: numbers, or the path of a `.pt` or `.safetensors` file (tensor
            "observation").
        noise_std: standard deviation of the measurement noise, positive.
    """

    def __init__(self, observation: Tensor | Sequence[Any] | str, noise_std: float = 0.1) -> None:
        super().__init__(observation, noise_std)

    def measure(self, images: Tensor) -> Tensor:
        return images.mean(dim=1, keepdim=True)


@register("ray_sums")
class RaySums(ImageMeasurement):
    """Likelihood of line integrals through the image: travel-time tomography between two boreholes, by straight rays.

    Sources are spread evenly over the left edge, receivers over the right one; a ray goes from each source to each
    receiver. Angles are limited: no ray is steeper than the image's diagonal. The integral is exact for pixels of
    constant value (Siddon, Medical Physics 12, 1985: lengths of a ray within each pixel), in heights of the image: a
    flat image of 1 has the ray's length.

    Args:
        observation: the measurement, `(C, sources, receivers)`: numbers, or the path of a `.pt` or `.safetensors` file
            (tensor "observation").
        noise_std: standard deviation of the measurement noise, positive.

    Raises:
        ValueError: for an observation of another number of dimensions.
    """

    def __init__(self, observation: Tensor | Sequence[Any] | str, noise_std: float = 0.1) -> None:
        super().__init__(observation, noise_std)
        if self.observation.dim() != 3:
            raise ValueError(
                f"observation of shape {tuple(self.observation.shape)}: expected (channels, sources, receivers)"
            )
        self._matrices: dict[tuple[int, int], Tensor] = {}

    def measure(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        sources, receivers = self.observation.shape[1:]
        if (height, width) not in self._matrices:
            self._matrices[height, width] = ray_lengths(height, width, sources, receivers)
        lengths = self._matrices[height, width].to(images)
        with torch.autocast(images.device.type, enabled=False):
            return (images.flatten(2) @ lengths.T).unflatten(2, (sources, receivers))


def ray_lengths(height: int, width: int, sources: int, receivers: int) -> Tensor:
    """Length of each ray within each pixel, `(sources * receivers, height * width)`, in heights of the image."""
    left, right = ((torch.arange(n, dtype=torch.float64) + 0.5) * height / n for n in (sources, receivers))
    begin = left.repeat_interleave(receivers)
    rise = right.repeat(sources) - begin  # over the width
    # where a ray crosses from pixel to pixel, as shares of its way: columns, and rows
    columns = torch.arange(width + 1, dtype=torch.float64).expand(len(rise), -1) / width
    steep = torch.where(rise == 0, torch.inf, rise)[:, None]
    rows = ((torch.arange(height + 1, dtype=torch.float64) - begin[:, None]) / steep).clamp(0, 1)
    crossings = torch.cat([columns, rows], dim=1).sort(dim=1).values
    shares, middle = crossings.diff(dim=1), (crossings[:, :-1] + crossings[:, 1:]) / 2
    column = (middle * width).long().clamp(0, width - 1)
    row = (begin[:, None] + middle * rise[:, None]).long().clamp(0, height - 1)
    lengths = torch.zeros(len(rise), height * width, dtype=torch.float64)
    lengths.scatter_add_(1, row * width + column, shares * (rise.square() + width**2).sqrt()[:, None] / height)
    return lengths.float()


def _log_normal(residual: Tensor, std: float) -> Tensor:
    constant = residual.shape[1] * math.log(std * math.sqrt(2 * math.pi))
    return -0.5 * (residual / std).square().sum(dim=1) - constant


def _positive(std: float) -> float:
    if not std > 0:
        raise ValueError(f"standard deviation {std} must be positive")
    return std


def _tensor(value: Tensor | Sequence[Any] | str, key: str = "observation") -> Tensor:
    if isinstance(value, str):
        if value.endswith(".safetensors"):
            from safetensors.torch import load_file

            value = load_file(value)[key]
        else:
            value = torch.load(value, map_location="cpu", weights_only=True)
    return torch.as_tensor(value, dtype=torch.float32)
