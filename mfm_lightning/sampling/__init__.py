"""Many samples of a model: which, drawn how, written where."""

from mfm_lightning.sampling.files import sample_files
from mfm_lightning.sampling.model_sampler import ModelSampler
from mfm_lightning.sampling.outputs import NPZ, OUTPUTS, Output, PNGFolder, WebDatasetShards
from mfm_lightning.sampling.plan import SamplePlan

__all__ = ["NPZ", "OUTPUTS", "ModelSampler", "Output", "PNGFolder", "SamplePlan", "WebDatasetShards", "sample_files"]
