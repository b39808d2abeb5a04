"""Training jobs that a suite needs: run as the user would, unless their file is there."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mfm_benchmarks.spec import Spec
from mfm_lightning.checkpoints import CheckpointError, fingerprint, read_metadata
from mfm_lightning.commands.imports import imported_modules
from mfm_lightning.utils.atomic import save_json
from mfm_lightning.utils.configs import DEFAULTS, find_config, read_config
from mfm_lightning.utils.distributed import Process

log = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1  # of prctl


@dataclass
class FitSettings:
    """A job as a YAML describes it.

    Args:
        config: its own YAML.
        file: what it writes.
        options: dotted keys of the config and their values.
    """

    config: str
    file: str = "model.safetensors"
    options: Spec | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The options."""
        return {} if self.options is None else self.options.value

    def job(self) -> Fit:
        """The job, for a file whose path is given in full."""
        return Fit(self.config, self.file, self.given)


@dataclass
class Fit:
    """`mfm fit --config CONFIG` with these options, for one file.

    Args:
        config: the job's YAML.
        file: what it is run for.
        options: dotted keys of the config and their values.
        inputs: files that it reads.
        remember: note beside the file what it was made of, and run again where that has changed. Without, a file that
            is there is the user's own and stays.
    """

    config: str
    file: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    remember: bool = False

    @property
    def _note(self) -> Path:
        return Path(self.file).with_suffix(".fit.json")

    def identity(self) -> dict[str, Any]:
        """What its file depends on, as JSON."""
        files = {"defaults": DEFAULTS, **{path: Path(path) for path in self.inputs}}
        with suppress(FileNotFoundError):  # `run` says so
            files[self.config] = find_config(self.config)
        inputs = {name: fingerprint(file) for name, file in files.items() if file.is_file()}
        return json.loads(json.dumps({"config": self.config, "options": self.options, "inputs": inputs}))

    def is_done(self) -> bool:
        """Whether the file is there and, where it is remembered, what it was made of is the same."""
        if not Path(self.file).is_file():
            return False
        if not self.remember:
            say_fewer_steps(self.file, self.config, self.options.get("trainer.max_steps"))
        noted = self._noted()
        return not self.remember or (noted.get("identity"), noted.get("sha256")) == (
            self.identity(), fingerprint(self.file),
        )  # fmt: skip

    def _noted(self) -> dict[str, Any]:
        try:
            return json.loads(self._note.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def forget(self) -> None:
        """Have it run again, where what it was made of is noted."""
        self._note.unlink(missing_ok=True)

    def run(self, device: torch.device | None = None) -> None:
        """Fit; a training of this file that was stopped goes on from its `last.ckpt`.

        In this process; where it is one of several, or could see several GPUs, in one of its own, which knows of no
        others and of one GPU.

        Args:
            device: that it may take; the first of its kind where None.

        Raises:
            FileNotFoundError: if the config is not there, or does not write the file.
            ValueError: if the options do not fit the config.
        """
        options = [part for key, value in self.options.items() for part in (f"--{key}", _as_argument(value))]
        checkpoint = Path(self.file).with_name("last.ckpt")
        if not self.remember and checkpoint.is_file() and not Path(self.file).is_file():
            options += ["--ckpt_path", str(checkpoint)]
        job = ["fit", "--config", self.config, "--overwrite", *options]
        if Process.from_environment().world_size > 1 or torch.cuda.device_count() > 1:
            self._run_apart(job, device)
        else:
            self._run_here(job)
        if not Path(self.file).is_file():
            raise FileNotFoundError(f"{self.config} did not write {self.file}: is it stopped, or of another folder?")
        if self.remember:
            note = {"identity": self.identity(), "sha256": fingerprint(self.file)}
            save_json(note, self._note)

    def _run_here(self, job: list[str]) -> None:
        from mfm_lightning.commands.errors import CommandLineError
        from mfm_lightning.commands.main import run

        try:
            run(job)
        except SystemExit as error:
            if error.code not in (1, 128 + signal.SIGINT):  # else Ctrl-C, also by Lightning's own status
                raise
            raise KeyboardInterrupt from error
        except CommandLineError as error:
            raise ValueError(f"mfm fit --config {self.config} refuses the options {self.options}: {error}") from error

    def _run_apart(self, job: list[str], device: torch.device | None) -> None:
        modules = [f"--imports={name}" for name in imported_modules()]
        command = [sys.executable, "-m", "mfm_lightning.commands.main", *job, *modules]
        process = subprocess.Popen(command, env=_of_one_process(device), preexec_fn=_ends_with_its_parent)
        try:
            code = process.wait()
        except BaseException:  # a stop: it writes its checkpoint
            process.terminate()
            process.wait()
            raise
        if code in (-signal.SIGINT, 128 + signal.SIGINT):
            raise KeyboardInterrupt
        if code:
            raise RuntimeError(f"mfm {' '.join(job[:3])} ended with status {code}: its words are above")


@cache  # once for each of them
def say_fewer_steps(file: str, config: str, steps: int | None = None) -> None:
    """Warn of a model that is taken as it is, and that was trained for fewer steps than the job that would make it has:
    `make demo` leaves such ones. More steps are the user's own wish.

    Args:
        steps: of the job's options; the config's where None.
    """
    try:
        trained = int(read_metadata(file)["step"])
        wanted = int(steps or read_config(find_config(config))["trainer"]["max_steps"])
    except (CheckpointError, OSError, KeyError, TypeError, ValueError):  # a file or a config that does not say
        return
    if trained < wanted and Process.from_environment().rank == 0:
        log.warning(
            "%s is taken as it is, after %d steps of training; %s has %s: move it away to have that run",
            file, trained, config, wanted,
        )  # fmt: skip


def _ends_with_its_parent() -> None:
    """In the child: a SIGTERM where the parent is killed, whose work another process takes over then; Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _of_one_process(device: torch.device | None) -> dict[str, str]:
    """The environment without what torchrun, SLURM and our launcher say of other processes, and with one GPU."""
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
    others = ("TORCHELASTIC_", "SLURM_", "GROUP_", "ROLE_", "PMI_", "OMPI_")
    kept = {key: value for key, value in os.environ.items() if key not in names and not key.startswith(others)}
    if device is not None and device.type == "cuda":
        visible = [part for part in kept.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
        kept["CUDA_VISIBLE_DEVICES"] = visible[device.index or 0] if visible else str(device.index or 0)
    return kept


def _as_argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
