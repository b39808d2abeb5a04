"""Rewards: values against numbers worked out otherwise, the registry, and clear refusals."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mfm_rewards
from mfm_rewards import RewardError
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood, RaySums


@pytest.fixture
def images():
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def own_names():
    """Names registered in a test are forgotten after it."""
    from mfm_rewards.registry import _FACTORIES

    before = dict(_FACTORIES)
    yield
    _FACTORIES.clear()
    _FACTORIES.update(before)


def test_a_function_is_a_reward(images, own_names):
    @mfm_rewards.register("redness")
    def redness(images):
        """Red minus
        the other channels.

        No more than that."""
        return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))

    built = mfm_rewards.build("redness")
    torch.testing.assert_close(mfm_rewards.evaluate(built, images), redness(images))
    assert mfm_rewards.available()["redness"] == "Red minus the other channels."
    assert built.differentiable
    assert built.needs == ("images",)


def test_options_names_and_class_paths(images):
    by_name = mfm_rewards.build({"name": "brightness", "scale": 2.0})
    path = "mfm_rewards.statistics.Brightness"
    by_path = mfm_rewards.build({"class_path": path, "init_args": {"scale": 2.0}})
    torch.testing.assert_close(by_name(images), 2 * images.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(by_name(images), by_path(images))
    torch.testing.assert_close(by_name(images), mfm_rewards.build({"class_path": path, "scale": 2.0})(images))
    with pytest.raises(RewardError, match="colour"):
        mfm_rewards.build({"class_path": path, "colour": 2.0})
    with pytest.raises(RewardError, match="did you mean 'brightness'"):
        mfm_rewards.build("brigthness")
    with pytest.raises(RewardError, match="options of reward 'brightness' do not fit"):
        mfm_rewards.build("brightness", colour=1)
    with pytest.raises(RewardError, match="cannot be imported"):
        mfm_rewards.build({"class_path": "mfm_rewards.nowhere.Nothing"})


def test_composition_and_jpeg(images):
    files = []
    for image in (images * 255).round().to(torch.uint8):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="JPEG", quality=95)
        files.append(len(buffer.getvalue()) / 1000)
    total = mfm_rewards.build(
        "sum", rewards=["brightness", {"name": "negate", "reward": "jpeg_compressibility"}], weights=[2.0, 0.5]
    )
    torch.testing.assert_close(total(images), 2 * images.mean(dim=(1, 2, 3)) + 0.5 * torch.tensor(files))
    assert not total.differentiable
    clamped = mfm_rewards.build("clamp", reward={"name": "scale", "reward": "brightness", "factor": 10.0}, max=1.0)
    assert clamped(images).eq(1.0).all()
    assert clamped.differentiable


def test_class_mixture_is_the_log_probability(images):
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    reward = mfm_rewards.build("class_mixture", classifier=classifier, weights=[0, 1, 0, 3])
    p = classifier(images).softmax(1)
    torch.testing.assert_close(reward(images), (0.25 * p[:, 1] + 0.75 * p[:, 3]).log())
    x = images.clone().requires_grad_()
    assert torch.autograd.grad(reward(x).sum(), x)[0].isfinite().all()


def test_inverse_problems_are_gaussian_log_densities(images):
    def matrix_of(measure, shape):
        """The operator as a matrix, column by column."""
        basis = torch.eye(math.prod(shape)).reshape(-1, *shape)
        return measure(basis).flatten(1).T

    mask = (torch.arange(64).reshape(8, 8) % 3 == 0).float()
    built = {
        "super_resolution": mfm_rewards.build(
            "super_resolution", observation=torch.rand(3, 4, 4), factor=2, noise_std=0.3
        ),
        "blur": mfm_rewards.build("blur", observation=torch.rand(3, 8, 8), blur_std=0.8, noise_std=0.3),
        "colour_removal": mfm_rewards.build("colour_removal", observation=torch.rand(1, 8, 8), noise_std=0.3),
        "ray_sums": mfm_rewards.build("ray_sums", observation=torch.rand(3, 3, 5), noise_std=0.3),
    }
    for name, reward in built.items():
        dense = LinearGaussianLikelihood(matrix_of(reward.measure, (3, 8, 8)), reward.observation.flatten(), 0.3)
        torch.testing.assert_close(reward(images), dense(images), rtol=1e-4, atol=1e-3, msg=name)
    observed = torch.rand(3, 8, 8)
    reward = mfm_rewards.build("inpainting", observation=observed, mask=mask, noise_std=0.3)
    seen = mask.bool().expand(3, 8, 8)
    expected = torch.distributions.Normal(images[:, seen], 0.3).log_prob(observed[seen]).sum(dim=1)
    torch.testing.assert_close(reward(images), expected, rtol=1e-4, atol=1e-3)
    # a flat image stays flat when blurred: the kernel sums to one, at the edges too
    flat = torch.full((1, 3, 8, 8), 0.4)
    torch.testing.assert_close(built["blur"].measure(flat), flat)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10)])
def test_ray_sums_are_line_integrals(height, width):
    """Against 20,000 points along each ray, and the closed forms of flat and of rising images."""
    sources, receivers = 3, 4
    reward = RaySums(torch.zeros(2, sources, receivers))
    images = torch.rand(5, 2, height, width, generator=torch.Generator().manual_seed(0))
    found = reward.measure(images)
    points = (np.arange(20_000) + 0.5) / 20_000
    for i in range(sources):
        for j in range(receivers):
            top, bottom = (i + 0.5) * height / sources, (j + 0.5) * height / receivers
            rows, columns = np.floor(top + points * (bottom - top)), np.floor(points * width)
            length = np.hypot(width, bottom - top) / height
            sampled = images.numpy()[:, :, rows.astype(int), columns.astype(int)].mean(axis=2) * length
            np.testing.assert_allclose(found[:, :, i, j], sampled, atol=2e-3)
            flat = reward.measure(torch.full((1, 2, height, width), 0.7))
            assert float(flat[0, 1, i, j]) == pytest.approx(0.7 * length, rel=1e-6)
    # from 1/2 to width - 1/2 in equal steps along the columns: each ray's mean is width / 2
    rising = (torch.arange(width) + 0.5).expand(1, 1, height, width)
    means = reward.measure(rising) / reward.measure(torch.ones(1, 1, height, width))
    torch.testing.assert_close(means, torch.full_like(means, width / 2))


def test_the_gradient_of_ray_sums_is_the_adjoint():
    """<A x, y> = <x, A' y>, and the likelihood's gradient A' (y - A x) / std^2, with A' from its columns."""
    reward = RaySums(torch.rand(1, 4, 4), noise_std=0.2)
    basis = torch.eye(64).reshape(64, 1, 8, 8)
    matrix = reward.measure(basis).flatten(1).T.double()
    x, y = torch.rand(3, 1, 8, 8), torch.rand(3, 1, 4, 4)
    measured, adjoint = torch.func.vjp(reward.measure, x)
    back = adjoint(y)[0]
    torch.testing.assert_close((measured * y).sum(), (x * back).sum())
    torch.testing.assert_close(back.flatten(1), (y.flatten(1).double() @ matrix).float())
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x).sum(), x)
    expected = (reward.observation.flatten().double() - x.detach().flatten(1).double() @ matrix.T) @ matrix / 0.2**2
    torch.testing.assert_close(gradient.flatten(1), expected.float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"observation of shape \(16,\): expected \(channels, sources, receivers\)"):
        RaySums(torch.rand(16))


def test_symmetry(images):
    both = (images + images.flip(3)) / 2
    reward = mfm_rewards.build("symmetry")
    assert reward(both).abs().max() < 1e-12
    assert (reward(images) < -0.01).all()
    with pytest.raises(RewardError, match="unknown axis"):
        mfm_rewards.build("symmetry", axis="diagonal")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images: images.mean(), "returned shape"),
        (lambda images: images.mean(dim=(1, 2, 3)).tolist(), "returned list"),
        (lambda images: torch.tensor([0.0, float("nan"), 1.0]), "1 of 3 values .* at indices 1"),
        (lambda images: torch.zeros(2), r"shape \(2,\) for 3 images"),
        (lambda images: torch.zeros(3).long(), "floating-point"),
        (lambda images: torch.zeros(3, device="meta"), "values on meta"),
        (lambda images: 1 / 0, "raised ZeroDivisionError"),
        (lambda images, prompts: images, "needs prompts"),
    ],
)
def test_what_a_reward_may_not_do(images, function, message):
    with pytest.raises(RewardError, match=message):
        mfm_rewards.evaluate(mfm_rewards.as_reward(function, "mine"), images)


def test_classifier_weights_must_be_plain_tensors(tmp_path):
    import pickle

    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps({"evil": print}))
    settings = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}}
    with pytest.raises(RewardError, match="refused"):
        mfm_rewards.build("class_mixture", classifier={**settings, "weights": str(path)}, weights=[1, 0])


def test_command_lists_and_scores(tmp_path, capsys, images):
    from mfm_lightning.commands.main import main

    main(["rewards"])
    assert "jpeg_compressibility" in capsys.readouterr().out
    for i, image in enumerate(images):
        pixels = ((i + 1) / 4 * image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    main(["rewards", "--score", "brightness", "--images", str(tmp_path), "--option", "scale=10"])
    lines = [line for line in capsys.readouterr().out.splitlines() if ".png" in line]
    assert [line.split()[1] for line in lines] == ["2.png", "1.png", "0.png"]  # best first
    assert float(lines[0].split()[3]) == pytest.approx(7.5 * images[2].mean().item(), abs=0.05)
    with pytest.raises(SystemExit, match="did you mean 'brightness'"):
        main(["rewards", "--score", "brightnes", "--images", str(tmp_path)])
