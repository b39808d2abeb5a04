"""What the pages and the configs name exists: modules, classes, files, links."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import mfm_lightning.alignment
from mfm_lightning.alignment import AlignmentMethod, Posterior, ValueEstimator
from mfm_lightning.objectives import TERMS
from mfm_rewards.registry import ENTRY_POINTS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SOURCES = [p for top in ("mfm_lightning", "rewards", "benchmarks") for p in sorted((ROOT / top).rglob("*.py"))]
OURS = {"mfm_lightning", "mfm_rewards", "mfm_benchmarks"}

DOTTED = re.compile(r"\bmfm_(?:lightning|rewards|benchmarks)(?:\.[A-Za-z_]\w*)+")
CLASS = re.compile(r"`([A-Z][a-z]+(?:[A-Z]\w*)+)`")
CLASS_PATH = re.compile(r"class_path: *([\w.]+)")
PYTHON_FILE = re.compile(r"[\w./-]*\w\.py\b")
IN_REPOSITORY = re.compile(r"(?<![\w./-])(?:mfm_lightning|rewards|benchmarks|configs|tests|docs)/[\w./*-]*\w")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
PLACEHOLDER = re.compile(r"\b(?:NAME|FOLDER|ROOM)\b")
A_USERS_OWN = {"my_rewards", "my_rewards.py", "my_module.MySuite", "my_parts"}
OTHERS = {"AutoencoderKL", "LightningDataModule"}  # classes of other packages


def resolves(dotted: str) -> bool:
    """Whether this is a module, or an attribute of one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def is_there(path: str) -> bool:
    """Whether this is a file or folder, as seen from the root or from `mfm_lightning/`; `*` stands for some."""
    return any(list(root.glob(path)) for root in (ROOT, ROOT / "mfm_lightning"))


def imported(text: str) -> set[str]:
    """What the Python of a page imports from our packages."""
    found = set()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def class_paths(node: Any) -> set[str]:
    """All values of `class_path` in a YAML."""
    if isinstance(node, dict):
        own = {node["class_path"]} if "class_path" in node else set()
        return own.union(*map(class_paths, node.values()))
    return set().union(*map(class_paths, node)) if isinstance(node, list) else set()


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def classes() -> set[str]:
    """Names of all classes of the packages."""
    return {
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_a_page_resolve(page, classes):
    text = page.read_text()
    names = {*DOTTED.findall(text), *imported(text)} - {ENTRY_POINTS}
    names |= {path for path in CLASS_PATH.findall(text) if "." in path and path.split(".")[0] not in A_USERS_OWN}
    assert sorted(name for name in names if not resolves(name)) == []
    assert sorted(set(CLASS.findall(text)) - classes - OTHERS) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_of_a_page_are_there(page):
    text = page.read_text()
    files = {
        path for path in (*PYTHON_FILE.findall(text), *IN_REPOSITORY.findall(text)) if not PLACEHOLDER.search(path)
    }
    assert sorted(path for path in files - A_USERS_OWN if not is_there(path)) == []
    assert sorted(link for link in LINK.findall(text) if not (page.parent / link).exists()) == []


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_class_paths_of_a_config_resolve(config):
    methods = vars(mfm_lightning.alignment)  # benchmarks name methods without their package
    paths = class_paths(yaml.safe_load(config.read_text()))
    assert sorted(path for path in paths if not (resolves(path) if "." in path else path in methods)) == []


@pytest.mark.parametrize("path", [*SOURCES, *CONFIGS], ids=name_of)
def test_files_that_a_comment_names_are_there(path):
    named = re.findall(
        r"\b(?:tests|docs|configs|benchmarks|mfm_lightning)/[\w./*-]*\.(?:py|md|yaml)\b", path.read_text()
    )
    assert sorted(name for name in named if not is_there(name) and not PLACEHOLDER.search(name)) == []


def test_every_room_is_on_the_map():
    """docs/design.md has the floors of tests/test_architecture.py."""
    from tests.test_architecture import FLOOR

    text = (ROOT / "docs/design.md").read_text()
    rows = {room.strip("/").removesuffix(".py"): int(floor) for floor, room in re.findall(r"\| (\d+) \| `(\S+)`", text)}
    assert rows == {room: floor + 1 for room, floor in FLOOR.items() if not room.startswith("_")}


def test_every_objective_is_on_its_page():
    text = (ROOT / "docs/training.md").read_text()
    assert [name for name in TERMS if f"`{name}`" not in text] == []


def test_every_method_and_estimator_is_on_its_page():
    text = (ROOT / "docs/methods.md").read_text()
    kinds = (AlignmentMethod, ValueEstimator, Posterior)
    found = [made for made in vars(mfm_lightning.alignment).values() if isinstance(made, type)]
    found = [made for made in found if issubclass(made, kinds) and not inspect.isabstract(made)]
    assert len(found) > 10
    oracles = {"ExactGradient", "OraclePosterior"}  # for tests and benchmarks, where an oracle is known
    assert [made.__name__ for made in found if f"`{made.__name__}`" not in text and made.__name__ not in oracles] == []


def test_nothing_leads_out_of_the_repository():
    outside = re.compile(r"\.\./shared|\bDESIGN\b|\bSTYLE\b|\bPAPER\.md|/work/")
    texts = [*PAGES, *CONFIGS, *SOURCES, ROOT / "CHANGELOG.md", ROOT / "Makefile", ROOT / "pyproject.toml"]
    texts += [path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__)]
    assert [name_of(path) for path in texts if outside.search(path.read_text())] == []
