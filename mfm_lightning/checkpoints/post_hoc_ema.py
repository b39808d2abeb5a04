"""Power-function averages of weights, and averages of any length after the fact (post-hoc EMA of EDM2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from scipy.optimize import brentq
from torch import Tensor

from mfm_lightning.networks.files import read_metadata
from mfm_lightning.utils.atomic import save_tensors
from mfm_rewards.weights import CheckpointError

SIGMA_REL = "sigma_rel"  # in a snapshot's metadata
LONGEST = 12**-0.5  # the relative width of the mean of all steps


def power(sigma_rel: float) -> float:
    """The power gamma of the profile t^gamma whose standard deviation is this share of the training so far (Karras et
    al., arXiv 2312.02696, Section 3.1): sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises:
        ValueError: for a width that no power >= 0 has: it lies in (0, 0.2887], where 0.2887 is the mean of all steps.
    """
    if not 0 < sigma_rel <= LONGEST + 1e-9:
        raise ValueError(f"sigma_rel {sigma_rel} must lie in (0, {LONGEST:.4f}], the last of which is the plain mean")
    if sigma_rel >= LONGEST:
        return 0.0

    def excess(gamma: float) -> float:
        return math.log((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) - 2 * math.log(sigma_rel)

    return float(brentq(excess, 0.0, 2 / sigma_rel))  # type: ignore[arg-type] # a number, without full_output; gamma is below 1 / sigma_rel


@dataclass(frozen=True)
class Profile:
    """How much each step counts in an average: step t as t^gamma, up to a last one.

    Attributes:
        step: the last step.
        sigma_rel: relative width, see `power`.
    """

    step: int
    sigma_rel: float

    def overlap(self, other: Profile) -> float:
        """Integral of the product of both profiles, each of integral 1."""
        first, last = sorted((self, other), key=lambda profile: profile.step)
        a, b = power(first.sigma_rel), power(last.sigma_rel)
        return (a + 1) * (b + 1) / (a + b + 1) * (first.step / last.step) ** b / last.step


def combination(snapshots: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """The weights with which averages of these profiles add up to the wanted one, by least squares (Karras et al.,
    Section 3.2). Unlike there, they sum to 1, so that a weight that did not move stays what it was.

    Returns:
        The weights, and what is missed: the norm of the difference of profiles, as a share of the wanted one's norm.
    """
    size = len(snapshots)
    matrix = torch.ones(size + 1, size + 1, dtype=torch.float64)
    matrix[:-1, :-1] = torch.tensor([[a.overlap(b) for b in snapshots] for a in snapshots], dtype=torch.float64)
    matrix[-1, -1] = 0.0
    right = torch.tensor([*(wanted.overlap(a) for a in snapshots), 1.0], dtype=torch.float64)
    # a row's own scale, for overlaps of early snapshots are much larger than those of late ones
    scale = torch.cat([matrix.diagonal()[:-1].rsqrt(), torch.ones(1, dtype=torch.float64)])
    solved = torch.linalg.lstsq(scale[:, None] * matrix * scale, (scale * right)[:, None], driver="gelsd").solution
    found = (scale * solved[:, 0])[:-1]
    norm = wanted.overlap(wanted)
    missed = norm - 2 * found @ right[:-1] + found @ matrix[:-1, :-1] @ found
    return found.tolist(), math.sqrt(max(0.0, missed.item()) / norm)


def snapshots_in(folder: str | Path) -> dict[Profile, Path]:
    """The snapshots that `EMASnapshots` left in a folder, in the order of their steps.

    Raises:
        FileNotFoundError: if there are none.
    """
    found: dict[Profile, Path] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        said = read_metadata(path)
        if SIGMA_REL in said:
            found[Profile(int(said["step"]), float(said[SIGMA_REL]))] = path
    if not found:
        raise FileNotFoundError(
            f"no snapshots of averages in {folder}: the callback mfm_lightning.callbacks.EMASnapshots leaves them in "
            "RUN/ema"
        )
    return dict(sorted(found.items(), key=lambda item: (item[0].step, item[0].sigma_rel)))


def average_snapshots(
    folder: str | Path, output: str | Path, sigma_rel: float, step: int | None = None
) -> tuple[int, int, float]:
    """Write the network whose weights are the average of this length, put together from a run's snapshots. One tensor
    of one file is in memory at a time.

    Args:
        folder: of the snapshots.
        output: file to write.
        sigma_rel: width of the average, as a share of the training up to `step`.
        step: the last step that counts, one of a snapshot; the last one where None.

    Returns:
        The step, how many snapshots were used, and what is missed, as `combination` tells it.

    Raises:
        FileNotFoundError: if there are no snapshots, or none of that step.
        ValueError: for a width that no average has.
        CheckpointError: for snapshots of networks that differ.
    """
    power(sigma_rel)
    there = snapshots_in(folder)
    steps = sorted({profile.step for profile in there})
    step = steps[-1] if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"no snapshot of step {step} in {folder}: there are those of {steps}")
    used = {profile: path for profile, path in there.items() if profile.step <= step}
    weights, missed = combination(list(used), Profile(step, sigma_rel))
    last = max(used, key=lambda profile: profile.step)
    tensors = _added(dict(zip(used.values(), weights, strict=True)), used[last])
    save_tensors(tensors, output, {**read_metadata(used[last]), SIGMA_REL: f"{sigma_rel:g}"})
    return step, len(used), missed


def _added(weights: Mapping[Path, float], last: Path) -> dict[str, Tensor]:
    """The weighted sum of the files' tensors; what is no floating number is the last file's."""
    files = {path: safe_open(path, framework="pt") for path in weights}
    names = list(files[last].keys())
    shapes = {name: files[last].get_slice(name).get_shape() for name in names}
    for path, file in files.items():
        if {name: file.get_slice(name).get_shape() for name in file.keys()} != shapes:  # noqa: SIM118 # no dictionary
            raise CheckpointError(f"{path} and {last} hold different networks, of two runs: keep those of one")
    added: dict[str, Tensor] = {}
    for name in names:
        tensor = files[last].get_tensor(name)
        if tensor.is_floating_point():
            total = torch.zeros(tensor.shape, dtype=torch.float64)
            for path, weight in weights.items():
                total.add_(files[path].get_tensor(name), alpha=weight)
            tensor = total.to(torch.float32)
        added[name] = tensor
    return added
