"""A small Qwen2-VL of random weights with a tokenizer of bytes, and a short training that makes it a judge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_judge(folder: Path) -> Path:
    """A folder as `from_pretrained` reads it."""
    from transformers import (
        GenerationConfig,
        Qwen2TokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
    )
    from transformers.models.qwen2.tokenization_qwen2 import bytes_to_unicode

    words = folder / "words"
    words.mkdir(parents=True)
    characters = list(bytes_to_unicode().values())
    (words / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(characters)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2TokenizerFast(
        str(words / "vocab.json"), str(words / "merges.txt"), additional_special_tokens=SPECIAL[1:],
        eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>",
    )  # fmt: skip
    ids: Any = {text: tokenizer.convert_tokens_to_ids(text) for text in SPECIAL}
    image_processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    processor = Qwen2VLProcessor(image_processor, tokenizer, chat_template=TEMPLATE)
    config = Qwen2VLConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, tie_word_embeddings=False,
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        bos_token_id=ids["<|im_start|>"], eos_token_id=ids["<|im_end|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    processor.save_pretrained(str(folder))
    model.save_pretrained(str(folder))
    return folder


def train_judge(folder: Path, asked: list[tuple[np.ndarray, str, str]], steps: int = 120) -> None:
    """Have the model in a folder give these answers to images `(H, W, 3)` and texts."""
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    processor: Any = AutoProcessor.from_pretrained(str(folder))
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(str(folder))
    processor.tokenizer.padding_side = "right"
    texts, starts = [], []
    for image, text, answer in asked:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        start = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        texts.append(start + answer + "<|im_end|>")
        picture = Image.fromarray(image)
        starts.append(processor(text=[start], images=[picture], return_tensors="pt")["input_ids"].shape[1])
    images = [Image.fromarray(image) for image, _, _ in asked]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    labels = batch["input_ids"].clone()
    for row, start in zip(labels, starts, strict=True):
        row[:start] = -100
    labels[batch["attention_mask"] == 0] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = torch.tensor(torch.inf)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.05, f"the judge has not learnt its answers: loss {loss.item():.3f}"
    model.save_pretrained(str(folder))
