"""Images of one's own: sources, and the DataModule over them."""

from mfm_lightning.data.images.arrays import IdxImages, NpzImages
from mfm_lightning.data.images.datamodule import ImageDataModule
from mfm_lightning.data.images.folder import ImageFolder
from mfm_lightning.data.images.hugging_face import HuggingFaceImages
from mfm_lightning.data.images.source import LabelledImages
from mfm_lightning.data.images.torchvision_sets import TorchvisionImages

__all__ = [
    "HuggingFaceImages",
    "IdxImages",
    "ImageDataModule",
    "ImageFolder",
    "LabelledImages",
    "NpzImages",
    "TorchvisionImages",
]
