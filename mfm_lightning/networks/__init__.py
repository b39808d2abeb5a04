"""Networks for the average velocity v_{s,u}(x; t, x_t), and for the amortised value V(t, x_t); decoders of states,
classifiers of images."""

from mfm_lightning.networks.autoencoder import Autoencoder
from mfm_lightning.networks.base import VelocityNetwork
from mfm_lightning.networks.classifier import ImageClassifier
from mfm_lightning.networks.decoders import Decoder, IdentityDecoder, PixelDecoder, VAEDecoder
from mfm_lightning.networks.dit import DiT, architecture
from mfm_lightning.networks.image_text import ImageTextEncoder
from mfm_lightning.networks.mlp import MLP
from mfm_lightning.networks.tiny_decoder import TinyDecoder
from mfm_lightning.networks.unet import UNet
from mfm_lightning.networks.value import ValueDiT, ValueMLP

NETWORKS = {"DiT": DiT, "MLP": MLP, "UNet": UNet}
VALUE_NETWORKS = {"ValueDiT": ValueDiT, "ValueMLP": ValueMLP}
CLASSIFIERS = {"ImageClassifier": ImageClassifier}

__all__ = [
    "CLASSIFIERS",
    "MLP",
    "NETWORKS",
    "VALUE_NETWORKS",
    "Autoencoder",
    "Decoder",
    "DiT",
    "IdentityDecoder",
    "ImageClassifier",
    "ImageTextEncoder",
    "PixelDecoder",
    "TinyDecoder",
    "UNet",
    "VAEDecoder",
    "ValueDiT",
    "ValueMLP",
    "VelocityNetwork",
    "architecture",
]
