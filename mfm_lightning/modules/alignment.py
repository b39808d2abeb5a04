"""Alignment at inference time as a job: `mfm predict` with a method, a reward and a trained model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mfm_lightning.alignment.described import BUDGETS, described
from mfm_lightning.alignment.memory import row_budgets
from mfm_lightning.alignment.method import AlignmentMethod
from mfm_lightning.alignment.result import AlignmentResult
from mfm_lightning.alignment.steering import Steering
from mfm_lightning.alignment.target import TargetSettings
from mfm_lightning.conditions import INDEX, Batch, Conditions
from mfm_lightning.evaluation.base import datamodule_of
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.modules.base import check_batch, own_gradients
from mfm_lightning.modules.predicting import PredictedSamples, begun
from mfm_lightning.networks.decoders import IdentityDecoder
from mfm_lightning.samplers import sample_ode
from mfm_lightning.sampling.resumable import write_json
from mfm_lightning.training.pictures import logged_pictures
from mfm_lightning.utils.figures import before_after, scatter
from mfm_lightning.utils.row_budget import ROWS, RowsNote, device_context
from mfm_rewards import RewardError

log = logging.getLogger(__name__)


class RewardAlignment(L.LightningModule):
    """Aligns samples from the DataModule's noise, and writes to `predict/` of the run's folder, for each batch,
    `batch_FIRST.json` (the run: rewards before and after, NFE, seconds, trace) and `.safetensors` (states, images, the
    best look-aheads where the method returns them, `states_before`, and the samples' `index`), FIRST the smallest
    index; `summary.json` over all; and `before_after.png`, of the first samples by index.

    "Before" is the base flow's ODE from the same noise. A run that was stopped goes on with the samples that are
    missing, on any number of devices and in batches of any size; all particles of a sample are made together.

    Args:
        target: model, reward and decoder.
        method: how to align.
        base_steps: Euler steps of the base flow.
        pictures: samples in the picture.
        seed: of the method's noise. A sample's depends on the seed and its index alone, not on batch size and devices.

    Raises:
        RewardError: on construction, if the method needs a reward gradient and there is none.
        CheckpointError: on construction, if the method draws posteriors from a plain flow map.
    """

    def __init__(
        self,
        target: TargetSettings,
        method: AlignmentMethod | None = None,
        base_steps: int = 100,
        pictures: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.target, self.method = target.load(plain_flow_map=True, groups=True), method or Steering()
        self.method.check(self.target.reward, self.target.model)
        self.state_shape, self.num_classes = self.target.model.state_shape, self.target.model.num_classes
        self.base_steps, self.pictures, self.seed = base_steps, pictures, seed
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer samples than ranks
        self._predicted: PredictedSamples | None = None
        self._rows: RowsNote | None = None

    @property
    def folder(self) -> Path:
        """Where this run writes."""
        return Path(self.trainer.default_root_dir) / "predict"

    def setup(self, stage: str) -> None:
        if stage != "predict":
            raise ValueError(f"alignment has nothing to {stage}: run mfm predict")
        data = datamodule_of(self.trainer)
        shape = tuple(getattr(data, "state_shape", self.state_shape))
        classes = getattr(data, "num_classes", self.num_classes)
        if (shape, classes) != (self.state_shape, self.num_classes):
            raise ValueError(
                f"noise of shape {shape} with {classes} classes for a model of "
                f"{self.state_shape} with {self.num_classes}: leave out data.state_shape and data.num_classes"
            )
        self.target.to(self.trainer.strategy.root_device)  # this module's own device is known only later
        self._predicted = PredictedSamples(self.trainer, self.folder, self._settings())
        context = device_context(self.trainer.strategy.root_device)
        self._rows = RowsNote(self.folder / ROWS, row_budgets(self.method), context)

    def _settings(self) -> dict[str, Any]:
        """What the samples depend on, besides the data."""
        method = {"method": described(self.method, BUDGETS), "base_steps": self.base_steps, "seed": self.seed}
        return {**self.target.described(), **method}

    @property
    def predicted(self) -> PredictedSamples:
        """What is there and what is missing; from the setup on."""
        return begun(self._predicted)

    def share(self, number: int) -> list[int]:
        """The indices of this rank's samples, of so many, that are not there yet."""
        return self.predicted.share(number)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        check_batch(batch, self.state_shape, self.num_classes)
        return batch

    def predict_step(self, batch: Batch, batch_idx: int) -> AlignmentResult | None:
        """What was made of the batch; None where its samples were there."""
        if (left := self.predicted.left(batch, batch_idx)) is None:
            return None
        with own_gradients():
            x0, given = pytree.tree_map_only(Tensor, Tensor.clone, left)
            return self._align(x0, Conditions.of_batch(given), given[INDEX].cpu())

    def _align(self, x0: Tensor, conditions: Conditions, index: Tensor) -> AlignmentResult:
        if bool(conditions.is_null(self.target.model.null_conditions).all()):
            conditions = Conditions(prompts=conditions.prompts)
        if "groups" in self.target.reward.needs:
            conditions = replace(conditions, group=index)  # of a sample are its particles and draws
        target = self.target(conditions)
        before = sample_ode(target.drift, x0, self.base_steps)
        try:
            base_rewards = target.plain_rewards(before)
        except RewardError as error:
            raise RewardError(f"base flow's samples, before any alignment: {error}") from error
        generators = sample_generators((self.seed, 1), index.tolist())  # other noise than x0's, of the same seed
        folder = self.predicted.folder
        try:
            with torch.enable_grad():  # as in Python: a method of the user's own may take gradients
                result = self.method(target, x0, generators)
        except (RewardError, FloatingPointError) as error:
            if (states := getattr(error, "states", None)) is not None:
                path = folder.write_unfinished(index, states)
                raise type(error)(f"{error}; the states so far are in {path}") from error
            raise
        record = {"rewards_before": base_rewards.tolist(), **result.summary()}
        if self._rows is not None and self.trainer.is_global_zero:
            self._rows.save()
        folder.write(index, {**result.tensors(), "states_before": before}, record)
        return result

    def teardown(self, stage: str) -> None:
        """The summary, of all samples that this run was asked for and are there, whoever made them."""
        if stage != "predict" or not self.predicted.finish():
            return
        folder, number = self.predicted.folder, self.predicted.number
        batches = [batch for batch in folder.records() if number is None or min(batch[INDEX]) < number]
        if not batches:
            return
        summary = _summary(batches, number)
        settings = self.target.settings
        summary |= {"reward": settings.reward, "reward_scale": settings.reward_scale, "prompts": settings.prompts}
        summary |= {"model": self.target.identity, "batches": batches}
        write_json(self.folder / "summary.json", summary)
        with logged_pictures(self.trainer, self.folder, "predict"):
            self._picture(summary)
        cost = f"{summary['samples']} samples, {summary['nfe_per_sample']:.0f} evaluations each"
        log.info("%s over %s; written to %s", _change(summary), cost, self.folder)

    def _picture(self, summary: dict[str, Any]) -> None:
        before = _by_sample(summary["batches"], "rewards_before")
        first = sorted(before)[: self.pictures]
        rows = self.predicted.folder.rows(first, ("states_before", "images", "rewards"))
        first = [index for index in first if index in rows]  # a method may return another number of states
        if not first:
            return
        device, decoder = self.target.model.device, self.target.settings.decoder or IdentityDecoder()
        with own_gradients():
            decoded = [decoder(rows[i]["states_before"][None].to(device)).cpu() for i in first]
        images, aligned = torch.cat(decoded), torch.stack([rows[i]["images"] for i in first])
        path, change = self.folder / "before_after.png", _change(summary)
        name = summary["method"]["name"]
        if images.dim() != 4:
            scatter({"base flow": images, name: aligned}, path, change)
            return
        scores = torch.tensor([before[i][0] for i in first]), torch.stack([rows[i]["rewards"] for i in first])
        title = f"base flow (upper of each pair) and {name} from the same noise (lower)\n{change}"
        before_after(images, aligned, scores, path, title)


def _by_sample(batches: Sequence[Mapping[str, Any]], key: str) -> dict[int, list[float]]:
    """Numbers of batches by the sample's index: those of all states that a method returns for it."""
    found: dict[int, list[float]] = {}
    for batch in batches:
        index, values = batch[INDEX], batch[key]
        each, rest = divmod(len(values), len(index))
        for k, i in enumerate(index):
            # a method of the user's own may return another number: they stand with the batch's last sample
            found.setdefault(i, values[k * each : (k + 1) * each] if not rest else values if i == index[-1] else [])
    return found


def _summary(batches: Sequence[Mapping[str, Any]], number: int | None) -> dict[str, Any]:
    """Over the samples of batches, of which the first `number` count; means are in the order of the index, so that they
    do not depend on who made which batch."""

    def values(key: str) -> Tensor:
        found = _by_sample(batches, key)
        counted = [i for i in sorted(found) if number is None or i < number]
        return torch.tensor([value for i in counted for value in found[i]], dtype=torch.float64)

    before, after = values("rewards_before"), values("rewards")
    made = {i for batch in batches for i in batch[INDEX]}
    summary = {
        "method": batches[0]["method"],
        "samples": len(after),
        "missing": None if number is None else len(set(range(number)) - made),
        "mean_reward_before": before.mean().item(),
        "mean_reward": after.mean().item(),
        "nfe_per_sample": sum(b["nfe"]["total"] for b in batches) / max(1, sum(b["samples"] for b in batches)),
        "seconds": sum(b["seconds"] for b in batches),
    }
    if all("best_rewards" in batch for batch in batches):
        summary["mean_best_reward"] = values("best_rewards").mean().item()
    return summary


def _change(summary: dict[str, Any]) -> str:
    best = summary.get("mean_best_reward")  # of a search the sample itself is its best look-ahead
    best = "" if best is None or best == summary["mean_reward"] else f" (best look-ahead {best:.3f})"
    return f"mean reward {summary['mean_reward_before']:.3f} to {summary['mean_reward']:.3f}{best}"
