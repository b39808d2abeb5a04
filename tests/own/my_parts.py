"""Parts of a user's own, in one file outside of the package: tests copy it to the folder that the command runs in."""

from dataclasses import dataclass
from typing import ClassVar

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mfm_rewards
from mfm_benchmarks.blocks import Headline
from mfm_benchmarks.suite import Cell, Outcome, Suite
from mfm_lightning import AlignmentMethod, Conditions
from mfm_lightning.alignment.result import Run
from mfm_lightning.evaluation import Evaluation
from mfm_lightning.interpolant import expand
from mfm_lightning.objectives import Term


class SmallNet(nn.Module):
    """A network of the attributes and the forward that `MetaFlowMap` asks for, and no base class of ours."""

    guidance_scales = ()

    def __init__(self, side: int = 8, width: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.state_shape, self.num_classes = (1, side, side), num_classes
        self.embedding = nn.Embedding(num_classes + 1, width)
        self.layers = nn.Sequential(nn.Linear(2 * side**2 + 3 + width, 128), nn.SiLU(), nn.Linear(128, side**2))

    @property
    def null_conditions(self) -> Conditions:
        return Conditions(label=self.num_classes, guidance=1.0)

    def forward(self, s, u, x, t, x_t, conditions):
        times, label = torch.stack([s, u, t], dim=1), self.embedding(conditions.label)
        return self.layers(torch.cat([x.flatten(1), x_t.flatten(1), times, label], dim=1)).reshape(x.shape)


class Huber(Term):
    """Flow matching whose residual is bounded."""

    noisy_target = pins_diagonal = base_flow_only = True

    def __init__(self, bound: float = 1.0) -> None:
        self.bound = bound

    def __call__(self, model, teacher, pair, inner):
        residual = model(inner.s, inner.s, inner.x, 0 * pair.t, 0 * pair.x_t, pair.conditions) - (pair.x1 - inner.eps)
        return residual.clamp(-self.bound, self.bound)


class PlainDigits(L.LightningDataModule):
    """Loaders of `(x1, label)` and nothing else."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def loader(self, part: slice) -> DataLoader:
        digits = load_digits()
        x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        return DataLoader(TensorDataset(x[part], torch.tensor(digits.target)[part].long()), self.batch_size)

    def train_dataloader(self):
        return self.loader(slice(128))

    def val_dataloader(self):
        return self.loader(slice(128, 192))

    def test_dataloader(self):
        return self.loader(slice(192, 256))


class Range(Evaluation):
    """The largest absolute value of two-step samples."""

    def draw(self, module, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "range.txt").write_text(f"{self.value(module):.3f}")

    def measure(self, module, folder):
        module.log("test/range", self.value(module))

    @torch.no_grad()
    def value(self, module) -> float:
        noise = torch.randn(4, *module.state_shape, generator=torch.Generator().manual_seed(0))
        return module.model.sample_posterior(noise, 0.0, steps=2).abs().max().item()


@mfm_rewards.register("left_half")
def left_half(images):
    """Bright on the left."""
    half = images.shape[-1] // 2
    return images[..., :half].mean(dim=(1, 2, 3)) - images[..., half:].mean(dim=(1, 2, 3))


def broken(images):
    """A reward with a fault."""
    return images.nonsense


@dataclass
class Ascent(AlignmentMethod):
    """Steps up the reward's gradient, at the samples of the base flow.

    Args:
        steps: of the ascent.
        size: of a step.
    """

    steps: int = 5
    size: float = 0.5

    @property
    def needs_reward_gradient(self) -> bool:
        return True

    def __call__(self, target, x0, generator=None):
        target = target.expand(x0)
        run = Run(target, "ascent", steps=self.steps)
        x = x0 + expand(torch.ones(len(x0)), x0) * target.drift(torch.zeros(len(x0)), x0).detach()
        for _ in range(self.steps):
            x = x.detach().requires_grad_()  # gradients as in a loop of one's own
            target.rewards(x).sum().backward()
            x = x + self.size * x.grad
        return run.finish(x.detach())


class MySuite(Suite):
    """How often a coin falls on its head.

    Args:
        throws: of the coin.
    """

    name: ClassVar[str] = "coin"
    title: ClassVar[str] = "A coin"
    about: ClassVar[str] = "Heads among throws of a coin."

    def __init__(self, throws: int = 10) -> None:
        self.throws = throws

    def prepare(self):
        pass

    def cells(self):
        def compute():
            heads = torch.randint(2, (self.throws,), generator=torch.Generator().manual_seed(0)).sum().item()
            return Outcome({"heads": heads})

        self.cell = Cell("throws", {"throws": self.throws}, compute)
        return [self.cell]

    def report(self, results):
        return [Headline([(f"{results[self.cell].numbers['heads']} heads of {self.throws}", "of one coin")])]
