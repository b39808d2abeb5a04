"""What the small commands on steering share: the MNIST model of the package, three rewards, noise, and how samples are
judged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_benchmarks.quality import ClassifierQuality
from mfm_lightning.alignment.target import Target
from mfm_lightning.checkpoints import load_model
from mfm_lightning.metrics.frechet import frechet_of_features
from mfm_lightning.metrics.measured import Measured, resampled
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import PixelDecoder
from mfm_rewards import build

REWARDS: dict[str, tuple[dict[str, object], float]] = {  # and the scale of each
    "brightness": ({"name": "brightness"}, 150.0),
    "symmetry": ({"name": "symmetry"}, 1500.0),
    "odd classes": ({"name": "class_mixture", "classifier": "mnist", "weights": [0, 1, 0, 1, 0, 2, 0, 2, 0, 4]}, 1.0),
}


@dataclass
class Judged:
    """Samples' rewards `(B,)`, without the scale, features `(B, F)`, and their Fréchet distance to real images."""

    rewards: Tensor
    features: Tensor
    distance: Measured


@dataclass
class MnistSteering:
    """The model, the features, and noise `(B, 1, 28, 28)`, the same each time."""

    model: MetaFlowMap
    quality: ClassifierQuality
    noise: Tensor

    @classmethod
    def prepared(cls, samples: int, device: torch.device) -> MnistSteering:
        """Of so many samples."""
        model = load_model("mnist").to(device).eval().requires_grad_(False)
        quality = ClassifierQuality(classifier="mnist/features", reference="mnist/real_features")
        quality.prepare(device)
        noise = torch.randn(samples, *model.state_shape, generator=torch.Generator().manual_seed(0))
        return cls(model, quality, noise.to(device))

    def target(self, reward: str) -> Target:
        """To one of `REWARDS`."""
        spec, scale = REWARDS[reward]
        return Target(self.model, build(dict(spec)).to(self.noise.device), PixelDecoder(), reward_scale=scale)

    @torch.no_grad()
    def judge(self, target: Target, states: Tensor) -> Judged:
        """Of states `(B, 1, 28, 28)`."""
        features = self.quality.features(target.decoder(states))
        distance = resampled(frechet_of_features, features, self.quality.gaussian)
        return Judged(target.plain_rewards(states).cpu(), features, distance)
