"""The UNet: its sizes, what it ignores at the start, its files, and a fit of it from the command line."""

import json

import pytest
import torch
from safetensors import safe_open

from mfm_lightning.checkpoints import load_model, save_model
from mfm_lightning.commands.main import run
from mfm_lightning.conditions import Conditions
from mfm_lightning.data import DigitsDataModule
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import TrainingExecution
from mfm_lightning.networks import UNet
from mfm_lightning.networks.files import load_network
from mfm_lightning.networks.unet_sizes import architecture
from mfm_lightning.tangents import velocity_and_jvp

TINY = {"channels": 8, "norm_groups": 4, "num_heads": 2, "num_classes": 5, "guidance_scales": [2.5]}


def tiny(input_size=7, in_channels=2, channel_multipliers=(1, 2, 2), attention_resolutions=(4,), **more) -> MetaFlowMap:
    """A UNet of 7, 4 and 2 pixels a side."""
    torch.manual_seed(0)
    sizes = (input_size, in_channels, TINY["channels"], channel_multipliers, 1, attention_resolutions)
    return MetaFlowMap(UNet(*sizes, **{k: v for k, v in TINY.items() if k != "channels"}, **more))


def trained(model: MetaFlowMap) -> MetaFlowMap:
    """As after training: no weight is zero."""
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def inputs(model: MetaFlowMap, B: int = 6):
    torch.manual_seed(1)
    s, u = torch.rand(2, B).sort(dim=0).values
    x, x_t = torch.randn(2, B, *model.state_shape)
    given = Conditions(label=torch.arange(B) % 6, guidance=torch.tensor([2.5, 1.0]).repeat(B // 2))
    return s, u, x, torch.rand(B), x_t, given


def test_size_of_the_paper():
    network = UNet.base((1, 28, 28), num_classes=10)
    assert 8e6 < sum(p.numel() for p in network.parameters()) < 10e6  # 9 M (F.2)
    assert network.config == UNet(28, 1, num_classes=10).config  # the constructor's defaults


@pytest.mark.parametrize(
    ("shape", "levels", "attention"),
    [
        ((1, 4, 4), 1, [4]),
        ((1, 8, 8), 2, [8, 4]),
        ((1, 28, 28), 3, [14, 7]),
        ((3, 32, 32), 4, [16, 8, 4]),
        ((3, 64, 64), 4, [16, 8]),
    ],
)
def test_sizes_by_name_follow_the_state(shape, levels, attention):
    counts = []
    for size in (UNet.small, UNet.base, UNet.large):
        with torch.device("meta"):
            network = size(shape, num_classes=3, guidance_scales=[2.0])
        assert network.state_shape == shape
        assert len(network.config["channel_multipliers"]) == levels
        assert network.config["attention_resolutions"] == attention
        assert (network.num_classes, network.guidance_scales) == (3, (2.0,))
        counts.append(sum(p.numel() for p in network.parameters()))
    assert counts[0] < counts[1] < counts[2]


def test_attention_where_it_is_not_given():
    given = {k: v for k, v in TINY.items() if k != "attention_resolutions"}
    network = UNet(20, 1, channel_multipliers=(1, 1, 1), **given)
    assert network.config["attention_resolutions"] == [10, 5]
    assert [block.attention is not None for level in network.down for block in level.blocks] == [False, True, True]


@pytest.mark.parametrize("size", [2, 5, 7, 9, 14, 28])
def test_any_size_comes_back(size):
    levels = 2 if size == 2 else 3
    model = trained(tiny(size, channel_multipliers=[1] * levels, attention_resolutions=[]))
    s, u, x, t, x_t, given = inputs(model)
    assert model.velocity(s, u, x, t, x_t, given).shape == (6, 2, size, size)


def test_at_first_the_output_is_zero():
    model = tiny()
    assert torch.equal(model.velocity(*inputs(model)), torch.zeros(6, 2, 7, 7))


def test_condition_is_inert_at_the_start_and_is_seen_after():
    model = trained(tiny())
    s, u, x, t, x_t, given = inputs(model)
    label = given.label

    def velocity(s, u, t, x_t, guidance):
        with torch.no_grad():
            return model.velocity(s, u, x, t, x_t, Conditions(label=label, guidance=guidance))

    def changed():
        """Which of t, x_t and guidance the output depends on."""
        reference = velocity(s, u, t, x_t, 1.0)
        others = [(s, u, 1 - t, x_t, 1.0), (s, u, t, x_t.flip(0), 1.0), (s, u, t, x_t, 2.5)]
        return [not torch.equal(velocity(*other), reference) for other in others]

    assert changed() == [True] * 3
    model.network.reset_condition()
    assert changed() == [False] * 3
    # of the inner times, the way down sees s alone and the way up u alone, as in the DiT
    seen = []
    for block in (model.network.down[0].blocks[0], model.network.middle[0], model.network.up[0].blocks[0]):
        block.register_forward_hook(lambda block, given, output: seen.append(given[1].value.detach()))
    velocity(s, u, t, x_t, 1.0)
    velocity(s, 0 * u, t, x_t, 1.0)
    velocity(0 * s, u, t, x_t, 1.0)
    (down, middle, up), (down_u, middle_u, up_u), (down_s, middle_s, up_s) = seen[:3], seen[3:6], seen[6:]
    assert torch.equal(down, down_u)
    assert torch.equal(middle, middle_u)
    assert torch.equal(up, up_s)
    assert not any(torch.equal(*pair) for pair in ((down, down_s), (middle, middle_s), (up, up_u)))


def test_gradients_reach_all_parameters():
    model = trained(tiny())
    model.velocity(*inputs(model)).square().mean().backward()
    nothing = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert nothing == []


def test_inert_parts_of_a_trained_flow_have_gradients():
    network = (model := trained(tiny())).network
    network.reset_condition()
    model.velocity(*inputs(model)).square().mean().backward()
    zeros = [network.condition_input, *[e.second for e in (network.condition_time, network.encoder_u)]]
    zeros += [network.decoder_s.second, network.guidance_embedding]
    for layer in zeros:
        assert layer.weight.abs().max() == 0
        assert layer.weight.grad.abs().max() > 0


def test_checkpointed_blocks_leave_loss_and_gradients():
    model = trained(tiny())
    s, u, x, t, x_t, given = inputs(model)

    def step():
        model.zero_grad()
        value, tangent = velocity_and_jvp(model, s, u, x, t, x_t, (torch.ones(6), torch.zeros(6), x_t), given)
        (value - tangent).square().mean().backward()
        return [value.detach(), tangent, *[p.grad.clone() for p in model.parameters()]]

    expected = step()
    TrainingExecution(checkpoint_activations=True).prepare(model.network)
    for ours, reference in zip(step(), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_every_block_is_compiled(monkeypatch):
    """Dynamo gives up after 8 versions of a function, and a UNet has more kinds of blocks."""
    graphs, compiled = [], torch.nn.Module.compile
    backend = lambda graph, inputs: graphs.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled(self, backend=backend))
    model = trained(tiny(8, 1, (1, 2, 3, 4), ()))
    s, u, x, t, x_t, given = inputs(model)
    tangents = (torch.ones(6), torch.zeros(6), x_t)
    expected = velocity_and_jvp(model, s, u, x, t, x_t, tangents, given)
    with torch._dynamo.config.patch(recompile_limit=8):
        TrainingExecution(compile=True).prepare(model.network)
        found = velocity_and_jvp(model, s, u, x, t, x_t, tangents, given)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    assert len(graphs) >= len(model.network.regions) - 2 > 8  # two are alike


def test_save_and_load_are_exact(tmp_path):
    model = trained(tiny())
    path = save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(path)
    assert torch.equal(loaded.velocity(*inputs(model)), model.velocity(*inputs(model)))
    network = load_network(path)
    assert type(network) is UNet
    assert network.config == model.network.config
    with safe_open(path, "pt") as file:
        assert file.metadata()["network"] == "UNet"
        assert json.loads(file.metadata()["config"])["attention_resolutions"] == [4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 10}, "channels 10 must be a multiple of norm_groups 4"),
        ({"num_heads": 3}, "the 16 channels of the level of size 4 must be a multiple of num_heads 3"),
        (
            {"attention_resolutions": [5]},
            r"attention_resolutions \[5\] are no sizes of a level: .* \[7, 4\]",
        ),
        ({"channel_multipliers": []}, r"channel_multipliers \[\] must be one number or more"),
        ({"channel_multipliers": [1, 0]}, r"channel_multipliers \[1, 0\] must be one number or more, each 1 or more"),
        ({"channel_multipliers": [1] * 5}, "input_size 7 is a single pixel after 4 levels"),
        ({"num_blocks": 0}, "num_blocks 0 must be at least 1"),
        ({"num_classes": -1}, "num_classes -1 must be at least 0"),
        ({"guidance_scales": [1.0]}, r"guidance_scales \[1.0\] must all be above 1"),
    ],
)
def test_wrong_sizes_are_refused_before_building(options, message, monkeypatch):
    monkeypatch.setattr(torch.nn.Conv2d, "__init__", lambda *_, **__: pytest.fail("a layer was built"))
    given = {
        "input_size": 7,
        "in_channels": 1,
        "channel_multipliers": [1, 2],
        "attention_resolutions": [4],
        **TINY,
        **options,
    }
    with pytest.raises(ValueError, match=message):
        UNet(**given)


def test_wrong_shapes_and_names_are_refused():
    with pytest.raises(ValueError, match=r"state_shape \(1, 28, 20\): a UNet takes square images"):
        UNet.small((1, 28, 20))
    with pytest.raises(ValueError, match=r"state_shape \(2,\): a UNet takes square images"):
        UNet.small((2,))
    with pytest.raises(ValueError, match="unknown UNet size 'huge': expected one of small, base, large"):
        architecture("huge", (1, 28, 28))


NETWORK = {"input_size": 8, "in_channels": 1, "channels": 8, "channel_multipliers": [1, 2], "num_blocks": 1}
NETWORK |= {"attention_resolutions": [4], "norm_groups": 2, "num_heads": 2, "num_classes": 10}


def fit_digits(network: dict, **options) -> MetaFlowMap:
    """What `mfm fit --config digits/flow` leaves with another network."""
    options |= {"ema.decay": 0.8, "model.init_args.network": json.dumps(network)}
    options |= {"trainer.accelerator": "cpu", "trainer.limit_val_batches": 0, "trainer.enable_progress_bar": False}
    options |= {"trainer.default_root_dir": "unet", "data.init_args.batch_size": 64}
    run(["fit", "--config", "digits/flow", *[f"--{name}={value}" for name, value in options.items()]])
    return load_model("unet/model.safetensors")


def test_fit_of_digits_from_the_command_line(tmp_path, monkeypatch):
    """The flow-matching error falls below 0.8 of that of the best velocity that ignores x, E[x1 | label] - E[x0]."""
    monkeypatch.chdir(tmp_path)
    optimization = {"warmup_steps": 5, "learning_rate": 1e-2}
    model = fit_digits(
        {"class_path": "mfm_lightning.networks.UNet", "init_args": NETWORK},
        **{"trainer.max_steps": 40, "model.init_args.optimization": json.dumps(optimization)},
    )
    assert isinstance(model.network, UNet)
    assert {k: model.network.config[k] for k in NETWORK} == NETWORK

    data = DigitsDataModule()
    data.setup()
    x1, label = data.splits["test"]
    torch.manual_seed(0)
    x0, t = torch.randn_like(x1), torch.rand(len(x1))
    x, velocity = torch.lerp(x0, x1, t[:, None, None, None]), x1 - x0
    with torch.no_grad():
        error = (model.drift(t, x, label=label) - velocity).square().mean()
    means = torch.stack([x1[label == k].mean(0) for k in range(10)])
    assert error < 0.8 * (means[label] - velocity).square().mean()


def test_size_by_name_in_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = {"class_path": "mfm_lightning.networks.UNet.small", "init_args": {"state_shape": [1, 8, 8]}}
    network["init_args"]["num_classes"] = 10
    model = fit_digits(network, **{"trainer.max_steps": 1})
    assert model.network.config == UNet.small((1, 8, 8), num_classes=10).config
