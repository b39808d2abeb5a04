"""Typical mistakes, each with its answer: in a line or two, with what was wrong, where, and what would be right."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mfm_lightning.checkpoints import save_model
from mfm_lightning.commands.main import main
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP
from mfm_lightning.utils.configs import SHIPPED
from mfm_rewards import registry

GMM = ["fit", "--config", "gmm/mfm"]
REWARDS = """
import mfm_rewards

@mfm_rewards.register("mine_that_raises")
def mine_that_raises(images):
    return images.mean() / (images.shape[0] - images.shape[0])

def wrong(images):
    return images.nonsense
"""
TRANSCRIPT = (Path(__file__).with_name("mistakes.txt")).read_text()
MISTAKES = dict(re.findall(r"^\$ mfm (.*)\n((?:(?!\$ mfm ).*\n)*)", TRANSCRIPT, re.MULTILINE))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (SHIPPED / "gmm/mfm.yaml").read_text()
    Path("key.yaml").write_text(text.replace("max_steps", "max_step"))
    Path("section.yaml").write_text(text.replace("\nmodel:", "\nmodle:"))
    Path("broken.yaml").write_text("model: [1, 2\ndata: 3")
    Path("empty.yaml").write_text("")
    Path("mistaken_rewards.py").write_text(REWARDS)
    save_model(MetaFlowMap(MLP()), "mlp.safetensors")
    save_model(MetaFlowMap(MLP()), "done/model.safetensors")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, "last.ckpt")
    yield tmp_path
    sys.modules.pop("mistaken_rewards", None)
    registry._FACTORIES.pop("mine_that_raises", None)


def answer(arguments, capsys) -> str:
    """What the command says on its way out, which must be with a status of its own."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = stopped.value.code if isinstance(stopped.value.code, str) else ""
    assert said or stopped.value.code == 2
    return said + capsys.readouterr().err


def test_there_are_many():
    assert len(MISTAKES) >= 30


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered(mistake, workplace, capsys):
    """As `mistakes.txt` says; ... there stands for anything."""
    arguments, expected = shlex.split(mistake), MISTAKES[mistake].strip()
    before = {path: path.stat().st_mtime_ns for path in workplace.rglob("*") if path.is_file()}
    said = answer(arguments, capsys)
    answered = said.strip()[said.strip().index("mfm: ") :]
    assert re.fullmatch(".*".join(map(re.escape, expected.split("..."))), answered), said
    assert len(answered.splitlines()) <= 2
    assert len(answered) < 400
    # nothing was lost, nothing begun
    after = {path: path.stat().st_mtime_ns for path in workplace.rglob("*") if path.is_file()}
    assert {path for path in after if "__pycache__" not in path.parts} == set(before)
    assert all(after[path] == time for path, time in before.items())


def test_a_reward_that_raises_shows_its_line(workplace, capsys):
    Path("images").mkdir()
    from PIL import Image

    Image.new("RGB", (8, 8)).save("images/a.png")
    said = answer(["rewards", "--score", "mistaken_rewards.wrong", "--images", "images"], capsys)
    line = REWARDS.splitlines().index("    return images.nonsense") + 1
    assert "raised AttributeError" in said
    assert f"mistaken_rewards.py:{line} in wrong: return images.nonsense" in said


@pytest.mark.parametrize("how", ["--debug", "MFM_DEBUG"])
def test_debug_gives_the_traceback(how, workplace, monkeypatch):
    if how == "MFM_DEBUG":
        monkeypatch.setenv("MFM_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown reward 'brightnes'"):
        main(["rewards", "--show", "brightnes", *([how] if how == "--debug" else [])])


def test_the_finished_run_is_begun_anew_or_gone_on_with(workplace, capsys):
    """What the refusal offers, works."""
    run = [*GMM, "--trainer.max_steps=1", "--trainer.default_root_dir=done"]
    before = Path("done/model.safetensors").read_bytes()
    assert "--overwrite" in answer(run, capsys)
    assert Path("done/model.safetensors").read_bytes() == before
    main([*run, "--overwrite"])
    assert Path("done/model.safetensors").read_bytes() != before
    main([*run[:-2], "--trainer.max_steps=2", run[-1], "--ckpt_path", "done/last.ckpt"])
    assert torch.load("done/last.ckpt", weights_only=True)["global_step"] == 2


def test_files_have_the_mode_that_the_user_wants(workplace):
    before = os.umask(0o027)
    try:
        path = save_model(MetaFlowMap(MLP()), "shared.safetensors")
    finally:
        os.umask(before)
    assert oct(path.stat().st_mode & 0o777) == "0o640"


def test_a_packaged_config_is_copied_to_be_edited(workplace, capsys):
    main(["configs"])
    listed = capsys.readouterr().out
    assert all(f"{path.parent.name}/{path.stem} " in listed for path in SHIPPED.glob("*/*.yaml"))
    main(["configs", "copy", "gmm/mfm"])
    assert Path("configs/gmm/mfm.yaml").read_text() == (SHIPPED / "gmm/mfm.yaml").read_text()
    assert yaml.safe_load(Path("configs/gmm/mfm.yaml").read_text())["model"]
