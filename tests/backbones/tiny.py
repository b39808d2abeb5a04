"""Pipelines of diffusers' real classes with few random weights, made on the spot: nothing is downloaded."""

import importlib
from typing import Any

import numpy as np
import torch
from PIL import Image

diffusers: Any = importlib.import_module("diffusers")  # its types say neither what it exports nor what may be None

TOKENS, TEXT, POOLED, CHANNELS = 5, 12, 10, 4
FACTOR = 2  # pixels a latent, for the pipelines' usual VAE of two blocks


def pictures(folder, number=24):
    """Pictures of 8 pixels, of noise, in the folders `a` and `b` in turn."""
    random = np.random.default_rng(0)
    for i in range(number):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i:02d}.png")


def random_weights(module, seed):
    """Of a size that nothing vanishes or explodes; no layer starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=generator))
            else:
                scale = 0.1 if p.dim() < 2 else 0.7 / p[0].numel() ** 0.5
                p.copy_(scale * torch.randn(p.shape, generator=generator))
    return module.eval()


def kl_vae(channels=CHANNELS, shift=0.11):
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], latent_channels=channels, norm_num_groups=4, layers_per_block=1,
        scaling_factor=0.7, shift_factor=shift, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return random_weights(vae, 1)


def euler(**settings):
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def sd3(scheduler=None, **parts):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=TEXT, caption_projection_dim=16, pooled_projection_dim=POOLED,
        pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        random_weights(transformer, 0), scheduler or euler(shift=3.0), kl_vae(),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3")) | parts,
        **{name: parts.get(name) for name in ("tokenizer", "tokenizer_2", "tokenizer_3") if name not in parts},
    )  # fmt: skip


def flux(scheduler=None, guidance_embeds=True, **parts):
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4 * CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=TEXT, pooled_projection_dim=POOLED, guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")) | parts
    scheduler = scheduler or euler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return diffusers.FluxPipeline(scheduler, kl_vae(), transformer=random_weights(transformer, 0), **parts)


def sana(scheduler=None, **parts):
    vae = diffusers.AutoencoderDC(
        latent_channels=CHANNELS, attention_head_dim=4, encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6, encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6, scaling_factor=0.41,
    )  # fmt: skip
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=TEXT,
        sample_size=16, timestep_scale=0.5,
    )  # fmt: skip
    parts = dict.fromkeys(("tokenizer", "text_encoder")) | parts
    return diffusers.SanaPipeline(
        vae=random_weights(vae, 1), transformer=random_weights(transformer, 0),
        scheduler=scheduler or euler(shift=3.0), **parts,
    )  # fmt: skip


def lumina2(scheduler=None, **parts):
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, in_channels=CHANNELS, hidden_size=16, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(300, 32, 32), cap_feat_dim=TEXT,
    )  # fmt: skip
    parts = dict.fromkeys(("text_encoder", "tokenizer")) | parts
    vae = random_weights(
        diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[4] * 4, latent_channels=CHANNELS, norm_num_groups=2, layers_per_block=1,
            scaling_factor=0.7, shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False,
        ),
        1,
    )  # fmt: skip
    scheduler = scheduler or euler(shift=6.0)
    return diffusers.Lumina2Pipeline(random_weights(transformer, 0), scheduler, vae, **parts)


def qwen_image(scheduler=None, **parts):
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=TEXT, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.2, 2.0],
    )  # fmt: skip
    parts = dict.fromkeys(("text_encoder", "tokenizer")) | parts
    scheduler = scheduler or euler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02)
    return diffusers.QwenImagePipeline(
        scheduler, random_weights(vae, 1), transformer=random_weights(transformer, 0), **parts
    )


def z_image(scheduler=None, **parts):
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=CHANNELS, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT,
        axes_dims=[4, 2, 2], axes_lens=[64, 64, 64],
    )  # fmt: skip
    parts = dict.fromkeys(("text_encoder", "tokenizer")) | parts
    scheduler = scheduler or euler(shift=3.0)
    return diffusers.ZImagePipeline(scheduler, kl_vae(), transformer=random_weights(transformer, 0), **parts)
