"""LightningModules."""

from mfm_lightning.modules.alignment import RewardAlignment
from mfm_lightning.modules.autoencoding import Autoencoding
from mfm_lightning.modules.base import TrainingModule, check_batch
from mfm_lightning.modules.classification import Classification
from mfm_lightning.modules.contrastive import Contrastive
from mfm_lightning.modules.execution import TrainingExecution
from mfm_lightning.modules.finetuning import LowRank, RewardFinetuning
from mfm_lightning.modules.finite import NonFiniteGradientError, NonFiniteLossError
from mfm_lightning.modules.normaliser import LogNormaliser
from mfm_lightning.modules.optimization import Optimization
from mfm_lightning.modules.pretraining import MFMPretraining
from mfm_lightning.modules.prompt_alignment import PromptAlignment
from mfm_lightning.modules.prompt_finetuning import PromptFinetuning
from mfm_lightning.modules.tilting import DiffusionSchedule, TiltedTraining
from mfm_lightning.modules.value_estimation import ValueEstimation

__all__ = [
    "Autoencoding",
    "Classification",
    "Contrastive",
    "DiffusionSchedule",
    "LogNormaliser",
    "LowRank",
    "MFMPretraining",
    "NonFiniteGradientError",
    "NonFiniteLossError",
    "Optimization",
    "PromptAlignment",
    "PromptFinetuning",
    "RewardAlignment",
    "RewardFinetuning",
    "TiltedTraining",
    "TrainingExecution",
    "TrainingModule",
    "ValueEstimation",
    "check_batch",
]
