"""Training of a VAE on images, whose latents a flow is then trained in."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfm_lightning.conditions import Conditions
from mfm_lightning.evaluation.base import all_test_batches, data_of, datamodule_of
from mfm_lightning.modules.base import TrainingModule
from mfm_lightning.modules.optimization import Optimization
from mfm_lightning.networks.autoencoder import Autoencoder

log = logging.getLogger(__name__)


class Autoencoding(TrainingModule):
    """Trains a VAE by squared error and a weak Kullback-Leibler term (Rombach et al., arXiv 2112.10752, without their
    adversarial and perceptual terms). Beside `model.safetensors` the run leaves `vae/`, a folder that diffusers,
    `mfm prepare-latents --vae`, `VAEDecoder` and pipelines read; its `scaling_factor` is one over the standard
    deviation of the test images' latents.

    Args:
        network: the VAE.
        kl_weight: of the Kullback-Leibler divergence to N(0, I), a mean over coordinates, beside the squared error of a
            pixel in [-1, 1].
        optimization: the optimiser and its learning rate.

    Raises:
        ValueError: for a weight below 0.
    """

    exported_kind = "autoencoder"

    def __init__(self, network: Autoencoder, kl_weight: float = 1e-4, optimization: Optimization | None = None) -> None:
        super().__init__(optimization)
        if kl_weight < 0:
            raise ValueError(f"kl_weight {kl_weight} must be at least 0")
        self.network, self.kl_weight, self.num_classes = network, kl_weight, 0

    @property
    def trained(self) -> Autoencoder:
        return self.network

    def setup(self, stage: str) -> None:
        shape = getattr(datamodule_of(self.trainer), "state_shape", None)
        if shape is None or len(shape) != 3 or shape[0] != self.network.channels:
            raise ValueError(
                f"data of shape {shape}, but the VAE takes images of {self.network.channels} channels (--data.channels)"
            )
        self.state_shape = tuple(shape)
        super().setup(stage)

    def losses(self, x1: Tensor, conditions: Conditions, training: bool) -> dict[str, Tensor]:
        again, mean, log_variance = self.network(x1)
        error = F.mse_loss(again, x1)
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
        return {"loss": error + self.kl_weight * divergence, "mse": error, "divergence": divergence}

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        raise ValueError("there is nothing to predict: the run's vae/ encodes and decodes")

    @torch.no_grad()
    def exported_part(self) -> str | None:
        return None

    def exported_metadata(self) -> dict[str, str]:
        """Sets the scale, by the latents of test images."""
        squares, total, number = 0.0, 0.0, 0
        with all_test_batches(data_of(self)) as batches:
            for x1, _ in batches:
                z = self.network.encode(x1.to(self.device)).double()
                squares, total, number = squares + float((z**2).sum()), total + float(z.sum()), number + z.numel()
                if number > 10_000_000:
                    break
        if not number:
            log.warning("no test images: the VAE's scaling_factor stays %g", float(self.network.scale))
            return {}
        variance = squares / number - (total / number) ** 2
        self.network.scale.fill_(variance**-0.5)
        return {"scaling_factor": f"{float(self.network.scale):.6g}"}
