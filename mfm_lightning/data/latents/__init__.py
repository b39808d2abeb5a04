"""Latents in WebDataset shards: preparing, verifying and reading them."""

from mfm_lightning.data.latents.datamodule import LatentShards

__all__ = ["LatentShards"]
