"""Shards of WebDataset that others made."""

from mfm_lightning.data.web.datamodule import WebDatasetDataModule

__all__ = ["WebDatasetDataModule"]
