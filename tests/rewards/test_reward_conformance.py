"""The conformance kit: it passes every reward of the zoo, and catches each fault it is there for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mfm_rewards
from mfm_rewards import Reward, RewardError
from mfm_rewards.testing import check_reward, smooth_images
from tests.reward_servers import judging, served


def small_classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.SiLU(), nn.Flatten(), nn.Linear(484, 5)).eval()


def options() -> dict[str, dict]:
    """Of the rewards that need some."""
    half, pixels = torch.ones(48, 48), smooth_images(1, seed=9)[0]
    half[:, 24:] = 0
    return {
        "blur": {"observation": pixels, "blur_std": 1.0},
        "clamp": {"reward": "brightness", "min": 0.0, "max": 1.0},
        "placed": {"reward": "brightness", "device": "cpu"},
        "class_mixture": {"classifier": small_classifier(), "weights": [1.0, 0, 2.0]},
        "classifier": {"classifier": small_classifier(), "target": 3},
        "colour": {"target": [0.2, 0.3, 0.4]},
        "colour_removal": {"observation": pixels.mean(dim=0, keepdim=True)},
        "inpainting": {"observation": pixels, "mask": half},
        "linear_gaussian": {"operator": torch.ones(3 * 48 * 48) / 48**2, "observation": 1.0, "noise_std": 0.5},
        "negate": {"reward": "contrast"},
        "scale": {"reward": "contrast", "factor": 3.0},
        "sum": {"rewards": ["contrast", "brightness"]},
        "ray_sums": {"observation": torch.rand(3, 4, 5)},
        "super_resolution": {"observation": torch.rand(3, 12, 12), "factor": 4},
    }


OURS = [
    name for name in mfm_rewards.available() if mfm_rewards.registry.factory(name).__module__.startswith("mfm_rewards.")
]


@pytest.fixture(scope="module")
def elsewhere():
    """Options of the rewards that servers compute."""
    with served("contrast") as server, judging() as judge:
        judged = {"url": judge.url, "model": "judge", "rubric": "How bright?"}
        yield {"remote": {"url": server.url, "gradients": True}, "vlm_judge": judged}


@pytest.mark.parametrize("name", OURS)
def test_every_reward_passes(tiny, elsewhere, name):
    reward = mfm_rewards.build(name, **{**options(), **tiny, **elsewhere}.get(name, {}))
    result = check_reward(reward)
    result.raise_for_failures()
    skipped = {check.name for check in result.checks if check.outcome == "skipped"}
    assert skipped == (set() if reward.differentiable else {"gradient", "gradient of its own image alone"})


def mean(images):
    return images.mean(dim=(1, 2, 3))


class Trains(Reward):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        return mean(self.dropout(images)) if self.training else mean(images)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 1.0 * x

    @staticmethod
    def backward(ctx, gradient):
        return 1.1 * gradient


def black_box(images):
    return mean(images)


black_box.differentiable = False


def changes_its_input(images):
    images += 0.0625
    return mean(images)


def depends_on_place(images):
    return mean(images) + 0.01 * torch.arange(len(images))


@pytest.mark.parametrize(
    ("reward", "failed"),
    [
        (lambda images: mean(images)[:2], "shape and dtype"),
        (lambda images: mean(images).half(), "shape and dtype"),
        (lambda images: mean(images) + 0.01 * torch.rand(len(images)), "deterministic"),
        (changes_its_input, "deterministic"),
        (Trains(), "deterministic"),
        (lambda images: mean(images) - mean(images).mean(), "batch independence"),
        (depends_on_place, "batch independence"),
        (lambda images: (images.flatten(1) @ torch.ones(images[0].numel(), 1)).squeeze(1), "autocast"),
        (lambda images: torch.enable_grad()(lambda: mean(images.requires_grad_()))(), "no graph under no_grad"),
        (lambda images: mean(images.detach()), "gradient"),
        (lambda images: mean((images * 20).round() / 20), "gradient"),
        (lambda images: mean(WrongGradient.apply(images)), "gradient"),
        (lambda images: mean(images) + 0.1 * mean(images).mean(), "gradient of its own image alone"),
        (lambda images: mean(images.nan_to_num()), "NaN pixels"),
        (lambda images: mean(images) * torch.ones(len(images)) * images.isfinite().all(), "NaN pixels"),
    ],
)
def test_each_fault_is_caught(reward, failed):
    result = check_reward(reward)
    assert failed in [check.name for check in result.failures]
    with pytest.raises(RewardError, match=failed):
        result.raise_for_failures()


def test_a_black_box_that_keeps_a_graph_and_prompts_are_followed():
    assert check_reward(black_box).failures == []  # no graph where its images ask for none

    class Keeps(Reward):
        differentiable = False

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, images):
            return self.weight * mean(images)

    assert [check.name for check in check_reward(Keeps()).failures] == ["no graph under no_grad"]

    def by_prompt(images, prompts, labels):
        return mean(images) + 0.1 * torch.tensor([float(len(p)) for p in prompts]) + labels

    assert check_reward(by_prompt, prompts=["a", "bb", "ccc", "dddd"]).failures == []
    with pytest.raises(ValueError, match="at least 3"):
        check_reward(mean, torch.rand(2, 3, 8, 8))
