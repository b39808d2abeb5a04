"""CLIPs and VAEs with settings beside their weights, or without: read, refused, or said to be a guess."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import mfm_rewards
from mfm_lightning.checkpoints import (
    CheckpointError,
)
from mfm_lightning.networks.vae import load_vae
from tests.tiny_rewards import openai_clip


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


@pytest.mark.parametrize("setting", ["latents_mean", "latents_std"])
def test_a_vae_that_scales_its_latents_by_channel_is_refused(tmp_path, setting):
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, **{setting: [0.1] * 4}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has {setting} .* in its config.json: only one scale"):
        load_vae(str(tmp_path))


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
