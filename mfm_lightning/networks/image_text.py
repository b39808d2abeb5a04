"""A small CLIP to train on captioned images of one's own, for rewards that read prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mfm_lightning.utils.configs import find_shipped

FOLDER = "clip"


class ImageTextEncoder(nn.Module):
    """transformers' `CLIPModel` by its sizes: images `(B, 3, size, size)` in [0, 1] and texts to unit vectors.

    Args:
        tokenizer: folder of a CLIP tokenizer (`vocab.json`, `merges.txt`); its `model_max_length` is that of texts.
        size: of the images.
        patch_size: of the vision transformer.
        width: of both transformers; heads have 32 channels.
        depth: of both.
        projection: dimension of the vectors.

    Raises:
        ImportError: without transformers.
        FileNotFoundError: if there is no tokenizer.
        ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        tokenizer: str,
        size: int = 32,
        patch_size: int = 4,
        width: int = 96,
        depth: int = 4,
        projection: int = 64,
    ) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise ImportError("a CLIP needs transformers: pip install 'mfm-lightning[text-to-image]'") from error
        if size % patch_size or width % 32:
            raise ValueError(f"size {size} must be a multiple of patch_size {patch_size}, and width {width} one of 32")
        self.config = {
            "tokenizer": tokenizer, "size": size, "patch_size": patch_size, "width": width, "depth": depth,
            "projection": projection,
        }  # fmt: skip
        self.size, self.folder = size, find_shipped(tokenizer)
        if not (self.folder / "vocab.json").is_file():
            raise FileNotFoundError(f"no CLIP tokenizer at {tokenizer}: expected a folder with vocab.json, merges.txt")
        self.tokens: Any = transformers.CLIPTokenizerFast.from_pretrained(str(self.folder))
        common: dict[str, Any] = {
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth,
            "num_attention_heads": width // 32, "projection_dim": projection,
        }  # fmt: skip
        text = transformers.CLIPTextConfig(
            vocab_size=len(self.tokens), max_position_embeddings=self.tokens.model_max_length,
            bos_token_id=self.tokens.bos_token_id, eos_token_id=self.tokens.eos_token_id,
            pad_token_id=self.tokens.pad_token_id, **common,
        )  # fmt: skip
        vision = transformers.CLIPVisionConfig(image_size=size, patch_size=patch_size, **common)
        self.clip: Any = transformers.CLIPModel(
            transformers.CLIPConfig.from_text_vision_configs(text, vision, projection_dim=projection)
        )

    def images(self, images: Tensor) -> Tensor:
        """Unit vectors `(B, projection)` of images in [0, 1]."""
        return F.normalize(self.clip.get_image_features(pixel_values=2 * images - 1), dim=1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors `(B, projection)` of texts; longer ones are cut off."""
        found = self.tokens(list(texts), padding="max_length", truncation=True, return_tensors="pt").to(
            self.clip.device
        )
        return F.normalize(self.clip.get_text_features(**found), dim=1)

    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Logits `(B, T)` of each image and text: cosines times the temperature."""
        return self.clip.logit_scale.exp() * self.images(images) @ self.texts(texts).T

    def write_beside(self, folder: Path) -> Path:
        """Write it as transformers and `clip_score` read it, to `clip` in a folder."""
        place = folder / FOLDER
        self.clip.save_pretrained(place)
        for file in filter(Path.is_file, self.folder.iterdir()):
            shutil.copy(file, place / file.name)
        said = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": self.size, "crop_size": self.size}
        (place / "preprocessor_config.json").write_text(json.dumps(said, indent=1) + "\n")
        return place
