"""Fixtures of several files."""

import sys
from pathlib import Path

import pytest
import torch

from mfm_lightning.checkpoints import save_model
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder: the configs and a model of digits."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    torch.manual_seed(0)
    model = MetaFlowMap(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, guidance_scales=()))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save_model(model, tmp_path / "outputs/digits/mfm/model.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mfm"])
    return tmp_path
