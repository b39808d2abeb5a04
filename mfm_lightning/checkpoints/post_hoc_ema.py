"""Power-function averages of weights, and averages of any length after the fact (post-hoc EMA of EDM2)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from scipy.optimize import brentq
from torch import Tensor

from mfm_lightning.networks.files import read_metadata
from mfm_lightning.utils.atomic import save_tensors
from mfm_rewards.weights import CheckpointError

SNAPSHOT = re.compile(r"\d{8,}-[\d.e-]+\.safetensors")  # the names of their files
STEP, WIDTH, BEGIN = "step", "sigma_rel", "begin"  # in their metadata
LONGEST = 12**-0.5  # the relative width of the mean of all steps: 0.2887


@cache
def power(sigma_rel: float) -> float:
    """The power gamma of the profile t^gamma whose standard deviation is this share of the training so far (Karras et
    al., arXiv 2312.02696, Section 3.1): sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises:
        ValueError: for a width that no power >= 0 has: it lies in (0, 0.2887], where 0.2887 is the mean of all steps.
    """
    if not 0 < sigma_rel <= 0.2887:
        raise ValueError(f"sigma_rel {sigma_rel} must lie in (0, 0.2887], the last of which is the plain mean")
    if sigma_rel >= LONGEST:
        return 0.0

    def excess(gamma: float) -> float:
        return math.log((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) - 2 * math.log(sigma_rel)

    found = brentq(excess, 0.0, 2 / sigma_rel)  # gamma is below 1 / sigma_rel
    return float(found)  # type: ignore[arg-type] # a number, without full_output


@dataclass(frozen=True)
class Profile:
    """How much each step counts in an average: step t as (t - begin)^gamma, up to a last one.

    Attributes:
        last: the last step.
        sigma_rel: width as a share of the steps since `begin`, see `power`.
        begin: the step after which the average begins.
    """

    last: int
    sigma_rel: float
    begin: int = 0

    @property
    def steps(self) -> int:
        return self.last - self.begin

    def overlap(self, other: Profile) -> float:
        """Integral of the product of two profiles of one beginning, each of integral 1."""
        first, last = sorted((self, other), key=lambda profile: profile.steps)
        a, b = power(first.sigma_rel), power(last.sigma_rel)
        return (a + 1) * (b + 1) / (a + b + 1) * (first.steps / last.steps) ** b / last.steps


@dataclass(frozen=True)
class Averaged:
    """What an average was put together from.

    Attributes:
        profile: of the average.
        snapshots: how many were used.
        missed: the norm of the difference of profiles, as a share of the wanted one's norm.
        rounding: of the files' numbers, as a share of the weights: the norm of the sum's weights times half a unit in
            the last place.
    """

    profile: Profile
    snapshots: int
    missed: float
    rounding: float


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


def write_snapshot(
    folder: Path, profile: Profile, tensors: Mapping[str, Tensor], header: Mapping[str, str], dtype: torch.dtype
) -> Path:
    """Write an average as a network's file.

    Args:
        folder: of the run's snapshots.
        profile: of the average, which its name tells.
        tensors: the network's, with the averages in their places.
        header: what the file says of the network.
        dtype: of the floating numbers in the file.

    Raises:
        CheckpointError: if a number is not finite, or becomes so by the type.
    """
    path = folder / f"{profile.last:08d}-{profile.sigma_rel:g}.safetensors"
    typed = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    if broken := [k for k, v in typed.items() if v.is_floating_point() and not torch.isfinite(v).all()]:
        raise CheckpointError(f"{path} is not written: weight {broken[0]} is not finite everywhere in {dtype}")
    said = {STEP: str(profile.last), WIDTH: f"{profile.sigma_rel:g}", BEGIN: str(profile.begin)}
    return save_tensors(typed, path, {**header, **said})


def snapshots_in(folder: str | Path) -> dict[Profile, Path]:
    """The snapshots that `EMASnapshots` left in a folder, in the order of their steps; other files are passed over.

    Raises:
        CheckpointError: for two files of one profile.
    """
    found: dict[Profile, Path] = {}
    for path in sorted(Path(folder).iterdir()):
        if SNAPSHOT.fullmatch(path.name) and WIDTH in (said := read_metadata(path)):
            profile = Profile(int(said[STEP]), float(said[WIDTH]), int(said[BEGIN]))
            if profile in found:
                raise CheckpointError(f"{found[profile]} and {path} are of one step and width: keep one of them")
            found[profile] = path
    return dict(sorted(found.items(), key=lambda item: (item[0].last, item[0].sigma_rel)))


def average_snapshots(folder: str | Path, output: str | Path, sigma_rel: float, step: int | None = None) -> Averaged:
    """Write the network whose weights are the average of this length, put together from a run's snapshots, in float32.
    Two networks are in memory at a time.

    Args:
        folder: of the snapshots.
        output: file to write, not in that folder.
        sigma_rel: width of the average, as a share of the training up to `step`.
        step: the last step that counts, one of a snapshot; the last one where None.

    Raises:
        FileNotFoundError: if there are no snapshots, or none of that step.
        ValueError: for a width that no average has, or an output among the snapshots.
        CheckpointError: for snapshots of different runs: of networks that differ, or averages that begin at others'
            steps.
    """
    power(sigma_rel)
    there = snapshots_in(folder) if Path(folder).is_dir() else {}
    if not there:
        raise FileNotFoundError(
            f"no snapshots of averages in {folder}: the callback mfm_lightning.callbacks.EMASnapshots leaves them in "
            "RUN/ema"
        )
    if Path(output).resolve().parent == Path(folder).resolve():
        raise ValueError(f"{output} would lie among the snapshots: write it elsewhere")
    steps = sorted({profile.last for profile in there})
    step = steps[-1] if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"no snapshot of step {step} in {folder}: there are those of {steps}")
    if len(begins := {profile.begin for profile in there}) > 1:
        raise CheckpointError(f"the averages in {folder} begin at steps {sorted(begins)}: keep those of one run")
    wanted = Profile(step, sigma_rel, begins.pop())
    used = {profile: path for profile, path in there.items() if profile.last <= step}
    weights, missed = combination(list(used), wanted)
    tensors, unit = _added(dict(zip(used.values(), weights, strict=True)))
    said = {k: v for k, v in read_metadata(list(used.values())[-1]).items() if k not in (WIDTH, BEGIN)}
    found = Averaged(wanted, len(used), missed, unit * math.hypot(*weights))
    save_tensors(tensors, output, {**said, "averaged": f"sigma_rel {sigma_rel:g}, of {len(used)} snapshots"})
    return found


def _added(weights: Mapping[Path, float]) -> tuple[dict[str, Tensor], float]:
    """The weighted sum of the files' tensors, and half a unit in the last place of the coarsest; what is no floating
    number is the last file's."""
    added: dict[str, Tensor] = {}
    unit, first = 0.0, next(iter(weights))
    for path, weight in weights.items():
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if path != first and (
                names != added.keys() or any(tuple(file.get_slice(k).get_shape()) != added[k].shape for k in names)
            ):
                raise CheckpointError(f"{path} and {first} hold different networks, of two runs: keep those of one")
            for name in names:
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    added[name] = tensor
                    continue
                unit = max(unit, torch.finfo(tensor.dtype).eps / 2)
                total = added.setdefault(name, torch.zeros(tensor.shape))
                total.add_(tensor.to(torch.float32), alpha=weight)
    return added, unit
