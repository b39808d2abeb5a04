"""A run of a few steps on digits, for tests of what is around training."""

from pathlib import Path

import torch
import yaml

from mfm_lightning.commands.main import run

NETWORK = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
NETWORK |= {"encoder_depth": 1, "num_classes": 10, "guidance_scales": []}
CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu", "log_every_n_steps": 2, "val_check_interval": 1000, "limit_val_batches": 2,
        "enable_progress_bar": False,
    },
    "ema": {"decay": 0.9},
    "model": {
        "class_path": "mfm_lightning.modules.MFMPretraining",
        "init_args": {
            "network": {"class_path": "mfm_lightning.networks.DiT", "init_args": NETWORK},
            "objective": {"terms": [{"name": "data_diagonal"}]},
            "optimization": {"optimizer": "adamw", "learning_rate": 1e-3, "warmup_steps": 0},
        },
    },
    "data": {"class_path": "mfm_lightning.data.DigitsDataModule", "init_args": {"batch_size": 16}},
}  # fmt: skip


def job(command: str, folder: str, *more: str) -> None:
    """`mfm COMMAND` with that config in the current folder."""
    if not Path("tiny.yaml").exists():
        Path("tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    run([command, "--config", "tiny.yaml", f"--trainer.default_root_dir={folder}", *more])


def fit(folder: str, steps: int, *more: str) -> None:
    """`mfm fit` of so many steps."""
    job("fit", folder, f"--trainer.max_steps={steps}", *more)


def last(folder: str) -> dict:
    """The run's last checkpoint."""
    return torch.load(Path(folder) / "last.ckpt", weights_only=True)
