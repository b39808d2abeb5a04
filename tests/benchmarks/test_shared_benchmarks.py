"""Benchmarks that many processes compute: the same results as one, launchers, the state of a run, parts of a report."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mfm_benchmarks.command import _how, _without_launcher
from mfm_benchmarks.progress import read_status
from mfm_benchmarks.store import Store
from mfm_benchmarks.suite import suites
from mfm_lightning.commands.main import main
from mfm_lightning.utils.leases import Leases

SUITE = '''
"""A suite of the user's own: cells that take from the global generator, one that needs the others, one that fails."""
import torch
from mfm_benchmarks.blocks import Text
from mfm_benchmarks.suite import Cell, Outcome, Suite


class Numbers(Suite):
    name, title, about = "numbers", "Numbers", "Sums of noise."

    def __init__(self, cells: int = 6, fail: bool = False) -> None:
        self.number, self.fail = cells, fail

    def prepare(self) -> None:
        pass

    def cells(self):
        def work(k):
            def compute():
                if self.fail and k == 1:
                    raise ValueError("no luck")
                x = torch.randn(1000)
                return Outcome({"sum": float(x.sum())}, {"x": x})
            return compute

        parts = [Cell(f"part {k}", {"k": k}, work(k)) for k in range(self.number)]
        total = Cell("total", {}, lambda *all: Outcome({"sum": sum(o.numbers["sum"] for o in all)}), tuple(parts))
        return [*parts, total]

    def report(self, results):
        return [Text("Sums", [f"{len(results)} results"])]
'''


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "my_suites.py").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delitem(sys.modules, "my_suites", raising=False)
    return tmp_path


def benchmark(*args):
    main(["benchmark", "my_suites.Numbers", *map(str, args)])


def stored(folder):
    """What the results are, without what says who found them and how long it took."""
    found = {}
    for path in Path(folder, "results").glob("*-*.json"):
        content = json.loads(path.read_text())
        numbers = {key: value for key, value in content["numbers"].items() if "seconds" not in key}
        tensors = path.with_suffix(".safetensors")
        found[path.stem] = (numbers, tensors.read_bytes() if tensors.is_file() else b"")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ("local", {"threads": 1}),
        pytest.param("submitit", {"cluster": "local", "timeout_min": 5}, marks=pytest.mark.long),
        pytest.param("ray", {"init": {"num_cpus": 2}}, marks=pytest.mark.long),
    ],
)
def test_processes_of_a_launcher_find_what_one_process_finds(workplace, capsys, launcher, options):
    benchmark("--output", "one")
    given = ("--launcher", launcher, "--processes", 2, "--launcher-options", json.dumps(options))
    benchmark("--output", "many", *given)
    assert "Report: many/report/index.html" in capsys.readouterr().out
    assert len(stored("one")) == 7
    assert stored("many") == stored("one")
    assert not list(Path("many/results/claims").glob("*.lease"))
    assert "7 results" in Path("many/report/index.html").read_text()


@pytest.mark.slow
def test_modules_of_the_users_own_are_imported_by_workers_and_are_in_the_command(workplace):
    """What a module registers has a name in each process; the page's command can be copied."""
    Path("my_names.py").write_text("import os, pathlib\npathlib.Path(f'imported_{os.getpid()}').touch()\n")
    given = ("--launcher", "local", "--processes", 1, "--launcher-options.threads", 1)
    benchmark("--output", "out", "--cells", 1, "--imports", "my_names", *given)
    assert {path.name for path in Path().glob("imported_*")} > {f"imported_{os.getpid()}"}
    assert len(list(Path().glob("imported_*"))) == 2
    command = json.loads(Path("out/report/environment.json").read_text())["environment"]["command"]
    assert command == "mfm benchmark my_suites.Numbers --output out --cells 1 --imports=my_names"
    benchmark("--output", "here", "--cells", 1, "--imports", "my_names")
    assert json.loads(Path("here/report/environment.json").read_text())["environment"]["command"].endswith(
        " --imports=my_names"
    )


def test_a_run_says_where_it_is_and_reports_the_part_that_is_there(workplace, capsys):
    benchmark("--output", "out", "--fail", "true")
    status = read_status(Path("out/results"))
    assert (status.suite, status.total, status.done) == ("numbers", 7, 5)
    assert status.failed == {"part 1": "ValueError: no luck"}
    benchmark("--output", "out", "--fail", "true", "--status")
    said = capsys.readouterr().out
    assert "numbers: 5 of 7 results, 1 failed" in said
    assert "failed: part 1: ValueError: no luck" in said
    assert "nobody is at work; to go on: mfm benchmark my_suites.Numbers --output out" in said
    # another process is at a cell: who, and since when
    key = next(Path("out/results").glob("part_3-*.json"))
    key.unlink()
    with Leases("out/results/claims", device="cuda:1").claim(key.stem):
        benchmark("--output", "out", "--status")
        said = capsys.readouterr().out
        assert re.search(
            rf"computing: part 3  \[\S+, process {os.getpid()}, cuda:1; for \d s, last sign \d s ago\]", said
        )
        benchmark("--output", "out", "--report")
        page = Path("out/report/index.html").read_text()
    assert "Not complete: 1 result is not computed yet" in page
    assert "<li>part 3</li>" in page
    assert "4 results" in page
    assert json.loads(Path("out/report/environment.json").read_text())["missing"] == [
        "part 3"
    ]  # the total needs part 1, which failed
    assert not key.is_file()  # a report computes nothing
    benchmark("--output", "out")
    assert "not computed yet" not in Path("out/report/index.html").read_text()
    assert len(stored("out")) == 7


@pytest.mark.parametrize("fails", [False, True])
def test_a_report_asked_for_meanwhile_does_not_stand_for_that_of_all(workplace, monkeypatch, fails):
    benchmark("--output", "out", "--cells", 2)
    save = Store.save

    def reported_just_after(store, cell, outcome):
        # the page of who looked before the last result was written, and wrote it after
        benchmark("--output", "out", "--cells", 2, "--report")
        if fails:
            raise ValueError("no luck")
        save(store, cell, outcome)
        page = Path("out/report/index.html")
        later = page.stat().st_mtime + 60
        os.utime(page, (later, later))

    next(Path("out/results").glob("total-*.json")).unlink()
    monkeypatch.setattr(Store, "save", reported_just_after)
    benchmark("--output", "out", "--cells", 2)
    page = Path("out/report/index.html").read_text()
    assert "not computed yet" not in page
    assert ("no luck" in page) == fails


@pytest.mark.long
def test_ranks_of_torchrun_share_the_work_and_one_reports(workplace):
    # the second process begins while the first is at work, as ranks and jobs of an array do
    command = [sys.executable, "-m", "mfm_lightning.commands.main", "benchmark", "my_suites.Numbers", "--cells", "30"]
    ranks = [
        subprocess.Popen(
            [*command, "--output", "two"],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    benchmark("--output", "one", "--cells", 30)
    assert len(stored("two")) == 31
    assert stored("two") == stored("one")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--processes", 2), "--processes and --launcher_options are of a --launcher"),
        (("--processes", 0, "--launcher", "local"), "--processes 0 and --lease 120 must be above 0"),
        (("--fresh", "--launcher", "local"), "--fresh, which forgets results, by one of several processes"),
        (("--fresh", "--report"), "--report computes nothing"),
        (("--fresh", "--status"), "--status computes nothing: leave out --fresh, --launcher and --report"),
        (("--launcher", "loca"), "launcher"),
        (("--launcher", "local", "--launcher-options", '{"thread": 1}'), "the launcher local takes threads"),
        (("--launcher", "local", "--launcher-options", '{"threads": "a"}'), "threads: 'a' must be a whole number"),
        (("--launcher", "local", "--launcher-options", '{"threads": 0}'), "threads: 0 must be a whole number"),
        (("--status",), "no run has begun in"),
    ],
)
def test_ways_of_running_that_do_not_fit_are_refused(workplace, capsys, args, message):
    with pytest.raises(SystemExit) as stop:
        benchmark(*args)
    assert stop.value.code
    assert message in f"{stop.value.code} {capsys.readouterr().err}"
    assert not Path("outputs").exists()


def test_fresh_takes_nothing_from_a_process_at_work(workplace, capsys):
    benchmark("--output", "out")
    before = stored("out")
    with Leases("out/results/claims").claim("part"), pytest.raises(SystemExit) as stop:
        benchmark("--output", "out", "--fresh")
    assert f"from process {os.getpid()} on" in f"{stop.value.code}"
    assert stored("out") == before
    benchmark("--output", "out", "--fresh")


def test_a_damaged_result_is_made_anew_and_said(workplace, caplog):
    benchmark("--output", "out")
    before = stored("out")
    path = next(Path("out/results").glob("part_2-*.safetensors"))
    path.write_bytes(path.read_bytes()[:20])
    with caplog.at_level("WARNING"):
        benchmark("--output", "out")
    assert "part_2" in caplog.text
    assert "is damaged, and made anew" in caplog.text
    assert stored("out") == before


@pytest.mark.parametrize("content", [b"[]", b'{"tensors": []}', b"\xff\xfe"])
def test_a_result_that_is_something_else_is_made_anew(workplace, content):
    benchmark("--output", "out")
    before = stored("out")
    next(Path("out/results").glob("part_2-*.json")).write_bytes(content)
    benchmark("--output", "out")
    assert stored("out") == before


def test_a_plan_that_cannot_be_read_is_an_error_of_a_line(workplace):
    benchmark("--output", "out")
    Path("out/results/claims/work.json").write_text("[]")
    with pytest.raises(
        SystemExit, match=r"out/results/claims/work\.json cannot be read .*: the next run in out/results"
    ):
        benchmark("--output", "out", "--status")
    benchmark("--output", "out")
    benchmark("--output", "out", "--status")


def test_workers_do_not_launch_others():
    given = ["numbers", "--launcher=local", "--processes", "2", "--launcher-options.threads", "1", "--cells", "3"]
    for arg in ("--launcher_options.threads", "--launcher_options"):
        assert _without_launcher([arg if "options" in part else part for part in given]) == ["numbers", "--cells", "3"]


def test_no_suite_has_a_parameter_of_the_name_of_an_option_of_all():
    """It would be taken for that option, as `workers` of data-throughput once was."""
    options = set(inspect.signature(_how).parameters)
    for kind in suites().values():
        assert not options & set(inspect.signature(kind).parameters), kind.name


@pytest.mark.parametrize(("option", "message"), [('"thread": 1', "thread"), ('"timeout_min": "x"', "timeout_min")])
def test_options_that_submitit_does_not_take_are_an_error_of_a_line(workplace, option, message):
    pytest.importorskip("submitit")
    given = ("--launcher", "submitit", "--launcher-options", f'{{"cluster": "local", {option}}}')
    with pytest.raises(SystemExit, match=rf"launcher_options of submitit: .*{message}"):
        benchmark("--output", "out", *given)
