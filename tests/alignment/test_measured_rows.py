"""Estimators and flows with `max_rows: auto`, whose network ends memory above so many rows."""

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml

from mfm_lightning.alignment import (
    DiamondGradient,
    DiamondGradientFree,
    DPSGradient,
    DrawGradient,
    DrawGradientFree,
    FlowMapGradient,
    Steering,
    Target,
)
from mfm_lightning.alignment.memory import row_budgets
from mfm_lightning.alignment.values import DrawValue
from mfm_lightning.checkpoints import save_model
from mfm_lightning.commands.main import run
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP, DiT
from mfm_rewards import RewardError
from tests.backbones.test_flows import conditions, started
from tests.processes import one_thread


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = MetaFlowMap(MLP(2, 16, 1))
    for p in made.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return made.requires_grad_(False)


class Limited:
    """A function whose memory ends above so many rows."""

    def __init__(self, function, room: int) -> None:
        self.function, self.room, self.most, self.failed = function, room, 0, 0

    def __call__(self, *args, **kwargs):
        rows = max(len(a) for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.dim() > 1)
        if rows > self.room:
            self.failed += 1
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory: {rows} rows")
        self.most = max(self.most, rows)
        return self.function(*args, **kwargs)


def bright(images):
    return 3 * images.mean(dim=1) - images.square().sum(dim=1)


ESTIMATORS = [
    DrawValue(4, max_rows="auto"),
    DrawGradient(4, max_rows="auto"),
    DrawGradientFree(4, max_rows="auto"),
    DPSGradient(max_rows="auto"),
    FlowMapGradient(max_rows="auto"),
    DiamondGradient(4, max_rows="auto"),
    DiamondGradientFree(4, max_rows="auto"),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("seeds", ["own", "one", "torch's"])
def test_an_estimate_is_that_of_the_rows_that_fit(model, estimator, seeds, monkeypatch):
    """With the noise, and the count of evaluations, of a call in which nothing failed."""
    estimator.__dict__.pop("_row_budget", None)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))

    def found(room: int, given):
        limited = Limited(MLP.forward, room)
        monkeypatch.setattr(MLP, "forward", lambda self, *a, **k: limited(self, *a, **k))
        target = Target(model, bright)
        torch.manual_seed(3)
        generator = {"own": sample_generators(1, range(6)), "one": torch.Generator().manual_seed(2), "torch's": None}[
            seeds
        ]
        estimate = given(target, 0.4, x, generator)
        monkeypatch.setattr(MLP, "forward", limited.function)
        return estimate, target.meter.total, limited

    wanted, nfe, _ = found(1000, type(estimator)(**{k: v for k, v in vars(estimator).items() if k != "max_rows"}))
    limited = Limited(bright, 0)
    for _ in range(6):
        estimate, count, limited = found(9, estimator)
        assert count == nfe
        for name in ("value", "gradient", "steering", "ess"):
            ours, theirs = getattr(estimate, name), getattr(wanted, name)
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert limited.failed == 0  # it is known by now
    assert limited.most <= 9
    draws = getattr(estimator, "num_draws", 1)
    if draws > 1:
        assert limited.most == 8  # two states of four draws
        assert row_budgets(Steering(estimator) if not isinstance(estimator, DrawValue) else estimator)
    else:
        assert not limited.most > 6


def test_a_reward_that_ends_memory_counts_too_and_other_errors_do_not(model):
    rewards = Limited(bright, 9)
    estimator = DrawGradientFree(4, max_rows="auto")
    x = torch.randn(6, 2)
    for _ in range(6):
        estimator(Target(model, lambda images: rewards(images)), 0.4, x)
    assert rewards.most == 8
    assert row_budgets(Steering(estimator)) == {"method.estimator": estimator.__dict__["_row_budget"]}
    failing = DrawGradientFree(4, max_rows="auto")

    def wrong(images):
        raise RuntimeError("another error")

    with pytest.raises(RewardError, match="raised RuntimeError: another error"):
        failing(Target(model, wrong), 0.4, x)
    with pytest.raises(ValueError, match="max_rows 'most' must be at least 1, or auto"):
        DrawGradientFree(4, max_rows="most")  # pyright: ignore[reportArgumentType]
    nothing = Limited(bright, 0)
    with pytest.raises(torch.OutOfMemoryError, match="DrawGradientFree runs out of memory with 1 at once, the fewest"):
        failing(Target(model, lambda images: nothing(images)), 0.4, x)
    with pytest.raises(
        torch.OutOfMemoryError, match="DiamondGradientFree runs out of memory with 4 at once, the fewest"
    ):
        DiamondGradientFree(4, max_rows="auto")(Target(model, lambda images: nothing(images)), 0.4, x)


def test_transformer_and_vae_of_a_flow(monkeypatch):
    flow, _, _, _ = started("sd3", (8, 8))
    plain, _, _, _ = started("sd3", (8, 8))
    _, two = conditions("sd3", False)
    given = two.take(slice(0, 1)).expand(11)
    x = torch.randn(11, *flow.state_shape, generator=torch.Generator().manual_seed(0))
    wanted, images = plain.drift(0.5, x, given), plain.decoder(x)
    flow.max_rows = flow.decoder.max_rows = "auto"
    assert set(flow.budgets) == {"transformer", "vae", "vae, gradients"}
    transformer, vae = Limited(flow.transformer.forward, 4), Limited(flow.decoder.vae.decode, 3)
    monkeypatch.setattr(flow.transformer, "forward", transformer)
    monkeypatch.setattr(flow.decoder.vae, "decode", vae)
    for _ in range(4):
        torch.testing.assert_close(flow.drift(0.5, x, given), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(flow.decoder(x), images, rtol=1e-4, atol=1e-5)
    assert (flow.budget.fits, flow.budget.fails) == (4, 5)
    assert (flow.decoder.budget.fits, flow.decoder.budget.fails) == (3, 4)
    # gradients: as many as can be decoded and differentiated, found before the graph is made
    vae.room, vae.most = 2, 0
    found = x
    for _ in range(4):
        state = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(flow.decoder(state).square().sum(), state)
    assert flow.decoder.gradient_budget.fits == vae.most == 2
    state = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(plain.decoder(state).square().sum(), state)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_run_writes_down_what_it_found_and_the_next_begins_with_it(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model(MetaFlowMap(DiT(8, 4, 1, 16, 1, 2, 1, num_classes=0, guidance_scales=())), "model.safetensors")
    estimator = {
        "class_path": "mfm_lightning.alignment.DrawGradientFree",
        "init_args": {"num_draws": 4, "max_rows": "auto"},
    }
    method = {
        "class_path": "mfm_lightning.alignment.Steering",
        "init_args": {"estimator": estimator, "grid": {"steps": 6}},
    }
    target = {
        "model": "model.safetensors",
        "reward": "brightness",
        "decoder": {"class_path": "mfm_lightning.networks.PixelDecoder"},
    }
    config = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "default_root_dir": "run"},
        "model": {
            "class_path": "mfm_lightning.modules.RewardAlignment",
            "init_args": {"target": target, "method": method, "base_steps": 2, "pictures": 0},
        },
        "data": {"class_path": "mfm_lightning.data.NoiseDataModule", "init_args": {"num_samples": 6, "batch_size": 6}},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    limited = Limited(DiT.forward, 9)
    monkeypatch.setattr(DiT, "forward", lambda self, *a, **k: limited(self, *a, **k))
    command = ["predict", "--config=config.yaml", "--return_predictions=false"]
    with one_thread():
        run(command)
    assert limited.failed > 0
    note = json.loads(Path("run/predict/max_rows.json").read_text())
    assert note["context"] == {"device": "cpu"}
    fits, fails = (note["rows"]["method.estimator"][key] for key in ("fits", "fails"))
    assert 8 <= fits < fails == fits + 1 <= 12  # of two states with four draws each
    limited.failed = 0
    run([*command, "--data.init_args.num_samples=12"])  # max_rows is no setting of the samples
    assert limited.failed == 0
    assert "max_rows: auto begins with what run/predict/max_rows.json says" in caplog.text
