"""Tangents of the layers of feature maps: against torch.func.jvp of the plain formulas, in float64."""

import pytest
import torch
import torch.nn.functional as F

from mfm_lightning.networks import dual, dual_conv
from mfm_lightning.networks.dual import Dual


def layers():
    """A strided convolution, and group norms with and without an affine map."""
    conv = torch.nn.Conv2d(6, 4, 3, stride=2, padding=1).double()
    affine = torch.nn.GroupNorm(3, 6).double()
    for p in affine.parameters():
        torch.nn.init.normal_(p)
    return conv, affine, torch.nn.GroupNorm(2, 6, affine=False).double()


CONV, AFFINE, PLAIN = layers()


def group_norm(x, groups, weight, bias):
    """From its definition; eps is torch's."""
    y = x.reshape(len(x), groups, -1)
    centred = y - y.mean(-1, keepdim=True)
    y = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
    return y * weight[:, None, None] + bias[:, None, None]


def nearest(x, size):
    """Pixel i of the larger image is pixel floor(i * old / new) of the smaller."""
    index = torch.arange(size) * x.shape[-1] // size
    return x[..., index, :][..., index]


# rule: (ours, the same in plain torch), of maps x, y `(2, 6, 5, 5)` and vectors a, b `(2, 6)`
RULES = {
    "conv2d": (
        lambda x, y, a, b: dual_conv.conv2d(CONV, x),
        lambda x, y, a, b: F.conv2d(x, CONV.weight, CONV.bias, stride=2, padding=1),
    ),
    "group_norm": (
        lambda x, y, a, b: dual_conv.group_norm(AFFINE, x),
        lambda x, y, a, b: group_norm(x, 3, AFFINE.weight, AFFINE.bias),
    ),
    "group_norm, plain": (
        lambda x, y, a, b: dual_conv.group_norm(PLAIN, x),
        lambda x, y, a, b: group_norm(x, 2, torch.ones(6), torch.zeros(6)),
    ),
    "modulate_channels": (
        lambda x, y, a, b: dual_conv.modulate_channels(x, a, b),
        lambda x, y, a, b: torch.einsum("bchw,bc->bchw", x, 1 + b) + a.reshape(2, 6, 1, 1),
    ),
    "upsample, twice": (lambda x, y, a, b: dual_conv.upsample(x, 10), lambda x, y, a, b: nearest(x, 10)),
    "upsample, odd": (lambda x, y, a, b: dual_conv.upsample(x, 9), lambda x, y, a, b: nearest(x, 9)),
    "channels side by side": (
        lambda x, y, a, b: dual.concatenate(x, y, dim=1),
        lambda x, y, a, b: torch.stack([x, y], dim=1).flatten(1, 2),
    ),
}


@pytest.mark.parametrize("moving", ["all", "maps", "one map", "vectors", "none"])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_equals_functorch(rule, moving):
    torch.manual_seed(0)
    ours, plain = RULES[rule]
    values = tuple(torch.randn(s, dtype=torch.float64) for s in [(2, 6, 5, 5)] * 2 + [(2, 6)] * 2)
    moves = {"all": 4 * [1], "maps": [1, 1, 0, 0], "one map": [0, 1, 0, 0], "vectors": [0, 0, 1, 1], "none": 4 * [0]}
    tangents = tuple(torch.randn_like(v) * m for v, m in zip(values, moves[moving], strict=True))
    given = [Dual(v, d if m else None) for v, d, m in zip(values, tangents, moves[moving], strict=True)]
    value, tangent = ours(*given)
    reference, change = torch.func.jvp(plain, values, tangents)
    torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-11)
    assert tangent is None or (tangent.shape == value.shape and not tangent.requires_grad)
    torch.testing.assert_close(torch.zeros_like(value) if tangent is None else tangent, change, rtol=1e-9, atol=1e-10)


def test_values_keep_their_graph():
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    y = dual_conv.group_norm(AFFINE, Dual(x, torch.randn_like(x)))
    (gradient,) = torch.autograd.grad(dual_conv.conv2d(CONV, y).value.square().sum(), x)
    plain = F.conv2d(group_norm(x, 3, AFFINE.weight, AFFINE.bias), CONV.weight, CONV.bias, stride=2, padding=1)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.square().sum(), x)[0])
