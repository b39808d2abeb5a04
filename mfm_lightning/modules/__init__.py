"""LightningModules."""

from mfm_lightning.modules.pretraining import MFMPretraining, NonFiniteLossError

__all__ = ["MFMPretraining", "NonFiniteLossError"]
