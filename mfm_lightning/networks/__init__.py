"""Networks for the average velocity v_{s,u}(x; t, x_t)."""

from mfm_lightning.networks.dit import DiT, architecture
from mfm_lightning.networks.mlp import MLP

NETWORKS = {"DiT": DiT, "MLP": MLP}

__all__ = ["MLP", "NETWORKS", "DiT", "architecture"]
