"""Rewards of images beside each other: the protocol, `diversity` against its closed form, and what passes groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mfm_rewards
from mfm_lightning.alignment import BestOfN, DrawGradient, ExactGradient, FeynmanKac, Steering, Target, TimeGrid
from mfm_lightning.commands.main import main
from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT
from mfm_lightning.oracles import GaussianMixture
from mfm_rewards import RewardError, evaluate
from mfm_rewards.testing import check_reward, smooth_images
from tests.reward_servers import served

ROOT = Path(__file__).parents[2]
GROUPS = torch.tensor([7, -1, 7, 3, 7, 3])


def grey(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 4, 5)


def test_diversity_of_grey_images_by_hand():
    values = evaluate(mfm_rewards.build("diversity"), grey(0.0, 0.2, 0.3, 0.5, 0.9, 0.5), groups=GROUPS)
    torch.testing.assert_close(values, torch.tensor([0.6, 0.0, 0.45, 0.0, 0.75, 0.0]))
    scaled = evaluate(mfm_rewards.build("diversity", scale=-2.0), grey(0.0, 0.5), groups=torch.tensor([1, 1]))
    torch.testing.assert_close(scaled, torch.tensor([-1.0, -1.0]))


def expected(x: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and the gradient of their sum, from the formulas, in float64; x `(B, D)`."""
    x, values, gradient = x.double(), torch.zeros(len(x)).double(), torch.zeros_like(x).double()
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i and groups[j] == groups[i]]
        for j in others:
            distance = ((x[i] - x[j]) ** 2).mean().sqrt()
            values[i] += distance / len(others)
            gradient[i] += 2 * (x[i] - x[j]) / (x.shape[1] * distance * len(others))
    return values.float(), gradient.float()


def test_diversity_and_its_gradient_in_pixels_and_features():
    images = smooth_images(6, size=16).requires_grad_()
    values = evaluate(mfm_rewards.build("diversity"), images, groups=GROUPS)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    wanted = expected(images.detach().flatten(1), GROUPS)
    torch.testing.assert_close(values.detach(), wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.flatten(1), wanted[1], rtol=1e-4, atol=1e-7)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    values = evaluate(mfm_rewards.build("diversity", features=network), images.detach(), groups=GROUPS)
    torch.testing.assert_close(values, expected(network(images.detach()), GROUPS)[0], rtol=1e-5, atol=1e-6)


def test_equal_images_have_no_gradient_and_nan_stays_in_its_group():
    images = grey(0.3, 0.3, 0.3).clone().requires_grad_()
    evaluate(mfm_rewards.build("diversity"), images, groups=torch.zeros(3, dtype=torch.long)).sum().backward()
    assert not images.grad.any()
    images = smooth_images(6)
    images[1, 0, 0, 0] = torch.nan
    assert mfm_rewards.build("diversity")(images, GROUPS).isnan().tolist() == [False, True] + 4 * [False]


def leaks(images, groups):
    """From a group to others."""
    return images.mean(dim=(1, 2, 3)) - images.mean() + 0 * groups


def test_the_conformance_kit_finds_a_leak_between_groups():
    check_reward(mfm_rewards.build("diversity")).raise_for_failures()
    failed = {check.name for check in check_reward(leaks).failures}
    assert {"batch independence", "gradient of its own image alone"} <= failed


def test_parts_of_a_sum_get_what_they_need():
    images, prompts = smooth_images(6), ["a", "b", "c", "d", "e", "f"]

    def lengths(images, prompts, groups):
        return images.new_tensor([len(p) for p in prompts]) + groups

    reward = mfm_rewards.build("sum", rewards=["diversity", lengths, {"name": "negate", "reward": "brightness"}])
    assert reward.needs == ("images", "prompts", "groups")
    parts = [mfm_rewards.build("diversity"), mfm_rewards.build("brightness")]
    wanted = evaluate(parts[0], images, groups=GROUPS) + 1 + GROUPS - evaluate(parts[1], images)
    torch.testing.assert_close(evaluate(reward, images, prompts, groups=GROUPS), wanted)


def test_where_there_is_no_group_it_is_said():
    with pytest.raises(RewardError, match="'diversity' needs groups: give one for each image"):
        evaluate(mfm_rewards.build("diversity"), smooth_images(3))
    with pytest.raises(RewardError, match="'diversity' was given 6 groups for 3 images"):
        evaluate(mfm_rewards.build("diversity"), smooth_images(3), groups=GROUPS)
    with pytest.raises(RewardError, match="'diversity' needs groups: give the target's conditions a group"):
        Target(mixture(), mfm_rewards.build("diversity"))


def test_a_server_is_asked_for_whole_groups():
    images, local = smooth_images(6), mfm_rewards.build("diversity")
    with served("diversity") as server:
        remote = mfm_rewards.build("remote", url=server.url, gradients=True, max_rows=2, wait=0.01)
        found = []
        for reward in (local, remote):
            x = images.clone().requires_grad_()
            values = evaluate(reward, x, groups=GROUPS)
            found.append((values.detach(), *torch.autograd.grad((values * torch.arange(6)).sum(), x)))
        torch.testing.assert_close(found[0], found[1])
        assert server.asked == ["/rewards"] * 3 + ["/gradients"] * 3  # of 1, 2 and 3 images


def mixture() -> GaussianMixture:
    return GaussianMixture(means=torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), covariances=0.1)


class Seen:
    """A reward that keeps the groups it was called with."""

    needs = ("images", "groups")

    def __init__(self):
        self.groups = []

    def __call__(self, states, groups):
        self.groups.append(groups.tolist())
        return states.mean(dim=1) + 0.0 * groups


def test_the_states_of_a_sample_are_in_its_group():
    seen, x0 = Seen(), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    target = Target(mixture(), seen, conditions=Conditions(group=torch.tensor([5, 5, 2])))
    FeynmanKac(num_particles=2, grid=TimeGrid(2))(target, x0)
    assert seen.groups[:-1] == [[5, 5, 5, 5, 2, 2]] * (len(seen.groups) - 1)
    assert len(seen.groups) > 2
    assert seen.groups[-1] == [5, 5, 2]  # what is returned of each
    one = Target(mixture(), seen, conditions=Conditions(group=4))
    one.expand(x0).rewards(x0)
    assert seen.groups[-1] == [4, 4, 4]


def test_what_would_take_groups_apart_is_refused():
    x0, group = torch.zeros(3, 2), Conditions(group=torch.tensor([0, 0, 1]))
    target = Target(mixture(), Seen(), conditions=group)
    with pytest.raises(RewardError, match="scores groups, which 4 of 12 states at once would take apart: set max_rows"):
        BestOfN(num_candidates=4, steps=1, max_rows=4)(target, x0)
    BestOfN(num_candidates=4, steps=1)(target, x0)
    with pytest.raises(RewardError, match="exact values are of rewards of one image"):
        ExactGradient(mixture())(target, 0.5, x0)
    model = MetaFlowMap(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, guidance_scales=()))
    target = Target(model, mfm_rewards.build("diversity"), conditions=group)
    method = Steering(DrawGradient(num_draws=2, max_rows=2), TimeGrid(1))
    with pytest.raises(RewardError, match="which 2 of 6 states at once would take apart"):
        method(target, torch.zeros(3, 1, 8, 8))


def test_conditions_keep_groups():
    label, group = torch.tensor([1, 2, 0]), torch.tensor([4, 4, 9])
    given = Conditions(label=label, group=group)
    dropped = given.drop(torch.tensor([True, False, True]), Conditions(label=3))
    assert dropped.label.tolist() == [3, 2, 3]
    assert dropped.group.tolist() == [4, 4, 9]
    assert given.expand(6).take(torch.tensor([1, 5])).group.tolist() == [4, 9]
    assert Conditions.of_batch(given.as_batch()).group.tolist() == [4, 4, 9]
    assert Conditions(label=3, group=1).is_null(Conditions(label=3)).all()
    with pytest.raises(ValueError, match=r"groups of type torch\.float32: expected integers"):
        Conditions(group=torch.tensor([0.5]))


def test_mfm_predict_scores_the_particles_of_a_sample_beside_each_other(folder):
    method = "--model.init_args.method"
    options = [f"{method}=FeynmanKac", f"{method}.num_particles=4", f"{method}.grid.steps=2", f"{method}.keep=all"]
    options += ["--model.init_args.target.reward=diversity", "--model.init_args.base_steps=2"]
    options += ["--data.init_args.num_samples=3", "--return_predictions=false"]
    main(["predict", "--config", "configs/digits/steer.yaml", *options])
    found = load_file("outputs/digits/steer/predict/batch_0000.safetensors")
    wanted, _ = expected(found["images"].flatten(1), torch.arange(3).repeat_interleave(4))
    torch.testing.assert_close(found["rewards"], wanted, rtol=1e-4, atol=1e-5)
    assert found["rewards"].max() > 0.01
    with pytest.raises(SystemExit, match="'diversity' scores images beside others of their group, and here is none"):
        main(["fit", "--config", "configs/digits/finetune.yaml", "--model.init_args.target.reward=diversity"])
