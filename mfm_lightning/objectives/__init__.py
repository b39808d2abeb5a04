"""Training objectives of Meta Flow Maps (paper, section 5)."""

from mfm_lightning.objectives.objective import Objective, WeightedTerm, adaptive_loss, squared_error
from mfm_lightning.objectives.pairs import END, ConditionTimes, InnerSample, InnerTimes, Pair, PairSampler, noised
from mfm_lightning.objectives.teachers import CheckpointTeacher, ModelTeacher, OracleTeacher, Teacher
from mfm_lightning.objectives.terms import TERMS, Consistency, Term

__all__ = [
    "END",
    "TERMS",
    "CheckpointTeacher",
    "ConditionTimes",
    "Consistency",
    "InnerSample",
    "InnerTimes",
    "ModelTeacher",
    "Objective",
    "OracleTeacher",
    "Pair",
    "PairSampler",
    "Teacher",
    "Term",
    "WeightedTerm",
    "adaptive_loss",
    "noised",
    "squared_error",
]
