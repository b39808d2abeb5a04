"""`mfm demo`: two trainings on small digits, then steering, search, fine-tuning and a comparison on MNIST at 28x28."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mfm_lightning.commands.errors import CommandLineError

OUTPUTS = Path("outputs")
MODEL = "model.safetensors"
REPORT = OUTPUTS / "benchmarks/mnist_demo_quick/report/index.html"
HELP = """Usage: mfm demo [--overwrite] [options of mfm fit and mfm test, such as --trainer.accelerator cpu]

Fit a base flow and a Meta Flow Map on real 8x8 digits; then, with the model of MNIST at 28x28 that comes with the
package, draw samples, steer and search for a reward, fine-tune to it, and compare methods in a report. All in the
folder outputs/ of the current one. Seven to eight minutes on two cores, more on slow ones. What an earlier demo has
left is taken as it is; --overwrite makes it again."""


@dataclass(frozen=True)
class Stage:
    """A command of the demo.

    title: what it shows; command: its arguments; folder: of what it leaves, under outputs/; seconds: on two idle cores,
    of which only the proportions matter; options: what makes a fit shorter than its config says.
    """

    title: str
    command: str
    folder: str
    seconds: float
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.command.split()[0]


STAGES = (
    Stage(
        "Train a base flow on 8x8 digits", "fit --config configs/digits/flow.yaml", "digits/flow", 50,
        ("--trainer.max_steps", "600", "--trainer.val_check_interval", "600"),
    ),
    Stage(
        "Distil a Meta Flow Map from it", "fit --config configs/digits/mfm.yaml", "digits/mfm", 75,
        ("--trainer.max_steps", "700", "--trainer.val_check_interval", "700"),
    ),
    Stage(
        "Samples of MNIST at 28x28, from the package's model",
        "sample mnist --output outputs/mnist/samples --num-samples 100", "mnist/samples", 12,
    ),
    Stage("Steer it: odd digits, nines most of all", "predict --config configs/mnist/steer.yaml", "mnist/steer", 45),
    Stage("Search it for symmetric digits", "predict --config configs/mnist/search.yaml", "mnist/search", 45),
    Stage(
        "Fine-tune it to bright digits", "fit --config configs/mnist/finetune.yaml", "mnist/finetune", 80,
        ("--trainer.max_steps", "80", "--trainer.val_check_interval", "80", "--data.init_args.buffer_size", "256"),
    ),
    Stage("Before and after", "test --config configs/mnist/finetune.yaml", "mnist/finetune", 20),
    Stage(
        "Compare with Best-of-N, GLASS and others",
        "benchmark alignment --quick --config configs/benchmarks/mnist_demo.yaml", "benchmarks/mnist_demo_quick", 110,
    ),
)  # fmt: skip


def demo(args: Sequence[str]) -> None:
    """Train on digits; steer, search, fine-tune and compare on MNIST, with the model of the package.

    Raises:
        CommandLineError: for an option that mfm fit does not know.
    """
    if {"-h", "--help"} & set(args):
        print(HELP)
        return
    from mfm_lightning.commands.main import run
    from mfm_lightning.utils.console import console, duration

    if args and not args[0].startswith("-"):
        raise CommandLineError(f"mfm demo takes options only, got {args[0]!r} (mfm demo --help)")
    fresh, others = "--overwrite" in args, [arg for arg in args if arg != "--overwrite"]
    terminal, begin, expected = console(), time.monotonic(), 0.0
    for i, stage in enumerate(STAGES):
        left = sum(later.seconds for later in STAGES[i:])
        if expected:  # by the pace so far
            left *= (time.monotonic() - begin) / expected
        terminal.rule(f"{i + 1}/{len(STAGES)}  {stage.title}")
        terminal.print(f"mfm {stage.command}\nabout {duration(left)} left", soft_wrap=True)
        if (more := _options(stage, fresh, others)) is None:
            terminal.print(
                f"{OUTPUTS / stage.folder} has it already, and it is taken; mfm demo --overwrite makes it again"
            )
        else:
            run([*stage.command.split(), *more])
            expected += stage.seconds
    terminal.print(f"Done in {time.monotonic() - begin:.0f} s. Pictures and tables:")
    for path in (*_shown(), REPORT):
        terminal.print(f"  {path}")


def _options(stage: Stage, fresh: bool, others: Sequence[str]) -> list[str] | None:
    """What is added to a stage's command; None where an earlier demo has done it."""
    folder = OUTPUTS / stage.folder
    if stage.name == "benchmark":
        return ["--fresh"] if fresh else []
    if stage.name == "sample":
        if fresh and folder.is_dir():
            for path in (folder / "samples.json", *folder.glob("[0-9]" * 8 + ".png")):  # what mfm sample writes
                path.unlink(missing_ok=True)
        return []
    if stage.name == "predict":
        done = (folder / "predict" / "summary.json").exists() and not fresh
        again = ["--overwrite"] if fresh else []
        return None if done else [*again, *others]
    last = ["--ckpt_path", str(folder / "last.ckpt")]
    if stage.name == "test":
        return [*last, *others]
    if (folder / MODEL).exists() and not fresh:
        return None
    stopped = (folder / "last.ckpt").exists() and not fresh
    return [*stage.options, *(["--overwrite"] if fresh else last if stopped else []), *others]


def _shown() -> list[Path]:
    """Pictures and tables of all stages."""
    found = []
    for stage in STAGES:
        folder = OUTPUTS / stage.folder
        for pattern in ("pictures/*/*.png", "predict/*.png", "test/*"):
            found += sorted(folder.glob(pattern))
    return list(dict.fromkeys(found))
