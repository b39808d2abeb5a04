"""Classifiers of images in [0, 1] that rewards take: a module, a file, a name, or a class of the user's own."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mfm_rewards.prompts import imagenet_classes
from mfm_rewards.protocol import nearest
from mfm_rewards.weights import load_state_dict, unwrapped

PRETRAINED = {"efficientnet_lite0": "mfm_rewards.efficientnet.EfficientNetLite0"}  # classes by name
# what reads the files of `mfm fit`, and knows those of the package; by its path, for rewards do not need it otherwise
FILES = "mfm_lightning.checkpoints.load_classifier"


def load_classifier(classifier: nn.Module | dict[str, Any] | str) -> nn.Module:
    """A frozen classifier, from images `(B, C, H, W)` in [0, 1] to logits `(B, K)`.

    Args:
        classifier: the module itself; a file that `mfm fit` wrote for `Classification`; a name, "mnist" (which comes
            with mfm-lightning) or one of `PRETRAINED`; or a dictionary of a `class_path`, and where needed of
            its `init_args` and of a file of `weights`.

    Raises:
        FileNotFoundError: if there is no such file or name.
        ImportError: if a pretrained one needs a package that is not there.
        ValueError: if a class cannot be imported, or weights are not plain tensors or do not fit.
    """
    if isinstance(classifier, str):
        pretrained = classifier in PRETRAINED and not Path(classifier).exists()
        made = _imported(PRETRAINED[classifier])() if pretrained else _imported(FILES)(classifier)
    else:
        made = classifier if isinstance(classifier, nn.Module) else _of_class(**classifier)
    return made.eval().requires_grad_(False)


def class_index(target: int | str, names: Sequence[str] | None) -> int:
    """The label of a class, by label or name; of a name also whole words do, if one name alone has them.

    Raises:
        ValueError: for a label out of range, or a name that is unknown (with the nearest) or ambiguous.
    """
    if isinstance(target, bool):
        raise ValueError(f"target {target}: expected a label or a class's name; in YAML quote a name such as 'yes'")
    if isinstance(target, int):
        if target < 0 or (names is not None and target >= len(names)):
            raise ValueError(f"target {target}: expected a label in 0..{len(names) - 1 if names else 'K-1'}")
        return target
    if not names:
        raise ValueError(f"target {target!r}: the classifier has no class names (class_names), give a label")
    wanted = target.lower()
    words = re.compile(rf"\b{re.escape(wanted)}\b")
    found = [k for k, name in enumerate(names) if name.lower() == wanted]
    found = found or [k for k, name in enumerate(names) if words.search(name.lower())]
    if len(found) > 1:
        several = ", ".join(f"{k} ({names[k]})" for k in found[:5])
        raise ValueError(f"target {target!r} is ambiguous: give a label, such as {several}")
    if not found:
        known = {*names, *(word for name in names for word in name.split())}
        raise ValueError(f"no class {target!r}: did you mean {nearest(target, sorted(known))!r}?")
    return found[0]


def class_names(classifier: nn.Module) -> list[str] | None:
    """The names that a classifier knows of its classes; ImageNet's for one that says `imagenet`."""
    if getattr(classifier, "imagenet", False):
        return imagenet_classes()
    names = getattr(classifier, "class_names", None)
    return None if names is None else list(names)


def _of_class(class_path: str, init_args: dict[str, Any] | None = None, weights: str | None = None) -> nn.Module:
    """A classifier by its class, with weights from a file of plain tensors."""
    classifier = _imported(class_path)(**(init_args or {}))
    if weights is not None:
        try:
            state = unwrapped(load_state_dict(weights), list(classifier.state_dict())[:1], weights)
            classifier.load_state_dict(state)
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"weights {weights!r} of the classifier cannot be loaded: {error}") from error
    return classifier


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"classifier {path!r} cannot be imported: {error}") from error
