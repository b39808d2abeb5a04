"""Executes the notebooks of docs/notebooks and stores their outputs in them, without times and paths.

python docs/notebooks.py            all of them: about four minutes on one core
python docs/notebooks.py finetune   one of them
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from queue import Empty
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets import Type
from traitlets.config import Config

FOLDER = Path(__file__).with_name("notebooks")
NOTEBOOKS = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
VIEW, STATE = (f"application/vnd.jupyter.widget-{part}+json" for part in ("view", "state"))


class AskingChannel(AsyncZMQSocketChannel):
    """A channel that looks for messages once a second, not only when told of one.

    nbclient answers a widget on the socket whose reply it waits for. Such a send can take the socket's signal of a
    reply that came at that moment, and the cell would be waited for until its time is over (nbclient, issue 312).
    """

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return await super().get_msg(min(1.0, max(0.0, end - time.monotonic())))
            except Empty:
                if time.monotonic() >= end:
                    raise


class Client(AsyncKernelClient):
    """jupyter_client's, with such a channel for requests and replies."""

    shell_channel_class = Type(AskingChannel)  # type: ignore[assignment]


def code(notebook: NotebookNode) -> str:
    """A short name of what the cells of a notebook compute: another one where a line of code changes."""
    lines = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def execute(path: Path, values: Mapping[str, Any] | None = None, check: str = "") -> NotebookNode:
    """A notebook with the outputs of its cells, run from top to bottom by a new kernel in an empty folder.

    Args:
        path: of the `.ipynb`.
        values: set after the cell that is tagged `parameters`, in place of what it sets.
        check: code that runs after the last cell.

    Raises:
        nbclient.exceptions.CellExecutionError: with the cell and its traceback, where one fails.
        ValueError: if a value is no parameter of the notebook.
    """
    notebook = nbformat.read(path, as_version=4)
    if values:
        k = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        for name in values:
            if f"{name} =" not in notebook.cells[k].source:
                raise ValueError(f"{path.name} has no parameter {name}: {notebook.cells[k].source}")
        lines = "\n".join(f"{name} = {value!r}" for name, value in values.items())
        notebook.cells.insert(k + 1, nbformat.v4.new_code_cell(lines))
    if check:
        notebook.cells.append(nbformat.v4.new_code_cell(check))
    with TemporaryDirectory() as folder:
        commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        # one thread: sums in another order are other pictures
        given = {"PATH": commands, "OMP_NUM_THREADS": "1", "IPYTHONDIR": folder, "MPLBACKEND": ""}
        given["TTY_COMPATIBLE"] = "0"  # no moving bars of commands, which rich shows in a notebook otherwise
        place = {"metadata": {"path": str(Path(folder, "work"))}}
        Path(folder, "work").mkdir()
        client = NotebookClient(
            notebook, timeout=900, kernel_name=KERNEL["name"], resources=place, record_timing=False,
            config=Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel", "client_factory": Client}),
        )  # fmt: skip
        client.execute(env={**os.environ, **given})
    return notebook


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """The same without what a run has of its own: times, log lines, versions. What a cell prints in pieces is one
    output, and in place of a widget, which needs its kernel, stands what it shows at first."""
    widgets = notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        kept: list[NotebookNode] = []
        for output in [shown for given in cell.outputs for shown in at_first(given, widgets)]:
            if output.get("name") == "stderr":
                continue
            if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
                kept[-1]["text"] += output["text"]
            else:
                kept.append(output)
        cell["outputs"] = kept
    notebook["metadata"] = NotebookNode(
        kernelspec=NotebookNode(KERNEL), language_info=NotebookNode(name="python"), executed=code(notebook)
    )
    return notebook


def at_first(output: NotebookNode, widgets: Mapping[str, Any]) -> list[NotebookNode]:
    """An output, or what the parts of a widget show."""
    view = output.get("data", {}).get(VIEW)
    if view is None:
        return [output]
    state = widgets[view["model_id"]]["state"]
    parts = [widgets[name.removeprefix("IPY_MODEL_")]["state"] for name in state.get("children", [])]
    return [NotebookNode(shown) for part in (state, *parts) for shown in part.get("outputs", [])]


def main(names: list[str]) -> None:
    if unknown := set(names) - set(NOTEBOOKS):
        sys.exit(f"no notebook {', '.join(sorted(unknown))}: there are {', '.join(NOTEBOOKS)}")
    for name in names or NOTEBOOKS:
        nbformat.write(cleaned(execute(NOTEBOOKS[name])), NOTEBOOKS[name])


if __name__ == "__main__":
    main(sys.argv[1:])
