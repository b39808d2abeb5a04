"""Pretrained text-to-image flows by folder or Hugging Face id: which family they are, and what is loaded of them."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mfm_lightning.backbones.base import TextToImageFlow
from mfm_lightning.backbones.fingerprint import fingerprint_of
from mfm_lightning.backbones.flux_map import FluxFlowMap
from mfm_lightning.backbones.merging import lora_file, merge
from mfm_lightning.backbones.placement import Placement
from mfm_lightning.backbones.scratch import new_pipeline, random_parts, read_json
from mfm_lightning.networks.tiny_decoder import TinyDecoder
from mfm_lightning.utils.row_budget import MaxRows
from mfm_rewards.execution import DTYPES as EXECUTED
from mfm_rewards.execution import Precision, warn_if_bf16_is_slow
from mfm_rewards.hub import find_file, find_folder
from mfm_rewards.weights import CheckpointError

log = logging.getLogger(__name__)
INDEX = "model_index.json"
FAMILIES = {  # class of the pipeline: module and class here
    "StableDiffusion3Pipeline": ("sd3", "SD3Flow"),
    "FluxPipeline": ("flux", "FluxFlow"),
    "SanaPipeline": ("sana", "SanaFlow"),
    "Lumina2Pipeline": ("lumina2", "Lumina2Flow"),
    "QwenImagePipeline": ("qwen_image", "QwenImageFlow"),
    "ZImagePipeline": ("z_image", "ZImageFlow"),
}
PRECISIONS: dict[torch.dtype, Precision] = {kind: name for name, kind in EXECUTED.items()}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_flow(
    name: str | Path,
    image_size: int | tuple[int, int] | None = None,
    torch_dtype: str | torch.dtype = "bfloat16",
    max_rows: MaxRows = 8,
    attention: str | None = None,
    checkpointing: bool = False,
    tiled: bool = False,
    cache: str | Path | None = None,
    true_guidance: float | None = None,
    encoder_device: str | None = None,
    allow_download: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    random_seed: int | None = None,
    max_sequence_length: int | None = None,
    flow_map: str | None = None,
    lora: str | None = None,
    encoder_dtype: str | torch.dtype | None = None,
    transformer: bool = True,
    devices: dict[str, Any] | None = None,
    gradient_vae: str | None = None,
) -> TextToImageFlow:
    """A pretrained text-to-image flow, without its text encoders: those are loaded where prompts are encoded that are
    not in the cache of embeddings, and dropped again.

    Args:
        name: a folder of diffusers, with `model_index.json`, or a Hugging Face id.
        image_size: height and width of the images in pixels, or one number for both; the pipeline's own where None.
        torch_dtype: floating type of transformer, VAE and text encoders: "float32", "bfloat16" or "float16".
        max_rows: states at once in the transformer, and latents at once in the VAE; "auto" finds the most that a GPU
            has room for.
        attention: "math", whose derivatives along a direction are known, or a backend of diffusers.
        checkpointing: less memory for gradients, by computing each block of transformer and VAE twice.
        tiled: decode large latents in overlapping tiles.
        cache: folder that keeps the embeddings of prompts; in memory where None.
        true_guidance: of FLUX, scale of guidance by two evaluations.
        encoder_device: where prompts are encoded; the CPU where None.
        allow_download: fetch what is not in Hugging Face's cache on this machine.
        revision: branch, tag or commit of a Hugging Face repository.
        variant: of the weights' files, such as "fp16".
        vae: folder of another VAE for it.
        random_seed: where given, parts that have a `config.json` and no weights get random ones by it, for training
            from scratch; they are an error where None.
        max_sequence_length: tokens of a prompt, as the pipeline's call takes it; its own usual number where None.
        flow_map: of FLUX, a LoRA that makes it a flow map of two times (`mfm_lightning.backbones.FluxFlowMap`): a file,
            or org/name/file of a Hugging Face repository.
        lora: a LoRA that is merged into the transformer: a folder or file that `pipe.load_lora_weights` reads, such as
            `PromptFinetuning` writes.
        encoder_dtype: floating type of the text encoders; `torch_dtype` where None.
        transformer: false: of the transformer the settings alone, for prompts, sizes and the VAE; there is no drift.
        devices: parts on devices of their own, where the flow is moved to, too: `{transformer: cuda:0, vae: cuda:1,
            text_encoders: cpu}`; the transformer over all GPUs: `{transformer: balanced}`, or by module as accelerate's
            `device_map` (`mfm_lightning.backbones.placement.Placement`).
        gradient_vae: a small decoder (`mfm_lightning.networks.TinyDecoder`), folder or Hugging Face id, such as
            madebyollin/taesd3: gradients of images go back through it, and images are still the VAE's.

    Raises:
        FileNotFoundError: if it is not there, and may not be fetched.
        ImportError: without diffusers, or where the family's text encoders need another transformers.
        CheckpointError: for a pipeline that is no flow, of no known family, or with files missing.
        ValueError: for an option that does not fit.
    """
    placement = Placement.of(devices)  # refuses wrong ones before anything is read
    if encoder_device is not None and placement.text_encoders is not None:
        raise ValueError(f"encoder_device {encoder_device} and devices.text_encoders: give one of them")
    spread = placement.transformer_map is not None
    if spread and (random_seed is not None or flow_map is not None or lora is not None or not transformer):
        raise ValueError("a transformer that is spread by devices goes with none of random_seed, flow_map and lora")
    dtype = _dtype("torch_dtype", torch_dtype)
    text_dtype = dtype if encoder_dtype is None else _dtype("encoder_dtype", encoder_dtype)
    patterns = [f"*/*.{ending}" for ending in ("json", "safetensors", "txt", "model")]
    if not transformer:
        patterns = ["vae/*", "text_encoder*/*", "tokenizer*/*", "*/*.json"]
    folder = find_folder(name, [INDEX], patterns, allow_download, revision, "diffusers pipeline")
    index = _read_index(folder)
    pipeline = str(index.get("_class_name"))
    if pipeline not in FAMILIES:
        raise CheckpointError(_unknown(folder, pipeline))
    if dtype == torch.bfloat16 and not torch.accelerator.is_available():
        warn_if_bf16_is_slow()
    kind, family = family_of(pipeline), FAMILIES[pipeline][1]
    two_times = None
    if flow_map is not None:
        if family != "FluxFlow":
            raise ValueError(f"flow_map {flow_map} is a LoRA of FLUX's: a {family} takes none")
        two_times = find_file(flow_map, allow_download)  # before the pipeline is loaded
    merged = None if lora is None else lora_file(lora)
    small = None
    if gradient_vae is not None:
        rows = 8 if isinstance(max_rows, str) else max_rows
        small = TinyDecoder(gradient_vae, True, rows, PRECISIONS[dtype], allow_download)
        config = read_json((folder / "vae" if vae is None else Path(vae)) / "config.json")
        if (channels := config.get("latent_channels", config.get("z_dim"))) is not None:
            small.check_channels(channels)
    encoders = [part for part in index if part.startswith("text_encoder")]
    common: dict[str, Any] = {"torch_dtype": dtype, "variant": variant, "local_files_only": True}
    common |= {part: None for part, said in index.items() if said == [None, None]}  # such as SD3's T5, left out

    elsewhere = {} if vae is None else {"vae": Path(vae)}
    load_encoders: Callable[[], Any] | None = None
    if not transformer and (random_seed is not None or flow_map is not None or lora is not None):
        raise ValueError("transformer: false goes with none of random_seed, flow_map and lora: leave them out")
    if random_seed is not None and random_parts(folder, index, elsewhere):
        pipe = new_pipeline(folder, _diffusers(pipeline, folder), index, elsewhere, random_seed, dtype)
    else:
        parts = {} if vae is None else {"vae": _vae(index, vae, dtype)}
        parts |= {} if transformer else {"transformer": _settings(index, folder)}
        parts |= {"transformer": _spread(index, folder, dtype, variant, placement)} if spread else {}
        pipe = _load(pipeline, folder, **(common | dict.fromkeys(encoders) | parts))

        def load_whole() -> Any:
            log.info("text encoders of %s: loading", name)
            given = {**common, "torch_dtype": text_dtype, "transformer": pipe.transformer, "vae": pipe.vae}
            whole = _load(pipeline, folder, **given)
            for part in encoders:
                # transformers makes the text model in a CLIP with projection of the type in its file's config
                encoder = getattr(whole, part)
                if encoder is not None and not getattr(encoder, "_keep_in_fp32_modules", None):
                    encoder.to(text_dtype)
            return whole

        load_encoders = load_whole
    if merged is not None:
        merge(pipe, merged)

    options: dict[str, Any] = {} if true_guidance is None else {"true_guidance": true_guidance}
    if options and family != "FluxFlow":
        raise ValueError(f"true_guidance is FLUX's, whose own is an input: give guidance for a {family}")
    weights = f"{name} {revision} {variant} {vae} {_state(folder, 'transformer', 'vae', 'scheduler')}"
    weights += "" if vae is None else f" {_state(Path(vae), '.')}"
    weights += "" if random_seed is None else f" random {random_seed}"
    weights += "".join(f" {f}:{f.stat().st_size}:{f.resolve().stat().st_mtime_ns}" for f in (two_times, merged) if f)
    if two_times is not None:
        kind, options["lora"] = FluxFlowMap, two_times

    def fingerprint(part: str) -> str:
        random = "" if random_seed is None else f"random {random_seed}"
        named = {"text_encoders": ("text_encoder*", "tokenizer*"), "vae": (), "transformer": ("transformer",)}[part]
        folders = [path for pattern in named for path in sorted(folder.glob(pattern))]
        return fingerprint_of(folders or [elsewhere.get("vae", folder / "vae")], variant, random)

    flow = kind(
        pipe,
        image_size=image_size,
        max_rows=max_rows,
        attention=attention,
        checkpointing=checkpointing,
        tiled=tiled,
        cache=cache,
        load_encoders=load_encoders,
        encoders=f"{name} {revision} {_state(folder, 'text_encoder*', 'tokenizer*')} {text_dtype}",
        weights=weights,
        encoder_device=placement.text_encoders or encoder_device,
        devices=placement,
        max_sequence_length=max_sequence_length,
        fingerprint=fingerprint,
        **options,
    )
    if small is not None:
        flow.use_for_gradients(small)
    flow.opened_by = opening(
        str(name), vae=vae, image_size=image_size, torch_dtype=str(dtype).removeprefix("torch."),
        max_sequence_length=max_sequence_length, lora=lora, revision=revision, variant=variant,
    )  # fmt: skip
    return flow


def family_of(pipeline: str) -> type[TextToImageFlow]:
    """The flow's class for a pipeline's, which is one of `FAMILIES`."""
    module, family = FAMILIES[pipeline]
    return getattr(importlib.import_module(f"mfm_lightning.backbones.{module}"), family)


def opening(name: str, **given: Any) -> dict[str, Any]:
    """What opens a flow again, for `TextToImageFlow.opened_by`: arguments of `load_flow`, None where not given."""
    names = ("vae", "image_size", "torch_dtype", "max_sequence_length", "lora", "revision", "variant")
    return {"name": name, **dict.fromkeys(names), **given}


def _dtype(name: str, given: str | torch.dtype) -> torch.dtype:
    dtype = DTYPES.get(given) if isinstance(given, str) else given
    if dtype is None or dtype not in DTYPES.values():
        raise ValueError(f"{name} {given!r}: expected one of {', '.join(DTYPES)}")
    return dtype


def _settings(index: dict[str, Any], folder: Path) -> Any:
    """The transformer without weights."""
    kind = _diffusers(str(index["transformer"][1]), folder)
    try:
        with torch.device("meta"):
            return kind.from_config(kind.load_config(str(folder / "transformer"), local_files_only=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the transformer of {folder} cannot be read: {_first_line(error)}") from error


def _spread(index: dict[str, Any], folder: Path, dtype: Any, variant: str | None, placement: Placement) -> Any:
    """The transformer, spread over devices."""
    kind = _diffusers(str(index["transformer"][1]), folder)
    given = {"torch_dtype": dtype, "variant": variant, "local_files_only": True, **placement.loading()}
    try:
        return kind.from_pretrained(str(folder / "transformer"), **given)
    except ImportError as error:
        raise ImportError("devices: a transformer is spread by accelerate: pip install accelerate") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"the transformer of {folder} cannot be spread by devices {placement.transformer_map}: {_first_line(error)}"
        ) from error


def _diffusers(kind: str, folder: Path) -> Any:
    """A class of diffusers."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{folder}: diffusers is missing: pip install 'mfm-lightning[text-to-image]'") from error
    return getattr(diffusers, kind)


def _vae(index: dict[str, Any], folder: str, dtype: Any) -> Any:
    kind = str(index["vae"][1])
    try:
        return _diffusers(kind, Path(folder)).from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"no {kind} in {folder}: {_first_line(error)}") from error


def _load(pipeline: str, folder: Path, **options: Any) -> Any:
    kind = _diffusers(pipeline, folder)
    try:
        return kind.from_pretrained(str(folder), **options)
    except (ImportError, RuntimeError) as error:
        if "import" not in str(error).lower():
            raise CheckpointError(f"the {pipeline} in {folder} cannot be read: {_first_line(error)}") from error
        raise ImportError(f"a {pipeline} cannot be imported: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the {pipeline} in {folder} cannot be read: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _read_index(folder: Path) -> dict[str, Any]:
    index = read_json(folder / INDEX)
    if "_class_name" not in index:
        raise CheckpointError(f"{folder / INDEX} names no pipeline: expected _class_name")
    return index


def _unknown(folder: Path, pipeline: str) -> str:
    scheduler = folder / "scheduler/scheduler_config.json"
    known = f"known are {', '.join(FAMILIES)}"
    try:
        predicted = json.loads(scheduler.read_text()).get("prediction_type")
    except (OSError, ValueError):
        predicted = None
    if predicted in ("epsilon", "v_prediction", "sample"):
        return f"{folder} is a {pipeline}, which is no flow: it predicts {predicted!r}; {known}"
    return f"{folder} is a {pipeline}, a family that has no adapter here; {known}. Or write one: a TextToImageFlow"


def _state(folder: Path, *parts: str) -> str:
    """Of the files of parts of a pipeline, so that what others made is not taken for theirs."""
    files = sorted(p for part in parts for p in folder.glob(f"{part}/*"))
    return " ".join(f"{p.relative_to(folder)}:{p.stat().st_size}:{p.resolve().stat().st_mtime_ns}" for p in files)
