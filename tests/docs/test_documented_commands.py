"""The commands of README and docs that need files of the user's: what they lack on a fresh machine are those alone."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from mfm_lightning.commands.main import run

ROOT = Path(__file__).parents[2]
NAMES = ("index", "commands", "quality", "checkpoints", "imagenet", "data")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
COMMAND = re.compile(
    r"^(?:torchrun .*--no-python )?mfm (import|export|sample|fid|prepare-latents) ([^#\n]*)", re.MULTILINE
)


def documented() -> list[tuple[str, list[str]]]:
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    return [(name, shlex.split(rest)) for name, rest in COMMAND.findall(text) if "..." not in rest]


def test_documented_commands_lack_files_alone(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    monkeypatch.chdir(tmp_path)
    found = documented()
    assert {name for name, _ in found} == {"import", "export", "sample", "fid", "prepare-latents"}
    for name, arguments in found:
        if name == "fid":
            assert {"--allow-download", "--weights"} & set(arguments), arguments
        here = [argument for argument in arguments if argument != "--allow-download"]  # no network is asked
        if name == "sample" and here[0] == "mnist":  # comes with the package: tests/checkpoints
            continue
        with pytest.raises(FileNotFoundError):
            run([name, *here])


def test_imports_have_the_direction_of_time_of_the_configs_that_start_from_them():
    configs = {path: yaml.safe_load(path.read_text()) for path in (ROOT / "configs/imagenet256").glob("*.yaml")}
    lines = [line for path in (*PAGES, *configs) for line in path.read_text().splitlines() if "mfm import" in line]
    checked = set()
    for path, config in configs.items():
        settings = config["model"]["init_args"]
        for line in lines:
            if "initial" in settings and f"--output {settings['initial']}" in line:
                flipped = settings["network"]["init_args"].get("flip_time", False)
                assert flipped == ("--no-flip-time" not in line), f"{path.name}: {line}"
                checked.add(path.stem)
    assert checked == {"mfm_b2", "mfm_xl2"}
