"""mfm-lightning: Meta Flow Maps (ICML 2026, arXiv 2601.14430) for scalable reward alignment of image generators.

    from mfm_lightning import Steering, Target, load_model

The names are those of `__init__.pyi`; each is imported from its room when it is first used.

- models: MetaFlowMap, VelocityNetwork (DiT, UNet, MLP)
- their files: load_model, save_model, load_value, load_classifier, import_checkpoint, export_checkpoint
- what is aligned to what: Target, Conditions, decoders (PixelDecoder, VAEDecoder, TinyDecoder, IdentityDecoder)
- methods: Steering, Search, BestOfN, FeynmanKac, TwistedSMC, TrajectoryTilting, NoiseOptimisation, PolicySampling (as
  functions: steer, search, best_of_n, tilt_trajectories, optimise_noise)
- estimators of the value: DrawValue, DrawGradient, DrawGradientFree, DiamondGradient, DiamondGradientFree, DPSGradient,
  FlowMapGradient, NetworkGradient, ExactGradient
- posteriors: FlowMapPosterior, GlassPosterior, DiamondPosterior, RolloutPosterior, OraclePosterior
- samplers: sample_ode, sample_sde, sample_refinement, sample_posterior_glass, glass_velocity, velocity_and_jvp
- oracles (Oracle): GaussianMixture, EmpiricalDistribution
- training: MFMPretraining, ValueEstimation, RewardFinetuning, RewardAlignment, Classification, Objective, PairSampler,
  ConditionTimes, InnerTimes, Optimization, teachers, EMA, EMASnapshots
- data: ImageDataModule, WebDatasetDataModule, LatentShards, LatentDataModule, DigitsDataModule, NoiseDataModule,
  GaussianMixtureDataModule, ModelSamplesDataModule, OffPolicyDataModule
"""

import lazy_loader

from mfm_lightning._version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
