"""The harness: runs a method and measures it from outside, the same way for all of them."""

from __future__ import annotations

import hashlib
import time
from dataclasses import is_dataclass, replace

import torch
from torch import Tensor

from mfm_benchmarks.quality import Quality
from mfm_benchmarks.suite import Outcome
from mfm_lightning.alignment import AlignmentMethod
from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.alignment.target import Target
from mfm_lightning.interpolant import sample_generators

SHOWN = 16  # images kept of each run


def noise(num: int, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """`(num, *shape)`: the noise that every method begins from."""
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed)).to(device)


def states_digest(states: Tensor) -> str:
    """SHA-256 of states, for the identity of results on them."""
    return hashlib.sha256(states.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def clock(device: torch.device) -> float:
    """Seconds, when all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def measure(
    method: AlignmentMethod,
    target: Target,
    x0: Tensor,
    seed: int,
    batch_size: int | None = None,
    quality: Quality | None = None,
    each: int = 1,
    rows: range | None = None,
) -> Outcome:
    """Samples of a method, with what they cost and what they are worth.

    NFE are what went through the target's counter, and rewards are those of the decoded images, whatever the method
    says of itself. Judging is not counted.

    Args:
        x0: noise `(B, *shape)`.
        seed: of the method's own noise, which is each sample's.
        batch_size: samples at once; all where None. The samples do not depend on it, but for the rounding of sums.
        quality: features to keep.
        each: samples that the method makes of each noise.
        rows: of x0, that samples are made of; all where None. They are the same whichever others are made.

    Returns:
        numbers: `network` and `reward` evaluations a sample, `nfe` their sum; tensors: `rewards` `(B,)`, `states`,
        `images` (the first few), `features` `(B, F)` with a quality, and `best_rewards` `(B,)`, of the best
        look-aheads, where the method has them.
    """
    meter, states, best, method = Meter(), [], [], looking_ahead(method)
    chosen = torch.arange(len(x0)) if rows is None else torch.tensor(rows)
    for batch in chosen.split(batch_size or len(chosen)):
        part = target.take(batch)
        part.meter = meter
        result = method(part, x0[batch], sample_generators((seed, 1), batch.tolist()))
        if len(result.states) != each * len(batch):
            raise ValueError(f"{len(result.states)} samples for {len(batch)}: a suite compares {each} for each noise")
        states.append(result.states)
        best += [] if result.best_states is None else [result.best_states]
    found, target = torch.cat(states), target.take(chosen)
    outcome = judge(target.expand(found), found, quality)
    network, reward = meter.network / len(found), meter.reward / len(found)
    outcome.numbers = {"network": network, "reward": reward, "nfe": network + reward}
    if best and sum(map(len, best)) == len(found):
        outcome.tensors["best_rewards"] = judge(target.expand(found), torch.cat(best)).tensors["rewards"]
    return outcome


def looking_ahead(method: AlignmentMethod) -> AlignmentMethod:
    """The method with `return_best`, which costs no evaluation and changes nothing else; as it is where it has none."""
    if getattr(method, "return_best", None) is not False or not is_dataclass(method):
        return method
    try:
        return replace(method, return_best=True)
    except ValueError:  # its estimator scores no clean states
        return method


@torch.no_grad()
def judge(target: Target, states: Tensor, quality: Quality | None = None, batch_size: int = 512) -> Outcome:
    """Rewards, images and features of finished states."""
    rewards, shown, features = [], [], []
    for rows in torch.arange(len(states)).split(batch_size):
        part = target.take(rows)
        chosen = states[rows]
        images = part.decoder(chosen)
        rewards.append(part.plain_rewards(chosen).cpu())
        if sum(map(len, shown)) < SHOWN:
            shown.append(images[:SHOWN].cpu())
        if quality is not None:
            features.append(quality.features(images))
    tensors = {"rewards": torch.cat(rewards), "states": states.cpu().clone(), "images": torch.cat(shown)[:SHOWN]}
    if quality is not None:
        tensors["features"] = torch.cat(features)
    return Outcome({}, tensors)
