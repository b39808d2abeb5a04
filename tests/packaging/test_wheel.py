"""A wheel built from what git tracks holds all of it, and works where it is installed, in an empty folder."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = {"rewards/mfm_rewards/": "mfm_rewards/", "benchmarks/mfm_benchmarks/": "mfm_benchmarks/"}
PLACES |= {"mfm_lightning/": "mfm_lightning/", "configs/": "mfm_lightning/configs/"}


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("a clone, and git, say what belongs to the project")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tracked, tmp_path_factory) -> Path:
    """Built from a copy of those files alone."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked:
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder / "built"), str(folder / "source"))
    (built,) = (folder / "built").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh virtual environment with the wheel, and this interpreter's packages behind it."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder)
    pip("--python", str(folder / "bin/python"), "install", str(wheel))
    (packages,) = folder.glob("lib/python*/site-packages")
    # .pth files there, an editable install's, stay unread
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def pip(*arguments: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        *arguments,
        "--no-deps",
        "--no-index",
    ]
    subprocess.run(command, check=True, timeout=300, capture_output=True)


def test_it_holds_all_that_git_tracks_and_nothing_else(tracked, wheel):
    expected = {
        place + name.removeprefix(folder)
        for name in tracked
        for folder, place in PLACES.items()
        if name.startswith(folder)
    }
    names = zipfile.ZipFile(wheel).namelist()
    info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
    held = {name for name in names if not name.startswith(f"{info}/")}
    assert held == expected
    assert {name.split("/")[0] for name in held} == {"mfm_lightning", "mfm_rewards", "mfm_benchmarks"}
    for name in ("mfm_lightning/configs/defaults.yaml", "mfm_rewards/data/imagenet_classes.txt"):
        assert name in held
    weights = {f"{name}.safetensors" for name in ("classifier", "features", "flow", "mfm", "real_features")}
    assert {*weights, "README.md"} <= {name.removeprefix("mfm_lightning/weights/mnist/") for name in held}
    for package in ("mfm_lightning", "mfm_rewards", "mfm_benchmarks"):
        assert f"{package}/py.typed" in held


def test_its_entry_points_are_those_of_the_project_and_lead_to_files(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        file = next(name for name in names if name.endswith(".dist-info/entry_points.txt"))
        points = configparser.ConfigParser(delimiters="=")
        points.read_string(archive.read(file).decode())
    found = {section: dict(points[section]) for section in points.sections()}
    assert found == {"console_scripts": project["scripts"], **project["entry-points"]}
    for section in found.values():
        for target in section.values():
            assert target.split(":")[0].replace(".", "/") + ".py" in names


# several commands in one process, for time
SESSION = """
import sys
import mfm_lightning, mfm_rewards, mfm_benchmarks
from mfm_lightning.commands.main import main

for package in (mfm_lightning, mfm_rewards, mfm_benchmarks):
    print("package", package.__file__)
for command in (
    "benchmark", "rewards", "plan --config configs/digits/mfm.yaml",
    "fit --config configs/digits/flow.yaml --print_config", "fit --config configs/digits/none.yaml",
):
    try:
        main(command.split())
    except SystemExit as stopped:
        print(stopped)
print("classifier of", len(mfm_lightning.load_classifier("mnist").class_names), "classes")
print(mfm_rewards.build("classifier", classifier="mnist", target="seven").target, "is seven")
"""


@pytest.mark.slow
def test_it_works_in_an_empty_folder(installed, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}

    def run(*command: str, status: int = 0) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout + done.stderr

    python, mfm = str(installed / "bin/python"), str(installed / "bin/mfm")
    assert "Usage: mfm demo" in run(mfm, "demo", "--help")
    # its config says where the model should be
    assert "checkpoints/imagenet256/mfm_xl2.safetensors" in run(mfm, "benchmark", "imagenet256", status=1)
    shown = run(python, "-c", SESSION)
    for line in shown.splitlines():
        if line.startswith("package "):
            assert Path(line.removeprefix("package ")).is_relative_to(installed)
    assert shown.count("package ") == 3
    assert all(suite in shown for suite in ("alignment", "digits", "gmm", "imagenet256"))
    assert "jpeg_compressibility" in shown
    assert "classifier of 10 classes" in shown
    assert "7 is seven" in shown
    assert "1.51 M trained parameters" in shown
    assert "max_steps: 1000" in shown
    assert "max_epochs: -1" in shown  # of the defaults
    assert "no config at configs/digits/none.yaml" in shown
    assert not list(tmp_path.iterdir())
