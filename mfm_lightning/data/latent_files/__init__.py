"""Latents as other people's preprocessing scripts leave them: sources, and the DataModule over them."""

from mfm_lightning.data.latent_files.arrays import LatentArrays
from mfm_lightning.data.latent_files.datamodule import LatentDataModule
from mfm_lightning.data.latent_files.folder import LatentFolder
from mfm_lightning.data.latent_files.source import StoredLatents

__all__ = ["LatentArrays", "LatentDataModule", "LatentFolder", "StoredLatents"]
