"""Images of photographs' size from small latents, with no training: a flow of Gaussian latents, and a decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import expand
from mfm_lightning.networks import Decoder, VelocityNetwork

SHAPE = (4, 7, 7)


class GaussianLatents(VelocityNetwork):
    """The exact Meta Flow Map of latents x1 ~ N(0, 1), plus a `shift` of zeros that can be trained.

    p(x1 | x_t) is N(m, d^2) with m = t x_t / a, d = (1-t) / a^(1/2), a = t^2 + (1-t)^2; the inner flow goes through
    N(s m, k_s^2) with k_s^2 = (1-s)^2 + (s d)^2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config, self.state_shape, self.num_classes, self.guidance_scales = {}, SHAPE, 0, ()
        self.shift = nn.Parameter(torch.zeros(SHAPE))

    def forward(self, s: Tensor, u: Tensor, x: Tensor, t: Tensor, x_t: Tensor, conditions: Conditions) -> Tensor:
        s, u, t = (expand(time, x) for time in (s, u, t))
        a = t**2 + (1 - t) ** 2
        m, d = t * x_t / a, (1 - t) / a.sqrt()
        k_s, k_u = (((1 - w) ** 2 + (w * d) ** 2).sqrt().clamp_min(1e-6) for w in (s, u))
        along = m + (s * d**2 - (1 - s)) / k_s**2 * (x - s * m)
        step = torch.where(u - s > 1e-4, u - s, 1.0)
        return torch.where(u - s > 1e-4, (u * m + k_u / k_s * (x - s * m) - x) / step, along) + self.shift


class LargeDecoder(Decoder):
    """Latents `(B, 4, 7, 7)` to smooth images `(B, 3, 224, 224)` in [0, 1]; the same random weights each time."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, states: Tensor) -> Tensor:
        images = F.interpolate(self.layers(2 * states), (224, 224), mode="bicubic")
        return torch.sigmoid(4 * images)
