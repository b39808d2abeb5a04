"""`mfm benchmark finetuning` on a text-to-image flow: policies, conditions and draws, and a run as a user's."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mfm_benchmarks.command import load_suite
from mfm_benchmarks.finetuning import MFMFineTuning, Problem
from mfm_benchmarks.parts.tuned_models import FlowSettings, TunedFlow
from mfm_benchmarks.spec import Spec
from mfm_lightning.backbones import FlowAdapter, load_flow
from mfm_lightning.commands.main import main
from mfm_lightning.conditions import Conditions
from mfm_lightning.modules import PromptFinetuning
from mfm_lightning.networks.files import save_network
from mfm_rewards import Reward, RewardError, build
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401
from tests.backbones.test_adapter import stirred

ROOT = Path(__file__).parents[2]
PROMPTS, GUIDANCE, CPU = ["a red cat", "the dog", "a blue mat"], 3.0, torch.device("cpu")


class Wordy(Reward):
    """Brightness by the length of the prompt."""

    needs = ("images", "prompts")

    def forward(self, images, prompts):
        return images.mean(dim=(1, 2, 3)) * torch.tensor([float(len(text)) for text in prompts])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline, an adapter of it, and captioned pictures."""
    folder = tmp_path_factory.mktemp("small")
    tiny.sd3(**encoders.of_sd3(folder / "words")).save_pretrained(folder / "pipe")
    adapter = FlowAdapter(str(folder / "pipe"), rank=2, image_size=8, guidance_scales=[GUIDANCE])
    save_network(stirred(adapter), folder / "mfm.safetensors")
    tiny.pictures(folder / "pictures")
    return folder


def options(place):
    return {"name": str(place / "pipe"), "image_size": 8, "torch_dtype": "float32"}


def flow_settings(place, **changes):
    spec = Spec({"class_path": "mfm_lightning.backbones.load_flow", "init_args": options(place)})
    given = {"prompts": PROMPTS, "mfm": str(place / "mfm.safetensors"), "guidance": GUIDANCE, "rank": 2, **changes}
    return FlowSettings(spec, **given)


@pytest.fixture(scope="module")
def tuned(place):
    return TunedFlow(flow_settings(place), CPU)


def states(tuned, num):
    return torch.randn(num, *tuned.state_shape, generator=torch.Generator().manual_seed(3))


def stir(policy):
    with torch.no_grad():
        for p in policy.parameters():
            p.normal_(std=0.3)


@torch.no_grad()
def test_a_policy_begins_as_the_base_flow_and_leaves_it_and_the_draws_alone(tuned, place):
    x, given = states(tuned, 3), tuned.conditions(3)
    alone = load_flow(**options(place)).drift(0.4, x, load_flow(**options(place)).encode(PROMPTS, guidance=GUIDANCE))
    draws = tuned.model.flow_map(0.0, 1.0, x, 0.3, x, given)
    policy, parameters = tuned.policy()
    assert len(parameters) == len(list(policy.parameters()))
    assert all(p.requires_grad for p in parameters)
    for drift in (policy.drift, tuned.model.drift):
        torch.testing.assert_close(drift(0.4, x, given), alone, atol=1e-5, rtol=1e-5)
    first = [p.clone() for p in parameters]
    stir(policy)
    assert (policy.drift(0.4, x, given) - alone).abs().max() > 0.01
    torch.testing.assert_close(tuned.model.drift(0.4, x, given), alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(tuned.model.flow_map(0.0, 1.0, x, 0.3, x, given), draws)
    again, parameters = tuned.policy()
    assert all(torch.equal(p, q) for p, q in zip(parameters, first, strict=True))
    torch.testing.assert_close(again.drift(0.4, x, given), alone, atol=1e-5, rtol=1e-5)


def same(given, expected):
    assert given.prompts == expected.prompts
    for name in ("text", "pooled", "guidance", "negative_text", "negative_pooled"):
        torch.testing.assert_close(getattr(given, name), getattr(expected, name))


def test_samples_are_of_the_prompts_and_data_of_their_captions(tuned, place):
    flow = load_flow(**options(place))

    def encoded(texts):
        return flow.encode(texts, guidance=GUIDANCE).expand(len(texts))

    same(tuned.conditions(5).expand(5), encoded([*PROMPTS, *PROMPTS[:2]]))
    torch.manual_seed(0)
    drawn = tuned.draw(60)
    assert {drawn.prompts.count(text) for text in PROMPTS} <= set(range(10, 31))
    same(drawn.expand(60), encoded(drawn.prompts))
    x1, given = tuned.of_data(
        (torch.ones(2, *tuned.state_shape), {"prompts": ["a cat", "the dog"], "label": torch.ones(2).long()})
    )
    assert x1.shape == (2, *tuned.state_shape)
    same(given, encoded(["a cat", "the dog"]))


def test_rewards_read_the_prompts_of_their_samples(tuned, place):
    x = states(tuned, 3)
    target = tuned.load({}, Wordy())(tuned.conditions(3))
    images = load_flow(**options(place)).decoder(x)
    expected = images.mean(dim=(1, 2, 3)) * torch.tensor([9.0, 7.0, 10.0])
    torch.testing.assert_close(target.plain_rewards(x), expected, atol=1e-5, rtol=1e-5)

    class Labelled(Wordy):
        needs = ("images", "labels")

    with pytest.raises(RewardError, match="'Labelled' needs labels, and prompts have none here"):
        tuned.load({}, Labelled())


@pytest.mark.parametrize("kind", ["reward", "free"])
def test_mfm_ft_here_is_that_of_the_module(tuned, place, kind):
    """With the same random numbers and weights the loss is `PromptFinetuning`'s, and so are its gradients."""
    policy, parameters = tuned.policy()
    torch.manual_seed(1)
    stir(policy)
    module = PromptFinetuning(
        load_flow(**options(place)), "brightness", str(place / "mfm.safetensors"), 5.0, GUIDANCE, rank=2, gradient=kind
    )
    module.policy.load_state_dict(policy.state_dict())
    x1, captions, rewarded = states(tuned, 4), [*PROMPTS, "the dog"], tuned.load("brightness")

    def make_target(conditions):
        target = rewarded(conditions)
        target.reward_scale = 5.0
        return target

    def data(num):
        return tuned.of_data((x1[:num], {"prompts": captions}))

    given = Problem(policy, parameters, make_target, tuned.draw, data)
    torch.manual_seed(2)
    loss = next(MFMFineTuning(kind, batch_size=4, policy_share=0.0).losses(given))
    torch.manual_seed(2)
    expected = module.losses(x1, Conditions(prompts=captions), training=False)["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, list(module.policy.parameters()))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()) + 1e-7)


def test_mfm_ft_normalises_by_prompt(tuned):
    """Rewards that depend on the prompt alone leave nothing to learn: once each prompt has its own c, which takes 16
    draws, all weights are 1, and the loss of a policy that is the base flow is 0."""

    class OfPrompt(Reward):
        needs = ("images", "prompts")

        def forward(self, images, prompts):
            return 0 * images.mean(dim=(1, 2, 3)) + torch.tensor([float(len(text)) for text in prompts])

    policy, parameters = tuned.policy()
    given = Problem(policy, parameters, tuned.load({}, OfPrompt()), tuned.draw)
    losses = MFMFineTuning("free", batch_size=24, buffer_size=24, ode_steps=1).losses(given)
    torch.manual_seed(0)
    found = [float(next(losses).detach()) for _ in range(8)]
    assert found[0] > 0.1
    assert found[-1] < 1e-6


# a run


def method(kind, **more):
    return {"method": {"class_path": f"mfm_benchmarks.finetuning.{kind}", "init_args": more}}


METHODS = {
    "MFM-FT": method("MFMFineTuning", batch_size=4, buffer_size=4, ode_steps=2),
    "DRaFT-1": method("DRaFT", last=1, steps=2, batch_size=4),
    "ReFL": method("ReFL", steps=2, earliest=1, batch_size=4),
    "GRPO": method("FlowGRPO", steps=2, batch_size=4, group_size=2),
    "NFT": method("DiffusionNFT", steps=2, batch_size=4, group_size=2),
}


@pytest.fixture(scope="module")
def settings(place):
    pictures = {
        "class_path": "mfm_lightning.data.images.CaptionedImages",
        "init_args": {"source": str(place / "pictures"), "captions": PROMPTS[:2]},
    }
    return {
        "flow": {
            "pipeline": {"class_path": "mfm_lightning.backbones.load_flow", "init_args": options(place)},
            "mfm": str(place / "mfm.safetensors"), "prompts": PROMPTS, "guidance": GUIDANCE, "rank": 2,
        },
        "data": {
            "class_path": "mfm_lightning.data.images.EncodedImages",
            "init_args": {"source": pictures, "vae": str(place / "pipe/vae"), "batch_size": 3},
        },
        "training": {"evaluations": 80, "checkpoints": [1.0], "warmup": 0.0, "average": 0.0},
        "learning_rates": [1e-3], "seeds": [1], "drifts": [1e-6], "num_samples": 6, "ode_steps": 3,
        "rewards": {"brightness": {"reward": "brightness", "scale": 20.0, "held_out": {"contrast": "contrast"}}},
        "methods": METHODS,
    }  # fmt: skip


def benchmark(settings, *args):
    Path("mine.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    main(["benchmark", "finetuning", "--config", "mine.yaml", "--output", "out", "--device", "cpu", *args])


def table(name):
    with open(f"out/report/{name}.csv") as file:
        return list(csv.DictReader(file))


def test_a_run_trains_every_method_from_the_same_flow(settings, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    benchmark(settings)
    record = json.loads(Path("out/report/environment.json").read_text())
    assert (record["failures"], record["skipped"]) == ({}, {})
    rows = table("results")
    assert {row["method"] for row in rows} == set(METHODS)
    assert all(float(row["drift"]) > 1e-6 for row in rows)
    # the base flow's samples, with guidance by two evaluations, written out
    flow = load_flow(**options(place))
    x = torch.randn(6, *flow.state_shape, generator=torch.Generator().manual_seed(1))
    given = flow.encode([*PROMPTS, *PROMPTS], guidance=GUIDANCE)
    with torch.no_grad():
        for k in range(3):
            x = x + flow.drift(k / 3, x, given) / 3
        images = flow.decoder(x)
    base = table("equal_drift")[0]
    assert base["method"] == "base flow"
    assert float(base["mean reward"]) == pytest.approx(float(images.mean()), abs=1e-5)
    assert float(base["contrast"]) == pytest.approx(float(build("contrast")(images).mean()), abs=1e-5)
    # 4 samples of 2 steps of 2 passes, one with its gradient, and the reward with its own
    cells = [json.loads(path.read_text()) for path in Path("out/results").glob("DRaFT*seed*.json")]
    numbers = cells[0]["numbers"]
    assert numbers["network"][-1] == numbers["step"][-1] * 4 * (2 * 2 + 2)
    assert numbers["reward"][-1] == numbers["step"][-1] * 4 * 2


def test_without_an_adapter_its_methods_are_left_out(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    glass = {"posterior": {"class_path": "mfm_lightning.alignment.GlassPosterior", "init_args": {"steps": 2}}}
    methods = {
        "MFM-FT": METHODS["MFM-FT"],
        "by GLASS": method("MFMFineTuning", batch_size=4, buffer_size=4, ode_steps=2, **glass),
    }
    benchmark({**settings, "flow": {**settings["flow"], "mfm": None}, "methods": methods})
    skipped = json.loads(Path("out/report/environment.json").read_text())["skipped"]
    assert list(skipped) == ["MFM-FT, brightness"]
    assert "a FlowMapPosterior draws from a Meta Flow Map, and a SD3Flow is none" in skipped["MFM-FT, brightness"]
    assert {row["method"] for row in table("results")} == {"by GLASS"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"file": "model.safetensors"}}, "give model, a Meta Flow Map, or flow, a text-to-image flow"),
        ({"flow": None}, "give model, a Meta Flow Map, or flow, a text-to-image flow"),
        ({"flow.guidance": 2.0}, "flow: guidance 2"),
        ({"flow.prompts": "nowhere.txt"}, "flow: "),
        ({"flow.pipeline": "nowhere"}, "flow: "),
        ({"flow.rank": 0}, "flow: rank 0"),
        ({"data.init_args.source": "pictures"}, "is trained on captions: give the data captions"),
    ],
)
def test_bad_settings_are_refused_before_any_training(settings, place, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "pictures", "pictures")
    changed = json.loads(json.dumps(settings))
    for key, value in changes.items():
        inside = changed
        *path, last = key.split(".")
        for name in path:
            inside = inside[name]
        inside[last] = value
    with pytest.raises(SystemExit) as stopped:
        benchmark(changed)
    said = f"{capsys.readouterr().err}{stopped.value}".splitlines()
    assert len([line for line in said if message in line]) == 1, said
    assert not Path("out/results").exists()


def test_the_config_that_is_there_fits_the_suite_and_its_quick_version(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    found, _, _ = load_suite("finetuning", ["--config", "configs/benchmarks/finetuning-text-to-image-small.yaml"])
    suite: Any = found
    assert suite.model is None
    assert len(suite.flow.prompts) == 20
    assert suite.num_samples % 20 == suite.quick_samples % 20 == 0
    assert set(suite.rewards["CLIP score"].held_out["classifier"].value["target"]) == set(suite.flow.prompts)
    assert next(iter(suite.methods)) == "MFM-FT"
    suite.shrink()
    assert suite.num_samples == suite.quick_samples
    assert suite.training.evaluations == suite.quick_evaluations
