"""DataModules."""

from mfm_lightning.data.base import ArrayDataModule
from mfm_lightning.data.digits import DigitsDataModule
from mfm_lightning.data.gaussian_mixture import GaussianMixtureDataModule
from mfm_lightning.data.noise import NoiseDataModule
from mfm_lightning.data.off_policy import OffPolicyDataModule

__all__ = ["ArrayDataModule", "DigitsDataModule", "GaussianMixtureDataModule", "NoiseDataModule", "OffPolicyDataModule"]
