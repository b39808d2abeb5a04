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
from torch import nn
from torchvision.transforms.functional import to_tensor

import mfm_rewards
from mfm_rewards.clip_tokens import CLIPTokenizer
from mfm_rewards.clip_weights import infer_config, transformers_names
from mfm_rewards.execution import Execution
from mfm_rewards.image_reward import build_model, infer_sizes
from mfm_rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from mfm_rewards.prompts import PromptCache, class_prompts, imagenet_classes
from tests.tiny_rewards import TEXTS, longest_edge_padded, openai_clip


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))


# -- values against the original code ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip_score", "pickscore"])
def test_clip_rewards_are_transformers_own_logits(tiny, photos, name):
    from transformers import CLIPImageProcessor, CLIPModel

    reward, model = mfm_rewards.build(name, **tiny[name]), CLIPModel.from_pretrained(tiny[name]["weights"]).eval()
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
    reward = mfm_rewards.build("hpsv2", **tiny["hpsv2"], hidden_act="quick_gelu")
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
    reward = mfm_rewards.build("aesthetic", weights=str(tmp_path / "ViT.pt"), head=str(tmp_path / "head.pth"))
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = head(nn.functional.normalize(model.encode_image(pixels))).squeeze(1)
        torch.testing.assert_close(reward.score(pixels), expected, rtol=1e-5, atol=1e-7)
    assert not any("text" in name for name in reward.state_dict())


def test_image_reward_is_the_packages_own_score(tiny, photos):
    reward = mfm_rewards.build("image_reward", **tiny["image_reward"])
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
    assert {name: mfm_rewards.registry.factory(name).default_act for name in activations} == activations
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    originals = {"hpsv2": lambda p: (longest_edge_padded(p, 32) - mean) / std, "aesthetic": _transform(32)}
    for name, original in originals.items():
        reward = mfm_rewards.build(name, **tiny[name])
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
    assert mfm_rewards.build("hpsv2", **tiny["hpsv2"]).clip.config.vision_config.hidden_act == "gelu"


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
    act = mfm_rewards.registry.factory(name).default_act
    model, openai = full_size_clip(act, *SIZES[name])
    expected = {key: tuple(v.shape) for key, v in model.state_dict().items()}
    renamed, _ = transformers_names(openai.state_dict(), Path("x.pt"))
    assert {key: tuple(v.shape) for key, v in renamed.items()} == expected
    inferred = infer_config(renamed, act)
    for tower in ("vision_config", "text_config"):
        own = getattr(model.config, tower).to_dict()
        wrong = {k: (v, own[k]) for k, v in inferred[tower].items() if own[k] != v and not k.endswith("token_id")}
        assert not wrong, tower
    card = mfm_rewards.registry.factory(name).card
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
    with mock.patch("mfm_rewards.image_reward._load_tokenizer"), rates, torch.device("meta"):
        model = build_model({"vision": vision, "text": text}, "no folder").requires_grad_(False)
    assert infer_sizes(model.state_dict()) == {"vision": vision, "text": text}
    card = mfm_rewards.registry.factory("image_reward").card
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
        reward = mfm_rewards.build(name, **tiny[name])
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
    def run(**execution):
        reward = mfm_rewards.build(name, **tiny[name], execution=execution)
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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("pickscore", {}, marks=pytest.mark.long),
        ("pickscore", {"checkpoint_activations": True}),
        ("image_reward", {}),
        ("image_reward", {"checkpoint_activations": True}),
    ],
)
@pytest.mark.slow
def test_compiled_blocks_give_the_same(tiny, images, options, name):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on CPU")
    found = []
    for compiled in (False, True):
        reward = mfm_rewards.build(name, **tiny[name], execution={"compile": compiled, **options})
        x = images.clone().requires_grad_()
        values = reward(x, TEXTS)
        found.append((values.detach(), torch.autograd.grad(values.sum(), x)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_checkpointed_blocks_keep_less(tiny, images):
    kept = {}
    for on in (False, True):
        reward = mfm_rewards.build("pickscore", **tiny["pickscore"], execution=Execution(checkpoint_activations=on))
        x = images.clone().requires_grad_()
        kept[on] = kept_for_the_gradient(reward, lambda reward=reward, x=x: reward(x, TEXTS))
    assert kept[True] < 0.5 * kept[False]
    with torch.no_grad():  # a black box keeps nothing
        assert kept_for_the_gradient(reward, lambda: reward(images.clone().requires_grad_(), TEXTS)) == 0


def test_a_gradient_in_float64_is_that_of_finite_differences(tiny, images):
    for name in tiny:
        reward = mfm_rewards.build(name, **tiny[name])
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


def test_rewards_can_be_sent_to_other_processes(tiny, images):
    for name in ("hpsv2", "image_reward"):
        reward = mfm_rewards.build(name, **tiny[name])
        again = pickle.loads(pickle.dumps(reward))
        with torch.no_grad():
            assert torch.equal(again(images, TEXTS), reward(images, TEXTS))


def test_importing_the_package_leaves_warnings_as_they_were(tiny):
    import warnings

    mfm_rewards.build("image_reward", **tiny["image_reward"])
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)
