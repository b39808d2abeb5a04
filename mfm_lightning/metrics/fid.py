"""Fréchet Inception distance and Inception score of streams of images.

FID (Heusel et al., 2017) is |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of Gaussians fitted to the features of two
sets of images; the Inception score (Salimans et al., 2016) is exp E KL(p(y|x) || p(y)) of the logits, averaged over
splits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from mfm_lightning.checkpoints import fingerprint
from mfm_lightning.metrics.frechet import Gaussian, frechet
from mfm_lightning.metrics.inception import Inception
from mfm_lightning.utils.atomic import whole_file
from mfm_lightning.utils.console import progress_bar
from mfm_lightning.utils.images import ImageSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """Mean `mu` `(F,)` and covariance `sigma` `(F, F)` of features, float64.

    num_samples: they are of so many images; None where a file does not say.

    Raises:
        ValueError: for numbers that are not finite, or a matrix that is no covariance.
    """

    mu: np.ndarray
    sigma: np.ndarray
    num_samples: int | None = None

    def __post_init__(self) -> None:
        wrong = int((~np.isfinite(self.mu)).sum()) + int((~np.isfinite(self.sigma)).sum())
        if wrong:
            raise ValueError(f"statistics of {len(self.mu)} features have {wrong} numbers that are not finite")
        largest = np.abs(self.sigma).max(initial=0)
        if np.abs(self.sigma - self.sigma.T).max(initial=0) > 1e-5 * largest or (np.diag(self.sigma) < 0).any():
            raise ValueError("sigma is no covariance: it must be symmetric, with no variance below 0")

    @cached_property
    def gaussian(self) -> Gaussian:
        """What `frechet` takes; a matter of seconds for 2,048 features, and so kept."""
        return Gaussian.of_moments(torch.from_numpy(self.mu), torch.from_numpy(self.sigma))

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read an `.npz` with `mu` and `sigma`, such as ADM's reference batches.

        Raises:
            ValueError: if the file does not hold them.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mu, sigma = (file[name].astype(np.float64) for name in ("mu", "sigma"))
                num = int(file["num_samples"]) if "num_samples" in file else None
        except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: expected an .npz with mu (F,) and sigma (F, F): {error}") from error
        if num is not None and num < 2:
            raise ValueError(f"{path}: num_samples is {num}, expected at least 2")
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"{path}: mu has shape {mu.shape} and sigma {sigma.shape}, expected (F,) and (F, F)")
        try:
            return cls(mu, sigma, num)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; make it anew by mfm fid --save-statistics") from error

    def save(self, path: str | Path) -> Path:
        """Write them as `load` reads them; the file appears whole."""
        path = Path(path)
        arrays: dict[str, Any] = {"mu": self.mu, "sigma": self.sigma}
        if self.num_samples is not None:
            arrays["num_samples"] = self.num_samples
        with whole_file(path) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)
        return path


class RunningStatistics(Metric):
    """`Statistics` of features that come in batches; sums are float64, so that their order does not matter.

    Args:
        num_features: F.
        over_ranks: add up the sums of all processes; each of them must then ask for the statistics.
    """

    total: Tensor
    products: Tensor
    num_samples: Tensor

    def __init__(self, num_features: int, over_ranks: bool = False) -> None:
        super().__init__(sync_on_compute=over_ranks)
        for name, shape in (("total", (num_features,)), ("products", (num_features, num_features))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Take in `(B, F)`."""
        features = features.double()
        self.num_samples += len(features)
        self.total += features.sum(dim=0)
        self.products.addmm_(features.T, features)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean `(F,)`, covariance `(F, F)` and number of all features so far; see `statistics`."""
        N = self.num_samples
        if N < 2:
            raise ValueError(f"{N} images: statistics need two at least")
        mu = self.total / N
        return mu, (self.products - N * torch.outer(mu, mu)) / (N - 1), N

    def statistics(self) -> Statistics:
        """Those of all features so far.

        Raises:
            ValueError: for fewer than two images.
        """
        mu, sigma, number = self.compute()
        return Statistics(mu.cpu().numpy(), sigma.cpu().numpy(), int(number))


@dataclass(frozen=True)
class Quality:
    """What was measured of a set of images; None where it was not asked for, or cannot be told."""

    num_samples: int | None
    fid: float | None
    inception_score: float | None = None
    inception_score_std: float | None = None

    @classmethod
    def of(
        cls, statistics: Statistics, logits: Tensor | None = None, reference: Statistics | None = None, splits: int = 10
    ) -> Quality:
        """Of a set's statistics and logits `(N, 1008)`; without a reference no FID, without logits no score."""
        fid = None if reference is None else frechet(statistics.gaussian, reference.gaussian)
        score = (None, None) if logits is None else inception_score(logits, splits)
        return cls(statistics.num_samples, fid, *score)


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over `splits` parts of logits `(N, 1008)`, by torch-fidelity, which shuffles them."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits ({splits}) must lie in 1..{len(logits)}, the number of images")
    found = isc_features_to_metric(logits.float().cpu(), splits)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]


def collect(
    batches: Iterable[Tensor], inception: Inception, what: str = "images", total: int | None = None
) -> tuple[Statistics, Tensor | None]:
    """Statistics of a stream of images, and their logits `(N, 1008)` where `inception` computes them.

    Args:
        batches: images `(B, 1|3, H, W)`, float in [0, 1] or uint8, from files or from a sampler as it goes.
    """
    device = next(inception.parameters()).device
    running, logits = RunningStatistics(inception.num_features).to(device), []
    with progress_bar() as progress:
        task = progress.add_task(f"Inception features of {what}", total=total)
        for images in batches:
            features, scores = inception(images.to(device))
            running.update(features)
            if scores is not None:
                logits.append(scores.cpu())
            progress.advance(task, len(images))
    return running.statistics(), torch.cat(logits) if logits else None


def measure_images(
    batches: Iterable[Tensor],
    inception: Inception,
    reference: Statistics | None = None,
    splits: int = 10,
    what: str = "samples",
    total: int | None = None,
    save: str | Path | None = None,
) -> Quality:
    """FID to a reference, and the Inception score where `inception` computes logits, of a stream of images.

    Args:
        batches: as `collect` takes them, as well as `what` and `total`.
        reference: statistics of real images; without, there is no FID.
        splits: of the Inception score.
        save: write the images' statistics to this .npz.
    """
    statistics, logits = collect(batches, inception, what, total)
    if save is not None:
        statistics.save(save)
    return Quality.of(statistics, logits, reference, splits)


def reference_statistics(
    path: str | Path,
    inception: Inception,
    cache: str | Path | None = None,
    crop: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    compute: bool = True,
) -> Statistics:
    """Statistics of real images, computed once and kept on disk.

    Args:
        path: an `.npz` with `mu` and `sigma`, taken as they are (also where it has images, too); or images as
            `ImageSet` reads them.
        cache: folder that keeps them, by what the images, Inception's weights and the layer are; `mfm_statistics`
            beside torch's downloads where None.
        crop: see `ImageSet`.
        batch_size: see `ImageSet`.
        workers: see `ImageSet`.
        compute: where they are not kept yet; without, that is an error with the command that makes them.

    Raises:
        FileNotFoundError: if there are no images, or statistics that may not be computed.
        ValueError: for statistics of another number of features.
    """
    if has_statistics(path):
        statistics = Statistics.load(path)
        if len(statistics.mu) != inception.num_features:
            raise ValueError(f"{path}: statistics of {len(statistics.mu)} features, expected {inception.num_features}")
        return statistics
    images = ImageSet(path, crop)
    depends = [images.identity(), fingerprint(inception.weights), inception.num_features]
    key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:20]
    folder = Path(torch.hub.get_dir()) / "mfm_statistics" if cache is None else Path(cache)
    kept = folder / f"{images.path.stem}-{inception.num_features}-{key}.npz"
    if kept.is_file():
        log.info("statistics of %s: %s", path, kept)
        return Statistics.load(kept)
    if not compute:
        settings = {"weights": inception.weights, "num-features": inception.num_features, "crop": crop, "cache": cache}
        options = [("--reference", path), *((f"--{k}", v) for k, v in settings.items() if v is not None)]
        command = shlex.join(["mfm", "fid", *(str(part) for option in options for part in option)])
        raise FileNotFoundError(f"the statistics of {path} are not kept yet: make them first, by `{command}`")
    statistics, _ = collect(images.batches(batch_size, workers), inception, str(path), images.number)
    statistics.save(kept)
    log.info("statistics of %s kept as %s", path, kept)
    return statistics


def has_statistics(path: str | Path) -> bool:
    """Whether a path is an `.npz` with `mu` and `sigma`."""
    if not Path(path).is_file() or not zipfile.is_zipfile(path):  # at a FIFO it would wait for ever
        return False
    with zipfile.ZipFile(path) as archive:
        return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
