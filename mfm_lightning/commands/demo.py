"""`mfm demo`: a base flow and a Meta Flow Map on real digits, drawn, fine-tuned, and compared in a report."""

from __future__ import annotations

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


def demo(extra: Sequence[str] = ()) -> None:
    """Run the stages from the repository's root, and the alignment suite's small version; `extra` arguments go to each
    stage.

    Raises:
        FileNotFoundError: if the configs are not there.
    """
    from mfm_lightning.commands.main import commands, run

    if not Path(STAGES[0][1]).is_file():
        raise FileNotFoundError(f"{STAGES[0][1]} is not here: run `mfm demo` in the repository's root")
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
