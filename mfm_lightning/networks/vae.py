"""The VAE of latent models, diffusers' AutoencoderKL (also AutoencoderDC, for encoding): read in full, or refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mfm_rewards.weights import CheckpointError

log = logging.getLogger(__name__)
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"


class VAE(Protocol):
    """What is used of diffusers' AutoencoderKL, whose own types do not say it."""

    config: Mapping[str, Any]

    def to(self, device: torch.device) -> VAE: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def enable_tiling(self) -> None: ...

    def encode(self, x: Tensor) -> Any:
        """Its `latent_dist` has `mean` and `std` `(B, C, h, w)`; of an AutoencoderDC `latent` is all there is."""

    def decode(self, z: Tensor) -> Any:
        """Its `sample` is `(B, 3, H, W)` in [-1, 1]."""


@dataclass(frozen=True)
class LatentSpace:
    """What the states of a VAE are: x = (z - shift) scale of the latents z that it gives.

    Args:
        channels: of a latent.
        factor: pixels a latent, along each side.
        scale: of its config.
        shift: of its config; 0 where it has none, as SD's.
    """

    channels: int
    factor: int
    scale: float
    shift: float = 0.0

    @classmethod
    def of(cls, vae: VAE) -> LatentSpace:
        """Of an AutoencoderKL or AutoencoderDC.

        Raises:
            ValueError: for another class, or latents that are scaled by channel.
        """
        config, kind = vae.config, type(vae).__name__
        blocks = next((n for n in ("block_out_channels", "encoder_block_out_channels") if n in config), None)
        if blocks is None or "latent_channels" not in config:
            raise ValueError(f"a VAE of class {kind}: images are encoded by an AutoencoderKL or AutoencoderDC alone")
        _check_unscaled(config, f"the {kind}")
        return cls(int(config["latent_channels"]), 2 ** (len(config[blocks]) - 1), *scale_and_shift(vae))

    def states(self, z: Tensor) -> Tensor:
        """Of latents z."""
        return (z - self.shift) * self.scale


def scale_and_shift(vae: VAE) -> tuple[float, float]:
    """Of the VAE's config: states are (z - shift) scale of its latents z."""
    return float(vae.config["scaling_factor"]), float(vae.config.get("shift_factor") or 0.0)


def moments(vae: VAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `(B, C, h, w)` of the latents of images `(B, 3, H, W)` in [-1, 1]; the latter is zero
    where the encoder draws nothing (AutoencoderDC)."""
    found = vae.encode(x)
    if hasattr(found, "latent_dist"):
        return found.latent_dist.mean, found.latent_dist.std
    return found.latent, torch.zeros_like(found.latent)


def load_vae(path: str, allow_download: bool = False) -> VAE:
    """A frozen AutoencoderKL in float32, from a folder (also that of a pipeline, with `vae` in it) or by a Hugging Face
    id. What diffusers would make up, it says or refuses: weights that are not in the file, a scale that the config does
    not give.

    Raises:
        FileNotFoundError: if it is not there, and may not be fetched.
        ImportError: without the extra `imagenet`.
        CheckpointError: if the folder holds something else, or not all of it; if its latents are scaled by channel.
    """
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise ImportError("a VAE needs diffusers: pip install 'mfm-lightning[imagenet]'") from error
    folder = Path(path)
    if folder.is_dir() and not (folder / CONFIG).is_file() and (folder / "vae" / CONFIG).is_file():
        folder = folder / "vae"
        log.info("VAE: %s, of the pipeline in %s", folder, path)
    options: dict[str, Any] = {"local_files_only": not allow_download, "output_loading_info": True}
    if folder.is_dir():
        options["variant"] = _variant(folder)
    try:
        loaded: Any = AutoencoderKL.from_pretrained(str(folder), **options)
        vae, found = loaded
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if folder.is_dir() and (folder / CONFIG).is_file():
            raise CheckpointError(f"the VAE in {folder} cannot be read: {reason[:300]}") from error
        raise FileNotFoundError(
            f"no VAE at {path}: give a folder with {CONFIG} and {WEIGHTS}.safetensors, or a Hugging Face id and allow "
            "the download (allow_download: true, --allow-download)"
        ) from error
    _check(vae, found, path)
    return vae.eval().requires_grad_(False)


def _variant(folder: Path) -> str | None:
    """The variant of the weights that a folder has, such as "fp16", where it has no others; raises FileNotFoundError
    where it has none."""
    names = sorted(p.name for p in folder.glob(f"{WEIGHTS}*") if p.suffix in (".safetensors", ".bin"))
    whole = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin")
    if any(name in whole for name in names) or any((folder / f"{name}.index.json").is_file() for name in whole):
        return None
    if not names:
        raise FileNotFoundError(f"no VAE at {folder}: {CONFIG} and {WEIGHTS}.safetensors are not both there")
    variants = sorted({name.removeprefix(f"{WEIGHTS}.").rpartition(".")[0] for name in names})
    if len(variants) > 1:
        raise CheckpointError(f"the VAE in {folder} is there as {' and '.join(variants)}: keep the file that is wanted")
    log.info("%s: %s is taken, for there is no other", folder, names[0])
    return variants[0]


def _check(vae: Any, found: Mapping[str, Any], path: str) -> None:
    """Refuse what is not the VAE that its files say, and say what is a guess."""
    check_weights(vae, found, f"VAE {path}", "AutoencoderKL's")
    _check_unscaled(vae.config, f"the VAE {path}")
    if "scaling_factor" in vae.config.get("_use_default_values", ()):
        log.warning(
            "VAE %s: its %s gives no scaling_factor, %s is taken (that of SD; SDXL's is 0.13025): scale says another",
            path,
            CONFIG,
            vae.config["scaling_factor"],
        )


def check_weights(network: Any, found: Mapping[str, Any], what: str, kind: str) -> None:
    """Refuse weights that are missing or not finite, by what diffusers tells of its loading; say which it left out.

    Args:
        what: it is, with its path, for messages.
        kind: whose the weights would be.
    """
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(f"the {what}: {len(missing)} weights are not in its file, first {missing[0]}")
    if others := sorted(found["unexpected_keys"]):
        log.warning("%s: %d weights are no %s and left out, first %s", what, len(others), kind, others[0])
    broken = next((name for name, p in network.state_dict().items() if not torch.isfinite(p).all()), None)
    if broken is not None:
        raise CheckpointError(f"the {what} holds numbers that are not finite, first in {broken}")


def _check_unscaled(config: Mapping[str, Any], what: str) -> None:
    for name in ("latents_mean", "latents_std"):
        if value := config.get(name):
            raise CheckpointError(
                f"{what} has {name} {value} in its {CONFIG}: only one scale and one shift of all channels are known"
            )
