"""What training an adapter on a text-to-image flow will need of a GPU, without its weights: a Meta Flow Map
(`MFMPretraining` of a `FlowAdapter`), or a LoRA (`PromptFinetuning`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.alignment.posteriors import FlowMapPosterior, Posterior
from mfm_lightning.backbones import AdaptedFlow, FlowAdapter, LoRANetwork, TextToImageFlow
from mfm_lightning.backbones.loading import opening
from mfm_lightning.commands.flow_planning import MeasuredTarget, conditions_of_sizes, flow_of_sizes, readable
from mfm_lightning.commands.planning import FLOAT, Allocations
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import Times, as_times
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import DiffusionSchedule
from mfm_lightning.objectives import END, Objective
from mfm_lightning.objectives.finetuning import regress
from mfm_lightning.objectives.teachers import Teacher

Step = Callable[[], Tensor]  # gives a loss


@dataclass
class AdapterPlan:
    """Memory of training on one device.

    Attributes:
        source: where the sizes of the flow's parts are from.
        image_size: height and width, in pixels.
        batch_size: samples at once.
        trained: parameters.
        weights: bytes of the frozen parts, by name; text encoders are not there.
        peak: bytes, the most that a step allocates besides weights and gradients.
    """

    source: str
    image_size: tuple[int, int]
    batch_size: int
    trained: int
    weights: dict[str, int]
    peak: int

    def memory(self) -> dict[str, int]:
        """Bytes by what they are for; what is trained is float32, with AdamW."""
        copies = {"adapter": 1, "its gradients": 1, "its optimiser": 2, "its average": 1}
        parts = {name: FLOAT * number * self.trained for name, number in copies.items()}
        return {
            **{f"{name}, frozen": size for name, size in self.weights.items()},
            **parts,
            "work of a step": self.peak,
        }


def plan_pretraining(network: dict[str, Any], objective: Objective, batch_size: int) -> AdapterPlan:
    """Plan `MFMPretraining` of a `FlowAdapter`.

    Args:
        network: the adapter's arguments.
        objective: what it is trained on.
        batch_size: samples at once.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `plan_flow`, and as the adapter.
    """

    def added(flow: TextToImageFlow) -> list[FlowAdapter | LoRANetwork]:
        own = ("rank", "ranks", "targets", "guidance_scales")
        return [FlowAdapter.on_flow(flow, **{k: v for k, v in network.items() if k in own and v is not None})]

    def begun(flow: TextToImageFlow, given: Conditions, adapter: Any) -> Step:
        alone = Conditions(text=given.text, mask=given.mask, pooled=given.pooled)
        base = adapter.teacher_network
        adapter._null = base._null = alone  # of the empty prompt; no text encoder is there to make it
        teacher = _GuidedTeacher(MetaFlowMap(base), objective.pairs.guidance_scale > 1)
        model, x1 = MetaFlowMap(adapter), torch.empty(batch_size, *flow.state_shape)
        return lambda: objective(model, teacher, x1, alone.expand(batch_size), END)["loss"]

    found, sizes, peak = _planned(network, None, added, begun)
    return AdapterPlan(*found, batch_size, sizes["trained"], {"transformer": sizes["transformer"]}, peak)


def plan_finetuning(
    flow: dict[str, Any],
    lora: dict[str, Any],
    mfm: bool,
    posterior: Posterior | None,
    gradient: str,
    num_draws: int,
    guidance: float | None,
    batch_size: int,
) -> AdapterPlan:
    """Plan `PromptFinetuning`.

    Args:
        flow: arguments of `load_flow`.
        lora: `rank`, `alpha`, `ranks`, `targets`.
        mfm: whether draws are an adapter's, which is taken to have rank 64; others are not planned.
        posterior: as the module.
        gradient: as the module.
        num_draws: as the module.
        guidance: as the module.
        batch_size: samples at once.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `plan_flow`, and as the module.
    """

    if not mfm or not isinstance(posterior, FlowMapPosterior | None):
        raise ValueError(f"mfm plan knows draws by a Meta Flow Map, not those of {type(posterior).__name__}: give mfm")

    def added(flow: TextToImageFlow) -> list[FlowAdapter | LoRANetwork]:
        adapter = FlowAdapter.on_flow(flow, rank=64).requires_grad_(False)
        return [LoRANetwork.on_flow(flow, **lora), adapter]

    def begun(flow: TextToImageFlow, given: Conditions, policy: Any, adapter: Any) -> Step:
        model, source = AdaptedFlow(adapter), posterior or FlowMapPosterior()
        many = given.expand(batch_size)

        def loss() -> Tensor:
            t, x = torch.rand(batch_size), torch.empty(batch_size, *flow.state_shape)
            with torch.no_grad():
                base = flow.drift(t, x, many)
            target = MeasuredTarget(model, lambda images: images.flatten(1).mean(dim=1), flow.decoder, many)
            half = DiffusionSchedule()
            found = regress(
                target, t, x, base, lambda: policy.drift(t, x, many), half(t), half.clamped(t), source, num_draws,
                lambda rewards: rewards.mean(dim=1), gradient,
            )  # fmt: skip
            return found.errors.mean()

        return loss

    found, sizes, peak = _planned(flow, guidance, added, begun)
    weights = {name: sizes[name] for name in ("transformer", "vae")}
    return AdapterPlan(*found, batch_size, sizes["trained"], weights, peak)


class _GuidedTeacher(Teacher):
    """As `ModelTeacher`, which looks for the rows to guide; here all are."""

    def __init__(self, model: MetaFlowMap, guided: bool) -> None:
        self.model, self.guided, self.state_shape, self.identity = model, guided, model.state_shape, {}

    @torch.no_grad()
    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        given = conditions or Conditions()
        if not self.guided:
            return self.model.drift(t, x, given)
        both = self.model.drift(
            as_times(t, x).repeat(2), torch.cat([x, x]), given.expand(len(x)).cat(given.expand(len(x)))
        )
        return both[: len(x)] + both[len(x) :]

    def to(self, device: torch.device) -> Teacher:
        return self


def _planned(
    options: dict[str, Any],
    guidance: float | None,
    added: Callable[[TextToImageFlow], list[FlowAdapter | LoRANetwork]],
    begun: Callable[..., Step],
) -> tuple[tuple[str, tuple[int, int]], dict[str, int], int]:
    """Source and image size; bytes of transformer and VAE, and the number of trained parameters; the peak.

    Args:
        added: puts adapters on a flow, the one that is trained first.
        begun: gives the step, of the flow, its conditions and the adapters.
    """
    own = {name: options.get(name) for name in ("image_size", "attention", "max_sequence_length")}
    more = {name: options[name] for name in ("true_guidance", "tiled") if options.get(name) is not None}
    dtype, rows = str(options.get("torch_dtype") or "float32"), int(options.get("max_rows") or 64)
    sizes, adapters = {}, []

    def begin(flow: TextToImageFlow) -> None:
        parts = {"transformer": flow.transformer, "vae": flow.decoder.vae}
        sizes.update({name: sum(t.nbytes for t in part.state_dict().values()) for name, part in parts.items()})
        flow.opened_by = opening(options["name"])
        adapters.extend(added(flow))

    source, _, flow, fake = flow_of_sizes(
        options["name"], dtype, options.get("vae"), begin, options.get("gradient_vae"), max_rows=rows, **own, **more
    )
    given = conditions_of_sizes(flow, guidance, fake)
    if options.get("checkpointing"):
        flow.enable_checkpointing()
    with fake, readable():
        for module in (module for adapter in adapters for module in adapter.modules()):
            if any(p.is_meta for p in module.parameters(recurse=False)):
                module.to_empty(device="cpu", recurse=False)  # what is not in the transformer
        step = begun(flow, given, *adapters)
        sizes["trained"] = sum(p.numel() for p in adapters[0].parameters() if p.requires_grad)
        with Allocations(torch.nn.ModuleList([flow, *adapters])) as allocations:
            step().backward()
    return (source, flow.image_size), sizes, allocations.peak
