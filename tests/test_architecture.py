"""The direction of dependencies (docs/design.md): an import leads to a room below, never to one above."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "mfm_lightning", ROOT / "rewards", ROOT / "benchmarks")
# from the ground up; rooms of one floor do not know each other
FLOORS = [
    {"_version", "utils"},
    {"conditions", "interpolant"},
    {"glass", "oracles", "networks", "tangents", "training"},
    {"models"},
    {"samplers", "checkpoints", "backbones"},
    {"metrics", "sampling"},
    {"alignment"},
    {"objectives", "evaluation", "data"},
    {"modules"},
    {"callbacks"},
    {"commands"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported(source: str) -> set[str]:
    """Dotted names that Python source imports, anywhere in it; those of relative imports begin with a dot."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def rooms(source: str) -> set[str]:
    """The parts of mfm_lightning that Python source imports; names of its face are among them."""
    return {name.split(".")[1] for name in imported(source) if name.startswith("mfm_lightning.")}


def hidden(source: str) -> list[str]:
    """Imports that do not say which room they lead to: relative ones, and from the package's face."""
    relative = {name for name in imported(source) if name.startswith(".")}
    return sorted(relative | (rooms(source) - FLOOR.keys()))


def files(*packages: Path) -> list[Path]:
    return sorted(path for package in packages for path in package.rglob("*.py"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ..alignment import Steering", ["..alignment.Steering"]),
        ("from . import plots", ["..plots"]),
        ("def f():\n    from mfm_lightning import Steering, tangents", ["Steering"]),
        ("from mfm_lightning import *", ["*"]),
        ("from mfm_lightning import tangents\nfrom mfm_lightning.alignment import Steering\nimport torch", []),
    ],
)
def test_imports_that_hide_their_room_are_found(source, expected):
    assert hidden(source) == expected


def test_a_room_imported_from_the_face_counts_as_that_room():
    assert rooms("from mfm_lightning import tangents") == {"tangents"}
    assert rooms("import mfm_lightning.data.base\nfrom mfm_lightning.models import MetaFlowMap") == {"data", "models"}


@pytest.mark.parametrize("path", files(*PACKAGES), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_say_their_room(path):
    assert not hidden(path.read_text())


@pytest.mark.parametrize("path", files(ROOT / "mfm_lightning"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_lead_down(path):
    room = path.relative_to(ROOT / "mfm_lightning").parts[0].removesuffix(".py")
    if room == "__init__":  # the face knows all rooms
        return
    assert room in FLOOR, f"{room} is on no floor: give it one in FLOORS, and in docs/design.md"
    source = path.read_text()
    assert not [other for other in sorted(rooms(source) & FLOOR.keys() - {room}) if FLOOR[other] >= FLOOR[room]]
    # the face itself, as `import mfm_lightning`, would hide the rooms behind its attributes
    assert not [name for name in imported(source) if name == "mfm_lightning" or name.split(".")[0] == "mfm_benchmarks"]


@pytest.mark.parametrize("path", files(ROOT / "rewards"), ids=lambda p: str(p.relative_to(ROOT)))
def test_rewards_know_nothing_of_the_framework(path):
    tops = {name.split(".")[0] for name in imported(path.read_text())}
    assert not tops & {"mfm_lightning", "mfm_benchmarks"}


def test_every_file_of_tests_has_a_folder_of_its_package():
    packages = {path.name for top in ("mfm_lightning",) for path in (ROOT / top).iterdir() if path.is_dir()}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= packages | {"core", "benchmarks", "rewards", "docs", "packaging", "inputs"}
