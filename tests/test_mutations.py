"""The lists of `tests/mutations/` fit the code; and the script tells what is caught from what is not."""

import ast
import json
import subprocess

import pytest

from tests import mutations
from tests.mutations import ROOT, Mutation, listed


@pytest.mark.parametrize("mutation", listed(), ids=lambda mutation: f"{mutation.listed}: {mutation.what}")
def test_each_listed_error_fits_the_code(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new
    file, _, name = mutation.test.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert name.partition("[")[0] in functions


def test_an_error_is_listed_once():
    places = [(mutation.file, mutation.old, mutation.new) for mutation in listed()]
    assert len(set(places)) == len(places)


CODE = "def half(x):\n    return x / 2\n\n\ndef third(x):\n    return x / 3\n"
TESTS = (
    "import mfm_lightning as m\n\n\ndef test_half():\n    assert m.half(4) == 2\n\n\ndef test_wrong():\n    assert 0\n"
)
HALF = {"file": "mfm_lightning/__init__.py", "old": "x / 2", "test": "tests/test_it.py::test_half"}


def test_the_script_tells_what_is_caught(tmp_path, capsys):
    """A repository of two functions, of which one is tested: an error there, one in the other, one that does not
    compile; and lists that do not fit. The repository is not touched."""

    def status(*entries: dict[str, str], arguments: tuple[str, ...] = ()) -> int:
        (tmp_path / "tests/mutations/some.json").write_text(json.dumps(entries))
        return mutations.main(arguments, tmp_path)

    for name, text in {"mfm_lightning/__init__.py": CODE, "tests/test_it.py": TESTS, ".gitignore": "ignored"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "tests/mutations").mkdir()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    caught = {**HALF, "new": "x / 3", "what": "a third"}
    survives, broken = {**HALF, "old": "x / 3", "new": "x", "what": "all"}, {**HALF, "new": "(", "what": "no Python"}
    assert status(caught) == 0
    assert status(caught, survives, broken, arguments=("-j", "2")) == 1
    shown = capsys.readouterr().out
    assert "SURVIVED" in shown
    assert "no answer" in shown
    assert "1 of 3 one-line errors are caught" in shown
    assert status(caught, survives, arguments=("third",)) == 0
    assert status({**caught, "old": "x / 5"}) == 2
    assert status({**caught, "test": "tests/test_it.py::test_nothing"}) == 2
    assert status({**caught, "test": "tests/test_it.py::test_wrong"}) == 2
    assert "fails as it is" in capsys.readouterr().out
    assert (tmp_path / "mfm_lightning/__init__.py").read_text() == CODE


def test_an_error_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    with pytest.raises(ValueError, match=r"occurs 2 times in a\.py"):
        Mutation("a.py", "x = 1", "x = 2", "tests/a.py::test_a", "x").apply(tmp_path)
