"""Features in which an evaluation compares images: of a classifier trained on the data, or of a given one."""

from __future__ import annotations

from pathlib import Path

import torch

from mfm_lightning.evaluation.base import ArrayData, EvaluatedModule, data_of
from mfm_lightning.metrics.classifier import SmallClassifier, fitted_features, load_features
from mfm_lightning.metrics.frechet import Gaussian
from mfm_lightning.networks import ImageClassifier


@torch.no_grad()
def check_features(module: EvaluatedModule, classifier: str | None) -> None:
    """Refuse, before any work, a classifier that is not there or does not take the images, or data to train one on that
    have no classes.

    Args:
        classifier: a file or a name; None where one is trained on the data.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: saying which.
    """
    data: ArrayData = data_of(module)
    if classifier is None:
        # a fit that only draws needs none
        measures = module.trainer.testing or getattr(module, "measures_at_validation", False)
        if measures and not data.num_classes:
            raise ValueError(
                "the evaluation trains a classifier on the data, which have no classes: give one, as "
                "evaluation.init_args.classifier, a file of Classification or a name such as mnist/features"
            )
        return
    loaded, images = load_features(classifier), data.decode(torch.zeros(1, *module.state_shape))
    try:
        loaded.features(images)
    except RuntimeError as error:
        raise ValueError(
            f"classifier {classifier} does not take images of shape {tuple(images.shape[1:])}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def features_of(
    data: ArrayData, classifier: str | None, cache: Path
) -> tuple[SmallClassifier | ImageClassifier, Gaussian]:
    """The classifier, and the Gaussian of its features of the training images; kept in `cache` for the next time."""
    x, label = data.splits["train"]
    images = data.decode(x)
    if classifier is None:
        return fitted_features(images, label, data.num_classes, cache)
    return fitted_features(images, label, data.num_classes, cache, load_features(classifier))
