"""Best-of-N of prompts from one pool of the base flow's images, which all rewards share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mfm_benchmarks.parts.best_of_n import Candidates
from mfm_benchmarks.parts.prompt_images import PromptFlow
from mfm_benchmarks.suite import Outcome
from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.alignment.target import Target
from mfm_lightning.samplers import integrate
from mfm_lightning.sampling.prompt_folder import PromptFolder, PromptImage
from mfm_lightning.utils.decoding import load_image
from mfm_lightning.utils.devices import finished


@dataclass
class PromptPool(Candidates):
    """Candidates on the flow's own times. The first of each image is the base flow's, from the noise that all methods
    begin from; the others are those that `BestOfN` would draw.

    Args:
        numbers: N, smallest first; the base flow is beside them in any case.
        steps: Euler steps of a candidate, and of the base flow.
        max_rows: candidates generated at once.
    """

    numbers: list[int] = field(default_factory=lambda: [2, 4, 8])
    steps: int = 28
    max_rows: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.max_rows < 1:
            raise ValueError(f"best_of_n: steps {self.steps} and max_rows {self.max_rows} must be at least 1")
        self.numbers = sorted({1, *self.numbers})

    def shrink(self) -> None:
        self.numbers = [n for n in self.numbers if n <= 4]

    @torch.no_grad()
    def generate(
        self, source: PromptFlow, folder: PromptFolder, images: Sequence[PromptImage], begin: int, n: int
    ) -> Outcome:
        """Candidates `begin` to `begin + n` of some images, written to the base flow's folder.

        Returns:
            tensors `(B, n)` of each candidate: `network` evaluations, `reward` evaluations (none), and `seconds`, with
            decoding.
        """
        times = source.flow.time_grid(self.steps)
        costs: list[list[float]] = []
        rows = [(image, k) for image in images for k in range(begin, begin + n)]
        drawn = self._noise(source, images, begin, n)
        for chunk in torch.arange(len(rows)).split(self.max_rows):
            part = [rows[i][0] for i in chunk.tolist()]
            source.warm(part)
            x0 = drawn[chunk].to(source.device)
            target = Target(source.flow, _no_reward, source.flow.decoder, source.conditions(part))
            target.meter = Meter()
            began = finished(source.device)
            found = source.flow.decoder(integrate(target.drift, x0, times))
            seconds = (finished(source.device) - began) / len(part)
            cost = target.meter.network / len(part), 0.0, seconds
            for i, image in zip(chunk.tolist(), found, strict=True):
                one, k = rows[i]
                if k:
                    folder.write_beside(candidates(k), one.index, image)
                else:
                    folder.write(one.index, image, source.note(one, *cost))
            costs += [[target.meter.network / len(part), seconds]] * len(part)
        network, each = torch.tensor(costs, dtype=torch.float64).T.reshape(2, len(images), n)
        return Outcome({}, {"network": network, "reward": torch.zeros_like(network), "seconds": each})

    def _noise(self, source: PromptFlow, images: Sequence[PromptImage], begin: int, n: int) -> Tensor:
        """`(B n, C, h, w)`, on the CPU; each candidate's is drawn after those before it."""
        found = []
        for image in images:
            generator, shape = image.method_generator(source.seed), source.flow.state_shape
            others = [torch.randn((1, *shape), generator=generator) for _ in range(1, begin + n)]
            found += [source.noise([image]).cpu(), *others][begin:]
        return torch.cat(found)

    def choose(
        self,
        source: PromptFlow,
        number: int,
        pool: PromptFolder,
        folder: PromptFolder,
        images: Sequence[PromptImage],
        parts: Sequence[Outcome],
        scores: Sequence[Outcome],
    ) -> Outcome:
        """The best of the first `number` candidates of some images, written to a folder of its own.

        Args:
            parts: of `generate`, in order; scores: of their candidates, `score` and `seconds` `(B, n)`.

        Returns:
            tensors as `mfm_benchmarks.parts.prompt_images.make`.
        """
        network, seconds = (torch.cat([o.tensors[key] for o in parts], dim=1) for key in ("network", "seconds"))
        score, more = (torch.cat([o.tensors[key] for o in scores], dim=1) for key in ("score", "seconds"))
        chosen = score[:, :number].argmax(dim=1)
        cost = {
            "network": network[:, :number].sum(dim=1),
            "reward": torch.full((len(images),), float(number), dtype=torch.float64),
            "seconds": (seconds + more)[:, :number].sum(dim=1),
        }
        for i, image in enumerate(images):
            note = source.note(image, *(float(cost[key][i]) for key in ("network", "reward", "seconds")))
            folder.write(image.index, load_image(candidate_file(pool, image, int(chosen[i]))), note)
        return Outcome({"best": False}, cost | {"chosen": chosen})


def candidates(k: int) -> str:
    """The folder of candidate `k`, counted from 0."""
    return f"candidate_{k:04d}"


def candidate_file(pool: PromptFolder, image: PromptImage, k: int) -> Path:
    """Where candidate `k` of an image is."""
    return pool.path / (f"{candidates(k)}/{image.index:06d}.png" if k else pool.files[image.index])


def _no_reward(images: Tensor) -> Tensor:
    """The base flow's images do not depend on one."""
    return images.new_zeros(len(images))
