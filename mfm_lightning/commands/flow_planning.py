"""What a text-to-image flow will need of a GPU, without its weights: its parts, and the peaks of what a method does.

The flow itself runs, on tensors that have shapes and no content (torch's FakeTensorMode), and what it allocates is
counted.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mfm_lightning.alignment import AlignmentMethod, BestOfN, DPSGradient, Search, Target
from mfm_lightning.alignment.values import Draws, GradientEstimator, PointGradient, ValueEstimator
from mfm_lightning.backbones import FAMILIES, TextToImageFlow
from mfm_lightning.backbones.loading import DTYPES, INDEX, family_of
from mfm_lightning.backbones.published import PUBLISHED, Part
from mfm_lightning.backbones.scratch import bare_pipeline
from mfm_lightning.commands.planning import Allocations
from mfm_lightning.conditions import Conditions
from mfm_lightning.networks.tiny_decoder import TinyDecoder
from mfm_rewards.hub import find_folder

DRIFT, DECODING = "drift", "decoding"
GRADIENT, CHECKPOINTED = "gradient", "gradient, checkpointing"
PLANNED = ("SD3Flow", "FluxFlow", "SanaFlow")


@dataclass
class FlowPlan:
    """Memory of a text-to-image flow on one device.

    Attributes:
        source: where the sizes of its parts are from.
        parameters: of each part.
        weights: bytes of each part, its stored buffers too.
        peaks: bytes, the most that each piece of work allocates besides the weights, for all rows.
        rows: states at once in the method; the flow cuts them into parts of `max_rows`.
        image_size: height and width, in pixels.
    """

    source: str
    image_size: tuple[int, int]
    rows: int
    max_rows: int
    parameters: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def resident(self) -> int:
        """Bytes of weights while images are made: text encoders are gone then."""
        return sum(size for name, size in self.weights.items() if not name.startswith("text_encoder"))

    @property
    def encoders(self) -> int:
        """Bytes of all text encoders, where prompts are encoded."""
        return sum(self.weights.values()) - self.resident

    def total(self, gradient: bool, checkpointing: bool) -> int:
        """Bytes that a method needs, with or without gradients, besides its reward."""
        work = [CHECKPOINTED if checkpointing else GRADIENT, DECODING] if gradient else [DRIFT, DECODING]
        return self.resident + max(self.peaks[name] for name in work)


def plan_flow(
    name: str,
    image_size: int | tuple[int, int] | None = None,
    torch_dtype: str = "bfloat16",
    max_rows: int = 8,
    attention: str | None = None,
    tiled: bool = False,
    true_guidance: float | None = None,
    vae: str | None = None,
    max_sequence_length: int | None = None,
    guidance: float | None = None,
    batch_size: int = 1,
    method: AlignmentMethod | None = None,
    gradient_vae: str | None = None,
) -> FlowPlan:
    """Plan images of a flow by a method. What the allocator wastes, libraries' workspaces, the CUDA context (about
    0.5 GB) and rewards come on top.

    Args:
        name: a folder of diffusers, of which only the configs are read, or a Hugging Face id; of
            `mfm_lightning.backbones.published.PUBLISHED` the sizes are known without a folder.
        image_size: as `load_flow`.
        torch_dtype: as `load_flow`.
        max_rows: as `load_flow`.
        attention: as `load_flow`.
        tiled: as `load_flow`.
        true_guidance: as `load_flow`.
        vae: as `load_flow`.
        max_sequence_length: as `load_flow`.
        guidance: as the pipeline takes it; its own where None.
        batch_size: samples aligned at once.
        method: of alignment; the base flow alone where None.
        gradient_vae: as `load_flow`; TAESD's sizes where it is no folder here.

    Raises:
        FileNotFoundError: if the folder is not there, and no such sizes are known.
        ValueError: for another family, or settings that do not fit.
        ImportError: without diffusers or transformers.
    """
    rows = rows_of(method, batch_size)
    options: dict[str, Any] = {"max_sequence_length": max_sequence_length}
    options |= {} if true_guidance is None else {"true_guidance": true_guidance}
    options |= {"image_size": image_size, "max_rows": max_rows, "attention": attention, "tiled": tiled}
    source, made, flow, fake = flow_of_sizes(name, torch_dtype, vae, gradient_vae=gradient_vae, **options)
    given = conditions_of_sizes(flow, guidance, fake)
    found = FlowPlan(source, flow.image_size, rows, max_rows)
    for part, network in made.items():
        found.parameters[part] = sum(p.numel() for p in network.parameters())
        found.weights[part] = _bytes(network)
    if isinstance(small := flow.decoder.gradients, TinyDecoder):
        found.parameters["gradient_vae"] = sum(p.numel() for p in small.load().parameters())
        found.weights["gradient_vae"] = _bytes(small.load())
    gradient = _gradient(method)
    work: dict[str, Callable[[Tensor], object]] = {
        DRIFT: torch.no_grad()(lambda x: flow.drift(0.5, x, given)),
        DECODING: torch.no_grad()(flow.decoder),
        GRADIENT: lambda x: gradient(MeasuredTarget(flow, _mean, flow.decoder, given), 0.5, x),
    }
    for what, step in work.items():
        found.peaks[what] = _peak(step, flow, rows, fake)
    flow.enable_checkpointing()
    found.peaks[CHECKPOINTED] = _peak(work[GRADIENT], flow, rows, fake)
    return found


def flow_of_sizes(
    name: str,
    torch_dtype: str,
    vae: str | None,
    begin: Callable[[TextToImageFlow], None] | None = None,
    gradient_vae: str | None = None,
    **options: Any,
) -> tuple[str, dict[str, nn.Module], TextToImageFlow, FakeTensorMode]:
    """A flow on tensors without content: where its sizes are from, its parts, the flow, and the mode it runs in.

    Args:
        name: as `plan_flow`, which says what is raised.
        torch_dtype: as `plan_flow`.
        vae: as `plan_flow`.
        begin: called with the flow while its tensors have no memory either, to add modules to it.
        gradient_vae: as `plan_flow`.
        options: of the flow.
    """
    if torch_dtype not in DTYPES:
        raise ValueError(f"torch_dtype {torch_dtype!r}: expected one of {', '.join(DTYPES)}")
    source, pipeline, parts = components(name)
    if vae is not None:
        config = _read(Path(vae) / "config.json")
        parts["vae"] = ("diffusers", str(config.get("_class_name")), config)
    if FAMILIES.get(pipeline, ("", ""))[1] not in PLANNED:
        raise ValueError(f"{name} is a {pipeline}: mfm plan knows the memory of {', '.join(PLANNED)}")
    made = {part: _on_meta(*described, DTYPES[torch_dtype]) for part, described in parts.items()}
    for part in ("transformer", "vae"):
        if part not in made:
            raise ValueError(f"{source} has no {part}: expected the folder of a {pipeline}")
    # of any scheduler: what is planned does not depend on times
    pipe = bare_pipeline(pipeline, transformer=made["transformer"], vae=made["vae"])
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        flow = family_of(pipeline)(pipe, **options)
    if begin is not None:
        with torch.device("meta"):
            begin(flow)
    with fake:
        flow.to_empty(device="cpu")
    if gradient_vae is not None:
        file = Path(gradient_vae) / "config.json"
        config = _read(file) if file.is_file() else {"latent_channels": flow.channels}
        network: Any = _on_meta("diffusers", "AutoencoderTiny", config, DTYPES[torch_dtype])
        with fake:
            network.to_empty(device="cpu")
        flow.use_for_gradients(TinyDecoder.of_network(network, max_rows=options["max_rows"]))
    return source, made, flow, fake


def components(name: str) -> tuple[str, str, dict[str, Part]]:
    """Where its sizes are from, the pipeline's class, and the parts with weights by name, of a folder or an id.

    Raises:
        FileNotFoundError: if it is not there, and no such sizes are known.
        ValueError: for files that are not those of a pipeline.
    """
    try:
        folder = find_folder(name, [INDEX], what="diffusers pipeline")
    except (FileNotFoundError, ImportError) as error:
        if name not in PUBLISHED:
            known = ", ".join(PUBLISHED)
            raise type(error)(f"{error}. Without it, mfm plan knows the sizes of {known}") from error
        pipeline, parts = PUBLISHED[name]
        return f"the published sizes of {name}", pipeline, dict(parts)
    index = _read(folder / INDEX)
    found = {}
    for part, described in index.items():
        if isinstance(described, list) and len(described) == 2 and (folder / part / "config.json").is_file():
            library, kind = described
            if library in ("diffusers", "transformers"):
                found[part] = (library, kind, _read(folder / part / "config.json"))
    return str(folder), str(index.get("_class_name")), found


def rows_of(method: AlignmentMethod | None, batch_size: int) -> int:
    """States of a batch of samples that a method has in the flow, or decodes, at once."""
    if isinstance(method, BestOfN):
        return min(batch_size * method.num_candidates, max(batch_size, method.max_rows))
    rows = batch_size * int(getattr(method, "num_particles", 1))
    if isinstance(method, Search):
        return rows * method.num_draws
    estimator = _estimator(method)
    if isinstance(estimator, Draws):
        rows *= estimator.num_draws
    if isinstance(most := getattr(estimator, "max_rows", None), int):
        rows = min(rows, most)
    return rows


def _estimator(method: AlignmentMethod | None) -> ValueEstimator | None:
    return next((value for value in vars(method or object).values() if isinstance(value, ValueEstimator)), None)


def _gradient(method: AlignmentMethod | None) -> GradientEstimator:
    """What takes the method's gradients, of one state a row; DPS's where it takes none."""
    estimator = _estimator(method)
    if method is None or not method.needs_reward_gradient:
        return DPSGradient()
    if not isinstance(estimator, PointGradient):
        raise ValueError(
            f"mfm plan knows gradients of one clean state, such as DPSGradient, not those of {type(estimator).__name__}"
        )
    return estimator


def _on_meta(library: str, kind: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A network without weights."""
    try:
        made = getattr(importlib.import_module(library), kind)
    except ImportError as error:
        raise ImportError(f"{library} is missing: pip install 'mfm-lightning[text-to-image]'") from error
    except AttributeError as error:
        raise ValueError(f"{library} here has no {kind}") from error
    with torch.device("meta"):
        network = (
            made.from_config(config) if library == "diffusers" else made(made.config_class.from_dict(dict(config)))
        )
    return nn.Module.to(network, dtype).eval().requires_grad_(False)


def _bytes(network: nn.Module) -> int:
    """Of parameters and stored buffers; what two parts share counts once."""
    return sum({id(tensor): tensor.nbytes for tensor in network.state_dict(keep_vars=True).values()}.values())


def conditions_of_sizes(flow: TextToImageFlow, guidance: float | None, fake: FakeTensorMode) -> Conditions:
    """Of one prompt, of the pipeline's number of tokens; guidance by two evaluations where the flow has it."""
    config, dtype = flow.transformer.config, flow.transformer.dtype
    length = flow.max_sequence_length
    length += 77 if flow.pipeline == "StableDiffusion3Pipeline" else 0  # CLIP's tokens before T5's
    width = config.get("joint_attention_dim") or config.get("caption_channels")
    scale = flow.usual_guidance if guidance is None else float(guidance)
    two = flow.passes(Conditions(guidance=scale, text=torch.zeros(1, 1, 1))) > 1
    # the number of evaluations is decided by looking at the scales, and these have no content
    object.__setattr__(flow, "passes", lambda given: 2 if two else 1)
    with fake:
        text = {"text": torch.empty(1, length, width, dtype=dtype)}
        if pooled := config.get("pooled_projection_dim"):
            text["pooled"] = torch.empty(1, pooled, dtype=dtype)
        if "caption_channels" in config:
            text["mask"] = torch.empty(1, length, dtype=torch.long)
        negative = {f"negative_{name}": value for name, value in text.items()} if two else {}
        return Conditions(guidance=scale, prompts=None, **{**text, **negative})


class MeasuredTarget(Target):
    """A target whose rewards are taken as they are: values without content can be checked for nothing."""

    def rewards(self, x: Tensor) -> Tensor:
        return self.plain_rewards(x)

    def plain_rewards(self, x: Tensor) -> Tensor:
        return _mean(self.decoder(x))


def _mean(images: Tensor) -> Tensor:
    """What stands for a reward."""
    return images.flatten(1).mean(dim=1)


def _peak(step: Callable[[Tensor], object], flow: TextToImageFlow, rows: int, fake: FakeTensorMode) -> int:
    """Bytes at most; of more than three parts of `max_rows` by what the third one added."""
    most = rows if isinstance(flow.max_rows, str) else flow.max_rows
    if rows <= 3 * most:
        return _allocated(step, flow, rows, fake)
    two, three = (_allocated(step, flow, parts * most, fake) for parts in (2, 3))
    return three + round((three - two) * (rows / most - 3))


def _allocated(step: Callable[[Tensor], object], flow: TextToImageFlow, rows: int, fake: FakeTensorMode) -> int:
    with fake, readable(), Allocations(flow) as allocations:
        step(torch.empty(rows, *flow.state_shape))
    return allocations.peak


@contextmanager
def readable() -> Iterator[None]:
    try:
        yield
    except DataDependentOutputException as error:
        raise ValueError(f"this cannot be planned: it looks at numbers on the way ({error})") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is a {type(found).__name__}: expected an object")
    return found
