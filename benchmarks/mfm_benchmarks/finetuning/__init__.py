"""Fine-tuning of a flow to a reward: MFM-FT and what people use instead, each as its paper has it, one file a method.

They know a flow by its `drift(t, x, conditions)` and its parameters alone, so that networks here and pretrained
text-to-image flows with an adapter are trained alike.
"""

from mfm_benchmarks.finetuning.diffusion_nft import DiffusionNFT
from mfm_benchmarks.finetuning.draft import DRaFT
from mfm_benchmarks.finetuning.flow_grpo import FlowGRPO
from mfm_benchmarks.finetuning.method import FineTuning
from mfm_benchmarks.finetuning.mfm_ft import MFMFineTuning
from mfm_benchmarks.finetuning.problem import Policy, Problem
from mfm_benchmarks.finetuning.refl import ReFL
from mfm_benchmarks.finetuning.training import Checkpoint, Training, train

__all__ = [
    "Checkpoint",
    "DRaFT",
    "DiffusionNFT",
    "FineTuning",
    "FlowGRPO",
    "MFMFineTuning",
    "Policy",
    "Problem",
    "ReFL",
    "Training",
    "train",
]
