"""FLUX.1-dev as a plain two-time flow map, by a LoRA: the public one of Weighted Diamond Maps, or one of its form.

The form, as the released code of Weighted Diamond Maps reads it (github.com/PeterHolderrieth/diamond_maps): diffusers'
`pytorch_lora_weights.safetensors`, tensors `transformer.MODULE.lora_A.weight` `(rank, in)` and `lora_B.weight`
`(out, rank)`, for a transformer whose `time_text_embed` is two copies of itself, `original_embedder` for the time where
the map starts and `second_embedder` for that where it ends; their outputs are averaged. The transformer then gives the
average velocity along sigma between both times.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mfm_lightning.backbones.flux import FluxFlow
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import Times, as_times, expand
from mfm_rewards.weights import CheckpointError

PREFIX, SECOND = "transformer.", "time_text_embed.second_embedder."
SETTINGS = "lora_adapter_metadata"  # in a file's header, as diffusers' save_lora_weights writes it


class FluxFlowMap(FluxFlow):
    """The flow map X_{s,u} of a `FluxPipeline` with a LoRA for two times; its drift is the map's own, at u = s.

    It is a plain flow map: `FlowMapGradient`, `TrajectoryTilting`, `NoiseOptimisation` and the Diamond estimators run
    on it. Guidance is as of `FluxFlow`; the public LoRA was used with guidance 1.

    Args:
        lora: the `.safetensors` file.
        true_guidance: scale of guidance by two evaluations; 1 for none.
        options: as `TextToImageFlow`.

    Raises:
        CheckpointError: for a file that is no LoRA of this transformer, or trains no second time.
        ImportError: without peft, by which diffusers loads LoRAs.
    """

    def __init__(self, pipe: Any, *, lora: str | Path, true_guidance: float = 1.0, **options: Any) -> None:
        if type(pipe).__name__ == self.pipeline:  # any other is refused below
            add_second_time(pipe.transformer, lora)
        super().__init__(pipe, true_guidance=true_guidance, **options)

    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        t = as_times(t, x)
        return self.evaluated(torch.stack([t, t], dim=-1), x, conditions)

    def base_flow_map(self, s: Times, u: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        """X_{s,u}(x) `(B, C, h, w)` in float32, by one evaluation; raises as `drift`.

        Args:
            s: where x is, `(B,)` in [0, 1], or a number.
            u: where it is taken to, likewise, not below s.
            x: latents `(B, C, h, w)`.
            conditions: of `encode`, a row for each state or one for all.
        """
        s, u = as_times(s, x), as_times(u, x)
        velocity = self.evaluated(torch.stack([s, u], dim=-1), x, conditions)
        return x.float() + expand(u - s, x) * velocity


class TwoTimeEmbedder(nn.Module):
    """FLUX's embedder of time, guidance and pooled text, for a pair of times `(B, 2)`: the mean of two copies of it.

    Its parts are named as in the files.
    """

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.original_embedder, self.second_embedder = embedder, copy.deepcopy(embedder)

    def forward(self, timestep: Tensor, *others: Tensor) -> Tensor:
        """`(B, D)`."""
        start, end = timestep.unbind(dim=-1)
        return (self.original_embedder(start, *others) + self.second_embedder(end, *others)) / 2


def add_second_time(transformer: Any, lora: str | Path) -> None:
    """Give a `FluxTransformer2DModel` the second time and the LoRA of a file, in place.

    Raises:
        CheckpointError, ImportError: as `FluxFlowMap`.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{lora}: peft is missing: pip install 'mfm-lightning[peft]'") from error
    try:
        with safe_open(lora, "pt") as file:
            tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # what safetensors raises is an exception of its own
        raise CheckpointError(f"{lora} cannot be read: {str(error).splitlines()[0][:200]}") from error
    asked = [name for name in tensors if not name.startswith(PREFIX) or ".lora_" not in name]
    if asked or not tensors:
        raise CheckpointError(
            f"{lora} is no LoRA of a transformer: expected {PREFIX}MODULE.lora_A.weight, got "
            f"{asked[0] if asked else 'nothing'}"
        )
    modules = {name.removeprefix(PREFIX).split(".lora_")[0] for name in tensors}
    if not any(name.startswith(SECOND) for name in modules):
        raise CheckpointError(f"{lora} trains no second time: it has no {PREFIX}{SECOND}..., so it is no flow map")
    settings = _settings(lora, header)
    plain = transformer.time_text_embed
    transformer.time_text_embed = TwoTimeEmbedder(plain)
    try:
        _add_lora(transformer, f"{lora}", tensors, modules, settings)
    except BaseException:
        transformer.time_text_embed = plain  # as it was
        raise


def _settings(lora: str | Path, header: Mapping[str, str]) -> dict[str, Any] | None:
    """What a file's header says of the transformer's LoRA, such as its `lora_alpha`; None where it says nothing, and
    alpha is the rank. diffusers writes it there, and does not read it where it is given tensors."""
    if SETTINGS not in header:
        return None
    try:
        said = json.loads(header[SETTINGS])
        return said if any(name.startswith(PREFIX) for name in said) else None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{lora}: {SETTINGS} in its header is no JSON object: {error}") from error


def _add_lora(
    transformer: Any, lora: str, tensors: dict[str, Tensor], modules: set[str], settings: dict[str, Any] | None
) -> None:
    there = dict(transformer.named_modules())
    if unknown := sorted(name for name in modules if not isinstance(there.get(name), nn.Linear)):
        raise CheckpointError(f"{lora} is for another transformer, or another form of two times: no {unknown[0]} here")
    for name in sorted(modules):
        _check_shapes(lora, name, there[name], tensors)
    try:
        transformer.load_lora_adapter(
            dict(tensors), prefix=PREFIX.rstrip("."), adapter_name="flow_map", metadata=settings
        )
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{lora}: diffusers does not take it: {str(error).splitlines()[0][:200]}") from error
    loaded = {name.split(".lora_A.")[0] for name, _ in transformer.named_parameters() if ".lora_A." in name}
    if loaded != modules:
        raise CheckpointError(f"{lora}: diffusers took {len(loaded)} of its {len(modules)} modules")


def _check_shapes(file: str, name: str, layer: Any, tensors: dict[str, Tensor]) -> None:
    down, up = (tensors.get(f"{PREFIX}{name}.lora_{part}.weight") for part in "AB")
    if down is None or up is None or down.dim() != 2 or up.dim() != 2:
        raise CheckpointError(f"{file}: {name} needs lora_A.weight (rank, in) and lora_B.weight (out, rank)")
    if (up.shape[0], down.shape[1]) != (layer.out_features, layer.in_features) or up.shape[1] != down.shape[0]:
        raise CheckpointError(
            f"{file}: {name} has lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}, for a layer of "
            f"{layer.in_features} inputs and {layer.out_features} outputs"
        )
