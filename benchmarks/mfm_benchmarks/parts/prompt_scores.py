"""What images of prompts are worth: rewards and diversity, of the files that an evaluator would see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mfm_benchmarks.parts.prompt_images import BEST
from mfm_benchmarks.suite import Outcome
from mfm_lightning.metrics.diversity import Diversity
from mfm_lightning.sampling.prompt_folder import PromptFolder, PromptImage
from mfm_lightning.utils.decoding import load_image
from mfm_lightning.utils.devices import finished
from mfm_rewards import Reward, evaluate

ROWS = 8  # images at once in a reward


@torch.no_grad()
def score_files(
    reward: Reward, files: Sequence[Path], prompts: Sequence[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rewards, and seconds of each, `(B,)` float64, of images that lie in files.

    Raises:
        FileNotFoundError: if a file is gone.
        RewardError: as `mfm_rewards.evaluate`.
    """
    values, seconds = [], []
    for begin in range(0, len(files), ROWS):
        part = slice(begin, begin + ROWS)
        images = torch.stack([load_image(there(file)) for file in files[part]]).to(device)
        began = finished(device)
        values.append(evaluate(reward, images, prompts[part]).double().cpu())
        seconds += [(finished(device) - began) / len(images)] * len(images)
    return torch.cat(values), torch.tensor(seconds, dtype=torch.float64)


def score(
    reward: Reward, folder: PromptFolder, images: Sequence[PromptImage], best: bool, device: torch.device
) -> Outcome:
    """Rewards of some images of a folder.

    Args:
        best: whether there are best look-aheads beside them.

    Returns:
        tensors `(B,)`: `score`, and `best`, of the look-aheads, where they are.
    """
    texts = [image.prompt.text for image in images]
    tensors = {"score": score_files(reward, [folder.path / folder.files[i.index] for i in images], texts, device)[0]}
    if best:
        files = [folder.path / BEST / f"{image.index:06d}.png" for image in images]
        tensors["best"] = score_files(reward, files, texts, device)[0]
    return Outcome({}, tensors)


def spread(diversity: Diversity, folder: PromptFolder, images: Sequence[PromptImage], device: torch.device) -> Outcome:
    """The diversity of each prompt's images, `diversity` `(P,)`; images of one prompt are next to each other."""
    found = []
    for prompt in dict.fromkeys(image.prompt_index for image in images):
        mine = [image for image in images if image.prompt_index == prompt]
        loaded = torch.stack([load_image(there(folder.path / folder.files[image.index])) for image in mine])
        found.append(diversity(loaded.to(device)))
    return Outcome({}, {"diversity": torch.stack(found)})


def there(file: Path) -> Path:
    """Raise FileNotFoundError for a file that is gone, with what to do."""
    if not file.is_file():
        raise FileNotFoundError(f"the image {file} is gone: --fresh makes all again")
    return file
