"""Whole suites by one to four processes, and with processes killed: the same results, bit for bit (`make long`)."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from mfm_benchmarks.progress import read_status
from mfm_lightning.checkpoints import save_model
from mfm_lightning.metrics.classifier import SmallClassifier
from mfm_lightning.networks import DiT
from tests.benchmarks.test_benchmarks import ROOT, model, tiny_imagenet
from tests.benchmarks.test_mnist_suite import tiny_settings
from tests.benchmarks.test_shared_benchmarks import stored

pytestmark = pytest.mark.long


def digits(folder):
    """The alignment suite with --quick, of an untrained model."""
    for name in ("mfm", "flow"):
        (folder / "outputs/digits" / name).mkdir(parents=True)
        network = DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, guidance_scales=())
        save_model(model(network), folder / "outputs/digits" / name / "model.safetensors")
    return ["alignment", "--quick", "--num_samples", "16"]


class SameClassifier(SmallClassifier):
    """The same weights in each process."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(1, 28, 10)


def mnist(folder):
    tiny_settings(folder)
    settings = yaml.safe_load((folder / "mnist.yaml").read_text())
    settings["reward"]["classifier"] = {"class_path": f"{__name__}.SameClassifier"}
    (folder / "mnist.yaml").write_text(yaml.safe_dump(settings))
    return ["mnist", "--config", "mnist.yaml"]


def imagenet256(folder):
    shutil.copytree(ROOT / "configs", folder / "configs")
    tiny_imagenet(folder)
    return ["imagenet256", "--config", "small.yaml"]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums of floats are taken in another order by another number
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "rewards"), str(ROOT / "benchmarks")]))
    torch.manual_seed(0)
    return tmp_path


def command(args, output):
    return [sys.executable, "-m", "mfm_lightning.commands.main", "benchmark", *args, "--output", output]


def run(args, output, *how):
    subprocess.run([*command(args, output), *how], check=True, timeout=1200)


@pytest.mark.parametrize("suite", [digits, mnist, imagenet256])
def test_one_to_four_processes_find_the_same(workplace, suite):
    args = suite(workplace)
    run(args, "one")
    expected = stored("one")
    assert len(expected) > 10
    for workers in (2, 3, 4):
        run(args, f"by{workers}", "--launcher", "local", "--processes", str(workers))
        assert stored(f"by{workers}") == expected
        said = [json.loads(path.read_text())["by"] for path in Path(f"by{workers}/results").glob("*-*.json")]
        assert len(set(said)) == workers  # all of them had a part
        assert Path(f"by{workers}/report/index.html").is_file()


def test_two_jobs_and_twenty_kills_lose_and_double_nothing(workplace):
    args, chance = digits(workplace), random.Random(1)
    run(args, "one")

    def begin():
        return subprocess.Popen(command(args, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    running, kills, seen = [begin() for _ in range(3)], 0, 0
    results, deadline = Path("killed/results"), time.monotonic() + 1500
    while kills < 20 and time.monotonic() < deadline:
        time.sleep(chance.uniform(0.2, 3.0))
        alive = [k for k, process in enumerate(running) if process.poll() is None]
        if not alive:
            break
        victim = running[chance.choice(alive)]
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        kills += 1
        running[running.index(victim)] = begin()
        there = len(list(results.glob("*-*.json")))
        assert there >= seen  # nothing that was there is gone
        seen = there
    for process in running:
        assert process.wait(timeout=900) == 0
    assert kills == 20
    assert stored("killed") == stored("one")
    assert not list((results / "claims").glob("*.lease"))
    status = read_status(results)
    assert status.done == status.total
    assert not status.failed
