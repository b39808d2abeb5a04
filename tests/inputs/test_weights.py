"""Files of weights as training scripts, wrappers and downloads leave them."""

import argparse
import contextlib
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import mfm_rewards
from mfm_lightning.checkpoints import (
    CheckpointError,
    import_checkpoint,
    load_model,
    load_network,
    save_model,
    save_network,
)
from mfm_lightning.commands.main import run
from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT
from mfm_lightning.networks.dit import Attention
from mfm_lightning.networks.dual import Dual
from mfm_lightning.networks.vae import load_vae
from mfm_rewards.weights import load_state_dict, unwrapped
from tests.parity import NOT_IN_SHAPES, weights
from tests.tiny_rewards import openai_clip


def labels(rows: int) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))


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


def sit(tmp_path, rows, args=None):
    state = {**weights("sit"), "y_embedder.embedding_table.weight": labels(rows)}
    torch.save({"ema": state, **({} if args is None else {"args": args})}, tmp_path / "sit.pt")
    return tmp_path / "sit.pt"


@pytest.mark.parametrize(
    ("rows", "given", "args", "classes"),
    [
        (11, None, None, 10),
        (11, 10, None, 10),
        (10, 10, None, 10),
        (1, 1, None, 1),
        (2, 1, None, 1),
        (7, 7, None, 7),
        (10, None, argparse.Namespace(num_classes=10), 10),
        (10, None, {"num_classes": 9}, 9),
    ],
)
def test_a_table_without_the_null_label_gets_one(tmp_path, caplog, rows, given, args, classes):
    model = import_checkpoint(sit(tmp_path, rows, args), "sit", num_classes=given, **NOT_IN_SHAPES)
    table, expected = model.network.label_embedding.weight, labels(rows)
    assert model.num_classes == classes
    assert torch.equal(table[: min(rows, classes + 1)], expected[: classes + 1])
    assert ("has no row of the null label" in caplog.text) == (rows == classes)
    if rows == classes:
        torch.testing.assert_close(table[classes], expected.mean(dim=0))
    x = torch.randn(1, 4, 8, 8)
    assert torch.isfinite(model.drift(0.3, x)).all()  # the null label


@pytest.mark.parametrize("rows", [1, 2, 10, 1000])
def test_where_rows_do_not_tell_it_is_asked_for(tmp_path, rows, capsys):
    with pytest.raises(CheckpointError, match=rf"{rows} classes without the null label .*--num-classes {rows} or"):
        run(["import", str(sit(tmp_path, rows)), "--source", "sit", "--num-heads", "4", "--encoder-depth", "3",
             "--output", str(tmp_path / "out.safetensors")])  # fmt: skip
    with pytest.raises(CheckpointError, match=f"has {rows} rows: expected 20 classes"):
        import_checkpoint(sit(tmp_path, rows), "sit", num_classes=20, **NOT_IN_SHAPES)


# -- QK-norm


def test_qk_norm_is_the_releases(tmp_path):
    """RMS over each head with one scale, eps 1e-6, against attention written out in float64."""
    torch.manual_seed(0)
    attention = Attention(32, 4, "rms").double()
    assert {"q_norm.scale", "k_norm.scale"} < set(attention.state_dict())
    for p in attention.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 5, 32, dtype=torch.float64) * torch.tensor([1.0, 1e-4])[:, None, None]

    q, k, v = F.linear(x, attention.qkv.weight, attention.qkv.bias).reshape(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)
    q, k = (
        y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.scale
        for y, norm in ((q, attention.q_norm), (k, attention.k_norm))
    )
    mixed = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v
    expected = F.linear(mixed.transpose(1, 2).reshape(2, 5, 32), attention.proj.weight, attention.proj.bias)
    torch.testing.assert_close(attention(Dual(x)).value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_weights_with_qk_norm_are_imported_with_their_norm(tmp_path, kind):
    """The release's (`scale`), and those of timm's attention (`weight`, `bias`)."""
    state = weights("sit")
    for i in range(4):
        for norm in "qk":
            names = ("scale",) if kind == "rms" else ("weight", "bias")
            state |= {f"blocks.{i}.attn.{norm}_norm.{name}": torch.randn(16) for name in names}
    torch.save(state, tmp_path / "a.pt")
    model = import_checkpoint(tmp_path / "a.pt", "sit", encoder_depth=3)
    assert (model.network.config["qk_norm"], model.network.config["num_heads"]) == (kind, 4)
    loaded, x = load_model(save_model(model, tmp_path / "ours.safetensors")), torch.randn(2, 4, 8, 8)
    assert torch.equal(loaded.drift(0.3, x, label=1), model.drift(0.3, x, label=1))


def test_an_unknown_qk_norm_is_refused():
    with pytest.raises(ValueError, match=r"qk_norm 'batch': expected true or 'rms'"):
        DiT(8, 4, 1, 16, 2, 2, 1, qk_norm="batch")


# -- settings beside the weights


def clip_folder(tmp_path, model_cfg=None, preprocess=None):
    torch.save(openai_clip(1).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    if model_cfg is not None:
        content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess or {}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    return str(tmp_path / "open_clip_pytorch_model.bin")


SIZES = {"embed_dim": 48, "vision_cfg": {"width": 64, "head_width": 32}, "text_cfg": {"width": 64, "heads": 2}}


def test_open_clips_config_beside_the_weights_counts(tmp_path, caplog):
    reward = mfm_rewards.build("clip_score", weights=clip_folder(tmp_path, SIZES))
    vision, text = reward.clip.config.vision_config, reward.clip.config.text_config
    assert (vision.hidden_act, text.hidden_act) == ("gelu", "gelu")
    assert (vision.num_attention_heads, text.num_attention_heads) == (2, 2)
    quick = mfm_rewards.build("clip_score", weights=clip_folder(tmp_path, {**SIZES, "quick_gelu": True}))
    assert quick.clip.config.vision_config.hidden_act == "quick_gelu"
    assert not caplog.text
    said = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 1.0]}
    other = mfm_rewards.build("clip_score", weights=clip_folder(tmp_path, SIZES, said))
    grey = other.preprocess(torch.full((1, 3, 40, 40), 0.75))
    torch.testing.assert_close(grey[0, :, 0, 0], torch.tensor([1.0, 0.5, 0.25]))


def test_a_guessed_activation_and_anothers_config_are_said(tmp_path, caplog):
    mfm_rewards.build("clip_score", weights=clip_folder(tmp_path))
    assert "no config beside it says its activation, quick_gelu is taken" in caplog.text
    caplog.clear()
    mfm_rewards.build("clip_score", weights=clip_folder(tmp_path), hidden_act="gelu")
    assert not caplog.text
    mfm_rewards.build("clip_score", weights=clip_folder(tmp_path, {**SIZES, "embed_dim": 512}))
    assert "is of other weights than open_clip_pytorch_model.bin (embed_dim 512, in the weights 48)" in caplog.text
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(mfm_rewards.RewardError, match=r"open_clip_config.json is no JSON"):
        mfm_rewards.build("clip_score", weights=clip_folder(tmp_path))


@pytest.mark.parametrize("setting", ["latents_mean", "latents_std", "shift_factor"])
def test_a_vae_that_shifts_its_latents_is_refused(tmp_path, setting):
    from diffusers import AutoencoderKL

    value = 0.1 if setting == "shift_factor" else [0.1] * 4
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, **{setting: value}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has {setting} .* in its config.json: only a scale"):
        load_vae(str(tmp_path))


# -- files of ours


def test_a_file_is_checked_before_its_network_is_built(tmp_path, monkeypatch):
    """A small file whose config asks for a network of many gigabytes."""
    from mfm_lightning.checkpoints.files import save_tensors

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


def small_vae(folder):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(folder)
    return folder


def changed_vae(folder, change, name="diffusion_pytorch_model.safetensors"):
    file = small_vae(folder) / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    file.unlink()
    change(state)
    save_file(state, folder / name, {"format": "pt"})
    return str(folder)


def test_weights_of_a_vae_that_diffusers_would_make_up_are_refused(tmp_path, caplog):
    """DisCo#100, diffusers#3578: a VAE with missing weights was run with random ones."""
    for name, change, message in (
        ("missing", lambda s: s.pop("decoder.conv_in.weight"), "1 weights are not in its file, first decoder.conv_in"),
        ("shape", lambda s: s.update({"encoder.conv_in.bias": torch.ones(4)}), "cannot be read: .*expected shape"),
        ("nan", lambda s: s["encoder.conv_in.bias"].fill_(float("inf")), "not finite, first in encoder.conv_in.bias"),
        ("empty", lambda s: s.clear(), "weights are not in its file|cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_vae(changed_vae(tmp_path / name, change))
    changed_vae(tmp_path / "cut", lambda s: None)
    file = tmp_path / "cut/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"the VAE in .*cut cannot be read"):
        load_vae(str(tmp_path / "cut"))
    caplog.clear()
    load_vae(changed_vae(tmp_path / "more", lambda s: s.update({"discriminator.bias": torch.ones(1)})))
    assert "1 weights are no AutoencoderKL's and left out, first discriminator.bias" in caplog.text


def test_a_vae_in_the_folder_of_a_pipeline_of_one_variant_or_without_a_scale(tmp_path, caplog):
    """diffusers#2177 (a pipeline's folder), #6923 (SDXL's scale taken for SD's)."""
    caplog.set_level(logging.INFO)
    expected = load_vae(str(small_vae(tmp_path / "pipeline/vae"))).state_dict()["encoder.conv_in.weight"]
    found = load_vae(str(tmp_path / "pipeline")).state_dict()["encoder.conv_in.weight"]
    assert torch.equal(found, expected)
    assert "of the pipeline in" in caplog.text
    half = changed_vae(tmp_path / "half", lambda s: None, "diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(load_vae(half).state_dict()["encoder.conv_in.weight"], expected)
    assert "diffusion_pytorch_model.fp16.safetensors is taken" in caplog.text
    caplog.clear()
    config = json.loads((tmp_path / "pipeline/vae/config.json").read_text())
    (tmp_path / "pipeline/vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.13025}))
    assert load_vae(str(tmp_path / "pipeline")).config["scaling_factor"] == 0.13025
    assert "scaling_factor" not in caplog.text
    del config["scaling_factor"]
    (tmp_path / "pipeline/vae/config.json").write_text(json.dumps(config))
    load_vae(str(tmp_path / "pipeline"))
    assert "gives no scaling_factor, 0.18215 is taken" in caplog.text
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="no VAE at"):
        load_vae(str(tmp_path / "none"))


def test_a_folder_of_open_clips_is_read(tmp_path):
    """open_clip#528."""
    file = clip_folder(tmp_path, SIZES)
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (mfm_rewards.build("clip_score", weights=str(w))(images, ["a", "b"]) for w in (tmp_path, file))
    assert torch.equal(one, other)


def test_settings_that_were_left_aside_do_not_count_for_pixels_either(tmp_path):
    other = {"mean": [0.5] * 3, "std": [0.5] * 3}
    reward = mfm_rewards.build("clip_score", weights=clip_folder(tmp_path, {**SIZES, "embed_dim": 512}, other))
    assert reward.preprocess.mean[0] == pytest.approx(0.48145466)


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
    header = {"network": "DiT", "config": json.dumps(DiT(8, 4, 1, 16, 2, 2, 1).config | {"depth": 40})}
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


def test_a_vae_of_several_variants_or_in_parts(tmp_path):
    changed_vae(tmp_path / "two", lambda s: None, "diffusion_pytorch_model.fp16.safetensors")
    file = tmp_path / "two/diffusion_pytorch_model.fp16.safetensors"
    (tmp_path / "two/diffusion_pytorch_model.bf16.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="is there as bf16 and fp16"):
        load_vae(str(tmp_path / "two"))
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*-of-*.safetensors"))) > 1
    expected = vae.state_dict()["encoder.conv_in.weight"]
    assert torch.equal(load_vae(str(tmp_path / "parts")).state_dict()["encoder.conv_in.weight"], expected)
