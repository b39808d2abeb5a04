"""`mfm predict` with an alignment method, as a user runs it: what it writes, and what it refuses."""

import json

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from mfm_lightning.alignment import (
    BestOfN,
    DiamondGradientFree,
    DiamondPosterior,
    FeynmanKac,
    FlowMapPosterior,
    NoiseOptimisation,
    Search,
    Steering,
    TimeGrid,
    TrajectoryTilting,
    TwistedSMC,
)
from mfm_lightning.alignment.target import Target, TargetSettings
from mfm_lightning.alignment.values import DrawGradient, DrawGradientFree, DrawValue
from mfm_lightning.checkpoints import CheckpointError, load_model, save_model
from mfm_lightning.data import NoiseDataModule
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import RewardAlignment
from mfm_lightning.networks import DiT
from mfm_lightning.networks.decoders import PixelDecoder
from mfm_rewards import RewardError


@pytest.fixture
def model_file(tmp_path):
    torch.manual_seed(0)
    model = MetaFlowMap(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, guidance_scales=()))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return str(save_model(model, tmp_path / "model.safetensors"))


def settings(model_file, reward="brightness", **options):
    return TargetSettings(model_file, reward, PixelDecoder(), **options)


def predict(folder, module, **data):
    trainer = L.Trainer(
        default_root_dir=folder, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    options = {"state_shape": [1, 8, 8], "num_classes": 10, "num_samples": 6, "batch_size": 4, **data}
    trainer.predict(module, NoiseDataModule(**options))
    return folder / "predict"


GRID = TimeGrid(4)
METHODS = [
    Steering(DrawGradient(2), GRID, clip=1.0, return_best=True),
    Search(3, 2, steps=3),
    BestOfN(5, steps=3),
    FeynmanKac(num_particles=3, grid=GRID),
    TwistedSMC(num_particles=3, grid=GRID),
    Steering(DiamondGradientFree(2), GRID),
    TrajectoryTilting(num_particles=3, grid=GRID),
    NoiseOptimisation(2),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_method_writes_its_run(tmp_path, model_file, method):
    folder = predict(
        tmp_path, RewardAlignment(settings(model_file, reward_scale=5.0), method, base_steps=3, pictures=6)
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["samples"] == 6
    assert [len(batch["rewards"]) for batch in summary["batches"]] == [4, 2]
    tensors = load_file(folder / "batch_0000.safetensors")
    assert tensors["states"].shape == tensors["images"].shape == (4, 1, 8, 8)
    # the rewards are those of the images, without the scale
    torch.testing.assert_close(tensors["rewards"], tensors["images"].mean(dim=(1, 2, 3)))
    assert summary["batches"][0]["rewards"] == pytest.approx(tensors["rewards"].tolist())
    assert (folder / "before_after.png").stat().st_size > 1000
    assert summary["batches"][0]["peak_memory"] > 2**20
    if "best_states" in tensors:  # the best look-ahead, too
        assert isinstance(method, Search | NoiseOptimisation) or method.return_best
        torch.testing.assert_close(tensors["best_rewards"], tensors["best_images"].mean(dim=(1, 2, 3)))
        rewards = [reward for batch in summary["batches"] for reward in batch["best_rewards"]]
        assert summary["mean_best_reward"] == pytest.approx(sum(rewards) / 6)


def test_labels_and_prompts_reach_the_reward(tmp_path, model_file):
    seen = []

    class Spy:
        needs = ("images", "prompts", "labels")

        def __call__(self, images, prompts, labels):
            seen.extend(zip(prompts, labels.tolist(), strict=True))
            return images.mean(dim=(1, 2, 3))

    module = RewardAlignment(
        settings(model_file, Spy(), prompts=[f"a {i}" for i in range(10)]), Steering(DrawGradient(2), GRID), 3
    )
    predict(tmp_path, module, labels=[7, 3])
    assert set(seen) == {("a 7", 7), ("a 3", 3)}
    with pytest.raises(RewardError, match=r"needs prompts: set target\.prompts"):
        RewardAlignment(settings(model_file, Spy()))
    with pytest.raises(ValueError, match=r"prompts, one a class, need a label"):
        predict(tmp_path / "unlabelled", module)


def test_black_boxes_are_refused_before_any_sampling(tmp_path, model_file):
    with pytest.raises(RewardError, match="Steering differentiates the reward, but 'jpeg_compressibility'"):
        RewardAlignment(settings(model_file, "jpeg_compressibility"), Steering(DrawGradient(2), GRID))

    def detached(images):
        return images.detach().mean(dim=(1, 2, 3))

    with pytest.raises(RewardError, match="'detached' gave values that carry no gradient"):
        predict(tmp_path, RewardAlignment(settings(model_file, detached), Steering(DrawGradient(2), GRID), 3))
    module = RewardAlignment(settings(model_file, "jpeg_compressibility"), Steering(DrawGradientFree(4), GRID), 3)
    assert (predict(tmp_path, module) / "summary.json").is_file()


def test_a_plain_flow_map_is_aligned_without_posteriors_of_its_own(tmp_path, model_file):
    """As an imported DMF: what draws posteriors from it is refused before any sampling, in Python as well."""
    model = load_model(model_file)
    plain = str(save_model(model, tmp_path / "flow_map.safetensors", {"kind": "flow_map"}))
    diamond = DiamondPosterior(2)
    for method in (
        Steering(DrawGradient(2), GRID),
        Search(2, 2, 2),
        FeynmanKac(DrawValue(2), grid=GRID),
        FeynmanKac(transition="glass", posterior=FlowMapPosterior(), grid=GRID),
    ):
        with pytest.raises(CheckpointError, match=f"{type(method).__name__} draws posteriors .* plain flow map"):
            RewardAlignment(settings(plain), method)
    with pytest.raises(TypeError, match="a plain flow map draws no posteriors"):
        Search(2, 2, 2)(Target(load_model(plain), lambda x: x.flatten(1).sum(1)), torch.zeros(2, 1, 8, 8))
    for method in (Search(2, 2, 2, posterior=diamond), Steering(DrawGradientFree(2, diamond), GRID)):
        RewardAlignment(settings(plain), method)
    module = RewardAlignment(settings(plain), TrajectoryTilting(num_particles=2, grid=GRID), 2)
    assert (predict(tmp_path, module) / "summary.json").is_file()


def test_a_failing_reward_leaves_what_was_finished(tmp_path, model_file):
    calls = []

    def flaky(images):
        calls.append(len(images))
        return images.mean(dim=(1, 2, 3)) * (float("nan") if len(calls) > 9 else 1.0)

    module = RewardAlignment(settings(model_file, flaky), Steering(DrawGradient(1), GRID), 3)
    # six calls a batch: base, four steps, the end; so the second batch fails in its third step
    with pytest.raises(
        RewardError, match=r"step 3 of 4 .*'flaky'.* indices 0, 1; the states so far are in .*_unfinished"
    ):
        predict(tmp_path, module)
    folder = tmp_path / "predict"
    assert (folder / "batch_0000.json").is_file()
    unfinished = load_file(folder / "batch_0004_unfinished.safetensors")["states"]
    assert unfinished.shape == (2, 1, 8, 8)
    assert unfinished.isfinite().all()


def test_noise_that_does_not_fit_is_refused(tmp_path, model_file):
    module = RewardAlignment(settings(model_file))
    with pytest.raises(ValueError, match=r"leave out data.state_shape and data.num_classes"):
        predict(tmp_path, module, num_classes=3)
    with pytest.raises(ValueError, match=r"labels \[11\] must lie in 0..10"):
        NoiseDataModule([1, 8, 8], num_classes=10, labels=[11])
    for method, message in (
        (lambda: Steering(dynamics="sode"), "unknown dynamics 'sode'"),
        (lambda: Search(num_particles=0), "num_particles 0"),
        (lambda: FeynmanKac(keep="most"), "unknown keep 'most'"),
        (lambda: TwistedSMC(ess_threshold=2.0), "ess_threshold 2.0"),
        (lambda: BestOfN(0), "num_candidates 0"),
        (lambda: DrawGradientFree(1), "at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            method()
