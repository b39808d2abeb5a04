"""Training jobs that a suite needs: run as the user would, unless their file is there."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfm_benchmarks.spec import Spec
from mfm_lightning.checkpoints import fingerprint
from mfm_lightning.utils.configs import DEFAULTS, find_config


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
        noted = self._noted()
        return not self.remember or (noted.get("identity"), noted.get("sha256")) == (
            self.identity(), fingerprint(self.file),
        )  # fmt: skip

    def _noted(self) -> dict[str, Any]:
        try:
            return json.loads(self._note.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def run(self) -> None:
        """Fit, in this process; a training of this file that was stopped goes on from its `last.ckpt`.

        Raises:
            FileNotFoundError: if the config is not there, or does not write the file.
            ValueError: if the options do not fit the config.
        """
        from mfm_lightning.commands.errors import CommandLineError
        from mfm_lightning.commands.main import run

        options = [part for key, value in self.options.items() for part in (f"--{key}", _as_argument(value))]
        checkpoint = Path(self.file).with_name("last.ckpt")
        if not self.remember and checkpoint.is_file() and not Path(self.file).is_file():
            options += ["--ckpt_path", str(checkpoint)]
        try:
            run(["fit", "--config", self.config, "--overwrite", *options])
        except SystemExit as error:
            if error.code not in (1, 128 + signal.SIGINT):  # else Ctrl-C, also by Lightning's own status
                raise
            raise KeyboardInterrupt from error
        except CommandLineError as error:
            raise ValueError(f"mfm fit --config {self.config} refuses the options {self.options}: {error}") from error
        if not Path(self.file).is_file():
            raise FileNotFoundError(f"{self.config} did not write {self.file}: is it stopped, or of another folder?")
        if self.remember:
            note = {"identity": self.identity(), "sha256": fingerprint(self.file)}
            self._note.write_text(json.dumps(note, indent=1))


def _as_argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
