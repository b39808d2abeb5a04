"""The report of trainings: reward by evaluations and by drift, and methods compared at equal drift."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Headline, Picture, Summary, Table
from mfm_benchmarks.charts import LineChart, family
from mfm_benchmarks.claims import verdict
from mfm_benchmarks.parts.drift_curves import Curve, best_at_drift, together
from mfm_lightning.metrics.measured import Measured, rounded

HELD_OUT = "held_out/"


@dataclass
class FinetuningReport:
    """Args:
    curves: by reward.
    levels: of drift, in nats, at which methods are compared.
    ours: the method that claims are about.
    samples: what tables say of samples and seeds.
    """

    curves: Mapping[str, Sequence[Curve]]
    levels: Sequence[float]
    ours: str
    samples: str

    def blocks(self) -> list[Block]:
        return [self._summary(), self._headline(), *self._pictures(), self._claims(), self._at_drift(), self._table()]

    def _summary(self) -> Summary:
        """Our method against the others at the largest drift that it reaches; what the numbers are of."""
        said = []
        for reward in self.curves:
            reached = [level for level in self.levels if self.ours in self._rewards(reward, level)]
            if not reached:
                continue
            found = self._rewards(reward, reached[-1])
            mine = found.pop(self.ours)
            if words := verdict(mine, found):
                said.append(f"for {reward}, at {reached[-1]:g} nats, {rounded(mine.value)} is {words}")
        first = f"{self.ours} is compared with the other methods at equal drift from the base flow"
        first = f"{first}: {'; '.join(said)}." if said else f"{first}; it reaches none of the chosen drifts."
        methods = dict.fromkeys(c.method for curves in self.curves.values() for c in curves)
        were = "1 method was" if len(methods) == 1 else f"{len(methods)} methods were"
        second = f"{were} trained with the same number of evaluations and the same optimiser."
        return Summary([first, second, f"Numbers are of {self.samples}"])

    def _chosen(self, reward: str, level: float) -> dict[str, Curve]:
        """Each method's curve that is reported at a level, of those that reach it in all runs."""
        methods = dict.fromkeys(curve.method for curve in self.curves[reward])
        chosen = {m: best_at_drift([c for c in self.curves[reward] if c.method == m], level) for m in methods}
        return {m: c for m, c in chosen.items() if c and c.at_drift("rewards", level) is not None}

    def _rewards(self, reward: str, level: float) -> dict[str, Measured]:
        found = {m: c.at_drift("rewards", level) for m, c in self._chosen(reward, level).items()}
        return {m: value for m, value in found.items() if value is not None}

    def _headline(self) -> Headline:
        items = []
        for reward in self.curves:
            reached = [level for level in self.levels if self.ours in self._rewards(reward, level)]
            if not reached:
                items.append(("n/a", f"{self.ours} reaches none of the chosen drifts for {reward}"))
                continue
            found = self._rewards(reward, reached[-1])
            mine = found.pop(self.ours)
            said = verdict(mine, {f"{m} ({rounded(v.value)})": v for m, v in found.items()})
            words = f"mean reward ({reward}) of {self.ours} at a drift of {reached[-1]:g} nats"
            items.append((rounded(mine.value), f"{words}: {said}" if said else words))
        return Headline(items)

    def _claims(self) -> Claims:
        lines = []
        for reward, curves in self.curves.items():
            for level in self.levels:
                found = self._rewards(reward, level)
                absent = [m for m in dict.fromkeys(c.method for c in curves) if m not in found]
                missing = f" Not reached by {', '.join(absent)}." if absent else ""
                if self.ours in found and len(found) > 1:
                    mine = found.pop(self.ours)
                    said = verdict(mine, found, gap=lambda difference: f" (by {rounded(abs(difference.value))})")
                    lines.append(f"{reward}, {level:g} nats: the reward of {self.ours} is {said}.{missing}")
                elif absent:
                    lines.append(f"{reward}, {level:g} nats:{missing}")
        return Claims(f"{self.ours} against the other methods at equal drift", lines)

    def _at_drift(self) -> Table:
        rows: list[dict[str, Any]] = []
        for reward, curves in self.curves.items():
            rows.append({"reward": reward, "drift": 0, "method": "base flow", **_values(_before(curves))})
            for level in self.levels:
                for method, curve in self._chosen(reward, level).items():
                    rows.append({
                        "reward": reward, "drift": level, "method": method, "setting": curve.label,
                        "learning rate": f"{curve.learning_rate:g}",
                        **_values({name: curve.at_drift(name, level) for name in curve.runs[0].values}),
                        "evaluations": round(curve.cost_at_drift("nfe", level) or 0),
                        "seconds": curve.cost_at_drift("seconds", level),
                    })  # fmt: skip
        caption = (
            "Rewards where a training first reaches the drift, KL(policy || base) of the SDEs' paths in nats; between "
            "two checkpoints they are interpolated linearly in the square root of the drift. Of a method's settings, "
            "the one is shown that has the highest reward there in the runs on which learning rates were chosen; "
            f"numbers are of other seeds. {self.samples}"
        )
        keys = ["reward", "drift", "method"]
        return Table("equal_drift", "Rewards at equal drift from the base flow", rows, caption, keys=keys)

    def _pictures(self) -> list[Picture]:
        found = [
            Picture(
                "reward_evaluations", "Reward against evaluations of training",
                self._lines(lambda c: c.costs("nfe"), "evaluations of training"),
                "Mean reward of samples, by evaluations of networks and reward in training, gradients included. 95 % "
                "intervals are shaded. The search for learning rates is not counted. The dashed line is the base flow.",
            ),
            Picture(
                "reward_drift", "Reward against drift from the base flow",
                self._lines(lambda c: [d.value for d in c.points("drift")], "KL(policy || base), nats"),
                "The same checkpoints, by drift. Higher and further left is better.",
            ),
        ]  # fmt: skip
        panels = {}
        for reward, curves in self.curves.items():
            for name in (n for n in curves[0].runs[0].values if n.startswith(HELD_OUT)):
                panels[f"{reward}: {name.removeprefix(HELD_OUT)}"] = {
                    c.name: [(x.value, y) for x, y in zip(c.points("rewards"), c.points(name), strict=True)]
                    for c in curves
                }
        if panels:
            plot = plots.lines(
                panels, "mean reward", "held-out reward", xscale="linear", sharey=False, mark=False, ours=self._strong()
            )
            caption = (
                "Held-out rewards, by the reward that was trained on. A falling line means that the trained reward "
                "rises at the cost of the held-out one."
            )
            found.append(Picture("held_out", "Reward hacking", plot, caption))
        for reward, curves in self.curves.items():
            if curves[0].images.dim() == 4:
                rows = [(f"{c.name}\n{c.points('rewards')[-1].value:.3g}", c.images) for c in curves]
                caption = "Each column starts from the same noise; at the end of training, with the mean reward."
                plot = plots.gallery(rows, ours=self._strong())
                found.append(Picture(f"samples_{reward}", f"Samples: {reward}", plot, caption))
        return found

    def _strong(self) -> list[str]:
        """Names of the lines of our method."""
        curves = [c for found in self.curves.values() for c in found]
        ours = family(self.ours, list(dict.fromkeys(c.method for c in curves)))
        return list(dict.fromkeys(c.name for c in curves if c.method in ours))

    def _lines(self, across: Callable[[Curve], list[float]], label: str) -> LineChart:
        panels: dict[str, dict[str, Any]] = {}
        for reward, curves in self.curves.items():
            panels[reward] = {"base flow": _before(curves)["rewards"]}
            for c in curves:
                panels[reward][c.name] = list(zip(across(c), c.points("rewards"), strict=True))[1:]
        return plots.lines(
            panels, label, "mean reward", sharey=False, mark=False, ours=self._strong(), baselines=["base flow"]
        )

    def _table(self) -> Table:
        rows = []
        for reward, curves in self.curves.items():
            for c in curves:
                for k in range(1, c.checkpoints):
                    rows.append({
                        "reward": reward, "method": c.method, "setting": c.label,
                        "learning rate": f"{c.learning_rate:g}", "steps": round(c.costs("step")[k]),
                        "evaluations": round(c.costs("nfe")[k]), "seconds": c.costs("seconds")[k],
                        "drift": c.points("drift")[k],
                        **_values({name: c.points(name)[k] for name in c.runs[0].values}),
                    })  # fmt: skip
        keys = ["reward", "method", "setting", "learning rate", "steps"]
        return Table("results", "All checkpoints", rows, self.samples, folded=True, keys=keys)


def _before(curves: Sequence[Curve]) -> dict[str, Measured]:
    """Of the base flow: all runs of one seed begin as it, with the same noise."""
    names = [name for name in curves[0].runs[0].values if name != "gain"]
    return {name: together([run.values[name][0] for run in curves[0].runs]) for name in names}


def _values(found: Mapping[str, Measured | None]) -> dict[str, Any]:
    """Columns of a table; the drift has its own."""
    words = {"rewards": "mean reward", "gain": "gain over the base flow"}
    return {
        words.get(name, name.removeprefix(HELD_OUT)): value
        for name, value in found.items()
        if name != "drift" and value is not None
    }
