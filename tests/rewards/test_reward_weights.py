"""Weights of the preference rewards: both layouts, sizes from shapes, Hugging Face's cache, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import mfm_rewards
from mfm_rewards import RewardError
from mfm_rewards.clip_tokens import CLIPTokenizer
from mfm_rewards.clip_weights import infer_config, load_clip
from tests.tiny_rewards import TEXTS, openai_clip


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def test_older_files_of_transformers_are_read(tiny, photos, tmp_path):
    """As OpenAI's own: `eos_token_id` 2, which means the highest id, and positions among the weights."""
    from transformers import CLIPModel

    source = Path(tiny["clip_score"]["weights"])
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(source / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
    state["vision_model.embeddings.position_ids"] = torch.arange(17).unsqueeze(0)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reward, model = mfm_rewards.build("clip_score", weights=str(tmp_path)), CLIPModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=CLIPTokenizer()(TEXTS), pixel_values=pixels).logits_per_image.diagonal()
        torch.testing.assert_close(reward.score(pixels, TEXTS), expected, rtol=1e-5, atol=1e-4)


def test_heads_of_towers_are_those_of_the_released_sizes():
    """Which shapes do not tell: open_clip's bigG has towers of 1664 and 1280 channels, of 16 and 20 heads."""
    for (width, text), heads in {(1664, 1280): (16, 20), (1280, 1024): (16, 16), (1024, 768): (16, 12)}.items():
        state = {
            "visual_projection.weight": torch.empty(1024, width, device="meta"),
            "vision_model.embeddings.patch_embedding.weight": torch.empty(width, 3, 14, 14, device="meta"),
            "vision_model.embeddings.position_embedding.weight": torch.empty(257, width, device="meta"),
            "vision_model.encoder.layers.0.mlp.fc1.weight": torch.empty(4 * width, width, device="meta"),
            "text_model.embeddings.token_embedding.weight": torch.empty(49408, text, device="meta"),
            "text_model.embeddings.position_embedding.weight": torch.empty(77, text, device="meta"),
            "text_model.encoder.layers.0.mlp.fc1.weight": torch.empty(4 * text, text, device="meta"),
        }
        found = infer_config(state, "gelu")
        assert (found["vision_config"]["num_attention_heads"], found["text_config"]["num_attention_heads"]) == heads


def test_missing_and_wrong_weights_are_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    weights = Path(tiny["clip_score"]["weights"])
    cases = [
        ("hpsv2", {}, r"HPS_v2\.1_compressed\.pt of xswu/HPSv2 is not .*`hf download xswu/HPSv2 HPS_v2\.1_compressed"),
        ("pickscore", {}, r"model\.safetensors.* of yuvalkirstain/PickScore_v1 is not .*hf download yuvalkirst"),
        ("image_reward", {}, r"ImageReward\.pt of THUDM/ImageReward is not in .*hub\. .*allow_download"),
        ("aesthetic", {}, r"aesthetic-model\.pth of trl-lib/ddpo-aesthetic-predictor"),
        ("clip_score", {"weights": "no/where/at/all.pt"}, r"at/all\.pt of no/where is not"),
        ("clip_score", {"weights": str(tmp_path)}, r"has no config\.json and no model\.safetensors or pytorch_"),
        ("clip_score", {"weights": str(weights), "tokenizer": str(tmp_path)}, r"has no tokenizer\.json or vocab\.json"),
        ("image_reward", {**tiny["image_reward"], "tokenizer": str(tmp_path)}, r"has no vocab\.txt"),
        ("hpsv2", {"weights": tiny["image_reward"]["weights"]}, r"holds no CLIP with a vision transformer"),
        ("image_reward", {"weights": tiny["hpsv2"]["weights"]}, r"not the weights of an ImageReward"),
        ("hpsv2", {**tiny["hpsv2"], "execution": {"precision": "fp8"}}, r"unknown precision 'fp8': .*fp32, bf16, fp16"),
        ("hpsv2", {**tiny["hpsv2"], "execution": {"max_rows": 0}}, r"max_rows must be a whole number, at least 1"),
        ("hpsv2", {**tiny["hpsv2"], "execution": {"compile": "no"}}, r"compile must be true or false, got 'no'"),
        ("image_reward", {"execution": {"precison": "bf16"}}, r"execution\.precison: did you mean 'precision'\?"),
        ("aesthetic", {**tiny["aesthetic"], "execution": "bf16"}, r"execution must be a dictionary .*, got 'bf16'"),
        ("hpsv2", {"precision": "bf16"}, r"options of reward 'hpsv2' do not fit.*execution: \{precision: bf16\}"),
        ("hpsv2", {**tiny["hpsv2"], "colour": 1}, r"options of reward 'hpsv2' do not fit.*colour"),
    ]  # fmt: skip
    for name, options, message in cases:
        if name == "image_reward" and "weights" in options and "tokenizer" not in options:
            options = {**options, "tokenizer": str(Path(tiny["image_reward"]["weights"]).parent)}
        with pytest.raises(RewardError, match=message):
            mfm_rewards.build(name, **options)
    state = load_file(weights / "model.safetensors")
    (tmp_path / "config.json").write_text((weights / "config.json").read_text())
    del state["text_projection.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RewardError, match=r"model\.safetensors does not hold a 'CLIP' .*text_projection"):
        mfm_rewards.build("clip_score", weights=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(RewardError, match="is not a safetensors file"):
        mfm_rewards.build("clip_score", weights=str(tmp_path))


def test_a_file_without_a_config_is_the_folder_with_one(tiny, tmp_path):
    """Sizes from shapes, for transformers' names, too."""
    weights = Path(tiny["pickscore"]["weights"])
    (tmp_path / "alone.safetensors").write_bytes((weights / "model.safetensors").read_bytes())
    # its towers have heads of 32 channels, which shapes do not tell: inferred are those of all released CLIPs, of 64
    inferred = load_clip(str(tmp_path / "alone.safetensors"))[0]
    with_config = load_clip(str(weights))[0]
    assert inferred.config.vision_config.num_attention_heads == 1
    for (name, a), (other, b) in zip(inferred.named_parameters(), with_config.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["hpsv2", "pickscore", "clip_score"])
def test_both_layouts_of_weights_give_the_same(tiny, images, tmp_path, name):
    """The release file of open_clip's names, in half precision, and a folder of transformers' layout."""
    half = {key: value.half() for key, value in openai_clip(7).state_dict().items()}
    torch.save({"state_dict": half, "epoch": 3}, tmp_path / "released.pt")
    act = mfm_rewards.registry.factory(name).default_act
    model, _ = load_clip(str(tmp_path / "released.pt"), default_act=act)
    model.save_pretrained(tmp_path / "folder")
    found = []
    for weights in ("released.pt", "folder"):
        with torch.no_grad():
            found.append(mfm_rewards.build(name, weights=str(tmp_path / weights))(images, TEXTS))
    assert torch.equal(*found)
    assert found[0].std() > 0


def test_a_config_beside_other_names_is_of_something_else_and_a_given_activation_counts(tiny, tmp_path):
    torch.save(openai_clip(1, width=128).state_dict(), tmp_path / "other.pt")
    (tmp_path / "config.json").write_text((Path(tiny["clip_score"]["weights"]) / "config.json").read_text())
    alone = load_clip(str(tmp_path / "other.pt"))[0].config  # in a folder with the config of a smaller one
    assert (alone.vision_config.hidden_size, alone.text_config.hidden_act) == (128, "gelu")
    for act in (None, "gelu"):
        config = load_clip(tiny["clip_score"]["weights"], act)[0].config
        assert config.vision_config.hidden_act == config.text_config.hidden_act == (act or "quick_gelu")


def test_what_is_in_the_cache_needs_no_network(tiny, images, tmp_path, monkeypatch):
    """Also where downloads are allowed, as by a config that was tried on a machine with a network."""
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    source = Path(tiny["pickscore"]["weights"])
    folder = tmp_path / "hub/models--yuvalkirstain--PickScore_v1"
    shutil.copytree(source, folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0" * 40)
    asked = mock.Mock(side_effect=ConnectionError("no route"))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", asked)
    found = [mfm_rewards.build("pickscore", allow_download=allowed)(images, TEXTS) for allowed in (False, True)]
    assert torch.equal(*found)
    (folder / "snapshots" / ("0" * 40) / "model.safetensors").unlink()
    with pytest.raises(RewardError, match=r"model\.safetensors.* of yuvalkirstain/PickScore_v1 is not .*\(no route\)"):
        mfm_rewards.build("pickscore", allow_download=True)
    assert asked.call_count == 1
