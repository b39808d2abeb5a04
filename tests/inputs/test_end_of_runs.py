"""What is still to do at the end of a run is done when it goes on; what is no number is not exported."""

import os
import re
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mfm_lightning.alignment import Steering, Target, TwistedSMC
from mfm_lightning.checkpoints import CheckpointError, save_network
from mfm_lightning.commands.imports import import_modules
from mfm_lightning.data import DigitsDataModule
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import MFMPretraining, NonFiniteGradientError, NonFiniteLossError, Optimization
from mfm_lightning.networks import MLP
from mfm_rewards import RewardError
from tests.inputs.tiny_runs import fit, last
from tests.processes import ended, forked

VALIDATED = ["--trainer.val_check_interval=4", "--checkpoint.every_n_steps=2"]


@pytest.mark.parametrize("where", ["validation", "export"])
def test_a_run_killed_at_its_end_is_ended_by_going_on(tmp_path, monkeypatch, where):
    """Its weights, and its validation, are those of a run that was not killed."""
    monkeypatch.chdir(tmp_path)
    fit("whole", 4, *VALIDATED)

    def killed() -> None:
        import mfm_lightning.callbacks.export as export

        def kill(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        if where == "export":
            export.save_network = kill
        else:
            MFMPretraining.validation_step = kill
        fit("run", 4, *VALIDATED)

    assert ended(forked(killed)) == -signal.SIGKILL
    assert last("run")["global_step"] == 4
    assert not Path("run/model.safetensors").exists()
    fit("run", 4, *VALIDATED, "--ckpt_path=last")
    expected, ours = load_file("whole/model.safetensors"), load_file("run/model.safetensors")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    rows = Path("run/logs/csv/metrics.csv").read_text().splitlines()
    once = [line for line in rows if line.split(",")[rows[0].split(",").index("val/loss")] not in ("", "val/loss")]
    assert len(once) == 1
    with safe_open("run/model.safetensors", "pt") as file:
        assert file.metadata()["step"] == "4"
        assert file.metadata()["checkpoint"] == sha256(Path("run/last.ckpt").read_bytes()).hexdigest()


def test_an_export_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    import mfm_lightning.callbacks.export as export

    monkeypatch.chdir(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "save_network", full)
        with pytest.raises(OSError, match="No space"):
            fit("run", 5, "--checkpoint.every_n_steps=4")
    assert last("run")["global_step"] == 5
    fit("run", 5, "--ckpt_path=last")
    assert Path("run/model.safetensors").exists()


def test_an_older_runs_model_does_not_pass_for_this_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit("run", 2)

    def failing(self, batch, batch_idx):
        raise ValueError("stop here")

    with monkeypatch.context() as patched:
        patched.setattr(MFMPretraining, "training_step", failing)
        with pytest.raises(ValueError, match="stop here"):
            fit("run", 4, "--overwrite")
    assert not Path("run/model.safetensors").exists()


@pytest.mark.parametrize("more", [2, 3, 5])
def test_a_finished_run_goes_on_with_more_steps(tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    constant = ["--trainer.val_check_interval=3"]
    fit("whole", 3 + more, *constant)
    fit("run", 3, *constant)
    fit("run", 3 + more, *constant, "--ckpt_path=last")
    ours, expected = last("run"), last("whole")
    assert ours["global_step"] == 3 + more
    torch.testing.assert_close(ours["state_dict"], expected["state_dict"], rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_network_of_no_numbers_is_not_exported(tmp_path, value):
    network = MLP(2, 8, 1)
    name, parameter = list(network.named_parameters())[1]
    parameter.data.view(-1)[0] = value
    with pytest.raises(CheckpointError, match=rf"m\.safetensors is not written: weight {name} of the MLP is {value}"):
        save_network(network, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", [0, 2])
def test_a_gradient_that_is_no_number_is_said_before_the_weights_take_it(tmp_path, monkeypatch, step):
    """Also with clipping, which would make all weights NaN."""
    monkeypatch.chdir(tmp_path)
    losses = MFMPretraining.losses

    def poisoned(self, x1, conditions, training):
        found = losses(self, x1, conditions, training)
        if training and self.global_step == step:
            first = next(p for p in self.parameters() if p.requires_grad)
            first.register_hook(lambda gradient: gradient * torch.nan)
        return found

    monkeypatch.setattr(MFMPretraining, "losses", poisoned)
    message = rf"non-finite gradient at step {step} of model\..* \(1 of \d+ parameters\).*batch {step} of rank 0"
    with pytest.raises(NonFiniteGradientError, match=message):
        fit("run", 4, "--trainer.gradient_clip_val=1.0", "--checkpoint.every_n_steps=1")
    if step:
        weights = last("run")["state_dict"]
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())
        assert last("run")["global_step"] == step


def test_a_loss_that_is_no_number_says_its_batch_and_shards(tmp_path, monkeypatch):
    from tests.latent_data import shards

    monkeypatch.chdir(tmp_path)
    shards(tmp_path / "shards", [8, 8], state_shape=(1, 8, 8), std=0.5, num_classes=10)
    data = ["--data=mfm_lightning.data.LatentShards", "--data.folder=shards", "--data.batch_size=4"]
    data += ["--data.num_workers=0", "--data.val_shards=0", "--trainer.limit_val_batches=0"]
    losses = MFMPretraining.losses

    def poisoned(self, x1, conditions, training):
        return {
            k: v * (torch.nan if self.global_step == 1 else 1)
            for k, v in losses(self, x1, conditions, training).items()
        }

    monkeypatch.setattr(MFMPretraining, "losses", poisoned)
    with pytest.raises(
        NonFiniteLossError, match=r"step 1 in data_diagonal.*batch 1 of rank 0, of latents-0.*in shards"
    ):
        fit("run", 4, *data)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.0), ("learning_rate", float("nan")), ("weight_decay", -1.0), ("warmup_steps", -2),
     ("final_learning_rate", -1e-5), ("betas", (0.9, 1.0))],
)  # fmt: skip
def test_a_setting_of_the_optimiser_that_is_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"optimization.{name}"):
        Optimization(**{name: value})


@pytest.mark.parametrize("method", [Steering, TwistedSMC])
@pytest.mark.parametrize("clip", [-1.0, float("nan"), -1e-9])
def test_a_negative_clip_is_refused(method, clip):
    with pytest.raises(ValueError, match="clip"):
        method(clip=clip)


@pytest.mark.parametrize("exponent", [19, 25, 30, 37])
def test_a_huge_gradient_is_clipped_and_does_not_vanish(exponent):
    """Its norm overflows in float32; its direction is that of the same gradient scaled down."""
    gradient, drift = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3, 2, 4)
    t = torch.full((3,), 0.5)
    for settings in ({"clip": 0.7}, {"renormalise": True}):
        small = Steering(**settings).term(gradient * 1e6, drift, t)
        large = Steering(**settings).term(gradient * 10.0**exponent, drift, t)
        torch.testing.assert_close(large, small, rtol=1e-5, atol=1e-6)
        assert large.norm() > 1


@pytest.mark.parametrize("scale", [1e36, -1e37, 3e38])
def test_a_scale_that_takes_rewards_out_of_the_finite_numbers_is_refused(scale):
    """Rewards of 2,000 times 1e36 are infinite in float32; then steering would vanish."""
    model = MetaFlowMap(MLP(2, 8, 1))
    target = Target(model, lambda x: x[:, 0], reward_scale=scale)
    with pytest.raises(RewardError, match=rf"times reward_scale {re.escape(f'{scale:g}')} leaves the finite numbers"):
        target.rewards(torch.full((3, 2), 2000.0))
    for none in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="reward_scale"):
            Target(model, lambda x: x[:, 0], reward_scale=none)


def test_digits_have_no_origin():
    assert DigitsDataModule().origin(3) == ""


def test_a_benchmarks_fit_that_was_hit_in_its_export_is_finished(tmp_path, monkeypatch):
    from mfm_benchmarks.fitting import Fit

    monkeypatch.chdir(tmp_path)
    options = {"trainer.default_root_dir": "run", "trainer.max_steps": 3, "trainer.logger": False}
    fit("other", 1)  # writes the config

    def killed() -> None:
        import mfm_lightning.callbacks.export as export

        export.save_network = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        Fit("tiny.yaml", "run/model.safetensors", options).run()

    assert ended(forked(killed)) == -signal.SIGKILL
    job = Fit("tiny.yaml", "run/model.safetensors", options)
    assert not job.is_done()
    job.run()
    assert job.is_done()
    assert last("run")["global_step"] == 3


@pytest.mark.slow
def test_a_benchmarks_fit_by_a_rank_is_of_one_process_and_its_failure_is_said(tmp_path, monkeypatch):
    from mfm_benchmarks.fitting import Fit, _of_one_process

    monkeypatch.chdir(tmp_path)
    fit("other", 1)  # writes the config
    # the second rank of torchrun: Lightning would wait for the first, or write nothing, being no rank 0
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**ranks, "TORCHELASTIC_RUN_ID": "x", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "x"}.items():
        monkeypatch.setenv(name, value)
    Path("of_a_user.py").write_text("import os\nwith open('imported', 'a') as file:\n    print(os.getpid(), file=file)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("mfm_lightning.commands.imports._imported", {})
    import_modules(["of_a_user"])
    job = Fit("tiny.yaml", "run/model.safetensors", {"trainer.default_root_dir": "run", "trainer.max_steps": 2})
    job.run()
    assert job.is_done()
    pids = Path("imported").read_text().split()
    assert len(pids) == 2  # --imports of this process reach the training's
    assert pids[0] == str(os.getpid()) != pids[1]
    with pytest.raises(RuntimeError, match=r"mfm fit --config tiny.yaml ended with status 2"):
        Fit("tiny.yaml", "run2/model.safetensors", {"trainer.no_such": 1}).run()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert _of_one_process(torch.device("cuda:1"))["CUDA_VISIBLE_DEVICES"] == "6"
    assert not set(ranks) & _of_one_process(None).keys()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a child hears of its parent's death on Linux alone")
def test_a_training_ends_with_the_rank_that_runs_it(tmp_path, monkeypatch):
    """Another process takes the work of a killed rank over, and would train in the same folder beside it."""
    monkeypatch.chdir(tmp_path)
    fit("other", 1)
    code = (
        "from mfm_benchmarks.fitting import Fit\n"
        "options = {'trainer.default_root_dir': 'run', 'trainer.max_steps': 10**7}\n"
        "Fit('tiny.yaml', 'run/model.safetensors', options).run()"
    )
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    rank = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not Path("run/.lock").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    (child,) = (int(pid) for pid in Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split())
    rank.kill()
    rank.wait()
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()
