"""A sample of webdataset's to a state with label and caption, and how many there are of each label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfm_lightning.conditions import Batch
from mfm_lightning.data.images.pixels import PixelForm, to_states
from mfm_lightning.data.latent_form import LatentForm
from mfm_lightning.data.web.fields import Fields
from mfm_lightning.data.web.shards import Faults, named, of_worker, pipeline
from mfm_lightning.utils.console import track

Sample = tuple[Tensor, int, str]  # state, label, caption


@dataclass(frozen=True)
class SampleReader:
    """Reads samples, in a worker process, too.

    Args:
        fields: where in a sample things are.
        form: what states are made to be.
        mirror: half of the images, mirrored.
    """

    fields: Fields
    form: PixelForm | LatentForm
    mirror: bool = False

    def __call__(self, sample: Mapping[str, Any], random: np.random.Generator) -> Sample:
        """Raises as `Fields` and the form.

        Args:
            random: what decides on mirror images and noise.
        """
        label = self.fields.label_of(sample)
        caption = "" if self.fields.caption is None else self.fields.caption_of(sample)
        if isinstance(self.form, LatentForm):
            array, place = self.fields.array(sample)
            self.form.check(array, place)
            noise = torch.Generator().manual_seed(int(random.integers(2**63)))
            return self.form.states(torch.from_numpy(array)[None], noise)[0], label, caption
        x = to_states(torch.tensor(self.form.pixels(*self.fields.image(sample))))
        return x.flip(-1) if self.mirror and random.random() < 0.5 else x, label, caption

    def collate(self, samples: list[Sample]) -> Batch:
        """A batch, with prompts where there are captions."""
        x, label, captions = zip(*samples, strict=True)
        labels = torch.tensor(label)
        return torch.stack(x), labels if self.fields.caption is None else {"label": labels, "prompts": list(captions)}


def count_labels(urls: Sequence[str], fields: Fields, faults: Faults) -> np.ndarray:
    """Samples of each label, `(classes,)`, by reading all shards; of samples without labels their number.

    Raises:
        ValueError: if there is none that can be used; as `Fields.check`, where `faults` raises.
    """
    labels = []
    for url in track(urls, lambda url: f"counting samples of {url}"):
        for sample in pipeline([url], faults, of_worker):
            try:
                label = fields.check(sample)
                labels.append(0 if fields.label is None else label)
            except ValueError as error:
                faults(error)
    if not labels:
        raise ValueError(f"no sample that can be used in {named(urls)}")
    return np.bincount(labels, minlength=fields.num_classes or 0)
