"""Jobs of `mfm` that are over in seconds, for tests that need their files, however good."""

FOUR_STEPS = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--trainer.log_every_n_steps=1"]
EVALUATION, DATA_MODULE = "--model.init_args.evaluation.init_args", "--data.init_args"
STEERING = f"{EVALUATION}.steering.init_args.grid.steps=2"
IMAGES = [f"{EVALUATION}.{option}" for option in ("num_samples=64", "ode_steps=10", "glass_steps=5")]
BUFFER = [f"{DATA_MODULE}.buffer_size=64", f"{DATA_MODULE}.ode_steps=2"]
VALUES = ["num_states=8", "num_draws=4", "rollout_draws=4", "rollout_steps=3", "times=[0.3]", "glass_steps=[1, 2]"]
SHORT = {  # by config: what makes the rest of a job short
    "digits/flow": IMAGES,
    "digits/mfm": IMAGES,
    "digits/mfm_from_data": IMAGES,
    "digits/value": [f"{EVALUATION}.{option}" for option in VALUES],
    "digits/finetune": [
        *[f"{EVALUATION}.{option}" for option in ("samples_per_class=3", "ode_steps=3", "pictures=10")],
        STEERING,
        *BUFFER,
    ],
    "gmm/mfm": [f"{EVALUATION}.num_states=2"],
    "gmm/finetune": [f"{EVALUATION}.num_samples=64", f"{EVALUATION}.ode_steps=3", *BUFFER],
    "mnist/flow": IMAGES,
    "mnist/mfm": IMAGES,
    "mnist/mfm_from_data": IMAGES,
    "mnist/value": [f"{EVALUATION}.{option}" for option in VALUES],
    "mnist/finetune": [
        *[f"{EVALUATION}.{option}" for option in ("samples_per_class=6", "ode_steps=2", "pictures=6")],
        STEERING,
        *BUFFER,
        f"{DATA_MODULE}.data.init_args.num_samples=20",
    ],
    "fashion/flow": IMAGES,
    "fashion/mfm": IMAGES,
    **{
        f"{name}/steer": [f"{DATA_MODULE}.num_samples=4", "--model.init_args.method.init_args.grid.steps=2"]
        for name in ("mnist", "fashion")
    },
    "mnist/search": [f"{DATA_MODULE}.num_samples=2", "--model.init_args.method.init_args.steps=1"],
    "digits/steer": [f"{DATA_MODULE}.num_samples=4", "--model.init_args.method.init_args.grid.steps=2"],
}

NEEDS = {  # configs whose outputs a config reads, in the order in which they are made
    "digits/mfm": ["digits/flow"],
    "digits/value": ["digits/flow", "digits/mfm"],
    "digits/finetune": ["digits/flow", "digits/mfm"],
    "gmm/value": ["gmm/mfm"],
    "gmm/finetune": ["gmm/mfm"],
    "mnist/mfm": ["mnist/flow"],
    "fashion/mfm": ["fashion/flow"],
}


def short(command: str, config: str) -> list[str]:
    """The command with a config by its name, such as "digits/mfm", and what makes it short."""
    steps = FOUR_STEPS if command == "fit" else []
    return [command, "--config", f"configs/{config}.yaml", *steps, *SHORT.get(config, [])]


def tiny_fit(channels: int, classes: int, terms: str, data: str) -> str:
    """A config of three steps on states of 8x8 in `outputs/`, with a checkpoint every two.

    Args:
        terms, data: of the objective and the data section, as YAML.
    """
    return f"""
trainer:
  default_root_dir: outputs
  max_steps: 3
  accelerator: cpu
  val_check_interval: 3
  log_every_n_steps: 1
  enable_progress_bar: false
checkpoint: {{every_n_steps: 2}}
seed_everything: 0
model:
  class_path: mfm_lightning.modules.MFMPretraining
  init_args:
    network:
      class_path: mfm_lightning.networks.DiT
      init_args:
        {{input_size: 8, patch_size: 4, in_channels: {channels}, hidden_size: 16, depth: 2, num_heads: 2,
         encoder_depth: 1, num_classes: {classes}, guidance_scales: []}}
    objective:
      terms: {terms}
data:{data}"""
