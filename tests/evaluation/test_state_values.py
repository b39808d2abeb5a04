"""`mfm test` of value estimation: the same estimates by one process, by two, and by one that was killed and goes on."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import yaml

import mfm_lightning.evaluation.state_values as state_values
import mfm_lightning.sampling.batch_folder as batch_folder
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DrawValue
from mfm_lightning.checkpoints import save_model
from mfm_lightning.commands.main import run
from mfm_lightning.evaluation.state_values import StateValues, ValueJob
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP
from mfm_lightning.oracles import GaussianMixture
from mfm_lightning.utils.atomic import save_tensors
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood
from tests.closed_form import MEAN, VARIANCE, gaussian_model
from tests.noise import seeded
from tests.processes import ended, forked, one_thread, torchrun


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = MetaFlowMap(MLP(2, 16, 1))
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    save_model(model, "model.safetensors")
    reward = {"name": "linear_gaussian", "operator": [1.2, -0.8], "observation": -1.0, "noise_std": 1.0}
    evaluation = {
        "times": [0.3, 0.6], "num_states": 10, "num_draws": 4, "num_repeats": 2, "model_steps": [1], "glass_steps": [2],
        "rollout_steps": 3, "rollout_draws": 4, "max_rows": 12, "reference": "rollouts",
    }  # fmt: skip
    config = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "default_root_dir": "one"},
        "model": {
            "class_path": "mfm_lightning.modules.ValueEstimation",
            "init_args": {
                "network": {"class_path": "mfm_lightning.networks.ValueMLP", "init_args": {"dim": 2, "hidden_size": 8}},
                "target": {"model": "model.safetensors", "reward": reward},
                "evaluation": {"class_path": "mfm_lightning.evaluation.ValueEvaluation", "init_args": evaluation},
            },
        },
        "data": {"class_path": "mfm_lightning.data.GaussianMixtureDataModule", "init_args": {"num_test": 32}},
    }  # fmt: skip
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def command(folder: str, *more: str) -> list[str]:
    return ["test", "--config=config.yaml", f"--trainer.default_root_dir={folder}", *more]


def table(folder: str) -> list[dict]:
    return json.loads(Path(folder, "test/value_estimates.json").read_text())


def files(folder: str) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in Path(folder).rglob("batch_*.safetensors")
    }


def test_one_process_two_and_a_killed_one_that_goes_on(workplace, monkeypatch, caplog):
    def killed() -> None:
        count = []

        def save(tensors, path, metadata=None):
            count.append(path)
            if len(count) == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return save_tensors(tensors, path, metadata)

        setattr(batch_folder, "save_tensors", save)  # noqa: B010
        run(command("killed"))

    with one_thread():
        torchrun(workplace, 1, *command("one"))
        torchrun(workplace, 2, *command("two", "--trainer.devices=2", "--trainer.strategy=ddp"))
        assert ended(forked(killed)) == -signal.SIGKILL
        left = files("killed")
        assert len(left) == 6
        torchrun(workplace, 1, *command("killed"))
    assert left.items() < files("killed").items()  # what was there is not computed again
    assert {row["estimator"] for row in table("one")} == {"MFM 1", "GLASS 2", "SDE 3", "DPS point estimate"}
    # blocks of states do not depend on ranks: the same numbers bit for bit
    assert table("two") == table("killed") == table("one")
    # finished: nothing is computed, and more states or times are added to what is there
    caplog.set_level("INFO")
    before = files("one")
    run(command("one"))
    assert files("one") == before
    assert "100 of 100 estimates are there; there is nothing to do" in caplog.text
    run(command("one", "--model.init_args.evaluation.init_args.num_states=14"))
    assert before.items() < files("one").items()
    # other settings are kept apart
    more = "--model.init_args.target.reward_scale=2"
    run(command("one", more))
    scaled = table("one")
    run(command("scaled", more))
    assert table("scaled") == scaled
    assert scaled != table("two")


def test_estimates_depend_neither_on_the_states_beside_them_nor_on_the_order(tmp_path):
    """Against the estimator called for all states at once, and the closed form."""
    oracle, reward = GaussianMixture([MEAN], VARIANCE), LinearGaussianLikelihood([1.0, 0.5], 0.3, 0.8)
    x1 = oracle.sample(9, seeded())
    model = gaussian_model().requires_grad_(False)
    job = ValueJob(0.4, "MFM 1", DrawValue(2000), 2, 4)

    def store(name: str, max_rows: int) -> StateValues:
        return StateValues(tmp_path / name, {"a": 1}, x1, lambda rows: Target(model, reward), 5, max_rows)

    whole, parts = store("whole", 10**6), store("parts", 4000)
    whole.fill([job])
    for rank in (1, 0, 2):
        parts.fill([job], rank, 3)
    parts.fill([job])
    found, wanted = parts.read(job), whole.read(job)
    assert found.values.shape == (2, 9)
    torch.testing.assert_close(found.values, wanted.values)
    torch.testing.assert_close(found.each_ess, wanted.each_ess)
    assert found.nfe == wanted.nfe == 4000
    one = parts.estimate(job, [7])
    torch.testing.assert_close(one.values[:, 0], wanted.values[:, 7])
    assert len(wanted.values.flatten().unique()) == 18  # each with noise of its own
    from mfm_lightning.evaluation.draws import noisy_states
    from mfm_lightning.interpolant import sample_generators

    x = noisy_states(x1, 0.4, sample_generators((5, 1), range(9)))
    exact = oracle.value(x, 0.4, reward)
    assert (found.values.mean(dim=0) - exact).abs().max() < 0.1


def test_a_slow_rank_leaves_nothing_undone(tmp_path, monkeypatch):
    """Parts are dealt out by what is missing, which all ranks see before one of them writes."""
    oracle, barrier, done = GaussianMixture([MEAN], VARIANCE), threading.Barrier(2), threading.Event()
    model, reward = gaussian_model().requires_grad_(False), LinearGaussianLikelihood([1.0, 0.5], 0.3, 0.8)
    x1, job = oracle.sample(8, seeded()), ValueJob(0.4, "MFM 1", DrawValue(4), 2, 4)

    def store() -> StateValues:
        return StateValues(tmp_path, {"a": 1}, x1, lambda rows: Target(model, reward), 5, 8)

    def meet(mine: None) -> list[None]:
        barrier.wait(30)
        return [mine, mine]

    class Slow(StateValues):
        def _missing(self, job: ValueJob) -> list[list[int]]:
            done.wait(1.0)
            return super()._missing(job)

    def first() -> None:
        store().fill([job], 0, 2)
        done.set()

    monkeypatch.setattr(state_values, "gather_ranks", meet, raising=False)
    other = threading.Thread(target=first)
    other.start()
    slow = store()
    slow.__class__ = Slow
    slow.fill([job], 1, 2)
    other.join()
    assert slow.read(job).values.shape == (2, 8)  # all are there
