"""A text-to-image flow, and its adapter, as a YAML names them."""

from __future__ import annotations

from mfm_benchmarks.spec import Spec, build
from mfm_lightning.backbones import AdaptedFlow, TextToImageFlow
from mfm_lightning.conditions import Conditions


def open_flow(given: Spec | str) -> TextToImageFlow:
    """The flow of a folder of diffusers or a Hugging Face id, or as `{class_path: ..., init_args: ...}` has it.

    Raises:
        FileNotFoundError, ImportError, CheckpointError, ValueError: as `load_flow`; for settings that do not fit it.
    """
    named = {"class_path": "mfm_lightning.backbones.load_flow", "init_args": {"name": given}}
    return build(TextToImageFlow, given.value if isinstance(given, Spec) else named, "flow")


def open_adapted(mfm: str, flow: TextToImageFlow, guidance: float | None) -> AdaptedFlow:
    """The flow with a file's adapter on it.

    Args:
        guidance: that it will be asked for; the flow's usual one where None.

    Raises:
        FileNotFoundError, CheckpointError: as `AdaptedFlow.load`.
        ValueError: for a guidance that the adapter has not learnt.
    """
    adapted = AdaptedFlow.load(mfm, flow)
    adapted.check(Conditions(guidance=flow.usual_guidance if guidance is None else guidance))
    return adapted
