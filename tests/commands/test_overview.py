"""`mfm --help` and the help of each command, at once and without torch; and runs that say no more than needed."""

import subprocess
import sys

import pytest

from mfm_lightning import __version__
from mfm_lightning.commands.jobs import JOBS
from mfm_lightning.commands.main import commands, overview, run, spelled

HELP = """
import sys
from mfm_lightning.commands.main import run

for name in NAMES:
    try:
        run([name, "--help"] if name else [])
    except SystemExit as stopped:
        assert not stopped.code, stopped.code
    heavy = {"torch", "lightning", "transformers", "matplotlib", "sklearn"} & set(sys.modules)
    assert not heavy, (name, heavy)
"""


def python(*arguments: str, folder=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=600)


def test_help_is_there_before_what_is_heavy(tmp_path):
    names = ["", *JOBS, *commands()]
    done = python("-c", HELP.replace("NAMES", repr(names)), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_all_commands_have_a_line():
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in overview().splitlines() if line.startswith("  ")}
    assert {*JOBS, *commands()} <= set(listed)
    assert {
        "benchmark",
        "configs",
        "data",
        "demo",
        "export",
        "fid",
        "import",
        "plan",
        "prepare-latents",
        "rewards",
        "sample",
    } <= set(commands())
    assert all(len(about.split()) > 3 for about in listed.values())
    assert not [name for name, about in listed.items() if "cannot be imported" in about]


def test_python_m_is_the_command():
    done = python("-m", "mfm_lightning", "--version")
    assert done.stdout.strip() == f"mfm-lightning {__version__}"


def test_suites_are_listed(capsys):
    run(["benchmark", "--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in ("alignment", "digits", "gmm", "imagenet256", "training-speed"))


def test_dashes_and_underscores_are_the_same():
    given = ["--batch-size", "8", "--num-workers=2", "a-b", "--model.init_args.a-b=x-y", "-c", "--no-flip-time", "-1"]
    said = ["--batch_size", "8", "--num_workers=2", "a-b", "--model.init_args.a_b=x-y", "-c", "--no_flip_time", "-1"]
    assert spelled(given) == said


@pytest.mark.slow
def test_a_run_says_what_matters_and_once(tmp_path):
    small = [
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--model.init_args.evaluation.init_args.num_states=2",
    ]
    done = python("-m", "mfm_lightning", "fit", "--config", "gmm/mfm", *small, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    said = (done.stdout + done.stderr).splitlines()
    for noise in ("TPU", "weights_only", "v_num", "Tip", "litlogger", "INFO:", "Warning"):
        assert not [line for line in said if noise in line], noise
    assert len([line for line in said if "Seed set to" in line]) == 1
    assert [line for line in said if line.startswith("step 2 of 2, train/loss ")]
    assert "model written to outputs/gmm/mfm/model.safetensors" in said


def test_a_package_does_not_take_the_name_of_a_command(monkeypatch, caplog):
    """Neither that of a job nor of a tool; the other is named, whatever the order of installation."""
    from importlib.metadata import EntryPoint

    from mfm_lightning.commands import main

    ours = EntryPoint("sample", "mfm_lightning.commands.sample:sample", main.ENTRY_POINTS)
    theirs = [EntryPoint(name, "plug:run", main.ENTRY_POINTS) for name in ("fit", "sample", "theirs")]
    for points in ([ours, *theirs], [*theirs, ours]):
        caplog.clear()
        monkeypatch.setattr(main, "entry_points", lambda group, points=points: points)
        assert {name: point.value for name, point in main.commands().items()} == {
            "sample": ours.value,
            "theirs": "plug:run",
        }
        for name in ("fit", "sample"):
            assert f"the command {name} of plug:run is left out" in caplog.text


def test_the_demo_says_where_its_report_is():
    """The folder is what `mfm benchmark` makes of the stage's command."""
    from mfm_benchmarks.command import load_suite
    from mfm_lightning.commands.demo import REPORT, STAGES

    _, name, *args = STAGES[-1].command.split()
    _, _, how = load_suite(name, args)
    assert how["quick"]
    assert REPORT.as_posix() == f"outputs/benchmarks/{how['config'].stem}_quick/report/index.html"
    assert f"outputs/{STAGES[-1].folder}/report/index.html" == REPORT.as_posix()


def test_configs_that_the_demo_names_are_there():
    from mfm_lightning.commands.demo import STAGES
    from mfm_lightning.utils.configs import find_config

    for stage in STAGES:
        words = stage.command.split()
        if "--config" in words:
            find_config(words[words.index("--config") + 1])
    assert {stage.name for stage in STAGES if stage.options} == {"fit"}
