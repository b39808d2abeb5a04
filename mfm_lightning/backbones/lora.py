"""LoRA on the transformer of a text-to-image flow (Hu et al., arXiv 2106.09685): on in a context, trained alone, and
written so that diffusers loads it."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from mfm_lightning.backbones.base import TextToImageFlow
from mfm_lightning.backbones.network import PromptedNetwork, opened
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import Times
from mfm_lightning.networks.files import fill_network, read_header
from mfm_rewards.weights import CheckpointError

# of attention and MLP in all blocks of SD3, FLUX and SANA
LINEAR = r".*blocks\..*\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|proj|net\.2|proj_mlp|proj_out|linear_[12])"
FOLDER = "lora"
MARKED = 16  # values of each tensor of the base that its mark looks at


class LoRA(nn.ModuleDict):
    """LoRA on linear layers of a flow's transformer, in place: zero at first, in float32, and off but in `on`. Several
    of different names go on one transformer.

    Args:
        flow: of the transformer.
        name: among the transformer's adapters; where one has it already, with a number.
        rank: at least 1.
        alpha: the product of both matrices is scaled by alpha / rank; the rank where None.
        ranks: others by module, a regular expression to a rank, of all layers in it: {"^transformer_blocks.0": 64}. It
            is of whole names of modules, or of their ends after a dot ("to_q"); the first that fits counts.
        targets: regular expression of whole names of linear layers; those of attention and MLP in all blocks where
            None.

    Raises:
        ImportError: without peft.
        ValueError: for numbers out of range, or a pattern that no layer has.
    """

    def __init__(
        self,
        flow: TextToImageFlow,
        name: str,
        rank: int,
        alpha: float | None = None,
        ranks: dict[str, int] | None = None,
        targets: str | None = None,
    ) -> None:
        super().__init__()
        if min(rank, *(ranks or {}).values(), rank) < 1 or (alpha is not None and not 0 < alpha < math.inf):
            raise ValueError(f"rank {rank} and ranks {ranks} must be at least 1, alpha {alpha} positive")
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise ImportError("a LoRA needs peft: pip install 'mfm-lightning[text-to-image]'") from error
        targets, transformer = targets or LINEAR, cast(Any, flow.transformer)
        there = [layer for layer in transformer.modules() if isinstance(layer, LoraLayer)]
        while any(name in layer.lora_A for layer in there):  # peft would put the new weights in place of those
            head, _, number = name.partition("_")
            name = f"{head}_{int(number or 1) + 1}"
        self.name, self._flow = name, [flow]  # in a list: it is no part of this module
        config = LoraConfig(
            r=rank, lora_alpha=cast(int, alpha or rank), target_modules=targets,
            rank_pattern=_by_layer(ranks or {}, targets, transformer), init_lora_weights=True,
        )  # fmt: skip
        trained = {id(p) for p in transformer.parameters() if p.requires_grad}  # of LoRAs that are there
        try:
            inject_adapter_in_model(config, transformer, name)
        except ValueError as error:
            raise ValueError(f"targets {targets!r}: {str(error).splitlines()[0]}") from error
        for p in transformer.parameters():
            p.requires_grad_(id(p) in trained)
        self._layers: list[Any] = []
        for place, layer in transformer.named_modules():
            if isinstance(layer, LoraLayer) and name in layer.lora_A:
                parts = [layer.lora_A[name].float(), layer.lora_B[name].float()]
                self[place.replace(".", "/")] = nn.ModuleList(parts).requires_grad_(True)
                self._layers.append(layer)
                layer._disable_adapters = True
        self._config = config

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within the context; elsewhere the transformer is the base's, whoever calls it. A block that is computed again
        for a gradient is computed as it was."""
        flow = self._flow[0]
        before = flow.recomputing
        flow.recomputing = self._switched_on
        try:
            with self._switched_on():
                yield
        finally:
            flow.recomputing = before

    @contextmanager
    def _switched_on(self) -> Iterator[None]:
        # not by peft's enable_adapters, which also says which parameters are trained
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self._layers]
        for layer in self._layers:
            layer._disable_adapters, layer._active_adapter = False, [self.name]
        try:
            yield
        finally:
            for layer, (off, active) in zip(self._layers, before, strict=True):
                layer._disable_adapters, layer._active_adapter = off, active

    def save(self, folder: Path) -> Path:
        """Write `pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(folder)` reads."""
        tensors = {
            f"{place.replace('/', '.')}.lora_{part}.weight": layer.weight.detach().cpu().contiguous()
            for place, layers in self.items()
            for part, layer in zip("AB", cast(Any, layers), strict=True)
        }
        self._flow[0].pipe.save_lora_weights(
            save_directory=str(folder),
            transformer_lora_layers=tensors,
            transformer_lora_adapter_metadata=_plain(self._config.to_dict()),
        )
        return folder


class AdaptedNetwork(PromptedNetwork):
    """Base class of networks that train what is added to a flow, whose own weights are there once, frozen. A file of it
    has what is trained alone, and a mark of the flow's weights.

    A subclass adds in `add_to`, with its own options.

    Args:
        opening: arguments of `load_flow`.
        base: a mark of the weights that it must be on; any where None.
        options: of the subclass.
    """

    shardable = True

    def __init__(self, opening: dict[str, Any], base: str | None, **options: Any) -> None:
        self._begin(opened(**opening), base, options)

    def _begin(self, flow: TextToImageFlow, base: str | None, options: dict[str, Any]) -> None:
        mark = mark_of(flow.transformer)
        if base not in (None, mark):
            name, lora = (flow.opened_by[key] for key in ("name", "lora"))
            raise CheckpointError(
                f"this {type(self).__name__} was trained on other weights than those of {name}"
                f"{'' if lora is None else f' with the LoRA {lora}'}: give the flow that it was trained on"
                f"{_type_of_marks(flow)}"
            )
        super().__init__(flow, {**flow.opened_by, "base": mark, **options})
        self.add_to(flow, **options)

    @classmethod
    def on_flow(cls, flow: TextToImageFlow, **options: Any) -> Self:
        """On a flow that is there already; its transformer is changed in place, and is the base's as before where the
        network is not called.

        Raises:
            ValueError: for a flow that `load_flow` did not open, whose file nobody could open again; and as the class.
            TypeError: for an unknown option.
        """
        own = {name: p.default for name, p in inspect.signature(cls).parameters.items() if name not in flow.opened_by}
        own = {name: default for name, default in own.items() if name not in ("checkpointing", "allow_download")}
        if unknown := options.keys() - own.keys():
            raise TypeError(f"a {cls.__name__} on a flow has no option {min(unknown)!r}: expected some of {list(own)}")
        options, network = own | options, cls.__new__(cls)
        network._begin(flow, options.pop("base"), options)
        return network

    @classmethod
    def of_file(cls, path: str | Path, flow: TextToImageFlow) -> Self:
        """A file's network on a flow that is there already, which must be the one it was trained on.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: for a file of another class, or of another flow.
        """
        kind, config = read_header(path)
        if kind != f"{cls.__module__}.{cls.__qualname__}":
            raise CheckpointError(f"{path} holds a {kind}: expected a {cls.__name__}")
        options = {name: value for name, value in config.items() if name not in flow.opened_by}
        network = cls.on_flow(flow, **options)
        fill_network(network, path)
        return network

    @property
    def elsewhere(self) -> nn.Module:
        """The transformer, which is no part of this module, or it would be in its files."""
        return self.flow.transformer

    @abstractmethod
    def add_to(self, flow: TextToImageFlow, **options: Any) -> None:
        """Make what is trained."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.elsewhere._apply(fn, recurse)
        return self


class LoRANetwork(AdaptedNetwork):
    """b_s(x) of a text-to-image flow with a LoRA: what fine-tuning changes. A run leaves, beside `model.safetensors`,
    `lora/pytorch_lora_weights.safetensors` for diffusers, and a model card.

    Args:
        name: a folder of diffusers with `model_index.json`, or a Hugging Face id.
        rank: of the LoRA (`mfm_lightning.backbones.LoRA`).
        alpha: its scale is alpha / rank; the rank where None.
        ranks: others by module, a regular expression to a rank.
        targets: regular expression of whole names of linear layers that have one; all of attention and MLP where None.
        vae: folder of another VAE for the flow.
        image_size: of the images in pixels; the pipeline's own where None.
        torch_dtype: of the base's weights; what is trained is float32.
        checkpointing: keep only the input of each block of the transformer, and compute the rest again.
        allow_download: fetch what is not in Hugging Face's cache on this machine.
        max_sequence_length: tokens of a prompt, as `load_flow`.
        lora: a LoRA that is merged into the flow first, as `load_flow`.
        revision: branch, tag or commit of a Hugging Face repository.
        variant: of the weights' files, such as "fp16".
        base: a mark of the weights that it must be on, as files have it; any where None.

    Raises:
        ImportError, ValueError: as `LoRA`, and as `load_flow`.
        CheckpointError: for a flow of other weights than `base`.
    """

    def __init__(
        self,
        name: str,
        rank: int = 16,
        alpha: float | None = None,
        ranks: dict[str, int] | None = None,
        targets: str | None = None,
        vae: str | None = None,
        image_size: int | None = None,
        torch_dtype: str = "float32",
        checkpointing: bool = False,
        allow_download: bool = False,
        max_sequence_length: int | None = None,
        lora: str | None = None,
        base: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        opening = {
            "name": name, "vae": vae, "image_size": image_size, "torch_dtype": torch_dtype,
            "checkpointing": checkpointing, "allow_download": allow_download,
            "max_sequence_length": max_sequence_length, "lora": lora, "revision": revision, "variant": variant,
        }  # fmt: skip
        super().__init__(opening, base, rank=rank, alpha=alpha, ranks=ranks, targets=targets)

    def add_to(self, flow: TextToImageFlow, **options: Any) -> None:
        self.lora = LoRA(flow, "policy", **options)

    def forward(self, s: Tensor, u: Tensor, x: Tensor, t: Tensor, x_t: Tensor, conditions: Conditions) -> Tensor:
        with self.lora.on():
            return self.flow.velocity(s, x, conditions)

    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        """b_t(x) `(B, C, h, w)` with the flow's guidance; raises as `TextToImageFlow.drift`."""
        with self.lora.on():
            return self.flow.drift(t, x, conditions)

    def write_beside(self, folder: Path) -> Path:
        """Write the LoRA for diffusers."""
        (folder / FOLDER).mkdir()
        self.lora.save(folder / FOLDER)
        (folder / FOLDER / "README.md").write_text(self._card())
        return folder / FOLDER

    def _card(self) -> str:
        name, kind, first = self.config["name"], type(self.flow.pipe).__name__, ""
        if (lora := self.config["lora"]) is not None:  # it was trained on top of it
            first = f"pipe.load_lora_weights({lora!r})  # what it was trained on top of\npipe.fuse_lora()\n"
            first += "pipe.unload_lora_weights()\n"
        return (
            f"---\nlibrary_name: diffusers\nbase_model: {name}\ntags: [lora, text-to-image]\n---\n\n"
            f"# LoRA of {name}\n\nrank {self.config['rank']}, alpha {self.config['alpha'] or self.config['rank']}, "
            f"{sum(p.numel() for p in self.parameters()):,} parameters in {len(self.lora)} layers. Written by "
            "mfm-lightning; the run's config says how it was trained.\n\n"
            f"```python\nimport diffusers\n\npipe = diffusers.{kind}.from_pretrained({name!r})\n"
            f"{first}pipe.load_lora_weights(FOLDER)  # of this file\n```\n"
        )


def _by_layer(ranks: dict[str, int], targets: str, transformer: nn.Module) -> dict[str, int]:
    """The rank of each layer that has one of its own, by a pattern of that name alone, as peft takes them: patterns of
    modules that hold layers would have no effect there, and not be missed.

    Raises:
        ValueError: for a pattern that fits no layer of the targets.
    """
    layers = [name for name, _ in transformer.named_modules() if re.fullmatch(targets, name)] if ranks else []
    found: dict[str, int] = {}
    for pattern, rank in ranks.items():
        inside = [name for name in layers if re.match(rf"(.*\.)?({pattern})(\..*)?$", name)]
        if not inside:
            raise ValueError(
                f"ranks: no layer with a LoRA is, or is in, a module {pattern!r}: expected a part of names such as "
                f"{layers[0] if layers else 'those of targets'}"
            )
        found = {f"^{re.escape(name)}": rank for name in inside} | found  # of several patterns the first counts
    return found


def mark_of(transformer: nn.Module) -> str:
    """What tells a transformer's weights from others': a hash of the first values of each tensor, in bfloat16, so that
    it is the same in float32 and bfloat16. Weights of more precision that were made float16, or into which a LoRA was
    merged in another type, are rounded twice, and have another mark. Adapters do not count. Empty where tensors have no
    content, as in `mfm plan`."""
    found = hashlib.sha256()
    if any(p.is_meta for p in transformer.parameters()):
        return ""
    for name, value in sorted((n.replace(".base_layer.", "."), p) for n, p in transformer.named_parameters()):
        if ".lora_" not in name:
            first = value.detach().flatten()[:MARKED].to(torch.bfloat16)
            found.update(f"{name} {tuple(value.shape)}".encode() + first.cpu().view(torch.int16).numpy().tobytes())
    return found.hexdigest()[:32]


def _type_of_marks(flow: TextToImageFlow) -> str:
    """What more to say where weights were perhaps rounded otherwise."""
    kind = flow.opened_by["torch_dtype"]
    if kind == "float16":
        return ". In float16 weights are rounded otherwise: open it in bfloat16 or float32"
    return "" if flow.opened_by["lora"] is None else f", and in the type ({kind} here) in which the LoRA was merged"


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """As JSON can hold it."""
    return {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
