"""Text encoders and tokenizers of transformers' real classes, tiny, with vocabularies made on the spot."""

import json
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.backbones.tiny import POOLED, TEXT, random_weights

WORDS = ["a", "red", "blue", "cat", "dog", "on", "the", "mat", "three"]


def clip_tokenizer(folder):
    """CLIP's byte-pair tokenizer with letters alone."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def word_tokenizer(kind: Any = transformers.PreTrainedTokenizerFast, **special):
    """Whole words."""
    names = ["<pad>", "</s>", "<unk>", "<bos>", *WORDS]
    vocabulary = {token: i for i, token in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return kind(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<bos>", **special
    )


def clip(projection, seed, hidden=POOLED // 2):
    config = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=hidden, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=77, projection_dim=hidden, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return random_weights(kind(config), seed)


def t5(seed):
    config = transformers.T5Config(
        vocab_size=64,
        d_model=TEXT,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return random_weights(transformers.T5EncoderModel(config), seed)


def gemma(seed):
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=TEXT, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return random_weights(transformers.Gemma2Model(config), seed)


def of_sd3(folder):
    """Two CLIPs, and T5."""
    return {
        "text_encoder": clip(True, 2), "tokenizer": clip_tokenizer(folder / "clip"),
        "text_encoder_2": clip(True, 3), "tokenizer_2": clip_tokenizer(folder / "clip"),
        "text_encoder_3": t5(4), "tokenizer_3": word_tokenizer(transformers.T5TokenizerFast, extra_ids=0),
    }  # fmt: skip


def of_flux(folder):
    """CLIP and T5."""
    return {
        "text_encoder": clip(False, 2, POOLED), "tokenizer": clip_tokenizer(folder / "clip"),
        "text_encoder_2": t5(4), "tokenizer_2": word_tokenizer(transformers.T5TokenizerFast, extra_ids=0),
    }  # fmt: skip


def of_gemma(_):
    """Gemma 2, of SANA and Lumina 2."""
    return {
        "text_encoder": gemma(2),
        "tokenizer": word_tokenizer(transformers.GemmaTokenizerFast, padding_side="right"),
    }
