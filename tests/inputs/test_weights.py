"""Files of weights as training scripts, wrappers and downloads leave them, and files of ours."""

import contextlib
import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mfm_lightning.checkpoints import (
    CheckpointError,
    import_checkpoint,
    load_model,
    load_network,
    save_model,
    save_network,
)
from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT
from mfm_rewards.weights import load_state_dict, unwrapped
from tests.parity import NOT_IN_SHAPES, weights

# -- names


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.model.dit._orig_mod.{name}",
        lambda name: f"net.module.{name.replace('blocks.1.', 'blocks.1._orig_mod.')}",
        lambda name: f"_forward_module._fsdp_wrapped_module.{name}",
        lambda name: name.replace("attn.", "_checkpoint_wrapped_module.attn."),
        lambda name: f"student.{name}",
    ],
)  # fmt: skip
def test_what_wrappers_put_into_names_is_taken_out(tmp_path, wrap):
    state, x, t = weights("sit"), torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    torch.save({"model": {wrap(name): tensor for name, tensor in state.items()}}, tmp_path / "wrapped.pt")
    save_file(state, tmp_path / "plain.safetensors")
    found, plain = (
        import_checkpoint(tmp_path / name, "sit", **NOT_IN_SHAPES) for name in ("wrapped.pt", "plain.safetensors")
    )
    assert torch.equal(found.drift(t, x, label=3), plain.drift(t, x, label=3))


def test_of_several_networks_the_average_is_taken_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    state = weights("sit")
    average = {f"ema_model.{name}": tensor + 1 for name, tensor in state.items()}
    one = unwrapped({**{f"semantic.{k}": v for k, v in state.items()}, **average}, ["x_embedder.proj.weight"], "a.pt")
    assert torch.equal(one["x_embedder.proj.bias"], state["x_embedder.proj.bias"] + 1)
    assert "a.pt holds networks under 'ema_model.', 'semantic.': that under 'ema_model.' is taken" in caplog.text
    two = {f"{kind}.{name}": tensor for kind in ("student", "teacher") for name, tensor in state.items()}
    with pytest.raises(CheckpointError, match=r"b.pt holds several such networks, under 'student.', 'teacher.'"):
        unwrapped(two, ["x_embedder.proj.weight"], "b.pt")
    # what stands beside the network's own prefix is named
    unwrapped(
        {**{f"dit.{k}": v for k, v in state.items()}, "vgg.0.bias": torch.ones(1)}, ["x_embedder.proj.weight"], "c"
    )
    assert "c: 1 tensors beside those under 'dit.' are left out, first vgg.0.bias" in caplog.text


@pytest.mark.parametrize(
    ("content", "first"),
    [
        ({"model": {"w": 1.0}, "ema": {"w": 2.0}}, 2.0),
        ({"state_dict": {"w": 1.0}, "model_ema": {"w": 3.0}}, 3.0),
        ({"model_state_dict": {"w": 4.0}, "epoch": 3}, 4.0),
        ({"state_dict": {"model": {"w": 5.0}}}, 5.0),
        ({"module": {"w": 6.0}, "optimizer": {"state": {}}}, 6.0),
        ({"w": 7.0}, 7.0),
        ({"state_dict_ema": {"w": 8.0}, "state_dict": {"w": 1.0}}, 8.0),
        ({"weights_of_mine": {"w": 9.0}, "epoch": 3}, 9.0),
    ],
)  # fmt: skip
def test_the_weights_in_what_a_script_saved(tmp_path, content, first):
    def tensors(value):
        return {k: tensors(v) for k, v in value.items()} if isinstance(value, dict) else (
            torch.tensor(value) if isinstance(value, float) else value
        )  # fmt: skip

    torch.save(tensors(content), tmp_path / "a.pt")
    assert load_state_dict(tmp_path / "a.pt")["w"].item() == first


def test_files_that_hold_no_weights_say_what_they_are(tmp_path):
    def written(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    torch.save({"model": {}, "epoch": 3}, tmp_path / "nothing.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(weights("sit"), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    cases = {
        written("empty.pt", b""): "is empty",
        written("empty.safetensors", b""): "is empty",
        written("pointer.pt", pointer): "a pointer of git-lfs",
        written("pointer.safetensors", pointer): "a pointer of git-lfs",
        written("page.bin", b"\n<!DOCTYPE html><html>quota exceeded</html>"): "a web page",
        written("page.safetensors", b"<html><body>login</body></html>"): "a web page",
        written("cut.pt", whole[: len(whole) // 2]): "not a file of plain tensors",
        written("bytes.pt", b"\x00\x01\x02"): "not a file of plain tensors",
        written("few.safetensors", b"\x10"): "not a safetensors file",
        tmp_path / "nothing.pt": "holds no tensors by name, but model, epoch",
        tmp_path / "list.pt": "holds no tensors by name, but list",
        tmp_path: "no checkpoint at .*, but a folder",
    }
    for path, message in cases.items():
        with pytest.raises((CheckpointError, FileNotFoundError), match=message) as error:
            load_state_dict(path)
        assert str(path) in str(error.value)


# -- the null label


# -- QK-norm


# -- settings beside the weights


# -- files of ours


def test_a_file_is_checked_before_its_network_is_built(tmp_path, monkeypatch):
    """A small file whose config asks for a network of many gigabytes."""
    from mfm_lightning.networks.files import save_tensors

    model = MetaFlowMap(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=3, guidance_scales=()))
    path = save_model(model, tmp_path / "small.safetensors")
    assert torch.equal(load_model(path).network.pos_embed, model.network.pos_embed)
    built = []
    monkeypatch.setattr(nn.init, "xavier_uniform_", lambda w, *_, **__: built.append(w.numel() if not w.is_meta else 0))
    for change in ({"hidden_size": 32768, "num_heads": 2}, {"depth": 100_000_000}, {"num_classes": 2**31}):
        header = {"network": "DiT", "config": json.dumps({**model.network.config, **change})}
        save_tensors(model.network.state_dict(), tmp_path / "large.safetensors", header)
        with pytest.raises(CheckpointError, match=r"large\.safetensors"):
            load_model(tmp_path / "large.safetensors")
    assert not sum(built)
    for content in ("[1]", "{", json.dumps({"hidden_size": "wide"})):
        save_tensors(model.network.state_dict(), tmp_path / "odd.safetensors", {"network": "DiT", "config": content})
        with pytest.raises(CheckpointError, match=r"odd\.safetensors"):
            load_model(tmp_path / "odd.safetensors")


def test_numbers_that_are_none_are_refused(tmp_path):
    model = MetaFlowMap(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=3, guidance_scales=()))
    model.network.final_layer.linear.bias.data[2] = float("nan")
    with pytest.raises(CheckpointError, match=r"nan.safetensors.*final_layer.linear.bias"):
        load_model(save_model(model, tmp_path / "nan.safetensors"))


@pytest.mark.parametrize("guidance", [7.0, 2.4, 0.5])
def test_an_unknown_guidance_is_refused_everywhere(guidance):
    model = MetaFlowMap(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=3, guidance_scales=(2.5,)))
    x, given = torch.randn(2, 1, 8, 8), Conditions(label=1, guidance=guidance)
    for call in (
        lambda: model.drift(0.3, x, given),
        lambda: model.sample_posterior(x, 0.3, conditions=given),
        lambda: model.velocity(0.1, 0.3, x, 0.2, x, given),
    ):
        with pytest.raises(ValueError, match=f"guidance {guidance:g} is not a scale"):
            call()


def test_a_network_of_the_users_own_may_have_large_numbers_in_its_config(tmp_path, monkeypatch):
    (tmp_path / "seeded_net.py").write_text(
        "import torch\n"
        "class Seeded(torch.nn.Module):\n"
        "    def __init__(self, width, seed):\n"
        "        super().__init__()\n"
        "        self.config = {'width': width, 'seed': seed}\n"
        "        self.layer = torch.nn.Linear(width, width)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from seeded_net import Seeded

    network = Seeded(4, 20240101)
    found = load_network(save_network(network, tmp_path / "own.safetensors"))
    assert torch.equal(found.layer.weight, network.layer.weight)
    # a file without most of the network is refused before it is built
    header = {"network": "DiT", "config": json.dumps(DiT(8, 4, 1, 16, 2, 2, 1, 10).config | {"depth": 40})}
    save_file({"nothing": torch.ones(1000)}, tmp_path / "less.safetensors", header)
    with pytest.raises(CheckpointError, match=r"less.safetensors does not hold the network of its config: \d+ names"):
        load_network(tmp_path / "less.safetensors")


def test_damaged_files_of_weights_are_named(tmp_path):
    """Bytes flipped all over, with a seed: whatever torch raises of them."""
    import random

    from mfm_lightning.training.run_checkpoints import check_checkpoint

    torch.save({"state_dict": {"w": torch.ones(4)}, "epoch": 1}, tmp_path / "whole.ckpt")
    whole, path, draw = (tmp_path / "whole.ckpt").read_bytes(), tmp_path / "flipped.ckpt", random.Random(0)
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        for read in (load_state_dict, check_checkpoint):
            with contextlib.suppress(CheckpointError):  # nothing else
                read(path)


def test_the_same_name_with_and_without_a_wrapper_is_refused():
    state = {"x.w": torch.ones(1), "_orig_mod.x.w": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"a.pt holds x\.w with and without a wrapper"):
        unwrapped(state, ["x.w"], "a.pt")
