"""Sizes of published pipelines, for planning where their folders are not at hand; no weights.

As in the `config.json` files of the named Hugging Face repositories; settings that are not here are the defaults of
diffusers' and transformers' classes. Of SD3 and the deep-compression autoencoder they are also in diffusers'
`scripts/convert_sd3_to_diffusers.py` and `scripts/convert_dcae_to_diffusers.py`.
"""

from __future__ import annotations

from typing import Any

Part = tuple[str, str, dict[str, Any]]  # library, class, and its config

_SD3: dict[str, Any] = {
    "sample_size": 128, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64, "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}  # fmt: skip
_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
_KL: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16, "sample_size": 1024,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
_VAE_SD3: Part = ("diffusers", "AutoencoderKL", {**_KL, "scaling_factor": 1.5305, "shift_factor": 0.0609})
_VAE_FLUX: Part = ("diffusers", "AutoencoderKL", {**_KL, "scaling_factor": 0.3611, "shift_factor": 0.1159})
_STAGES = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_VAE_SANA: Part = (
    "diffusers",
    "AutoencoderDC",
    {
        "latent_channels": 32, "encoder_block_types": _STAGES, "decoder_block_types": _STAGES,
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
        "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "downsample_block_type": "conv", "upsample_block_type": "interpolate", "scaling_factor": 0.41407,
    },
)  # fmt: skip
_CLIP_L = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768,
}  # fmt: skip
_CLIP_G = {
    "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "projection_dim": 1280,
}  # fmt: skip
_T5_XXL: Part = (
    "transformers",
    "T5EncoderModel",
    {
        "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
)  # fmt: skip
_GEMMA_2B: Part = (
    "transformers",
    "Gemma2Model",
    {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    },
)  # fmt: skip


def _sd3(**settings: Any) -> dict[str, Part]:
    projected = "CLIPTextModelWithProjection"
    return {
        "transformer": ("diffusers", "SD3Transformer2DModel", {**_SD3, **settings}),
        "vae": _VAE_SD3,
        "text_encoder": ("transformers", projected, _CLIP_L),
        "text_encoder_2": ("transformers", projected, _CLIP_G),
        "text_encoder_3": _T5_XXL,
    }


def _flux(guidance: bool) -> dict[str, Part]:
    sizes = {
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "guidance_embeds": guidance, "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip
    return {
        "transformer": ("diffusers", "FluxTransformer2DModel", sizes),
        "vae": _VAE_FLUX,
        "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
        "text_encoder_2": _T5_XXL,
    }


_SANA: dict[str, Any] = {
    "in_channels": 32, "out_channels": 32, "num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 20,
    "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240,
    "caption_channels": 2304, "mlp_ratio": 2.5, "sample_size": 32, "patch_size": 1,
}  # fmt: skip
PUBLISHED: dict[str, tuple[str, dict[str, Part]]] = {  # Hugging Face id: the pipeline's class, and its parts
    "stabilityai/stable-diffusion-3-medium-diffusers": (
        "StableDiffusion3Pipeline",
        _sd3(**_MEDIUM, pos_embed_max_size=192),
    ),
    "stabilityai/stable-diffusion-3.5-medium": (
        "StableDiffusion3Pipeline",
        _sd3(**_MEDIUM, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=list(range(13))),
    ),
    "stabilityai/stable-diffusion-3.5-large": (
        "StableDiffusion3Pipeline",
        _sd3(
            num_layers=38,
            num_attention_heads=38,
            caption_projection_dim=2432,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        ),
    ),
    "black-forest-labs/FLUX.1-dev": ("FluxPipeline", _flux(True)),
    "black-forest-labs/FLUX.1-schnell": ("FluxPipeline", _flux(False)),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": (
        "SanaPipeline",
        {
            "transformer": ("diffusers", "SanaTransformer2DModel", _SANA),
            "vae": _VAE_SANA,
            "text_encoder": _GEMMA_2B,
        },
    ),
}
