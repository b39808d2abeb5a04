"""A deeper network that starts from another one's weights computes what that one computes, and can learn more."""

import pytest
import torch

from mfm_lightning.alignment import TargetSettings
from mfm_lightning.checkpoints import CheckpointError, load_model, save_model
from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import MFMPretraining, ValueEstimation
from mfm_lightning.networks import DiT, ValueDiT
from mfm_lightning.objectives import Objective, WeightedTerm


def network(depth: int, encoder_depth: int, seed: int = 0, **other) -> DiT:
    torch.manual_seed(seed)
    sizes = {"num_classes": 3, "guidance_scales": [2.0], "qk_norm": True, "flip_time": True} | other
    made = DiT(8, 4, 1, hidden_size=16, depth=depth, num_heads=2, encoder_depth=encoder_depth, **sizes)
    for p in made.parameters():  # all of it, what begins at zero, too
        torch.nn.init.normal_(p, std=0.2)
    return made.double()


def inputs(rows: int = 5) -> tuple:
    times = torch.rand(3, rows).double()
    s, u, t = times[:2].amin(0), times[:2].amax(0), times[2]
    x, x_t = torch.randn(2, rows, 1, 8, 8).double()
    return s, u, x, t, x_t, Conditions(label=torch.arange(rows) % 4, guidance=torch.full((rows,), 2.0).double())


@pytest.mark.parametrize(("depth", "encoder_depth"), [(3, 2), (5, 2), (6, 5), (7, 4)])
def test_it_computes_the_same(depth, encoder_depth):
    start, deeper = network(3, 2), network(depth, encoder_depth, seed=1)
    deeper.start_from(start)
    given = inputs()
    torch.testing.assert_close(deeper(*given), start(*given), atol=1e-14, rtol=0)
    deeper(*given).square().sum().backward()
    assert all(block.adaLN_modulation.projection.weight.grad.abs().sum() > 0 for block in deeper.blocks)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (network(2, 1), "depth 3 there, 2 here"),
        (network(4, 1), "depth 3 there, 4 here, encoder_depth 2 there, 1 here"),  # an encoder of fewer blocks
        (network(4, 3), None),
        (network(4, 4), "depth 3 there, 4 here"),  # no decoder for its block
        (network(4, 3, flip_time=False), "flip_time True there, False here"),
        (network(3, 2, qk_norm=False), "qk_norm rms there, False here"),
    ],
)
def test_what_has_no_place_is_refused(other, message, tmp_path):
    path = str(save_model(MetaFlowMap(network(3, 2).float()), tmp_path / "start.safetensors"))
    objective = Objective([WeightedTerm("data_diagonal")])
    if message is None:
        MFMPretraining(other, objective, initial=path)
        return
    with pytest.raises(
        CheckpointError, match=f"start.safetensors: another architecture than the network's: .*{message}"
    ):
        MFMPretraining(other, objective, initial=path)


def test_a_model_and_a_value_network_of_more_blocks_start_from_a_file(tmp_path):
    path = str(save_model(MetaFlowMap(network(3, 2).float()), tmp_path / "start.safetensors"))
    module = MFMPretraining(network(6, 4).float(), Objective([WeightedTerm("data_diagonal")]), initial=path)
    x, t, label = torch.randn(5, 1, 8, 8), torch.rand(5), torch.arange(5) % 4
    velocity = load_model(path).drift(t, x, label=label)
    torch.testing.assert_close(module.model.drift(t, x, label=label), velocity)
    value = ValueDiT(
        8, 4, 1, 16, 6, 2, num_classes=3, encoder_depth=4, qk_norm=True, guidance_scales=[2.0], flip_time=True
    )
    ValueEstimation(value, TargetSettings(path, {"name": "brightness"}), initial=path)
    last, rows = value.last_layer(), load_model(path).network.final_layer.linear
    with torch.no_grad():
        last.weight.copy_(rows.weight.mean(0, keepdim=True))
        last.bias.copy_(rows.bias.mean(0, keepdim=True))
    torch.testing.assert_close(-value(t, x, Conditions(label=label)), velocity.mean(dim=(1, 2, 3)))
