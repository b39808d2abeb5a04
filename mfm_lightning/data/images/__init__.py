"""Images of one's own: sources, and the DataModule over them."""

from mfm_lightning.data.images.arrays import IdxImages, NpzImages
from mfm_lightning.data.images.captioned_folder import CaptionedFolder
from mfm_lightning.data.images.captions import CaptionedImages, JoinedImages
from mfm_lightning.data.images.datamodule import ImageDataModule
from mfm_lightning.data.images.folder import ImageFolder
from mfm_lightning.data.images.hugging_face import HuggingFaceImages
from mfm_lightning.data.images.latents import EncodedImages
from mfm_lightning.data.images.source import LabelledImages
from mfm_lightning.data.images.torchvision_sets import TorchvisionImages

__all__ = [
    "CaptionedFolder",
    "CaptionedImages",
    "EncodedImages",
    "HuggingFaceImages",
    "IdxImages",
    "ImageDataModule",
    "ImageFolder",
    "JoinedImages",
    "LabelledImages",
    "NpzImages",
    "TorchvisionImages",
]
