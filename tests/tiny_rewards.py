"""The preference rewards' real architectures with small sizes and random weights, in files as users have them."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

TEXTS = ["a tabby cat", "a red car at night, high quality", "two people in the snow"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "an", "of", "high", "-", "quality", ",", "resolution"]
WORDS += [
    "photograph",
    "photo",
    "cat",
    "dog",
    "tabby",
    "car",
    "red",
    "at",
    "night",
    "two",
    "people",
    "in",
    "the",
    "snow",
    ".",
]


def openai_clip(seed: int = 0, image_size: int = 32, patch: int = 8, width: int = 64, depth: int = 2) -> nn.Module:
    """openai/CLIP's own class: the names of its weights are open_clip's, too."""
    from clip.model import CLIP

    torch.manual_seed(seed)
    model = CLIP(48, image_size, depth, width, patch, 77, 49408, width, 1, depth)
    # its text projection starts small; larger, texts differ more, and gradients are not lost in rounding
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.08)
    return model.eval().requires_grad_(False)


def clip_folder(folder: Path, seed: int = 0) -> Path:
    """transformers' layout."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"projection_dim": 48, "initializer_factor": 4.0}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    text = {**tower, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=48))
    model.save_pretrained(folder)
    return folder


def image_reward_file(folder: Path, seed: int = 0) -> Path:
    """The package's class; with a vocabulary beside the weights."""
    from mfm_rewards.image_reward import build_model

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    vision = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    text = {"vocab_size": len(WORDS) + 2, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(seed)
    model = build_model({"vision": vision, "text": text}, folder)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.1)
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    return folder / "ImageReward.pt"


def tiny_rewards(folder: Path) -> dict[str, dict]:
    """Options of each preference reward, whose files are written to a folder."""
    from mfm_rewards.aesthetic import aesthetic_head

    folder.mkdir(parents=True, exist_ok=True)
    clip = str(clip_folder(folder / "clip"))
    torch.save({"state_dict": openai_clip(1).state_dict()}, folder / "hpsv2.pt")
    torch.manual_seed(2)
    head = aesthetic_head(48)
    torch.save({f"layers.{name}": v for name, v in head.state_dict().items()}, folder / "head.pth")
    return {
        "clip_score": {"weights": clip},
        "pickscore": {"weights": str(clip_folder(folder / "pickscore", 3))},
        "hpsv2": {"weights": str(folder / "hpsv2.pt")},
        "aesthetic": {"weights": clip, "head": str(folder / "head.pth")},
        "image_reward": {"weights": str(image_reward_file(folder / "image_reward"))},
    }


def longest_edge_padded(image: Image.Image, size: int) -> torch.Tensor:
    """HPSv2's own way in PIL: open_clip's ResizeMaxSize, then to a tensor and normalised."""
    scale = size / max(image.size)
    small = image.resize([round(n * scale) for n in image.size], Image.BICUBIC)
    square = Image.new("RGB", (size, size))
    square.paste(small, [(size - n) // 2 for n in small.size])
    return to_tensor(square)
