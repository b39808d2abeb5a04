"""Alignment at inference time as a job: `mfm predict` with a method, a reward and a trained model."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mfm_lightning.alignment.method import AlignmentMethod
from mfm_lightning.alignment.result import AlignmentResult
from mfm_lightning.alignment.steering import Steering
from mfm_lightning.alignment.target import TargetSettings
from mfm_lightning.conditions import INDEX, Batch, Conditions
from mfm_lightning.evaluation.base import datamodule_of
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.modules.base import SampleNumbers, batch_number, check_batch, own_gradients
from mfm_lightning.samplers import sample_ode
from mfm_lightning.utils.atomic import save_tensors
from mfm_lightning.utils.figures import before_after, scatter
from mfm_rewards import RewardError

log = logging.getLogger(__name__)


class RewardAlignment(L.LightningModule):
    """Aligns samples from the DataModule's noise, and writes to `predict/` of the run's folder, for each batch,
    `batch_NNNN.json` (the run: rewards before and after, NFE, seconds, trace) and `.safetensors` (states, images, the
    best look-aheads where the method returns them, and the samples' `index`); `summary.json` over all; and
    `before_after.png`.

    "Before" is the base flow's ODE from the same noise.

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
        self._numbers = SampleNumbers()
        self._done: list[dict[str, Any]] = []
        self._shown: list[tuple[Tensor, ...]] = []

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
        self.folder.mkdir(parents=True, exist_ok=True)
        self._done, self._shown = [], []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        check_batch(batch, self.state_shape, self.num_classes)
        return batch

    def predict_step(self, batch: Batch, batch_idx: int) -> AlignmentResult:
        with own_gradients():
            x0, given = pytree.tree_map_only(Tensor, Tensor.clone, self._numbers(batch, batch_idx, self.trainer))
            number, index = batch_number(batch_idx, self.trainer), given[INDEX].cpu()
            return self._align(x0, Conditions.of_batch(given), number, index)

    def _align(self, x0: Tensor, conditions: Conditions, number: int, index: Tensor) -> AlignmentResult:
        if bool(conditions.is_null(self.target.model.null_conditions).all()):
            conditions = Conditions(prompts=conditions.prompts)
        if "groups" in self.target.reward.needs:
            conditions = replace(conditions, group=index)  # of a sample are its particles and draws
        target = self.target(conditions)
        before = sample_ode(target.drift, x0, self.base_steps)
        images = target.decoder(before)
        try:
            base_rewards = target.plain_rewards(before)
        except RewardError as error:
            raise RewardError(f"base flow's samples, before any alignment: {error}") from error
        generators = sample_generators((self.seed, 1), index.tolist())  # other noise than x0's, of the same seed
        name = f"batch_{number:04d}"
        try:
            with torch.enable_grad():  # as in Python: a method of the user's own may take gradients
                result = self.method(target, x0, generators)
        except (RewardError, FloatingPointError) as error:
            if (states := getattr(error, "states", None)) is not None:
                path = self.folder / f"{name}_unfinished.safetensors"
                save_tensors({"states": states}, path)
                raise type(error)(f"{error}; the states so far are in {path}") from error
            raise
        result.save(self.folder, name, {"index": index})
        self._done.append(
            {"batch": number, "index": index.tolist(), "rewards_before": base_rewards.tolist(), **result.summary()}
        )
        if len(result.states) == len(x0) and sum(len(shown[0]) for shown in self._shown) < self.pictures:
            self._shown.append((images.cpu(), result.images.cpu(), base_rewards.cpu(), result.rewards.cpu()))
        return result

    def on_predict_epoch_end(self) -> None:
        if not self._done:
            return
        before, after = (
            torch.tensor([r for batch in self._done for r in batch[key]]) for key in ("rewards_before", "rewards")
        )
        summary = {
            "method": self._done[0]["method"],
            "reward": self.target.settings.reward,
            "reward_scale": self.target.settings.reward_scale,
            "prompts": self.target.settings.prompts,
            "model": self.target.identity,
            "samples": len(after),
            "mean_reward_before": before.mean().item(),
            "mean_reward": after.mean().item(),
            "nfe_per_sample": sum(b["nfe"]["total"] for b in self._done) / len(after),
            "seconds": sum(b["seconds"] for b in self._done),
            "batches": self._done,
        }
        if all("best_rewards" in batch for batch in self._done):
            best = torch.tensor([r for batch in self._done for r in batch["best_rewards"]])
            summary["mean_best_reward"] = best.mean().item()
        rank = f"_rank{self.global_rank}" if self.trainer.world_size > 1 else ""
        (self.folder / f"summary{rank}.json").write_text(json.dumps(summary, indent=1, default=repr))
        if self._shown and self.trainer.is_global_zero:
            self._picture(summary)
        cost = f"{len(after)} samples, {summary['nfe_per_sample']:.0f} evaluations each"
        log.info("%s over %s; written to %s", _change(summary), cost, self.folder)

    def _picture(self, summary: dict[str, Any]) -> None:
        images, aligned, *scores = (torch.cat(parts) for parts in zip(*self._shown, strict=True))
        path, change = self.folder / "before_after.png", _change(summary)
        if images.dim() != 4:
            scatter({"base flow": images, summary["method"]["name"]: aligned}, path, change)
            return
        title = f"base flow (upper of each pair) and {summary['method']['name']} from the same noise (lower)\n{change}"
        shown = slice(self.pictures)
        before_after(images[shown], aligned[shown], (scores[0][shown], scores[1][shown]), path, title)


def _change(summary: dict[str, Any]) -> str:
    best = summary.get("mean_best_reward")  # of a search the sample itself is its best look-ahead
    best = "" if best is None or best == summary["mean_reward"] else f" (best look-ahead {best:.3f})"
    return f"mean reward {summary['mean_reward_before']:.3f} to {summary['mean_reward']:.3f}{best}"
