"""MFM-FT of a text-to-image flow: the loss as written in the paper, adapters where they belong, and a run as a user."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mfm_lightning.alignment import DiamondPosterior, FlowMapPosterior, GlassPosterior, Target
from mfm_lightning.backbones import FlowAdapter, load_flow
from mfm_lightning.checkpoints import CheckpointError, load_model
from mfm_lightning.commands.main import run
from mfm_lightning.conditions import Conditions
from mfm_lightning.evaluation import PromptPolicyEvaluation
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import PromptFinetuning
from mfm_lightning.networks.files import save_network
from mfm_lightning.samplers import integrate
from mfm_rewards import Reward, RewardError, build
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401
from tests.backbones.test_adapter import stirred

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red cat", "the dog", "a red cat"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """SD3 and FLUX with tiny text encoders, and of each a Meta Flow Map's adapter."""
    folder = tmp_path_factory.mktemp("flows")
    tiny.sd3(**encoders.of_sd3(folder / "words")).save_pretrained(folder / "sd3")
    tiny.flux(**encoders.of_flux(folder / "words")).save_pretrained(folder / "flux")
    for family, options in (("sd3", {"guidance_scales": [3.0]}), ("flux", {})):
        torch.manual_seed(5)
        adapter = stirred(FlowAdapter(str(folder / family), rank=2, image_size=8, **options))
        save_network(adapter, folder / f"{family}.safetensors")
    return folder


def opened(places, family="sd3"):
    return load_flow(places / family, 8, torch_dtype="float32", checkpointing=True)


def module_of(places, family="sd3", **options):
    torch.manual_seed(7)
    given = {"reward": "brightness", "reward_scale": 5.0, "rank": 2, **options}
    module = PromptFinetuning(opened(places, family), **given)
    stirred(module.policy)
    return module


CASES = {
    "sd3": {"mfm": True, "guidance": 1.0},
    "sd3, guided": {"mfm": True, "guidance": 3.0},
    "sd3, GLASS, guided": {"posterior": GlassPosterior(3), "guidance": 4.0, "negative": "bad"},
    "sd3, Diamond": {"mfm": True, "guidance": 1.0, "posterior": DiamondPosterior(4), "gradient": "free"},
    "flux": {"mfm": True},
    "sd3, black box": {"mfm": True, "guidance": 1.0, "gradient": "free", "num_draws": 2},
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_loss_is_the_papers_with_each_adapter_in_its_place(places, name):
    family, options = name.split(",")[0], dict(CASES[name])
    adapter = None
    if options.pop("mfm", False):
        options["mfm"] = str(places / f"{family}.safetensors")
        adapter = FlowAdapter.of_file(options["mfm"], opened(places, family))  # on a flow of its own
    module = module_of(places, family, **options)
    plain, scale, prompts = opened(places, family), options.get("guidance"), PROMPTS
    x1 = torch.randn(3, *module.state_shape, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    found = module.losses(x1, Conditions(prompts=prompts), training=False)

    # the same random numbers, and the formula; of a policy that is merged into weights of its own
    torch.manual_seed(2)
    t, _ = torch.rand(3), torch.rand(3)  # the second for times at zero, of which there are none
    x = t[:, None, None, None] * x1 + (1 - t)[:, None, None, None] * torch.randn_like(x1)
    noise = torch.randn(3, module.num_draws, *module.state_shape)
    given = plain.encode(prompts, options.get("negative"), scale)
    module.policy.lora.save(places / "lora")
    merged = load_flow(places / family, 8, torch_dtype="float32", lora=str(places / "lora"))
    wide = lambda v: v[:, None, None, None]  # noqa: E731
    with torch.no_grad():
        base, policy = plain.drift(t, x, given), merged.drift(t, x, given)
    x.requires_grad_()
    draws = []
    for k in range(module.num_draws):
        eps, zero, one = noise[:, k], torch.zeros(3), torch.ones(3)
        if "Diamond" in name:  # tested for itself
            known = Target(MetaFlowMap(adapter), build("brightness"), None, given, drift=plain.drift)
            draws.append(DiamondPosterior(4)(known, t, x.detach(), noise)[:, k])
        elif adapter is not None:
            known = Conditions(
                text=given.text, pooled=given.pooled, guidance=scale if family == "sd3" else None
            ).expand(3)
            draws.append(eps + adapter(zero, one, eps, t, x, known))
        else:
            end = eps
            for s in (0.0, 1 / 3, 2 / 3):  # GLASS: the base's drift at the time where both observations weigh as one
                end = end + glass_velocity(plain, torch.full((3,), s), end, t, x, given) / 3
            draws.append(end)
    rewards = torch.stack([5 * plain.decoder(d).mean(dim=(1, 2, 3)) for d in draws], dim=1)
    c = rewards.detach().flatten().logsumexp(0) - torch.tensor(float(rewards.numel())).log()
    weight = (rewards - c).exp().mean(dim=1)
    half = ((1 - t) / t).clamp_max(25.0)
    if module.gradient == "reward":
        (gradient,) = torch.autograd.grad(weight.sum(), x)
        third = wide(half) * gradient
    else:
        denoised = x.detach() + wide(1 - t) * base
        each = torch.stack([wide((rewards[:, k] - c).exp() - 1) * (d - denoised) for k, d in enumerate(draws)])
        third = (each.mean(dim=0) / wide(1 - t)).detach()
        assert (half < 25).all()
    expected = base - wide(weight.detach() - 1) * (policy - base) + third
    loss = (policy - expected).square().flatten(1).sum(dim=1).mean()
    assert float(found["loss"]) == pytest.approx(float(loss), rel=2e-4)
    assert float(found["reward"]) == pytest.approx(float(rewards.mean()) / 5, rel=1e-4)
    # what is trained is the policy's LoRA alone
    found["loss"].backward()
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in module.named_parameters()}
    assert all("policy.lora" in n for n in trained)
    assert all(p.grad is not None for p in module.parameters())
    moved = {n for n, p in module.named_parameters() if p.grad.abs().sum() > 0}
    assert all(n in moved for n in trained if "to_q" in n or "to_v" in n)


def glass_velocity(flow, s, z, t, x, given):
    """The posterior's velocity in terms of the base's denoiser, for the noise's scale of a linear path: with
    observations x = t x1 + (1-t) e and z = s x1 + (1-s) e', the sufficient statistic has the precision of both."""
    wide = lambda v: v[:, None, None, None]  # noqa: E731
    a, b = t / (1 - t) ** 2, s / (1 - s) ** 2
    snr = t**2 / (1 - t) ** 2 + s**2 / (1 - s) ** 2
    time = snr.sqrt() / (1 + snr.sqrt())
    centre = (wide(a) * x + wide(b) * z) / wide(snr)  # an estimate of x1 with variance 1 / snr
    drift = flow.drift(time, wide(time) * centre, given)
    x1 = wide(time) * centre + wide(1 - time) * drift
    return (x1 - z) / wide(1 - s)


def test_parts_of_rewards_are_logged_each(places):
    parts = {"name": "sum", "weights": [2.0, 1.0], "rewards": ["brightness", {"name": "sum", "rewards": ["contrast"]}]}
    module = module_of(places, reward=parts, mfm=str(places / "sd3.safetensors"), guidance=1.0)
    x1 = torch.randn(2, *module.state_shape)
    found = module.losses(x1, Conditions(prompts=["a cat", "a dog"]), training=False)
    total = 2 * found["reward/brightness"] + found["reward/contrast"]
    assert float(found["reward"]) == pytest.approx(float(total), rel=1e-5)


def test_prompts_have_their_own_normaliser_the_same_in_all_processes(places):
    module = module_of(places, mfm=str(places / "sd3.safetensors"), guidance=1.0)
    pair = module.noised(torch.randn(3, *module.state_shape), Conditions(prompts=PROMPTS))
    first, second, third = module.classes(pair).tolist()
    assert first == third != second
    assert [first, second] == [2301, 285]  # CRC-32 of the texts, modulo 4096: not Python's hash, which differs


def test_what_does_not_fit_is_refused_before_any_work(places, tmp_path):
    mfm = str(places / "sd3.safetensors")
    with pytest.raises(CheckpointError, match=r"a FlowMapPosterior draws from a Meta Flow Map: give its file \(mfm\)"):
        module_of(places, posterior=FlowMapPosterior(2))
    with pytest.raises(ValueError, match="draws of a DiamondPosterior have no gradient: take gradient 'free'"):
        module_of(places, mfm=mfm, guidance=1.0, posterior=DiamondPosterior())
    other = tiny.sd3(**encoders.of_sd3(tmp_path / "words"))
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    flow = load_flow(tmp_path / "other", 8, torch_dtype="float32")
    with pytest.raises(CheckpointError, match="trained on other weights than those of"):
        PromptFinetuning(flow, "brightness", mfm)
    with pytest.raises(ValueError, match=r"guidance 7 is not a scale that this network knows: \[1.0, 3.0\]"):
        module_of(places, mfm=mfm)
    with pytest.raises(RewardError, match=r"jpeg.*not differentiable"):
        module_of(places, mfm=mfm, guidance=1.0, reward="jpeg_compressibility")
    with pytest.raises(RewardError, match="'diversity' needs groups, and prompts have none here"):
        module_of(places, mfm=mfm, guidance=1.0, gradient="free", reward="diversity")
    module = module_of(places, mfm=mfm, guidance=1.0)
    with pytest.raises(ValueError, match="fine-tuned for prompts: give the data captions"):
        module.losses(torch.randn(2, *module.state_shape), Conditions(), training=False)
    with pytest.raises(ValueError, match="unknown gradient 'none'"):
        module_of(places, mfm=mfm, guidance=1.0, gradient="none")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


class Net(Reward):
    """With weights."""

    name = "net"

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 1)

    def forward(self, images):
        return self.net(images.mean(dim=(2, 3)))[:, 0]


def test_the_rewards_weights_are_in_no_checkpoint(places):
    reward: Any = {"name": "sum", "rewards": [Net(), "brightness"]}
    module = module_of(places, reward=reward, mfm=str(places / "sd3.safetensors"), guidance=1.0)
    assert not [name for name in module.state_dict() if "policy.lora" not in name and "normaliser" not in name]
    module.to_device(torch.device("meta"))  # though it moves with the rest
    assert {p.device.type for p in module.reward.parameters()} == {"meta"}


def test_prompts_of_a_report_load_text_encoders_once_and_drop_them(places, tmp_path, monkeypatch, capsys):
    module = module_of(places, mfm=str(places / "sd3.safetensors"), guidance=1.0)
    loaded, load = [], module.flow.whole_pipeline
    monkeypatch.setattr(module.flow, "whole_pipeline", lambda: loaded.append(1) or load())
    module.embedded(Conditions(prompts=["a mat"]), torch.device("cpu"))  # of training
    loaded.clear()
    trainer = SimpleNamespace(testing=False, is_global_zero=True)
    monkeypatch.setattr(PromptFinetuning, "trainer", trainer)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    report = PromptPolicyEvaluation(["a cat", "a dog", "on the mat"], images_per_prompt=1, steps=1, batch_size=1)
    report.measure(module, tmp_path)
    report.draw(module, tmp_path)
    assert (tmp_path / "before_after.png").is_file()
    assert loaded == [1]
    assert not module.flow.keep_encoders
    for rank, shown in ((1, False), (0, True)):  # where all ranks compute in step, one prints the table
        monkeypatch.setattr(PromptFinetuning, "trainer", SimpleNamespace(testing=True, is_global_zero=rank == 0))
        report.measure(module, tmp_path)
        assert ("the same noise for both" in " ".join(capsys.readouterr().out.split())) is shown
    PromptPolicyEvaluation(["a cat"], pictures=0).draw(module, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="pictures -1 at least 0"):
        PromptPolicyEvaluation(["a cat"], pictures=-1)


def config(places, images, steps, folder="run", **more):
    source = {"class_path": "mfm_lightning.data.images.CaptionedImages",
              "init_args": {"source": str(images), "captions": ["a red cat", "the dog"]}}  # fmt: skip
    data = {"class_path": "mfm_lightning.data.images.EncodedImages",
            "init_args": {"vae": str(places / "plain_vae"), "source": source, "size": 16, "batch_size": 4}}  # fmt: skip
    return {
        "seed_everything": 0,
        "trainer": {"default_root_dir": folder, "max_steps": steps, "val_check_interval": 4, "logger": False,
                    "accelerator": "cpu"},
        "ema": {"decay": 0.5},
        "model": {
            "class_path": "mfm_lightning.modules.PromptFinetuning",
            "init_args": {
                "flow": {"class_path": "mfm_lightning.backbones.load_flow",
                         "init_args": {"name": str(places / "sd3"), "image_size": 16, "torch_dtype": "float32"}},
                "posterior": {"class_path": "mfm_lightning.alignment.GlassPosterior", "init_args": {"steps": 2}},
                "reward": "brightness", "reward_scale": 200.0, "rank": 2,
                "guidance": 1.0, "optimization": {"learning_rate": 0.03, "warmup_steps": 0},
                "evaluation": {"class_path": "mfm_lightning.evaluation.PromptPolicyEvaluation",
                               "init_args": {"prompts": ["a red cat", "the dog"], "images_per_prompt": 3, "steps": 3,
                                             "held_out": {"symmetry": "symmetry"}, "batch_size": 4}},
            },
        },
        "data": {"class_path": "mfm_lightning.data.OffPolicyDataModule",
                 "init_args": {"data": data, "policy_share": 0.5, "buffer_size": 6, "refresh_every": 3,
                               "ode_steps": 2}},
        **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(places, images, tmp_path_factory):
    """A run of eight steps, and one that was stopped after four and gone on with."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.kl_vae(shift=None).save_pretrained(places / "plain_vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("run.yaml").write_text(yaml.safe_dump(config(places, images, 8)))
        Path("parts.yaml").write_text(yaml.safe_dump(config(places, images, 8, "parts")))
        run(["fit", "--config", "run.yaml"])
        run(["fit", "--config", "parts.yaml", "--trainer.max_steps=4"])
        run(["fit", "--config", "parts.yaml", "--ckpt_path", "last"])
        run(["test", "--config", "run.yaml", "--ckpt_path", "run/last.ckpt"])
    return folder


def test_a_run_goes_on_exactly_and_leaves_what_diffusers_loads(places, trained, monkeypatch):
    monkeypatch.chdir(trained)
    whole, parts = (load_model(f"{name}/model.safetensors").network for name in ("run", "parts"))
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(p, q), name
    state = torch.load("run/last.ckpt", weights_only=True)["state_dict"]
    assert all("policy.lora" in name or "normaliser" in name for name in state)  # the frozen flow is not in it
    pipe = tiny.diffusers.StableDiffusion3Pipeline.from_pretrained(str(places / "sd3"))
    pipe.set_progress_bar_config(disable=True)
    x0 = torch.randn(2, *whole.state_shape, generator=torch.Generator().manual_seed(0))
    options = {"latents": x0, "num_inference_steps": 3, "height": 16, "width": 16, "output_type": "latent"}
    base = pipe(["a red cat", "the dog"], guidance_scale=2.0, **options).images
    pipe.load_lora_weights("run/lora")
    theirs = pipe(["a red cat", "the dog"], guidance_scale=2.0, **options).images
    given = whole.flow.encode(["a red cat", "the dog"], guidance=2.0)
    ours = integrate(lambda t, x: whole.drift(t, x, given), x0, whole.flow.time_grid(3)).detach()
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (theirs - base).abs().max() > 1e-3 * base.abs().max()


def test_the_report_is_paired_by_noise_and_has_what_was_not_asked_for(places, trained, monkeypatch):
    monkeypatch.chdir(trained)
    with open("run/test/policy.csv") as file:
        rows = {row["measure"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["brightness", "symmetry", "control cost", "RMS difference of images"]
    base, policy, gain = (float(rows["brightness"][key].split(" ")[0]) for key in ("base", "policy", "difference"))
    assert policy - base == pytest.approx(gain, abs=2e-3)
    # the same numbers by the merged LoRA
    merged = load_flow(places / "sd3", 16, torch_dtype="float32", lora="run/lora")
    noise = torch.stack([torch.randn(merged.state_shape, generator=g) for g in sample_generators(0, range(6))])
    given = merged.encode(["a red cat"] * 3 + ["the dog"] * 3, guidance=1.0)
    with torch.no_grad():
        x = integrate(lambda t, x: merged.drift(t, x, given), noise, merged.time_grid(3))
        expected = float(merged.decoder(x).mean())
    assert policy == pytest.approx(expected, abs=2e-3)
    assert Image.open("run/test/before_after.png").size[0] > 100


def test_another_flow_or_setting_is_refused_when_going_on(places, images, trained, monkeypatch):
    monkeypatch.chdir(trained)
    with pytest.raises(CheckpointError, match=r"this run was trained with settings .*200.0.*the config has .*6.0"):
        run(["test", "--config", "run.yaml", "--ckpt_path", "run/last.ckpt", "--model.reward_scale=6"])
