"""The direction of dependencies (docs/design.md): an import leads to a room below, never to one above."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# from the ground up; rooms of one floor do not know each other
FLOORS = [
    {"_version", "utils"},
    {"conditions", "interpolant"},
    {"glass", "oracles", "networks", "tangents", "training"},
    {"models"},
    {"samplers", "checkpoints"},
    {"metrics", "sampling"},
    {"alignment"},
    {"objectives", "evaluation", "data"},
    {"modules"},
    {"callbacks"},
    {"commands"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*.py"))


@pytest.mark.parametrize("path", files(ROOT / "mfm_lightning"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_lead_down(path):
    room = path.relative_to(ROOT / "mfm_lightning").parts[0].removesuffix(".py")
    if room == "__init__":  # the face knows all rooms
        return
    assert room in FLOOR, f"{room} is on no floor: give it one in FLOORS, and in docs/design.md"
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("mfm_lightning.")}
    assert not [other for other in sorted(ours & FLOOR.keys() - {room}) if FLOOR[other] >= FLOOR[room]]
    assert not [name for name in imported(path) if name.split(".")[0] == "mfm_benchmarks"]


@pytest.mark.parametrize("path", files(ROOT / "rewards"), ids=lambda p: str(p.relative_to(ROOT)))
def test_rewards_know_nothing_of_the_framework(path):
    assert not [name for name in imported(path) if name.split(".")[0] in ("mfm_lightning", "mfm_benchmarks")]


def test_every_file_of_tests_has_a_folder_of_its_package():
    packages = {path.name for top in ("mfm_lightning",) for path in (ROOT / top).iterdir() if path.is_dir()}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= packages | {"core", "benchmarks", "rewards", "docs", "packaging"}
