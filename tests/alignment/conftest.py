"""Fixtures of several files."""

import pytest
import torch

from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP


@pytest.fixture(scope="module")
def model():
    """An MFM of random weights that does use its condition."""
    torch.manual_seed(0)
    model = MetaFlowMap(MLP(dim=2, hidden_size=16, depth=1))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.requires_grad_(False)
