"""Training of an image classifier, for rewards and for features that measure samples."""

from __future__ import annotations

import json
import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from mfm_lightning.conditions import Batch, Conditions
from mfm_lightning.evaluation.base import all_test_batches, data_of, datamodule_of
from mfm_lightning.metrics.classifier import proportion
from mfm_lightning.modules.base import TrainingModule, own_gradients
from mfm_lightning.modules.optimization import Optimization
from mfm_lightning.networks.classifier import ImageClassifier
from mfm_lightning.networks.results import measured_on
from mfm_lightning.utils.console import write_table

log = logging.getLogger(__name__)


class Classification(TrainingModule):
    """Trains a classifier of the data's images by cross-entropy. `test` measures its accuracy; the file that the run
    leaves has the class names, and the accuracy on the test images, in its metadata.

    Args:
        network: from images `(B, C, H, W)` in [0, 1] to logits `(B, K)`, such as
            `mfm_lightning.networks.ImageClassifier`.
        augmentation: what training images go through, one by one, such as `torchvision.transforms.v2.RandomAffine`.
        label_smoothing: of the cross-entropy.
        optimization: the optimiser and its learning rate.
    """

    exported_kind = "classifier"

    def __init__(
        self,
        network: nn.Module,
        augmentation: nn.Module | None = None,
        label_smoothing: float = 0.0,
        optimization: Optimization | None = None,
    ) -> None:
        super().__init__(optimization)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing {label_smoothing} must lie in [0, 1)")
        if not hasattr(network, "num_classes"):
            raise TypeError(f"a {type(network).__name__} has no num_classes: set it, as ImageClassifier does")
        self.network = cast(ImageClassifier, network)  # or one that keeps to its attributes
        self.num_classes = self.network.num_classes
        self.augmentation, self.label_smoothing = augmentation, label_smoothing
        self.confusion = MulticlassConfusionMatrix(self.num_classes)

    @property
    def trained(self) -> nn.Module:
        return self.network

    def setup(self, stage: str) -> None:
        data = datamodule_of(self.trainer)
        if missing := [name for name in ("decode", "num_classes", "state_shape") if not hasattr(data, name)]:
            raise ValueError(
                f"a classifier is trained on a DataModule of labelled images, such as ImageDataModule; "
                f"{type(data).__name__} has no {missing[0]}"
            )
        self.state_shape = tuple(data.state_shape)
        channels = getattr(self.network, "in_channels", self.state_shape[0])
        if len(self.state_shape) != 3 or channels != self.state_shape[0]:
            raise ValueError(
                f"data of shape {self.state_shape}, but the network takes images of {channels} channels (in_channels)"
            )
        super().setup(stage)

    def losses(self, x1: Tensor, conditions: Conditions, training: bool) -> dict[str, Tensor]:
        images, labels = self._images(x1), self._labels(conditions)
        if training and self.augmentation is not None:
            images = torch.stack([self.augmentation(image) for image in images])
        logits = self.network(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing if training else 0.0)
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == labels).float().mean()}

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        raise ValueError("there is nothing to predict: mfm test measures the classifier, mfm fit writes its file")

    # -- accuracy ------------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        self.confusion.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        with torch.no_grad():
            self._count(batch)

    def on_test_epoch_end(self) -> None:
        with own_gradients(), self.whole_weights():
            if not self.trainer.is_global_zero:
                return
            if self.trainer.world_size > 1:  # ranks have as many images each, so that some come twice
                self._count_all()
            rows = _rows(self.confusion.confmat.cpu(), self._class_names())
            every = rows[-1]
            title = f"accuracy on {every['images']} test images, with 95 % (Wilson) intervals"
            with measured_on(self.exported, self.folder / "test"):
                write_table(rows, title, self.folder / "test", "accuracy")
            self.log_dict({f"test/accuracy_{end}": every[end] for end in ("low", "high")}, rank_zero_only=True)

    def exported_part(self) -> str | None:
        return None

    def exported_metadata(self) -> dict[str, str]:
        self._count_all()
        found = {"class_names": json.dumps(self._class_names())}
        if not (counts := self.confusion.confmat).sum():
            log.warning("no test images: the file of the classifier does not say how accurate it is")
            return found
        every = _rows(counts.cpu(), self._class_names())[-1]
        log.info("accuracy on %(images)d test images: %(accuracy).4f (%(low).4f to %(high).4f)", every)
        return {**found, "accuracy": json.dumps(every)}

    def _count_all(self) -> None:
        """Count all test images, once each, by this process alone."""
        self.confusion.reset()
        training = self.network.training
        with torch.no_grad(), all_test_batches(data_of(self)) as batches:
            self.network.eval()
            for x1, given in batches:
                self._count((x1.to(self.device), Conditions.of_batch(given).to(self.device).as_batch()))
        self.network.train(training)

    def _count(self, batch: Batch) -> None:
        x1, given = batch
        self.confusion.update(self.network(self._images(x1)), self._labels(Conditions.of_batch(given)))

    def _images(self, x1: Tensor) -> Tensor:
        return data_of(self).decode(x1)

    def _labels(self, conditions: Conditions) -> Tensor:
        label = conditions.label
        if label is None or (len(label) and int(label.max()) >= self.num_classes):
            raise ValueError(
                f"a classifier is trained on images with labels in 0..{self.num_classes - 1}, got "
                + ("none" if label is None else f"{int(label.max())}")
            )
        return label

    def _class_names(self) -> list[str]:
        names = getattr(data_of(self), "class_names", None)
        return list(names) if names else [str(k) for k in range(self.num_classes)]


def _rows(counts: Tensor, names: list[str]) -> list[dict[str, Any]]:
    """Accuracy of each class, then of all.

    Args:
        counts: `(K, K)`, images by class and by predicted class.
    """
    right, images = [*counts.diagonal().tolist(), int(counts.diagonal().sum())], [*counts.sum(dim=1).tolist()]
    rows = []
    for name, k, n in zip([*names, "all"], right, [*images, sum(images)], strict=True):
        low, high = proportion(k, n)
        rows.append({"class": name, "images": n, "accuracy": k / n if n else float("nan"), "low": low, "high": high})
    return rows
