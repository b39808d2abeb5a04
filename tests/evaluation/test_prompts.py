"""What prompts are measured by is checked before a run."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from mfm_lightning.backbones import FlowAdapter
from mfm_lightning.evaluation import PromptEvaluation
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT
from tests.backbones import tiny
from tests.backbones.fast import frozen  # noqa: F401


def module_of(network) -> Any:
    data = SimpleNamespace(splits={}, decode=lambda x: x, num_classes=2)
    return cast(
        Any, SimpleNamespace(model=MetaFlowMap(network), trainer=SimpleNamespace(datamodule=data, testing=False))
    )


def test_settings_that_do_not_fit_are_refused_before_the_run(tmp_path):
    tiny.sd3().save_pretrained(tmp_path / "sd3")
    module = module_of(FlowAdapter(str(tmp_path / "sd3"), rank=2, image_size=8, guidance_scales=[3.0]))
    PromptEvaluation(["a", "b"], adapter_guidance=3.0).check(module)
    with pytest.raises(ValueError, match=r"adapter_guidance 2 is not a scale that the network learns: \[3\.0\]"):
        PromptEvaluation(["a", "b"], adapter_guidance=2.0).check(module)
    without = module_of(FlowAdapter(str(tmp_path / "sd3"), rank=2, image_size=8))
    with pytest.raises(ValueError, match=r"adapter_guidance 3 .* learns: \[\]"):  # samples would be without guidance
        PromptEvaluation(["a", "b"], adapter_guidance=3.0).check(without)
    for labels in ([0, 2], [-1, 1]):
        with pytest.raises(ValueError, match="the data have 2 classes, from 0"):
            PromptEvaluation(["a", "b"], labels).check(module)
    with pytest.raises(ValueError, match="not for a DiT"):
        PromptEvaluation(["a", "b"]).check(module_of(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=0)))
