"""The preference rewards against the code they come from, on the real architectures with small random weights."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision.transforms.functional import to_tensor

import rewards
from rewards import RewardError
from rewards.clip_tokens import CLIPTokenizer
from rewards.clip_weights import infer_config, load_clip, transformers_names
from rewards.image_reward import build_model, infer_sizes
from rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from rewards.prompts import PromptCache, class_prompts, imagenet_classes
from tests.tiny_rewards import openai_clip, tiny_rewards

TEXTS = ["a tabby cat", "a red car at night, high quality", "two people in the snow"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_rewards(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def photos():
    """scikit-learn's two photographs, 427 x 640, and an upright part of one."""
    found = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    return [*found, found[0].crop((100, 20, 353, 420))]


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))


# -- preprocessing -----------------------------------------------------------------------------------------------------


def longest_edge_padded(image: Image.Image, size: int) -> torch.Tensor:
    """HPSv2's own way in PIL: open_clip's ResizeMaxSize, then to a tensor and normalised."""
    scale = size / max(image.size)
    small = image.resize([round(n * scale) for n in image.size], Image.BICUBIC)
    square = Image.new("RGB", (size, size))
    square.paste(small, [(size - n) // 2 for n in small.size])
    return to_tensor(square)


@pytest.mark.parametrize("size", [224, 97])
def test_preprocessing_is_that_of_pil(photos, size):
    """Within 2 grey levels of 255 anywhere, half a level on average: PIL rounds to 8 bits after each pass."""
    from ImageReward.ImageReward import _transform
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    originals = {
        "crop": lambda image: _transform(size)(image),  # ImageReward's, and openai/CLIP's
        "crop_floor": lambda image: processor(images=image, return_tensors="pt").pixel_values[0],
    }
    std = torch.tensor(CLIP_STD)[:, None, None]
    for photo in photos:
        for fit, original in originals.items():
            ours = Preprocessing(size, fit)(to_tensor(photo)[None])[0]
            levels = ((ours - original(photo)) * std * 255).abs()
            assert levels.max() < 2, fit
            assert levels.mean() < 0.5, fit
        ours = Preprocessing(size, "pad", mean=(0.0,) * 3, std=(1.0,) * 3)(to_tensor(photo)[None])[0]
        levels = (ours - longest_edge_padded(photo, size)).abs() * 255
        assert levels.max() < 2
        assert levels.mean() < 0.5


def test_preprocessing_takes_grey_images_and_batches_and_refuses_others(photos):
    grey = torch.rand(2, 1, 30, 50)
    torch.testing.assert_close(Preprocessing(24)(grey), Preprocessing(24)(grey.expand(-1, 3, -1, -1)))
    for fit in ("crop", "pad"):
        x = torch.rand(2, 3, 9, 14, dtype=torch.float64).mul(0.8).add(0.1).requires_grad_()
        assert torch.autograd.gradcheck(Preprocessing(8, fit), x)
    with pytest.raises(ValueError, match=r"images of shape \(2, 4, 8, 8\): expected \(B, 3, H, W\)"):
        Preprocessing(24)(torch.rand(2, 4, 8, 8))
    with pytest.raises(ValueError, match="unknown fit 'stretch'"):
        Preprocessing(24, "stretch")


# -- values against the original code ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip_score", "pickscore"])
def test_clip_rewards_are_transformers_own_logits(tiny, photos, name):
    from transformers import CLIPImageProcessor, CLIPModel

    reward, model = rewards.build(name, **tiny[name]), CLIPModel.from_pretrained(tiny[name]["weights"]).eval()
    ids = CLIPTokenizer()(TEXTS)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pixels = CLIPImageProcessor(**sides)(images=photos, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits_per_image.diagonal()
        torch.testing.assert_close(reward.score(pixels, TEXTS), expected, rtol=1e-5, atol=1e-4)
        # from the pictures themselves: what 8 bits make of it
        ours = torch.cat([reward(to_tensor(p)[None], [t]) for p, t in zip(photos, TEXTS, strict=True)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.01 * expected.std().item())


def test_hpsv2_from_open_clips_names_is_openai_clips_own_forward(tiny):
    """openai/CLIP's class has the names of open_clip; its activation is the quick one."""
    reward = rewards.build("hpsv2", **tiny["hpsv2"], hidden_act="quick_gelu")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = openai_clip(1)
    with torch.no_grad():
        logits, _ = model(pixels, CLIPTokenizer()(TEXTS))
        cosine = logits.diagonal() / model.logit_scale.exp()
        torch.testing.assert_close(reward.score(pixels, TEXTS), cosine, rtol=1e-5, atol=1e-6)


def test_aesthetic_is_the_packages_head_on_openai_clip(tiny, tmp_path):
    from ImageReward.models.AestheticScore import MLP

    model, head = openai_clip(5), MLP(48).eval()
    torch.save(model.state_dict(), tmp_path / "ViT.pt")
    torch.save(head.state_dict(), tmp_path / "head.pth")
    reward = rewards.build("aesthetic", weights=str(tmp_path / "ViT.pt"), head=str(tmp_path / "head.pth"))
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = head(nn.functional.normalize(model.encode_image(pixels))).squeeze(1)
        torch.testing.assert_close(reward.score(pixels), expected, rtol=1e-5, atol=1e-7)
    assert not any("text" in name for name in reward.state_dict())


def test_image_reward_is_the_packages_own_score(tiny, photos):
    reward = rewards.build("image_reward", **tiny["image_reward"])
    assert type(reward.model).__module__ == "ImageReward.ImageReward"
    with torch.no_grad():
        expected = torch.tensor([reward.model.score(t, p) for t, p in zip(TEXTS, photos, strict=True)])
        exact = torch.stack([reward.model.preprocess(p) for p in photos])
        torch.testing.assert_close(reward.score(exact, TEXTS), expected, rtol=1e-5, atol=1e-5)
        ours = torch.cat([reward(to_tensor(p)[None], [t]) for p, t in zip(photos, TEXTS, strict=True)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.02 * expected.std().item())
    assert expected.std() > 0.01


def test_each_reward_sees_a_picture_as_its_own_code_does(tiny, photos):
    """The fit and activation that go with each, on pictures that are not square; those of CLIP are tested above."""
    from ImageReward.ImageReward import _transform

    activations = {"clip_score": "quick_gelu", "aesthetic": "quick_gelu", "hpsv2": "gelu", "pickscore": "gelu"}
    assert {name: rewards.registry.factory(name).default_act for name in activations} == activations
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    originals = {"hpsv2": lambda p: (longest_edge_padded(p, 32) - mean) / std, "aesthetic": _transform(32)}
    for name, original in originals.items():
        reward = rewards.build(name, **tiny[name])
        texts = [[[text]] for text in TEXTS] if "prompts" in reward.needs else [[]] * 3

        @torch.no_grad()
        def each(function, pictures, texts=texts):
            return torch.cat([function(p[None], *text) for p, text in zip(pictures, texts, strict=True)])

        expected = each(reward.score, map(original, photos))
        spread = expected.std().item()
        ours = each(reward, map(to_tensor, photos))
        torch.testing.assert_close(ours, expected, rtol=0, atol=0.1 * spread)  # 8 bits, of 32 x 32 pixels
        reward.preprocess = Preprocessing(32, "crop" if name == "hpsv2" else "pad")  # would be seen
        assert (each(reward, map(to_tensor, photos)) - expected).abs().max() > 0.3 * spread
    # its file comes without a config
    assert rewards.build("hpsv2", **tiny["hpsv2"]).clip.config.vision_config.hidden_act == "gelu"


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
    reward, model = rewards.build("clip_score", weights=str(tmp_path)), CLIPModel.from_pretrained(tmp_path).eval()
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


# -- full size ---------------------------------------------------------------------------------------------------------


def full_size_clip(act: str, width: int, depth: int, heads: int, text: tuple[int, int, int], projected: int):
    from clip.model import CLIP
    from transformers import CLIPConfig, CLIPModel

    def tower(width, depth, heads):
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
        return {**sizes, "num_attention_heads": heads, "hidden_act": act, "projection_dim": projected}

    vision = {**tower(width, depth, heads), "patch_size": 14, "image_size": 224}
    config = CLIPConfig(text_config=tower(*text), vision_config=vision, projection_dim=projected)
    with torch.device("meta"):
        model = CLIPModel(config).requires_grad_(False)
        openai = CLIP(projected, 224, depth, width, 14, 77, 49408, text[0], text[2], text[1])
    return model, openai


SIZES = {
    "clip_score": (1024, 24, 16, (768, 12, 12), 768),
    "aesthetic": (1024, 24, 16, (768, 12, 12), 768),
    "hpsv2": (1280, 32, 16, (1024, 24, 16), 1024),
    "pickscore": (1280, 32, 16, (1024, 24, 16), 1024),
}


def kept_for_the_gradient(model: nn.Module, run) -> float:
    """GB of what is saved for the backward pass, but for the weights."""
    weights, sizes = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()  # alive until all is counted, so that no storage is counted in another's place
    del kept
    return sum(sizes.values()) / 1e9


@pytest.mark.parametrize("name", SIZES)
def test_full_sizes_on_the_meta_device(name):
    """Names, shapes and sizes inferred of both layouts, and what the card says of memory."""
    act = rewards.registry.factory(name).default_act
    model, openai = full_size_clip(act, *SIZES[name])
    expected = {key: tuple(v.shape) for key, v in model.state_dict().items()}
    renamed, _ = transformers_names(openai.state_dict(), Path("x.pt"))
    assert {key: tuple(v.shape) for key, v in renamed.items()} == expected
    inferred = infer_config(renamed, act)
    for tower in ("vision_config", "text_config"):
        own = getattr(model.config, tower).to_dict()
        wrong = {k: (v, own[k]) for k, v in inferred[tower].items() if own[k] != v and not k.endswith("token_id")}
        assert not wrong, tower
    card = rewards.registry.factory(name).card
    if name == "aesthetic":
        del model.text_model, model.text_projection
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert card.parameters == pytest.approx(millions, rel=0.005)
    pixels = torch.empty(1, 3, 224, 224, device="meta", requires_grad=True)
    saved = kept_for_the_gradient(model, lambda: model.vision_model(pixel_values=pixels))
    assert card.activations == pytest.approx(saved, rel=0.05)


def test_full_size_image_reward_on_the_meta_device():
    from ImageReward.models.BLIP import vit

    vision = {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    text = {"vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    text |= {"num_attention_heads": 12, "max_position_embeddings": 512}
    rates = mock.patch.object(vit.torch, "linspace", return_value=torch.zeros(24))  # they are read as numbers
    with mock.patch("rewards.image_reward._load_tokenizer"), rates, torch.device("meta"):
        model = build_model({"vision": vision, "text": text}, "no folder").requires_grad_(False)
    assert infer_sizes(model.state_dict()) == {"vision": vision, "text": text}
    card = rewards.registry.factory("image_reward").card
    assert card.parameters == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, rel=0.005)
    model.device, ids = "meta", torch.zeros(1, 35, dtype=torch.long, device="meta")
    pixels = torch.empty(1, 3, 224, 224, device="meta", requires_grad=True)
    saved = kept_for_the_gradient(model.eval(), lambda: model.score_gard(ids, torch.ones_like(ids), pixels))
    assert card.activations == pytest.approx(saved, rel=0.05)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_tokens_are_the_same_from_a_folder_and_from_openai_clip(tmp_path):
    import clip
    from clip.simple_tokenizer import default_bpe

    words = clip.simple_tokenizer.SimpleTokenizer().encoder
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    merges = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    texts = [*class_prompts("A high-quality, high-resolution photograph of a {class}.", imagenet_classes()), "x " * 90]
    ours, theirs = CLIPTokenizer()(texts), CLIPTokenizer(str(tmp_path))(texts)
    end = words["<|endoftext|>"]
    until = (ours == end).int().argmax(dim=1)  # what comes after it is padding, which no earlier token sees
    assert torch.equal(until, (theirs == end).int().argmax(dim=1))
    seen = torch.arange(77) <= until[:, None]
    assert torch.equal(ours[seen], theirs[seen])


def test_imagenet_names_are_those_of_its_classes():
    from torchvision.models import ResNet50_Weights

    names, others = imagenet_classes(), ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    assert len(names) == 1000
    assert [names[i] for i in (0, 281, 999)] == ["tench", "tabby cat", "toilet paper"]
    # torchvision's are the first names of the synsets: most agree in a word, class by class
    alike = [set(a.lower().split()) & set(b.lower().split()) for a, b in zip(names, others, strict=True)]
    assert sum(map(bool, alike)) > 850


def test_each_prompt_is_encoded_once(tiny, images):
    asked = []
    cache = PromptCache(lambda prompts: asked.append(prompts) or torch.tensor([len(p) for p in prompts]), 3, 2)
    assert cache(["a", "bb", "a", "ccc"]).tolist() == [1, 2, 1, 3]
    assert cache(["ccc", "a"]).tolist() == [3, 1]
    assert asked == [["a", "bb"], ["ccc"]]
    assert cache(["dddd", "a"]).tolist() == [4, 1]  # one too many: all are forgotten, but none is wrong
    assert len(cache) == 2
    for name in ("clip_score", "hpsv2", "pickscore", "image_reward"):
        reward = rewards.build(name, **tiny[name])
        with torch.inference_mode():
            first = reward(images, TEXTS)
        cache = reward._tokens if name == "image_reward" else reward._texts
        with mock.patch.object(cache, "encode", side_effect=AssertionError("encoded again")):
            x = images.clone().requires_grad_()
            again = reward(x, TEXTS)
            again.sum().backward()
        torch.testing.assert_close(again.detach(), first)
        mixed = reward(images[:1].expand(3, -1, -1, -1), TEXTS)
        assert mixed.unique().numel() == 3


# -- how it is executed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hpsv2", "aesthetic", "image_reward"])
def test_execution_changes_neither_values_nor_gradients(tiny, images, name):
    def run(**options):
        reward = rewards.build(name, **tiny[name], **options)
        assert not any(p.requires_grad for p in reward.parameters())
        x = images.clone().requires_grad_()
        values = reward(x, *([TEXTS] if "prompts" in reward.needs else []))
        return values.detach(), torch.autograd.grad(values.sum(), x)[0]

    expected = run()
    for options in ({"checkpoint_activations": True}, {"max_rows": 2}):
        for found, wanted in zip(run(**options), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # its own precision, whatever is around it
        torch.testing.assert_close(run()[0], expected[0], rtol=1e-5, atol=1e-6)
    values, gradient = run(precision="bf16")
    assert values.dtype == torch.float32
    assert not torch.equal(values, expected[0])
    assert not torch.equal(values, values.bfloat16().float())  # not as coarse as that: ties would be without meaning
    assert torch.cosine_similarity(gradient.flatten(), expected[1].flatten(), dim=0) > 0.95


@pytest.mark.parametrize("name", ["pickscore", "image_reward"])
@pytest.mark.parametrize("options", [{}, {"checkpoint_activations": True}], ids=["plain", "checkpointed"])
def test_compiled_blocks_give_the_same(tiny, images, options, name):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on CPU")
    found = []
    for compiled in (False, True):
        reward = rewards.build(name, **tiny[name], compile=compiled, **options)
        x = images.clone().requires_grad_()
        values = reward(x, TEXTS)
        found.append((values.detach(), torch.autograd.grad(values.sum(), x)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_checkpointed_blocks_keep_less(tiny, images):
    kept = {}
    for on in (False, True):
        reward = rewards.build("pickscore", **tiny["pickscore"], checkpoint_activations=on)
        x = images.clone().requires_grad_()
        kept[on] = kept_for_the_gradient(reward, lambda reward=reward, x=x: reward(x, TEXTS))
    assert kept[True] < 0.5 * kept[False]
    with torch.no_grad():  # a black box keeps nothing
        assert kept_for_the_gradient(reward, lambda: reward(images.clone().requires_grad_(), TEXTS)) == 0


def test_a_gradient_in_float64_is_that_of_finite_differences(tiny, images):
    for name in tiny:
        reward = rewards.build(name, **tiny[name])
        context = [TEXTS] if "prompts" in reward.needs else []
        if name in ("clip_score", "hpsv2", "pickscore"):  # transformers has no causal mask in float64
            reward.text_features = mock.Mock(return_value=reward.text_features(TEXTS).double())
        reward.double()
        x = images.double().requires_grad_()
        values = reward(x, *context)
        assert values.dtype == torch.float64
        direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
        wanted = (torch.autograd.grad(values.sum(), x)[0] * direction).sum()
        with torch.no_grad():
            ahead, behind = (reward(x + h * direction, *context).sum() for h in (1e-5, -1e-5))
        torch.testing.assert_close((ahead - behind) / 2e-5, wanted, rtol=1e-4, atol=1e-7)


# -- what is refused ---------------------------------------------------------------------------------------------------


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
        ("hpsv2", {**tiny["hpsv2"], "precision": "fp8"}, r"unknown precision 'fp8'"),
        ("hpsv2", {**tiny["hpsv2"], "colour": 1}, r"options of reward 'hpsv2' do not fit.*colour"),
    ]  # fmt: skip
    for name, options, message in cases:
        if name == "image_reward" and "weights" in options and "tokenizer" not in options:
            options = {**options, "tokenizer": str(Path(tiny["image_reward"]["weights"]).parent)}
        with pytest.raises(RewardError, match=message):
            rewards.build(name, **options)
    state = load_file(weights / "model.safetensors")
    (tmp_path / "config.json").write_text((weights / "config.json").read_text())
    del state["text_projection.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RewardError, match=r"model\.safetensors does not hold a 'CLIP' .*text_projection"):
        rewards.build("clip_score", weights=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(RewardError, match="is not a safetensors file"):
        rewards.build("clip_score", weights=str(tmp_path))


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
    act = rewards.registry.factory(name).default_act
    model, _ = load_clip(str(tmp_path / "released.pt"), default_act=act)
    model.save_pretrained(tmp_path / "folder")
    found = []
    for weights in ("released.pt", "folder"):
        with torch.no_grad():
            found.append(rewards.build(name, weights=str(tmp_path / weights))(images, TEXTS))
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


def test_rewards_can_be_sent_to_other_processes(tiny, images):
    for name in ("hpsv2", "image_reward"):
        reward = rewards.build(name, **tiny[name])
        again = pickle.loads(pickle.dumps(reward))
        with torch.no_grad():
            assert torch.equal(again(images, TEXTS), reward(images, TEXTS))


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
    found = [rewards.build("pickscore", allow_download=allowed)(images, TEXTS) for allowed in (False, True)]
    assert torch.equal(*found)
    (folder / "snapshots" / ("0" * 40) / "model.safetensors").unlink()
    with pytest.raises(RewardError, match=r"model\.safetensors.* of yuvalkirstain/PickScore_v1 is not .*\(no route\)"):
        rewards.build("pickscore", allow_download=True)
    assert asked.call_count == 1


def test_importing_the_package_leaves_warnings_as_they_were(tiny):
    import warnings

    rewards.build("image_reward", **tiny["image_reward"])
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)
