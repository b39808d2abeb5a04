"""DataModules."""

from mfm_lightning.data.base import ArrayDataModule
from mfm_lightning.data.digits import DigitsDataModule
from mfm_lightning.data.gaussian_mixture import GaussianMixtureDataModule

__all__ = ["ArrayDataModule", "DigitsDataModule", "GaussianMixtureDataModule"]
