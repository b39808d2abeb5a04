"""Parts of a flow and rewards on devices of their own. There is no second device that computes here: the device "meta"
has tensors without content, from which nothing can be copied back, and accelerate's disk offloading runs as it is."""

import pytest
import torch

from mfm_lightning.backbones import load_flow
from mfm_lightning.backbones.placement import Placement
from mfm_lightning.conditions import Conditions
from mfm_lightning.modules import PromptAlignment
from mfm_rewards import build, evaluate, execution
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    tiny.sd3(**encoders.of_sd3(folder / "words")).save_pretrained(folder / "pipe")
    return folder / "pipe"


def devices_of(module: torch.nn.Module) -> set[str]:
    return {str(p.device) for p in module.parameters()}


def given(num: int) -> Conditions:
    noise = torch.Generator().manual_seed(1)
    text, pooled = torch.randn(num, 5, tiny.TEXT, generator=noise), torch.randn(num, tiny.POOLED, generator=noise)
    return Conditions(text=text, pooled=pooled)


def test_parts_stay_where_they_are_and_inputs_come_to_them(pipeline, monkeypatch):
    flow = load_flow(pipeline, 16, "float32", max_rows=2, devices={"transformer": "meta", "text_encoders": "cpu"})
    assert devices_of(flow.transformer) == {"meta"}
    assert devices_of(flow.decoder) == {"cpu"}
    flow.to("cpu")  # as a trainer does; without content nothing could be moved back
    torch.nn.ModuleList([flow]).to("cpu")
    assert devices_of(flow.transformer) == {"meta"}
    seen = []

    def velocity(t, x, conditions):
        seen.append({str(value.device) for value in (t, x, conditions.text, conditions.pooled)})
        return torch.ones(x.shape)  # as a GPU's, which can be copied back

    monkeypatch.setattr(flow, "_velocity", velocity)
    found = flow.drift(0.5, torch.zeros(3, *flow.state_shape), given(3))
    assert seen == [{"meta"}] * 2  # in parts of two
    assert found.device.type == "cpu"
    other = load_flow(pipeline, 16, "float32", devices={"vae": "meta"}).to("cpu")
    assert devices_of(other.transformer) == {"cpu"}
    assert devices_of(other.decoder) == {"meta"}

    def decode(latents, return_dict):
        seen.append(str(latents.device))
        return (torch.zeros(len(latents), 3, 16, 16),)

    monkeypatch.setattr(other.decoder.vae, "decode", decode)
    assert other.decoder(torch.zeros(1, *other.state_shape)).device.type == "cpu"
    assert seen[-1] == "meta"


def test_a_transformer_on_disk_in_part_is_the_same_flow(pipeline, tmp_path):
    """accelerate's hooks bring the second block from the disk at each evaluation; also with a gradient."""
    plain = load_flow(pipeline, 16, "float32")
    modules = dict.fromkeys((name for name, _ in plain.transformer.named_children()), "cpu")
    del modules["transformer_blocks"]
    modules |= {"transformer_blocks.0": "cpu", "transformer_blocks.1": "disk"}
    spread = load_flow(pipeline, 16, "float32", devices={"transformer": modules, "offload_folder": str(tmp_path)})
    assert devices_of(spread.transformer) == {"cpu", "meta"}
    assert list(tmp_path.glob("transformer_blocks.1.*"))
    spread.to("cpu")
    x = torch.randn(3, *plain.state_shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.1, 0.5, 0.9])
    wanted = plain.drift(times, x, given(3))
    torch.testing.assert_close(spread.drift(times, x, given(3)), wanted, rtol=0, atol=0)
    gradients = []
    for flow in (plain, spread):
        state = x.clone().requires_grad_()
        gradients += torch.autograd.grad(flow.drift(times, state, given(3)).square().sum(), state)
    torch.testing.assert_close(*gradients)
    whole = load_flow(pipeline, 16, "float32", devices={"transformer": "auto"})  # all on the CPU, which is all there is
    torch.testing.assert_close(whole.drift(times, x, given(3)), wanted, rtol=0, atol=0)


class Bright(torch.nn.Module):
    """Its weights are where it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[str] = []

    def forward(self, images, labels):
        self.seen += [str(images.device), str(labels.device)]
        return (self.weight * images).mean(dim=(1, 2, 3)) + labels


def test_a_reward_stays_on_its_device(monkeypatch):
    inner = Bright()
    reward = build({"name": "placed", "reward": inner, "device": "cpu"})
    assert reward.name == "Bright"
    assert (reward.needs, reward.differentiable) == (("images", "labels"), True)
    reward.to("meta")
    torch.nn.ModuleList([reward]).to("meta")
    assert devices_of(reward) == {"cpu"}
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    values = evaluate(reward, images, labels=torch.tensor([0, 1]))
    torch.testing.assert_close(values, images.mean(dim=(1, 2, 3)) + torch.tensor([0, 1]))
    assert torch.autograd.grad(values.sum(), images)[0].device.type == "cpu"
    # images and labels are brought to it
    away = build({"name": "placed", "reward": Bright(), "device": "meta"})
    monkeypatch.setattr(away, "_values", lambda images, context: [torch.zeros(len(images))] if {
        str(value.device) for value in (images, *context)} == {"meta"} else [])  # fmt: skip
    assert away(images, torch.tensor([0, 1])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ({"unet": "cpu"}, "devices: no part 'unet': expected some of transformer, vae, text_encoders"),
        ({"vae": "cuda:77"}, "devices, vae: device 'cuda:77' cannot be used here"),
        ({"transformer": "everywhere"}, "devices, transformer: device 'everywhere' cannot be used here"),
        ({"transformer": {"proj_out": "cuda:77"}}, r"devices, transformer\.proj_out: device 'cuda:77' cannot be used"),
        ({"transformer": {"proj_out": "disk"}}, "modules of the transformer on disk need an offload_folder"),
    ],
)
def test_wrong_devices_are_refused_before_anything_is_read(devices, message):
    with pytest.raises(ValueError, match=message):
        load_flow("none/here", devices=devices)


def test_what_does_not_go_together_is_refused(pipeline):
    with pytest.raises(ValueError, match=r"encoder_device cpu and devices\.text_encoders: give one of them"):
        load_flow(pipeline, encoder_device="cpu", devices={"text_encoders": "cpu"})
    with pytest.raises(ValueError, match="a transformer that is spread by devices goes with none of random_seed"):
        load_flow(pipeline, devices={"transformer": "auto"}, random_seed=0)
    with pytest.raises(ValueError, match="device 'cuda:77' cannot be used here"):
        build({"name": "placed", "reward": "brightness", "device": "cuda:77"})
    flow = load_flow(pipeline, 16, "float32", devices={"transformer": "cpu"})
    with pytest.raises(ValueError, match=r"flow\.devices: an mfm draws on the device of the states"):
        PromptAlignment(flow, "brightness", mfm="none.safetensors")
    assert not Placement.of({"vae": "cpu"}).names_gpus
    assert Placement(vae=torch.device("cuda:1")).names_gpus
    assert Placement.of({"transformer": "balanced"}).names_gpus


def test_bf16_without_a_gpu_is_said_to_be_slow_where_the_cpu_multiplies_none(pipeline, monkeypatch, caplog):
    monkeypatch.setattr(execution, "cpu_multiplies_bf16", lambda: False)
    for gpu, kind, said in ((False, "bfloat16", 1), (False, "float32", 0), (True, "bfloat16", 0)):
        execution.warn_if_bf16_is_slow.cache_clear()
        monkeypatch.setattr("torch.accelerator.is_available", lambda gpu=gpu: gpu)
        load_flow(pipeline, 16, kind)
        assert caplog.text.count("bf16 is slower than fp32 on this CPU") == said
        caplog.clear()
    execution.warn_if_bf16_is_slow.cache_clear()
