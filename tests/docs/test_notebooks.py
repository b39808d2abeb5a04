"""The notebooks of docs/notebooks run from top to bottom, show what they say, and are stored as they ran."""

import ast
import asyncio
import base64
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mfm_lightning

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]


def module_of(path: Path):
    """A file of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


RUNNER = module_of(ROOT / "docs/notebooks.py")
NAMES = ("compare_methods", "finetune", "posterior_and_value", "steer_mnist", "text_to_image")
LARGEST = 400_000  # bytes of a stored notebook
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")

EXECUTE = """
import json, runpy, sys
import nbformat
runner, path, values, check, output = *sys.argv[1:3], json.loads(sys.argv[3]), *sys.argv[4:]
from pathlib import Path
nbformat.write(runpy.run_path(runner)["execute"](Path(path), values, check), output)
"""


def executed(path: Path, folder: Path, values: dict | None = None, check: str = ""):
    """What `execute` gives, by a process of its own: threads of other tests, and what they fork, are no part of it."""
    output = folder / "executed.ipynb"
    arguments = [str(ROOT / "docs/notebooks.py"), str(path), json.dumps(values), check, str(output)]
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, *arguments], capture_output=True, text=True, timeout=600
    )  # a notebook that stands still is an error
    assert done.returncode == 0, done.stderr[-4000:]
    return nbformat.read(output, as_version=4)


# by notebook: smaller settings, and what is true once it has run with them
SMALL = {
    "posterior_and_value": {"training_steps": 600, "num_points": 200, "repeats": 20},
    "steer_mnist": {"num_samples": 8, "steps": 10, "scales": [5.0, 20.0]},
    "compare_methods": {"num_samples": 16},
    "finetune": {"training_steps": 30, "batch_size": 16, "num_samples": 16, "ode_steps": 10},
    "text_to_image": {"vae_steps": 60, "flow_steps": 60, "sampling_steps": 6},
}
TRUE = {
    "posterior_and_value": """
assert max(differences) < 0.3, differences
assert max(chance) < 0.05, chance
exact = [float(error.square().mean()) for error in errors["exact draws"]]
assert exact[-1] < exact[0] / 4, exact
assert float(errors["exact draws"][0].mean()) < -0.5  # too low with one draw
assert steered.rewards.mean() > reward(data).mean() + 2
""",
    "steer_mnist": """
assert not report.failures
assert (steered.rewards > rewards).float().mean() > 0.7
assert steered.rewards.mean() > rewards.mean() + 0.05
assert sweep[1].rewards.mean() > sweep[0].rewards.mean() > rewards.mean()
assert dps.rewards.mean() > rewards.mean() + 0.05
assert free.rewards.mean() > jpeg.reward(before[:8]).mean()
assert (steered.nfe_per_sample, dps.nfe_per_sample) == (5 * steps, 4 * steps)
""",
    "compare_methods": """
table = {(row["method"], row["setting"]): row for row in rows}
assert [(name, float(row["NFE"])) for (_, name), row in table.items()][:3] == [("N 1", 16), ("N 2", 32), ("N 4", 64)]
assert {method for method, _ in table} == {"Best-of-N", "MFM-G", "DPS", "MFM-GF"}
best = [float(table["Best-of-N", f"N {n}"]["mean reward"]) for n in (1, 2, 4)]
assert best == sorted(best)
assert float(table["DPS", "steps 10"]["mean reward"]) > best[0] + 0.1
assert all(float(row["Fréchet low"]) < float(row["Fréchet"]) for row in rows)
""",
    "finetune": """
assert reward(after).mean() > reward(before).mean() + 0.005
assert reward(steered.images).mean() > reward(before).mean() + 0.01
assert len(log) == training_steps
assert (again - after[:4]).abs().max() < 1e-5
""",
    "text_to_image": """
assert steered.rewards.mean() > before.rewards.mean()
assert best.rewards.mean() > before.rewards.mean()
assert large(larger.images).mean() > large(before.images).mean()
assert steered.nfe_per_sample == 4 * sampling_steps
assert before.images.shape == (12, 3, 16, 16)
""",
}
PICTURES = {"compare_methods": 3, "finetune": 4, "posterior_and_value": 6, "steer_mnist": 6, "text_to_image": 4}


def pictures(notebook) -> list[bytes]:
    """The PNG files of the outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    found = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [base64.b64decode(text) for text in found]


def stored(name: str):
    return nbformat.read(RUNNER.NOTEBOOKS[name], as_version=4)


def test_all_notebooks_are_tested_and_on_their_page():
    assert tuple(RUNNER.NOTEBOOKS) == NAMES
    page = (ROOT / "docs/how_to/notebooks.md").read_text()
    assert [name for name in NAMES if f"(../notebooks/{name}.ipynb)" not in page] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_shows_what_it_says(name, tmp_path):
    notebook = RUNNER.cleaned(executed(RUNNER.NOTEBOOKS[name], tmp_path, SMALL[name], TRUE[name]))
    assert [png[:4] for png in pictures(notebook)] == [b"\x89PNG"] * PICTURES[name]


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_at_its_own_settings(name, tmp_path):
    executed(RUNNER.NOTEBOOKS[name], tmp_path)


def small_notebook(path: Path, *cells: str) -> Path:
    made = [nbformat.v4.new_code_cell(code) for code in cells]
    made[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path


@pytest.mark.parametrize("missed", [True, False])
def test_a_reply_that_comes_while_a_widget_is_answered_is_not_lost(missed):
    """A send can take the signal of a reply that has come, so a channel that only waits for the signal misses it."""
    zmq, channels = pytest.importorskip("zmq"), pytest.importorskip("jupyter_client.channels")
    kind = channels.AsyncZMQSocketChannel if missed else RUNNER.AskingChannel
    session = pytest.importorskip("jupyter_client.session").Session(key=b"key")

    async def answered() -> bool:
        with zmq.Context() as kernels, zmq.asyncio.Context() as ours:
            kernel, client = kernels.socket(zmq.DEALER), ours.socket(zmq.DEALER)
            kernel.connect(f"tcp://127.0.0.1:{client.bind_to_random_port('tcp://127.0.0.1')}")
            channel = kind(client, session)
            session.send(kernel, "first")
            assert (await channel.get_msg(timeout=30))["msg_type"] == "first"
            waiting = asyncio.ensure_future(channel.get_msg(timeout=30))
            await asyncio.sleep(0.5)
            session.send(kernel, "execute_reply")
            time.sleep(0.5)  # it is there, and the loop has not looked
            zmq.Socket.shadow(client.underlying).get(zmq.EVENTS)  # what a send does as well, now and then
            try:
                return (await asyncio.wait_for(waiting, 5))["msg_type"] == "execute_reply"
            except TimeoutError:
                return False
            finally:
                kernel.close(linger=0)
                client.close(linger=0)

    if missed and asyncio.run(answered()):
        pytest.skip("this version of jupyter_client or pyzmq does not miss it: AskingChannel could go")
    assert missed or asyncio.run(answered())


def test_values_are_injected_and_what_a_run_has_of_its_own_is_left_out(tmp_path):
    pytest.importorskip("ipywidgets")
    code = [
        "number = 1",
        "import sys; print(number); print('a line of a log', file=sys.stderr); print(number + 1)",
        "from ipywidgets import interact; interact(lambda k=3: print('k is', k))",
    ]
    path = small_notebook(tmp_path / "small.ipynb", *code)
    ran = RUNNER.cleaned(executed(path, tmp_path, {"number": 5}, "assert number == 5"))
    assert [cell.source for cell in ran.cells] == [code[0], "number = 5", *code[1:], "assert number == 5"]
    shown = [[(output.get("name"), output.get("text")) for output in cell.outputs] for cell in ran.cells]
    assert shown[2] == [("stdout", "5\n6\n")]
    assert shown[3][0] == ("stdout", "k is 3\n")  # in place of the slider, what it shows at first
    assert set(ran.metadata) == {"kernelspec", "language_info", "executed"}
    again = RUNNER.cleaned(executed(path, tmp_path, {"number": 5}, "assert number == 5"))
    assert nbformat.writes(again) == nbformat.writes(ran)


def test_a_cell_that_fails_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)CellExecutionError.*nothing is known of it"):
        executed(small_notebook(tmp_path / "small.ipynb", "raise OSError('nothing is known of it')"), tmp_path)


def test_a_value_of_no_parameter_is_refused():
    with pytest.raises(ValueError, match="no parameter training_step: "):
        RUNNER.execute(RUNNER.NOTEBOOKS["finetune"], {"training_step": 1})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_the_output_of_this_code(name):
    """Where this fails: python docs/notebooks.py NAME."""
    notebook = stored(name)
    assert notebook.metadata.get("executed") == RUNNER.code(notebook), f"run: python docs/notebooks.py {name}"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(pictures(notebook)) == PICTURES[name]
    assert RUNNER.NOTEBOOKS[name].stat().st_size < LARGEST


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_clean(name):
    notebook = stored(name)
    assert set(notebook.metadata) == {"kernelspec", "language_info", "executed"}
    assert notebook.metadata.kernelspec == RUNNER.KERNEL
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            texts = [
                output.get("text", ""),
                *(str(text) for kind, text in output.get("data", {}).items() if "text" in kind),
            ]
            for text in texts:
                assert not re.search(r"(?:^|[\s'\"(])/(?:tmp|home|root|work|usr)/|\x1b|Warning", text), text


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_takes_public_names_and_its_links_lead_somewhere(name):
    face, notebook = set(dir(mfm_lightning)), stored(name)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for link in LINK.findall(cell.source):
                assert (RUNNER.FOLDER / link).exists(), link
        elif not cell.source.startswith("%%"):
            code = re.sub(r"^!.*$", "", cell.source, flags=re.MULTILINE)
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and node.module == "mfm_lightning":
                    assert [alias.name for alias in node.names if alias.name not in face] == []
                    assert not any(alias.name.startswith("_") for alias in node.names)


def test_a_notebook_becomes_a_page_of_the_site():
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    hooks = module_of(ROOT / "docs/hooks.py")
    for name in NAMES:
        text, files = hooks.notebook_page(RUNNER.NOTEBOOKS[name])
        assert list(files.values()) == pictures(stored(name))
        assert [file for file in files if f"]({file})" not in text] == []
        assert text.startswith(f'{stored(name).cells[0].source.splitlines()[0]}\n\n<a href="{name}.ipynb" download>')
        codes = [cell.source for cell in stored(name).cells if cell.cell_type == "code"]
        assert [code for code in codes if f"```python\n{code}\n```" not in text] == []
        assert f": notebooks/{name}.md\n" in (ROOT / "mkdocs.yml").read_text()
    given = "[a](../notebooks/finetune.ipynb) [b](x.ipynb#keep-it) [c](x.md)"
    assert hooks.NOTEBOOK.sub(hooks.page_link, given) == "[a](../notebooks/finetune.md) [b](x.md#keep-it) [c](x.md)"
