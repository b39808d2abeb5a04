"""Dockerfile, GitHub's workflows, pre-commit's hooks and the Makefile agree with each other and with pyproject.toml."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
TARGETS = set(re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split())


def steps(workflow: str) -> list[tuple[str, str]]:
    """The commands of a workflow, with the name of their job."""
    jobs = WORKFLOWS[workflow]["jobs"]
    return [(name, step["run"]) for name, job in jobs.items() for step in job["steps"] if "run" in step]


def made(command: str) -> set[str]:
    return {word for part in re.findall(r"^make ([a-z ]+)", command, re.MULTILINE) for word in part.split()}


def test_the_tests_run_on_each_python_that_the_package_names():
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert WORKFLOWS["ci"]["jobs"]["test"]["strategy"]["matrix"]["python"] == named


@pytest.mark.parametrize("workflow", ["ci", "release"])
def test_workflows_call_targets_that_are_there(workflow):
    assert {name for _, command in steps(workflow) for name in made(command)} <= TARGETS
    if workflow == "ci":  # what .ci/run asks for, and the wheel
        wanted = {"setup", *made((ROOT / ".ci/run").read_text()), "wheel"}
        assert {name for _, command in steps("ci") for name in made(command)} == wanted
    for job in WORKFLOWS[workflow]["jobs"].values():
        assert set(job.get("needs", "").split()) <= WORKFLOWS[workflow]["jobs"].keys()


def test_a_tag_of_another_version_is_not_published(tmp_path):
    command = next(run for _, run in steps("release") if "GITHUB_REF_NAME" in run and "version" in run)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    version = re.search(r'__version__ = "(.+)"', (ROOT / "mfm_lightning/_version.py").read_text())[1]
    for tag, done in ((f"v{version}", 0), ("v0.0.1", 1)):
        env = {"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        assert subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env).returncode == done


def dockerfile() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_is_made_of_what_is_there():
    lines = dockerfile()
    copied = [name for word, rest in lines if word == "COPY" for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {name for word, rest in lines if word == "RUN" for name in made(rest)} == {"packages", "setup"}
    base = next(rest for word, rest in lines if word == "FROM")
    assert re.match(r"python:(3\.\d+)-", base)[1] in " ".join(PROJECT["classifiers"])
    # what is not of the repository stays out of it, and all of the repository comes in
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", "outputs", "data", ".git"} <= set(ignored)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [name for name in tracked if any(fnmatch.fnmatch(name, f"{pattern}/*") for pattern in ignored)]


def test_the_packages_come_before_the_code():
    """`make packages` asks for nothing that the image has not yet: its layer is kept while the code changes."""
    lines = dockerfile()
    first = next(i for i, (word, rest) in enumerate(lines) if word == "RUN" and "make packages" in rest)
    copied = [name for word, rest in lines[:first] if word == "COPY" for name in rest.split()[:-1]]
    assert sorted(copied) == ["Makefile", "requirements.lock"]


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` as by itself, also where the tests run under one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=env, capture_output=True, text=True)


def dry_run(folder: Path, *arguments: str) -> str:
    """The commands that `make` would run with these files alone."""
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    done = make(folder, "-n", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_lock_without_cuda(tmp_path):
    """`make packages CPU=1` installs the lock but for what is CUDA's, torch by its version of any build."""
    commands = dry_run(tmp_path, "packages", "CPU=1").splitlines()
    assert "--torch-backend cpu" in commands[-2]
    (tmp_path / ".venv").mkdir(exist_ok=True)
    subprocess.run(next(c for c in commands if c.startswith("grep")), shell=True, cwd=tmp_path, check=True)
    left = (tmp_path / ".venv/requirements-cpu.txt").read_text().splitlines()
    lock = (tmp_path / "requirements.lock").read_text().splitlines()
    out = {line.split("=")[0] for line in set(lock) - set(left)}
    assert out - {"torch", "triton", "jvp_flash_attention"} == {n for n in out if n.startswith(("nvidia-", "cuda-"))}
    assert len(out) > 15
    torch = next(line for line in lock if line.startswith("torch="))
    assert torch.replace("===", "==") in left
    assert "requirements-cpu" in dry_run(tmp_path, "packages")  # later calls keep to it
    (tmp_path / ".venv/requirements-cpu.txt").unlink()
    assert "--requirement requirements.lock" in dry_run(tmp_path, "packages")


def test_a_venv_with_cuda_is_not_taken_for_one_without(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    for name in ("requirements.lock", "pyproject.toml", ".venv/.packages", ".venv/.installed"):
        (tmp_path / name).touch()
    done = make(tmp_path, "setup", "CPU=1")
    assert done.returncode != 0
    assert "make clean first" in done.stdout
    assert make(tmp_path, "setup").returncode == 0


def test_hooks_and_extras_are_there():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff-format", "ruff-check", "types"}
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks)
    page = (ROOT / "docs/install.md").read_text()
    table = {
        name for row in re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE) for name in re.findall(r"`([\w-]+)`", row)
    }
    assert table >= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms_ask_something(form):
    found = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())
    assert {"name", "description", "body"} <= found.keys()
    assert len({entry["id"] for entry in found["body"]}) == len(found["body"])
    assert any(entry.get("validations", {}).get("required") for entry in found["body"])
