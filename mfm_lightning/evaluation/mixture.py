"""One-step posterior draws of a mixture against the exact posterior."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.alignment.posteriors import FlowMapPosterior, GlassPosterior, Posterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.checkpoints import is_there, load_model
from mfm_lightning.conditions import INDEX
from mfm_lightning.evaluation.base import Evaluation, ModelModule, data_of
from mfm_lightning.evaluation.draws import draw, draw_distance, noisy_states
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.oracles import GaussianMixture
from mfm_lightning.utils.console import track, write_table

log = logging.getLogger(__name__)

Source = tuple[Posterior, Target, torch.device | str]  # of draws; by whose model or drift; where that is


class MixtureEvaluation(Evaluation[ModelModule]):
    """Sliced W2 to the exact posterior, averaged over noisy states x_t ~ p_t, of one-step draws and of GLASS ODEs
    with the exact drift; with the noise floor (exact against exact).

    Args:
        times: outer times t.
        num_states: states for each time.
        num_draws: posterior draws for each state.
        glass_steps: Euler steps of the GLASS ODEs.
        model_steps: flow-map steps of the model's draws.
        compare: models by a name for the table, of whose one-step draws it has columns too; each by its file, a name of
            the package's, or a Hugging Face id. Those that are not there yet are left out, with a word.
        max_rows: at most so many draws in memory at once.
        seed: of states, draws and projections.
    """

    needs_data = ("oracle",)

    def __init__(
        self,
        times: Sequence[float] = (0.1, 0.3, 0.5, 0.7),
        num_states: int = 64,
        num_draws: int = 4096,
        glass_steps: Sequence[int] = (16,),
        model_steps: Sequence[int] = (1,),
        compare: dict[str, str] | None = None,
        max_rows: int = 65536,
        seed: int = 0,
    ) -> None:
        self.times, self.num_states, self.num_draws = tuple(times), num_states, num_draws
        self.glass_steps, self.model_steps, self.seed = tuple(glass_steps), tuple(model_steps), seed
        self.compare, self.max_rows = dict(compare or {}), max_rows

    def _states(self, oracle: GaussianMixture, t: float, num: int, generator: torch.Generator) -> Tensor:
        return noisy_states(oracle.sample(num, generator), t, generator)

    @torch.no_grad()
    def measure(self, module: ModelModule, folder: Path) -> None:
        oracle: GaussianMixture = data_of(module).oracle
        sources, rows = self._sources(module, oracle), []
        for t in track(self.times, describe=lambda t: f"posteriors at t = {t}"):
            generator = torch.Generator().manual_seed(self.seed)
            x_t = self._states(oracle, t, self.num_states, generator)
            exact, again = (oracle.sample_posterior(x_t, t, self.num_draws, generator=generator) for _ in range(2))
            noise = torch.randn(exact.shape, generator=generator)
            row = {"t": t, "floor": self._distance(again, exact)}
            for name, (source, target, device) in sources.items():
                draws = draw(source, target, t, x_t.to(device), noise.to(device), self.max_rows)
                row[name] = self._distance(draws, exact)
            rows.append(row)
            module.log_dict({f"test/sliced_w2/{k}/t={t}": v for k, v in row.items() if k != "t"}, rank_zero_only=True)
        title = f"Sliced W2 to the exact posterior ({self.num_states} states, {self.num_draws} draws each)"
        write_table(rows, title, folder, "posterior_distance")

    def _distance(self, draws: Tensor, exact: Tensor) -> float:
        return draw_distance(draws, exact, 64, self.seed).mean().item()

    def _sources(self, module: ModelModule, oracle: GaussianMixture) -> dict[str, Source]:
        """Where draws come from, by the table's column."""
        ours, exact = Target(module.model, _no_reward), Target(oracle, _no_reward)
        found: dict[str, Source] = {f"MFM-{k}": (FlowMapPosterior(k), ours, module.device) for k in self.model_steps}
        for name, other in self._others(module.device).items():
            found[f"{name}-1"] = (FlowMapPosterior(1), Target(other, _no_reward), module.device)
        return found | {f"GLASS-{k}": (GlassPosterior(k), exact, "cpu") for k in self.glass_steps}

    def _others(self, device: torch.device) -> dict[str, MetaFlowMap]:
        missing = {name: path for name, path in self.compare.items() if not is_there(path)}
        if missing:
            said = ", ".join(f"{name} ({path})" for name, path in missing.items())
            log.info("not in the table, as not fitted yet: %s", said)
        return {name: load_model(path).to(device) for name, path in self.compare.items() if name not in missing}

    @torch.no_grad()
    def draw(self, module: ModelModule, folder: Path) -> None:
        from matplotlib.figure import Figure

        folder.mkdir(parents=True, exist_ok=True)
        oracle: GaussianMixture = data_of(module).oracle
        figure = Figure(figsize=(3 * len(self.times), 6.4), layout="constrained")
        axes = figure.subplots(2, len(self.times), sharex=True, sharey=True, squeeze=False)
        background = oracle.sample(2000, torch.Generator().manual_seed(1))
        for column, t in zip(axes.T, self.times, strict=True):
            generator = torch.Generator().manual_seed(self.seed)
            x_t = self._states(oracle, t, 4, generator)
            noise = torch.randn(4, 400, *x_t.shape[1:], generator=generator)
            exact = oracle.sample_posterior(x_t, t, 400, generator=generator)
            ours = module.model.sample_posterior(x_t.to(module.device), t, noise=noise.to(module.device)).cpu()
            for axis, draws, name in zip(column, (exact, ours), ("exact posterior", "one-step MFM draws"), strict=True):
                axis.scatter(*background.T, s=2, color="0.88", linewidths=0)
                for i in range(4):
                    axis.scatter(*draws[i].T, s=3, color=f"C{i}", linewidths=0)
                    axis.scatter(*(x_t[i] / max(t, 0.1)), marker="x", color=f"C{i}", s=50)
                axis.set_title(f"{name}, t = {t}", fontsize=10)
                axis.set(xlim=(-6, 6), ylim=(-6, 6), aspect="equal")
        figure.suptitle("Posterior p(x1 | x_t) of four states; crosses: x_t / t", fontsize=11)
        figure.savefig(folder / "posterior.png", dpi=110)

    @torch.no_grad()
    def predict(self, module: ModelModule, batch: Any) -> dict[str, Tensor]:
        x1, index = batch[0], batch[1][INDEX]
        generators = sample_generators((self.seed, 2), index.tolist())
        result = {"x1": x1.cpu()}
        for t in self.times:
            x_t = noisy_states(x1, t, generators)
            result[f"x_t/t={t}"] = x_t.cpu()
            result[f"draws/t={t}"] = module.model.sample_posterior(x_t, t, num_samples=16, generator=generators).cpu()
        return result


def _no_reward(x: Tensor) -> Tensor:
    """Draws of the posterior look at none."""
    return x.new_zeros(len(x))
