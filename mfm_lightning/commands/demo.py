"""`mfm demo`: a base flow and a Meta Flow Map on real digits, drawn, fine-tuned, and compared in a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from mfm_lightning.commands.errors import CommandLineError

STAGES = (
    ("fit", "configs/digits/flow.yaml", "Base flow"),
    ("fit", "configs/digits/mfm.yaml", "Meta Flow Map, distilled from it"),
    ("test", "configs/digits/mfm.yaml", "Measure and draw"),
    ("fit", "configs/digits/finetune.yaml", "Fine-tune the base flow to a reward"),
    ("test", "configs/digits/finetune.yaml", "Before and after"),
)
REPORT = Path("outputs/benchmarks/alignment_quick/report/index.html")
HELP = """Usage: mfm demo [--overwrite] [options of mfm fit and mfm test, such as --trainer.accelerator cpu]

Fit a base flow and a Meta Flow Map on real digits, fine-tune to a reward, and compare methods in a report; all in the
folder outputs/ of the current one. Six to eight minutes on two cores, more on slow ones. A model that an earlier demo
has left is taken as it is; --overwrite fits it again."""


def demo(args: Sequence[str]) -> None:
    """Fit a base flow and a Meta Flow Map on digits, fine-tune, compare methods in a report.

    Raises:
        CommandLineError: for an option that mfm fit does not know.
    """
    if {"-h", "--help"} & set(args):
        print(HELP)
        return
    from mfm_lightning.commands.main import run
    from mfm_lightning.utils.console import console

    if args and not args[0].startswith("-"):
        raise CommandLineError(f"mfm demo takes options only, got {args[0]!r} (mfm demo --help)")
    fresh, others = "--overwrite" in args, [arg for arg in args if arg != "--overwrite"]
    terminal, begin, num = console(), time.monotonic(), len(STAGES) + 1
    for i, (command, config, title) in enumerate(STAGES, start=1):
        terminal.rule(f"{i}/{num}  {title}  (mfm {command} --config {config})")
        folder = Path("outputs/digits") / Path(config).stem
        if command == "fit" and not fresh and (model := folder / "model.safetensors").exists():
            terminal.print(f"{model} is there already, and taken as it is; mfm demo --overwrite fits it again")
            continue
        more = ["--overwrite"] if fresh else []
        if command == "test" or (not fresh and (folder / "last.ckpt").exists()):  # of a demo that was stopped
            more = ["--ckpt_path", f"{folder}/last.ckpt"]
        run([command, "--config", config, *more, *others])
    terminal.rule(f"{num}/{num}  Compare with Best-of-N, GLASS and others  (mfm benchmark alignment --quick)")
    run(["benchmark", "alignment", "--quick", *(["--fresh"] if fresh else [])])
    terminal.print(f"Done in {time.monotonic() - begin:.0f} s. Pictures and tables:")
    for path in (*sorted(Path("outputs/digits").glob("*/test/*")), REPORT):
        terminal.print(f"  {path}")
