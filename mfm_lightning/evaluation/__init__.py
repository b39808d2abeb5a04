"""Evaluations that a config can name."""

from mfm_lightning.evaluation.base import Evaluation
from mfm_lightning.evaluation.images import ImageEvaluation
from mfm_lightning.evaluation.mixture import MixtureEvaluation
from mfm_lightning.evaluation.policy import PolicyEvaluation, TiltedMixtureEvaluation
from mfm_lightning.evaluation.prompt_policy import PromptPolicyEvaluation
from mfm_lightning.evaluation.prompts import PromptEvaluation
from mfm_lightning.evaluation.values import ValueEvaluation

__all__ = [
    "Evaluation",
    "ImageEvaluation",
    "MixtureEvaluation",
    "PolicyEvaluation",
    "PromptEvaluation",
    "PromptPolicyEvaluation",
    "TiltedMixtureEvaluation",
    "ValueEvaluation",
]
