"""Text-to-image alignment as a job: `mfm predict` with a pretrained flow, prompts, a reward and a method."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mfm_lightning.alignment.described import BUDGETS, described
from mfm_lightning.alignment.memory import row_budgets
from mfm_lightning.alignment.method import AlignmentMethod, TimeGrid
from mfm_lightning.alignment.steering import Steering
from mfm_lightning.alignment.target import Target
from mfm_lightning.backbones import AdaptedFlow, TextToImageFlow
from mfm_lightning.checkpoints import fingerprint
from mfm_lightning.conditions import INDEX, Batch, Conditions
from mfm_lightning.data.prompts import PromptsDataModule
from mfm_lightning.evaluation.base import datamodule_of
from mfm_lightning.metrics.measured import Measured, mean_of_groups
from mfm_lightning.modules.base import own_gradients
from mfm_lightning.samplers import integrate
from mfm_lightning.sampling.evaluations import read_evaluation
from mfm_lightning.sampling.prompt_folder import PromptFolder, PromptImage
from mfm_lightning.sampling.resumable import OVERWRITE, dealt, write_json
from mfm_lightning.training.pictures import logged_pictures
from mfm_lightning.utils.console import write_table
from mfm_lightning.utils.decoding import load_image
from mfm_lightning.utils.devices import finished
from mfm_lightning.utils.distributed import gather_ranks
from mfm_lightning.utils.figures import pairs_in_rows
from mfm_lightning.utils.row_budget import ROWS, RowsNote, device_context
from mfm_rewards import Reward, RewardError, build
from mfm_rewards.protocol import name_of

log = logging.getLogger(__name__)


class PromptAlignment(L.LightningModule):
    """Aligns a pretrained text-to-image flow's images of prompts to a reward, with no training.

    Writes to `predict/` of the run's folder: the images, in the layout of an evaluator; of each a line in
    `lines_RANK.jsonl` (prompt, seed, rewards, evaluations, seconds); `before/`, the base flow's images from the same
    noise; `before_after.png`; and `rewards.csv` and `summary.json`, with paired differences and intervals over prompts.
    The same command goes on with what is missing.

    Args:
        flow: the base flow (`mfm_lightning.backbones.load_flow`).
        reward: what is optimised: a registered name; `{name: ..., and its options}`; or `{class_path, init_args}`.
        mfm: a `model.safetensors` of a `FlowAdapter` of this flow, for methods that draw posteriors in one step; None
            where the method needs a drift alone.
        method: how to align; the base flow's own sampler, on its own times, where None.
        held_out: rewards that are measured alone, by the names of the report.
        reward_scale: the reward is multiplied by it.
        guidance: scale of the flow's guidance; the pipeline's usual one where None, 1 for none.
        negative: negative prompt, of all images; the pipeline's usual one where None.
        before: also make the base flow's images, which costs `base_steps` evaluations each.
        base_steps: of those, on the flow's own times.
        layout: of the images: "flat", "geneval", "compbench" or "unigenbench".
        pictures: pairs in the picture.
        seed: of the method's noise. An image's depends on the seed and its index alone.
        evaluations: by the names of the report, files that evaluators wrote for the images of an earlier run of the
            same command (`mfm_lightning.sampling.evaluations.read_evaluation`); their scores get into the report.

    Raises:
        RewardError: on construction, if a reward is unknown, or the method needs a gradient and there is none; before
            any image, if a reward needs all images of a prompt at once and batches do not have them.
        ValueError: on construction, for steps that make no times, two columns of the report with one name, or an `mfm`
            on a transformer with devices of its own; before any image, for GPUs by name and several processes.
        FileNotFoundError: on construction, for an evaluation that is not there.
        CheckpointError: on construction, if the method draws posteriors in one step and there is no `mfm`, or an `mfm`
            of another flow.
    """

    def __init__(
        self,
        flow: TextToImageFlow,
        reward: dict[str, Any] | str,
        method: AlignmentMethod | None = None,
        held_out: dict[str, dict[str, Any] | str] | None = None,
        reward_scale: float = 1.0,
        guidance: float | None = None,
        negative: str | None = None,
        before: bool = True,
        base_steps: int = 28,
        layout: str = "flat",
        pictures: int = 8,
        seed: int = 0,
        evaluations: dict[str, str] | None = None,
        mfm: str | None = None,
    ) -> None:
        super().__init__()
        self.evaluations = {name: Path(path) for name, path in (evaluations or {}).items()}
        for name, path in self.evaluations.items():
            if not path.is_file():
                raise FileNotFoundError(
                    f"evaluations, {name}: no file {path}; run without it, then the evaluator on the images, then this"
                )
        self.flow = flow.eval().requires_grad_(False)
        self.optimised = build(reward).eval().requires_grad_(False)
        self.names = [name_of(self.optimised), *(held_out or {})]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"held_out has {self.names[0]!r}, which is the name of what is optimised: take another")
        if both := set(self.names) & self.evaluations.keys():
            raise ValueError(f"evaluations has {min(both)!r}, which is the name of a reward: take another")
        others = [build(spec).eval().requires_grad_(False) for spec in (held_out or {}).values()]
        self.held_out = torch.nn.ModuleList(others)
        self.method = method or Steering(strength=0.0, grid=TimeGrid(base_steps, of_model=True))
        if mfm is not None and (flow.placement.transformer is not None or flow.placement.transformer_map is not None):
            raise ValueError("flow.devices: an mfm draws on the device of the states: leave the transformer's out")
        self.model: TextToImageFlow | AdaptedFlow = flow if mfm is None else AdaptedFlow.load(mfm, flow)
        self.method.check(self.optimised, self.model)
        if isinstance(self.model, AdaptedFlow) and self.method.needs_meta_flow_map:
            self.model.check(Conditions(guidance=flow.usual_guidance if guidance is None else guidance))
        self.reward_scale, self.guidance, self.negative = reward_scale, guidance, negative
        self.before, self.base_steps, self.layout = before, base_steps, layout
        self.pictures, self.seed = pictures, seed
        self.base_times = flow.time_grid(base_steps)  # refuses wrong settings, as the next line does
        _ = [grid.pairs(flow) for grid in vars(self.method).values() if isinstance(grid, TimeGrid)]
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer images than ranks
        self._folder: PromptFolder | None = None
        self._share: list[int] = []
        self._rows: RowsNote | None = None
        self._settings = {
            **flow.identity, "reward": reward, "method": described(self.method, BUDGETS), "held_out": held_out,
            "reward_scale": reward_scale, "guidance": guidance, "negative": negative, "before": before,
            "base_steps": base_steps, "seed": seed, **({} if mfm is None else {"mfm": fingerprint(mfm)}),
        }  # fmt: skip

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.flow.state_shape

    @property
    def folder(self) -> PromptFolder:
        """Where this run writes; known once it is set up."""
        if self._folder is None:
            raise RuntimeError("the folder is known once mfm predict has begun")
        return self._folder

    @property
    def images(self) -> list[PromptImage]:
        """All images of the run, by their index."""
        return self.folder.images

    def share(self, number: int) -> list[int]:
        """The indices of this rank's images that are not there yet."""
        return self._share

    def setup(self, stage: str) -> None:
        if stage != "predict":
            raise ValueError(f"a pretrained flow has nothing to {stage} here: run mfm predict")
        if self.flow.placement.names_gpus and (processes := self.trainer.num_devices) > 1:
            raise ValueError(
                f"flow.devices names GPUs, and {processes} processes of this machine would share them: set "
                "trainer.devices to 1"
            )
        data = datamodule_of(self.trainer)
        if not isinstance(data, PromptsDataModule):
            raise ValueError(f"data is a {type(data).__name__}: expected a PromptsDataModule")
        if grouped := self._scores_groups():
            _check_groups(grouped, data)
        path = Path(self.trainer.default_root_dir) / "predict"
        self._folder = PromptFolder(path, data.prompts, data.images_per_prompt, self.layout, self.global_rank)
        own = {"noise_seed": data.seed, "precision": self.trainer.precision}
        self._folder.claim({**self._settings, **own}, OVERWRITE)
        self._scores()  # refuses wrong files
        size = {"image_size": list(self.flow.image_size), "dtype": str(self.flow.transformer.dtype)}
        where = self.flow.placement.transformer or self.trainer.strategy.root_device
        context = {**device_context(where), **size, "flow": type(self.flow).__name__}
        self._rows = RowsNote(path / ROWS, {**self.flow.budgets, **row_budgets(self.method)}, context)
        number = len(self._folder.images)
        missing = gather_ranks(self._folder.left(number) if self.global_rank == 0 else None)[
            0
        ]  # before any rank writes
        together = data.images_per_prompt if grouped else 1  # of a prompt of which one is missing all are made again
        self._share = dealt(missing, self.global_rank, self.trainer.world_size, together)
        if there := number - len(missing):
            more = "the others follow" if missing else "there is nothing to do"
            log.info("%s: %d of %d images are there; %s", path, there, number, more)
        # all embeddings at once, for text encoders are large; by one rank where the others can read them
        shared = self.flow.embeddings.folder is not None
        if self.global_rank == 0 or not shared:
            every = dealt(missing, 0, 1, together) if shared else self._share
            texts = list(dict.fromkeys(self.images[index].prompt.text for index in every))
            self.flow.keep_embeddings(texts, self.negative, self.guidance)
        gather_ranks(None)

    def _scores_groups(self) -> str | None:
        """The name of a reward that scores the images of a prompt beside each other; None where there is none."""
        rewards = zip(self.names, (self.optimised, *self.held_out), strict=True)
        return next((name for name, reward in rewards if "groups" in cast(Reward, reward).needs), None)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[int]:
        """The indices of the images that were made."""
        with own_gradients():
            x0, given = pytree.tree_map_only(Tensor, Tensor.clone, batch)
            self._align(x0, list(given["prompts"]), given[INDEX].tolist())
            return given[INDEX].tolist()

    def _align(self, x0: Tensor, prompts: list[str], index: list[int]) -> None:
        conditions = self.flow.encode(prompts, self.negative, self.guidance).to(x0.device)
        if self._scores_groups():
            of_prompt = [self.folder.images[number].prompt_index for number in index]
            conditions = replace(conditions, group=torch.tensor(of_prompt, device=x0.device))
        target = Target(self.model, self.optimised, self.flow.decoder, conditions, reward_scale=self.reward_scale)
        images: Tensor | None = None
        if self.before:
            states = integrate(target.drift, x0, self.base_times)
            images = self.flow.decoder(states)
        generators = [self.folder.images[number].method_generator(self.seed) for number in index]
        began = finished(x0.device)
        with torch.enable_grad():  # as in Python: a method of the user's own may take gradients
            result = self.method(target, x0, generators)
        seconds = (finished(x0.device) - began) / len(x0)
        if self._rows is not None and self.trainer.is_global_zero:
            self._rows.save()
        if len(result.states) != len(x0):
            raise ValueError(f"{type(self.method).__name__} gave {len(result.states)} images for {len(x0)} prompts")
        after = self._measured(result.images, conditions)
        earlier = None if images is None else self._measured(images, conditions)
        nfe = {kind: count / len(x0) for kind, count in asdict(result.nfe).items()}
        for i, number in enumerate(index):
            seed = self.folder.images[number].noise_key(datamodule_of(self.trainer).seed)[0]
            measured: dict[str, Any] = {"seed": seed, "rewards": {k: v[i] for k, v in after.items()}}
            if images is not None and earlier is not None:
                measured["rewards_before"] = {k: v[i] for k, v in earlier.items()}
                self.folder.write_beside("before", number, images[i])
            measured |= {"method": result.method["name"], "nfe": nfe, "seconds": round(seconds, 4)}
            self.folder.write(number, result.images[i], measured)

    def _measured(self, images: Tensor, conditions: Conditions) -> dict[str, list[float]]:
        found = {}
        for name, reward in zip(self.names, (self.optimised, *self.held_out), strict=True):
            target = Target(self.flow, cast(Reward, reward), None, conditions)  # None: what is given are images
            found[name] = [float(value) for value in target.plain_rewards(images)]
        return found

    def teardown(self, stage: str) -> None:
        """The summary, of all that is there: also where this run, or this rank, had nothing to do."""
        gather_ranks(None)
        if not self.trainer.is_global_zero:
            return
        lines, scores = self.folder.lines(), self._scores()
        rows = _rows(lines, scores)
        title = f"{len(lines)} images of {len(self.folder.prompts)} prompts"
        shown = [{key: value for key, value in row.items() if key != "images"} for row in rows]
        if rows:
            write_table(rows, title, self.folder.path, "rewards", shown=shown)
        summary = {
            "settings": self._settings,
            "images": len(lines),
            "missing": len(self.folder.images) - len(lines),
            "rewards": rows,
            "evaluations": scores,
        }
        write_json(self.folder.path / "summary.json", summary)
        if self.before and self.pictures and lines:
            one_a_prompt = sorted(lines, key=lambda line: (line["number"], line["index"]))  # before the second of any
            with logged_pictures(self.trainer, self.folder.path, "predict"):
                self._picture(one_a_prompt[: self.pictures])
        log.info("%d images: %s", len(lines), self.folder.path)

    def _scores(self) -> dict[str, dict[int, float]]:
        """What evaluators found, by name and the image's index."""
        return {name: read_evaluation(path, self.folder) for name, path in self.evaluations.items()}

    def _picture(self, lines: list[dict[str, Any]]) -> None:
        path, name = self.folder.path, self.names[0]
        pairs = [[path / "before" / f"{line['index']:06d}.png", path / line["file"]] for line in lines]
        images = torch.stack([torch.stack([load_image(file) for file in pair]) for pair in pairs])
        captions = [
            [
                textwrap.shorten(line["prompt"], 34, placeholder="...")
                + f"\n{name} {line['rewards_before'][name]:.3g}",
                f"{line['method']}\n{name} {line['rewards'][name]:.3g}",
            ]
            for line in lines
        ]
        title = "base flow, and aligned from the same noise"
        pairs_in_rows(images, captions, path / "before_after.png", title)


def _check_groups(name: str, data: PromptsDataModule) -> None:
    """Refuse batches that would not hold all images of their prompts."""
    beside, batch = f"reward {name!r} scores the images of a prompt beside each other", data.batch_size
    number = data.images_per_prompt
    if number == 1:
        raise RewardError(f"{beside}, and there is one: set data.images_per_prompt to 2 or more")
    if batch % number:
        raise RewardError(f"{beside}: data.batch_size {batch} must be a multiple of data.images_per_prompt, {number}")


def _rows(lines: Sequence[Mapping[str, Any]], scores: Mapping[str, Mapping[int, float]]) -> list[dict[str, Any]]:
    """A row a reward, and one an evaluation: means, and the mean of the paired differences, with 95 % intervals over
    prompts; NFE and seconds an image.

    Args:
        scores: of evaluations, by name and the image's index; images without one are left out, which is said.
    """
    rows = []
    for name in lines[0]["rewards"] if lines else ():
        after = [line["rewards"][name] for line in lines]
        row: dict[str, Any] = {"reward": name, "images": len(lines), "mean": _over_prompts(after, lines).text()}
        if all("rewards_before" in line for line in lines):
            earlier = [line["rewards_before"][name] for line in lines]
            gains = [b - a for a, b in zip(earlier, after, strict=True)]
            row |= {
                "before": _over_prompts(earlier, lines).text(),
                "difference": _over_prompts(gains, lines).text(),
            }
        row["NFE"] = round(sum(sum(line["nfe"].values()) for line in lines) / len(lines), 1)
        row["seconds"] = round(sum(line["seconds"] for line in lines) / len(lines), 3)
        rows.append(row)
    for name, found in scores.items() if rows else ():
        scored = [line for line in lines if line["index"] in found]
        if len(scored) < len(lines):
            log.warning("%s: %d of %d images have no row, and do not count", name, len(lines) - len(scored), len(lines))
        mean = _over_prompts([found[line["index"]] for line in scored], scored).text() if scored else ""
        rows.append({**dict.fromkeys(rows[0], ""), "reward": name, "images": len(scored), "mean": mean})
    return rows


def _over_prompts(values: Sequence[float], lines: Sequence[Mapping[str, Any]]) -> Measured:
    """The mean of the images' values: those of one prompt depend on each other, so that its samples are the prompts."""
    prompts = torch.tensor([line["prompt_index"] for line in lines])
    return mean_of_groups(torch.tensor(values, dtype=torch.float64), prompts)
