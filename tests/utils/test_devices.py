"""Frozen parts go where Lightning will put the module: it moves the module itself only after `setup`."""

from types import SimpleNamespace

import pytest
import torch

from mfm_lightning.alignment.target import TargetSettings
from mfm_lightning.checkpoints import save_model
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import MFMPretraining, RewardAlignment, RewardFinetuning, ValueEstimation
from mfm_lightning.networks import DiT, ValueDiT
from mfm_lightning.networks.decoders import PixelDecoder
from mfm_lightning.objectives import Objective
from mfm_lightning.objectives.teachers import ModelTeacher
from mfm_rewards import build


def network() -> DiT:
    return DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, guidance_scales=())


@pytest.mark.parametrize("job", ["pretraining", "value", "finetuning", "alignment"])
def test_frozen_parts_are_moved_in_setup(tmp_path, job):
    """The strategy's device stands for a GPU: meta, the only other device that every machine has."""
    file = str(save_model(MetaFlowMap(network()), tmp_path / "model.safetensors"))
    target = TargetSettings(file, {"name": "colour", "target": [0.5]}, PixelDecoder())
    if job == "pretraining":
        module = MFMPretraining(network(), Objective(), ModelTeacher(MetaFlowMap(network())))
        frozen = [module.teacher.model]
    elif job == "value":
        module = ValueEstimation(ValueDiT(8, 4, 1, 16, 1, 2, num_classes=10), target)
        frozen = [module.target.model, module.target.reward]
    elif job == "finetuning":
        module = RewardFinetuning(target)
        frozen = [module.target.model, module.target.reward, module.base]
    else:
        module = RewardAlignment(target)
        frozen = [module.target.model, module.target.reward]
    strategy = SimpleNamespace(root_device=torch.device("meta"))
    module._trainer = SimpleNamespace(
        strategy=strategy,
        datamodule=None,
        default_root_dir=str(tmp_path),
        is_global_zero=True,
        world_size=1,
        precision="32-true",
    )
    assert build(target.reward).target.device.type == "cpu"
    module.setup("predict" if job == "alignment" else "fit")
    for part in frozen:
        assert {t.device.type for t in (*part.parameters(), *part.buffers())} == {"meta"}
