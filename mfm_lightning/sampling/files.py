"""Samples of a model as files: this process's share of what is missing."""

from __future__ import annotations

import logging

import torch

from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks.decoders import Decoder
from mfm_lightning.sampling.model_sampler import ModelSampler
from mfm_lightning.sampling.outputs import Output
from mfm_lightning.utils.console import track
from mfm_lightning.utils.distributed import Process
from mfm_lightning.utils.images import to_uint8

log = logging.getLogger(__name__)


def sample_files(
    model: MetaFlowMap, sampler: ModelSampler, decoder: Decoder, output: Output, process: Process | None = None
) -> bool:
    """Draw this process's share of what is missing, and put the output together if it was the last.

    Returns:
        Whether all samples are there.
    """
    process, plan = process or Process(), output.plan
    missing = set(output.missing())
    mine = [batch for batch in plan.share(process) if batch in missing]
    jobs = track(mine, describe=lambda batch: f"samples from {batch.start}") if process.rank == 0 else mine
    for batch in jobs:
        # the last batch is drawn in full, so that a sample does not depend on how many there are
        indices = range(batch.start, batch.start + plan.batch_size)
        states = sampler(model, plan.label(indices), plan.generators(indices))
        with torch.no_grad():
            images = decoder(states[: len(batch)])
        output.write(batch, to_uint8(images).cpu())
    left = sum(len(batch) for batch in output.missing())
    if left:
        log.info("process %d of %d is done; %d samples are with others", process.rank, process.world_size, left)
        return False
    for path in output.finish():
        log.info("%d samples: %s", plan.num_samples, path)
    output.clear()
    return True
