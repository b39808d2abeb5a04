"""FID's Inception network: torch-fidelity's, with weights from a file."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from mfm_lightning.checkpoints import CheckpointError, load_state_dict
from mfm_lightning.utils.images import to_uint8

log = logging.getLogger(__name__)
FEATURES = (64, 192, 768, 2048)
LOGITS = "logits_unbiased"  # what torch-fidelity computes the Inception score from


class Inception(nn.Module):
    """Features, and logits, of images by the network that FID is defined with (TensorFlow's Inception of 2015, in
    torch-fidelity's port, with its resizing). It stays in evaluation mode.

    Args:
        weights: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, or the same tensors as `.safetensors`.
        num_features: 2048 for FID; 768, 192 or 64 are earlier layers', for small sets of images.
        logits: compute them, too.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it does not hold this network's weights.
        ImportError: without torch-fidelity.
    """

    def __init__(self, weights: str | Path, num_features: int = 2048, logits: bool = False) -> None:
        super().__init__()
        if num_features not in FEATURES:
            raise ValueError(f"num_features {num_features}: expected one of {', '.join(map(str, FEATURES))}")
        network = _extractor()
        self.num_features, self.weights = num_features, Path(weights)
        # torch-fidelity unpickles whatever the file holds; what it gets here are tensors that were read safely
        torch.save(load_state_dict(weights), buffer := io.BytesIO())
        buffer.seek(0)
        layers = [str(num_features), *([LOGITS] if logits else [])]
        try:
            self.network = network("inception-v3-compat", layers, feature_extractor_weights_path=buffer)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:3]]
            raise CheckpointError(f"{weights} does not hold Inception's weights: {' '.join(lines)[:300]}") from error

    def train(self, mode: bool = True) -> Inception:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features `(B, F)` and logits `(B, 1008)` (None where not asked for) of images `(B, 1|3, H, W)`, float in
        [0, 1] or uint8."""
        features, *rest = self.network(to_uint8(images))
        return features, rest[0] if rest else None


def find_inception_weights(path: str | Path | None = None, allow_download: bool = False) -> Path:
    """The file of Inception's weights: the one given, or torch-fidelity's own, from where torch keeps downloads.

    Args:
        allow_download: fetch torch-fidelity's where it is not there.

    Raises:
        FileNotFoundError: if it is not there, with what was looked for.
    """
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no Inception weights at {path}: expected {_name()}, which torch-fidelity fetches (--allow-download)"
            )
        return Path(path)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / _name()
    if not cached.is_file():
        if not allow_download:
            raise FileNotFoundError(
                f"no Inception weights at {cached}: give {_name()} (weights, --weights), or let torch-fidelity fetch "
                "it (allow_download, --allow-download)"
            )
        log.info("fetching %s", _url())
        torch.hub.load_state_dict_from_url(_url(), check_hash=True, weights_only=True)
    return cached


def _extractor() -> type[nn.Module]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("FID needs torch-fidelity: pip install 'mfm-lightning[fid]'") from error
    return FeatureExtractorInceptionV3


def _url() -> str:
    _extractor()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return URL_INCEPTION_V3


def _name() -> str:
    return _url().rsplit("/", 1)[-1]
