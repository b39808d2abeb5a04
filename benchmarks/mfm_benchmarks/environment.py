"""Where numbers were measured."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "lightning", "torchmetrics", "numpy", "matplotlib")


def describe(device: torch.device) -> dict[str, str]:
    """Machine, versions and commit, by name; no paths of the machine."""
    import mfm_lightning

    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "mfm-lightning": mfm_lightning.__version__,
        "Python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["CPU"] = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    found["GPU"] = "none used" if device.type == "cpu" else f"{device_name(device)}, CUDA {torch.version.cuda}"
    return found


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu": results of different devices are kept apart."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
