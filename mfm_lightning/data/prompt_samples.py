"""Samples of a text-to-image flow for prompts, in place of captioned images."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.backbones import TextToImageFlow
from mfm_lightning.data.latents.captions import CaptionEncoder
from mfm_lightning.data.latents.datamodule import LatentShards
from mfm_lightning.data.latents.index import INDEX, LatentIndex, Shard
from mfm_lightning.data.latents.preparation import begin
from mfm_lightning.data.latents.shard_writer import (
    PARTS,
    LatentSample,
    shards_of,
    unit_path,
    write_index_files,
    write_json,
    write_shard,
)
from mfm_lightning.interpolant import randn, sample_generators
from mfm_lightning.networks.vae import scale_and_shift
from mfm_lightning.samplers import integrate
from mfm_lightning.sampling.prompts import as_prompts
from mfm_lightning.utils.console import track
from mfm_rewards.execution import Precision, check_precision

log = logging.getLogger(__name__)
_PAUSE = 1.0  # seconds between looks at what other ranks have drawn


class PromptSamplesDataModule(LatentShards):
    """A text-to-image flow's own samples, with their prompts and embeddings, as `LatentShards` gives those of images:
    for training an adapter without any images.

    They are drawn once, by Euler's steps on the flow's own times, and kept in `folder` as shards of latents, which
    another run, or another rank, reads; a run that was stopped goes on. Sample i has prompt i (from the first again
    after the last) and noise of the seed and i alone, whatever the numbers of ranks (but for the rounding of sums in
    batches of another `draw_batch`). The last `val_shards` shards are for validation.

    Args:
        prompts: a file (`mfm_lightning.sampling.prompts.read_prompts`), the name of a set such as geneval, or texts.
        folder: that keeps the samples; one of other settings is refused.
        num_samples: in all.
        flow: whose samples; that of the network in training, without its adapter or LoRA, where None.
        guidance: its scale, as the pipeline takes it; the pipeline's usual one where None, 1 for none.
        steps: of Euler.
        batch_size: training batch on each device.
        draw_batch: samples drawn at once.
        shard_size: samples of a file, and of what a rank draws at a time.
        embeddings: floating type in which embeddings are kept, "bf16", "fp16" or "fp32".
        column: of the file, that has the texts.
        num_workers: as `LatentShards`.
        shuffle_buffer: as `LatentShards`.
        val_shards: as `LatentShards`.
        seed: of the samples, and of the order of batches.

    Raises:
        FileNotFoundError, ValueError: as `read_prompts`; for numbers below 1; when used, for a network without a flow,
            and a folder of other samples.
    """

    def __init__(
        self,
        prompts: str | list[str],
        folder: str,
        num_samples: int = 10_000,
        flow: TextToImageFlow | None = None,
        guidance: float | None = None,
        steps: int = 28,
        batch_size: int = 8,
        draw_batch: int = 8,
        shard_size: int = 64,
        embeddings: Precision = "bf16",
        column: str = "prompt",
        num_workers: int = 4,
        shuffle_buffer: int = 128,
        val_shards: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            folder, batch_size, num_workers, shuffle_buffer, flip=False, val_shards=val_shards, seed=seed
        )  # fmt: skip
        for name, value in (
            ("num_samples", num_samples), ("steps", steps), ("draw_batch", draw_batch), ("shard_size", shard_size),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        self.prompts = [prompt.text for prompt in as_prompts(prompts, column)]
        self.num_samples, self.guidance, self.draw_steps = num_samples, guidance, steps
        self.draw_batch, self.shard_size = draw_batch, shard_size
        self.kept: Precision = check_precision(embeddings)
        self._flow = [flow]  # in a list: what it is drawn by is no part of the data
        self._drawn = False

    def setup(self, stage: str | None = None) -> None:
        if not self._drawn:
            # a run that draws trains with the noise of one that reads: to load text encoders takes random numbers
            with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
                self._draw_missing()
            self._drawn = True
        super().setup(stage)

    @property
    def units(self) -> int:
        """Shards of all samples."""
        return -(-self.num_samples // self.shard_size)

    def _teacher(self) -> TextToImageFlow:
        """What draws, on this rank's device."""
        flow = self._flow[0]
        if flow is None:
            module: Any = None if self.trainer is None else self.trainer.lightning_module
            network = getattr(getattr(module, "model", None), "network", None)
            flow = getattr(network, "flow", None) or getattr(module, "flow", None)
            if not isinstance(flow, TextToImageFlow):
                raise ValueError(
                    f"{self.folder}: no flow to sample: set data.flow, or train a FlowAdapter or by PromptFinetuning "
                    "with this data"
                )
        if self.trainer is not None:
            flow.transformer.to(self.trainer.strategy.root_device)
        return flow

    def _settings(self, flow: TextToImageFlow) -> dict[str, Any]:
        """What the samples depend on, as JSON."""
        weights = (
            json.dumps(flow.identity, default=str) if flow.fingerprint is None else flow.fingerprint("transformer")
        )
        return {
            "prompts": _sha256(json.dumps(self.prompts)), "num_samples": self.num_samples, "seed": self.seed,
            "shard_size": self.shard_size, "draw_batch": self.draw_batch, "embeddings": self.kept,
            "guidance": flow.usual_guidance if self.guidance is None else self.guidance, "steps": self.draw_steps,
            "state_shape": list(flow.state_shape), "weights": _sha256(weights), "type": str(flow.transformer.dtype),
            **{f"flow's {name}": value for name, value in flow.parts.items()},
        }  # fmt: skip

    @torch.no_grad()
    def _draw_missing(self) -> None:
        flow, folder, (rank, world_size) = self._teacher(), Path(self.folder), self.rank()
        train = min(self.num_samples, (self.units - self.val_shards) * self.shard_size)
        if train < world_size * self.batch_size:  # said before they are drawn
            raise ValueError(
                f"num_samples {self.num_samples}: without {self.val_shards} shards of {self.shard_size} for validation "
                f"{max(train, 0)} are left, not a batch of {self.batch_size} for each of {world_size} ranks: raise it"
            )
        begin(self.folder, settings := self._settings(flow), "the prompts")
        if (folder / INDEX).is_file() and all(shards_of(folder, unit) for unit in range(self.units)):
            return
        texts = CaptionEncoder(flow, self.kept, folder)
        (folder / PARTS).mkdir(exist_ok=True)
        missing = [u for u in range(self.units) if u % world_size == rank and shards_of(folder, u) is None]
        rows = torch.arange(self.num_samples).split(self.shard_size)
        if missing and rank == 0:
            log.info("%d samples of %s, by %d steps, are drawn and kept in %s", self.num_samples,
                     flow.pipeline, self.draw_steps, folder)  # fmt: skip
        for unit in track(missing, lambda unit: f"samples from {unit * self.shard_size} of {self.num_samples}"):
            name, cut = f"latents-{unit:06d}.tar", []
            samples = self._samples(flow, texts, rows[unit], cut)
            write_shard(folder, name, samples, [], texts.form, cut)
            write_json(unit_path(folder, unit), [name])
        form = texts.form
        flow.release_encoders()
        found = [self._wait_for(folder, unit) for unit in range(self.units)]
        scale, shift = scale_and_shift(flow.decoder.vae)  # pyright: ignore[reportArgumentType] # diffusers' types
        made_with = {"samples_of": flow.pipeline, **settings}
        parts = {"name": str(getattr(flow.pipe, "name_or_path", "") or flow.pipeline), **flow.parts}
        shards = [Shard.from_dict(part) for part in found]
        index = LatentIndex(flow.state_shape, 1, scale, shards, made_with, [], shift, form, parts)
        write_index_files(folder, index, {"all": 0})

    def _wait_for(self, folder: Path, unit: int) -> dict[str, Any]:
        """A shard that this rank or another one draws."""
        while (parts := shards_of(folder, unit)) is None:
            time.sleep(_PAUSE)
        return parts[0]

    def _samples(self, flow: TextToImageFlow, texts: CaptionEncoder, rows: Tensor, cut: list[str]) -> Any:
        scale, shift = scale_and_shift(flow.decoder.vae)  # pyright: ignore[reportArgumentType]
        for part in rows.split(self.draw_batch):
            prompts = [self.prompts[i % len(self.prompts)] for i in part.tolist()]
            latents = (self.draw(flow, part.tolist()) / scale + shift).cpu()
            for i, prompt, z in zip(part.tolist(), prompts, latents, strict=True):
                moments = torch.stack([z, torch.zeros_like(z)]).half()
                if not torch.isfinite(moments).all():
                    raise FloatingPointError(f"sample {i} ({prompt!r}) is not finite in float16")
                text, is_cut = texts(prompt)
                cut += [str(i)] if is_cut else []
                # the mirror image's place has the sample again: nothing here reads it
                yield LatentSample(f"{i:08d}", 0, torch.stack([moments, moments]).numpy(), text)

    @torch.no_grad()
    def draw(self, flow: TextToImageFlow, rows: list[int]) -> Tensor:
        """Samples of these numbers, states `(len(rows), C, h, w)` on the flow's device."""
        device = next(flow.transformer.parameters()).device
        prompts = [self.prompts[i % len(self.prompts)] for i in rows]
        given = flow.encode(prompts, guidance=self.guidance).to(device)
        noise = randn((len(rows), *flow.state_shape), torch.empty(0), sample_generators((self.seed, 17), rows))
        times = flow.time_grid(self.draw_steps)
        return integrate(lambda t, x: flow.drift(t, x, given), noise.to(device), times)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
