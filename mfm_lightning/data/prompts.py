"""What text-to-image samples start from: prompts and noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mfm_lightning.conditions import INDEX
from mfm_lightning.data.base import Share, trainer_of
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.sampling.prompt_folder import PromptImage
from mfm_lightning.sampling.prompts import as_prompts
from mfm_lightning.utils.digests import digest_of


class PromptsDataModule(L.LightningDataModule):
    """Batches `(x0 (B, *shape), {prompts, index (B,)})` for `mfm predict`: each prompt so many times, with noise that
    depends on the seed and the image's index alone; of a prompt with a seed of its own, on that and the image's number.

    Images that the run's folder has already are left out.

    Args:
        prompts: a file (`mfm_lightning.sampling.prompts.read_prompts`), the name of a set such as geneval, or texts.
        images_per_prompt: at least 1.
        batch_size: images aligned at once on each device.
        seed: of the noise.
        column: of the file, that has the texts.

    Raises:
        FileNotFoundError, ValueError: as `read_prompts`; for a number below 1.
    """

    def __init__(
        self,
        prompts: str | list[str],
        images_per_prompt: int = 1,
        batch_size: int = 8,
        seed: int = 0,
        column: str = "prompt",
    ) -> None:
        super().__init__()
        if images_per_prompt < 1 or batch_size < 1:
            raise ValueError(
                f"images_per_prompt ({images_per_prompt}) and batch_size ({batch_size}) must be at least 1"
            )
        self.prompts = as_prompts(prompts, column)
        self.images_per_prompt, self.batch_size, self.seed = images_per_prompt, batch_size, seed

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The number of prompts and the SHA-256 of them all."""
        return {"prompts": len(self.prompts), "sha256": digest_of([prompt.text for prompt in self.prompts])}

    def predict_dataloader(self) -> DataLoader:
        module: Any = trainer_of(self).lightning_module
        if not hasattr(module, "images"):
            raise ValueError(f"prompts are for PromptAlignment, not for a {type(module).__name__}")
        samples = PromptNoise(module.images, module.state_shape, self.seed)
        return DataLoader(samples, batch_size=self.batch_size, sampler=Share(samples, module.share(len(samples))))


class PromptNoise(Dataset):
    """Noise, prompt and index of images.

    Args:
        images: which.
        state_shape: of the noise.
        seed: of images whose prompt has none.
    """

    def __init__(self, images: Sequence[PromptImage], state_shape: Sequence[int], seed: int) -> None:
        self.images, self.state_shape, self.seed = list(images), tuple(state_shape), seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Any]]:
        image = self.images[i]
        seed, number = image.noise_key(self.seed)
        (generator,) = sample_generators(seed, [number])
        x0 = torch.randn(self.state_shape, generator=generator)
        return x0, {"prompts": image.prompt.text, INDEX: image.index}
