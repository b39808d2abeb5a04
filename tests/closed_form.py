"""The exact flow map of a single Gaussian, as a network."""

import torch
from torch import nn

from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import expand
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.objectives.teachers import OracleTeacher
from mfm_lightning.oracles import GaussianMixture

MEAN, VARIANCE = (1.0, -0.5), 0.3


class GaussianNetwork(nn.Module):
    """v_{s,u}(x; t, x_t) for data N(mu, c I), written out.

    The posterior is N(m, v I), v = c (1-t)^2 / k, m = (mu (1-t)^2 + c t x_t) / k, k = (1-t)^2 + c t^2. The inner
    flow has marginals N(s m, S_s^2), S_s^2 = (1-s)^2 + s^2 v, so X_{s,u}(x) = u m + S_u/S_s (x - s m) and
    v_{s,u} = m + (x - s m) [(u+s)(1+v) - 2] / (S_s (S_u + S_s)), also at u = s.
    """

    state_shape, num_classes, guidance_scales = (2,), 0, ()
    null_conditions = Conditions(label=0, guidance=1.0)

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, s, u, x, t, x_t, conditions):
        s, u, t = (expand(time, x) for time in (s, u, t))
        k = (1 - t) ** 2 + VARIANCE * t**2
        v = VARIANCE * (1 - t) ** 2 / k
        m = (torch.tensor(MEAN).to(x) * (1 - t) ** 2 + VARIANCE * t * x_t) / k
        S_s, S_u = ((1 - w) ** 2 + w**2 * v for w in (s, u))
        S_s, S_u = S_s.sqrt(), S_u.sqrt()
        return self.one * (m + (x - s * m) * ((u + s) * (1 + v) - 2) / (S_s * (S_u + S_s)))


def gaussian_model() -> MetaFlowMap:
    return MetaFlowMap(GaussianNetwork())


def gaussian_teacher() -> OracleTeacher:
    return OracleTeacher(GaussianMixture([MEAN], VARIANCE))
