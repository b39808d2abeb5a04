"""DataModules."""

from mfm_lightning.data.base import ArrayDataModule, StepDataModule
from mfm_lightning.data.digits import DigitsClassifier, DigitsDataModule
from mfm_lightning.data.gaussian_mixture import GaussianMixtureDataModule
from mfm_lightning.data.images import ImageDataModule
from mfm_lightning.data.latent_files import LatentDataModule
from mfm_lightning.data.latents import LatentShards
from mfm_lightning.data.model_samples import ModelSamplesDataModule
from mfm_lightning.data.noise import NoiseDataModule
from mfm_lightning.data.off_policy import OffPolicyDataModule
from mfm_lightning.data.prompt_samples import PromptSamplesDataModule
from mfm_lightning.data.prompts import PromptsDataModule
from mfm_lightning.data.web import WebDatasetDataModule

__all__ = [
    "ArrayDataModule",
    "DigitsClassifier",
    "DigitsDataModule",
    "GaussianMixtureDataModule",
    "ImageDataModule",
    "LatentDataModule",
    "LatentShards",
    "ModelSamplesDataModule",
    "NoiseDataModule",
    "OffPolicyDataModule",
    "PromptSamplesDataModule",
    "PromptsDataModule",
    "StepDataModule",
    "WebDatasetDataModule",
]
