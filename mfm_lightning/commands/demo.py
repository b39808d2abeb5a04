"""`mfm demo`: a base flow and a Meta Flow Map on real digits, drawn, fine-tuned, and compared in a report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

STAGES = (
    ("fit", "configs/digits/flow.yaml", "Base flow"),
    ("fit", "configs/digits/mfm.yaml", "Meta Flow Map, distilled from it"),
    ("test", "configs/digits/mfm.yaml", "Measure and draw"),
    ("fit", "configs/digits/finetune.yaml", "Fine-tune the base flow to a reward"),
    ("test", "configs/digits/finetune.yaml", "Before and after"),
)

REPORT = Path("outputs/benchmarks/alignment_quick/report/index.html")


def demo(args: Sequence[str] = ()) -> None:
    """Entry point of the subcommand: run the stages, and the alignment suite's small version."""
    from mfm_lightning.commands.main import commands, run

    parser = argparse.ArgumentParser(
        prog="mfm demo",
        description="Fit a base flow and a Meta Flow Map on real digits, fine-tune to a reward, and compare methods in "
        "a report; all in the folder outputs/ of the current one. Six to eight minutes on two cores, eleven on slow "
        "ones.",
        epilog="Other options go to each mfm fit and mfm test, e.g. --trainer.accelerator cpu.",
    )
    _, extra = parser.parse_known_args(args)
    console, begin, num = Console(), time.monotonic(), len(STAGES) + 1
    for i, (command, config, title) in enumerate(STAGES, start=1):
        console.rule(f"{i}/{num}  {title}  (mfm {command} --config {config})")
        checkpoint = ["--ckpt_path", f"outputs/digits/{Path(config).stem}/last.ckpt"] if command == "test" else []
        run([command, "--config", config, *checkpoint, *extra])
    console.rule(f"{num}/{num}  Compare with Best-of-N, GLASS and others  (mfm benchmark alignment --quick)")
    commands()["benchmark"].load()(["alignment", "--quick"])
    console.print(f"Done in {time.monotonic() - begin:.0f} s. Pictures and tables:")
    for path in (*sorted(Path("outputs/digits").glob("*/test/*")), REPORT):
        console.print(f"  {path}")
