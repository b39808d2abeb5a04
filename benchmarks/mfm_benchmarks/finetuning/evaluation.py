"""What a policy is worth: its rewards, those that it was not trained on, and how far it went from the base flow."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from mfm_benchmarks.measure import judge
from mfm_benchmarks.quality import Quality
from mfm_lightning.alignment.target import Target
from mfm_lightning.glass import BaseDrift
from mfm_lightning.interpolant import Generators, as_times, diffusion, randn, sample_generators
from mfm_lightning.objectives.finetuning import control_cost
from mfm_lightning.samplers import euler_maruyama, sample_ode

T_START = 0.01


@torch.no_grad()
def path_divergence(
    policy: BaseDrift, base: BaseDrift, x0: Tensor, steps: int = 20, generator: Generators = None
) -> Tensor:
    """What each sample adds to KL(policy || base) of the two SDEs' paths, in nats, `(B,)`.

    By Girsanov it is the integral of `control_cost` over t along the policy's own SDE, drift 2 b_theta - x/t with
    sigma^2/2 = (1-t)/t: for any policy, near its optimum or not. Its mean is an upper bound of the divergence of the
    SDE's samples, and equal to it where the policy is the flow of a tilted distribution.

    Args:
        policy: the policy's drift `(t, x)`.
        base: the base flow's drift `(t, x)`.
        x0: noise `(B, *shape)`, the state at t = 0.01.
        steps: of Euler-Maruyama.
        generator: of the steps' noise.
    """
    x, total = x0, torch.zeros(len(x0), device=x0.device)
    for now, then in itertools.pairwise(torch.linspace(T_START, 1, steps + 1, dtype=torch.float64).tolist()):
        t = as_times(now, x)
        drift = policy(t, x)
        total = total + (then - now) * control_cost(base(t, x), drift, diffusion(t, torch.inf))
        x, deviation = euler_maruyama(now, then, x, drift, diffusion(t))
        if deviation is not None:
            x = x + deviation * randn(x.shape, x, generator)
    return total


@torch.no_grad()
def worth(
    policy: Target,
    base: Target,
    x0: Tensor,
    seed: int,
    held_out: Mapping[str, Target],
    quality: Quality | None = None,
    steps: int = 20,
) -> dict[str, Tensor]:
    """Of samples of the policy's ODE from noise `x0` `(B, *shape)`.

    Args:
        policy: target with a row of conditions for each sample, whose drift is the policy's.
        base: the same, with the base flow's drift.
        seed: of the noise of the SDE that drift is measured on; samples of one index have the same for all policies.
        held_out: targets whose rewards the policy was not trained on.
        steps: Euler steps of the samples, and of the SDE.

    Returns:
        `rewards` `(B,)` without the scale, `drift` `(B,)`, `held_out/NAME` `(B,)`, `images` (the first few), and
        `features` `(B, F)` with a quality.
    """
    states = sample_ode(policy.drift, x0, steps)
    judged = judge(policy, states, quality).tensors
    generators = sample_generators((seed, 2), range(len(x0)))
    found = {name: judged[name] for name in ("rewards", "images", "features") if name in judged}
    found["drift"] = path_divergence(policy.drift, base.drift, x0, steps, generators).cpu()
    for name, other in held_out.items():
        found[f"held_out/{name}"] = judge(other.expand(states), states).tensors["rewards"]
    return found
