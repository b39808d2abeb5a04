"""Pretrained text-to-image flows of diffusers as base flows: steering, search and scores with no training."""

from mfm_lightning.backbones.adapted_flow import AdaptedFlow
from mfm_lightning.backbones.adapter import FlowAdapter
from mfm_lightning.backbones.base import TextToImageFlow
from mfm_lightning.backbones.decoder import LatentDecoder
from mfm_lightning.backbones.flux import FluxFlow
from mfm_lightning.backbones.flux_map import FluxFlowMap
from mfm_lightning.backbones.loading import FAMILIES, load_flow
from mfm_lightning.backbones.lora import LoRA, LoRANetwork
from mfm_lightning.backbones.lumina2 import Lumina2Flow
from mfm_lightning.backbones.network import FlowNetwork, PromptedNetwork
from mfm_lightning.backbones.qwen_image import QwenImageFlow
from mfm_lightning.backbones.sana import SanaFlow
from mfm_lightning.backbones.sd3 import SD3Flow
from mfm_lightning.backbones.z_image import ZImageFlow

__all__ = [
    "FAMILIES",
    "AdaptedFlow",
    "FlowAdapter",
    "FlowNetwork",
    "FluxFlow",
    "FluxFlowMap",
    "LatentDecoder",
    "LoRA",
    "LoRANetwork",
    "Lumina2Flow",
    "PromptedNetwork",
    "QwenImageFlow",
    "SD3Flow",
    "SanaFlow",
    "TextToImageFlow",
    "ZImageFlow",
    "load_flow",
]
