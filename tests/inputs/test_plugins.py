"""Rewards of installed packages that clash or cannot be imported, and class paths that are no rewards."""

import sys
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path

import pytest
import torch

import mfm_rewards
from mfm_lightning.commands.main import run
from mfm_rewards import RewardError, registry

PACKAGE = """
import torch
from mfm_rewards import Reward

def dark(images):
    return -images.mean(dim=(1, 2, 3))

class Bright(Reward):
    def forward(self, images):
        return images.mean(dim=(1, 2, 3))

class Plain:
    def __call__(self, images):
        return images.sum(dim=(1, 2, 3))

class Odd:
    def __init__(self, **options):
        raise AssertionError("was called")

def made(scale=2.0) -> Reward:
    return Bright()

def unknown(scale=2.0):
    raise AssertionError("was called")
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Packages whose entry points name rewards: `{package: {name: value}}`."""
    (tmp_path / "of_packages.py").write_text(PACKAGE)
    (tmp_path / "that_fails.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    monkeypatch.setattr(registry, "_SEEN", [])

    class Package(Distribution):
        def __init__(self, name):
            self._name = name

        metadata = property(lambda self: {"Name": self._name})

        def read_text(self, filename):
            return None

        def locate_file(self, path):
            return path

    def install(packages):
        points = [
            EntryPoint(name, value, registry.ENTRY_POINTS)._for(Package(package))
            for package, rewards in packages.items()
            for name, value in rewards.items()
        ]
        monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])

    yield install
    for name in ("of_packages", "that_fails"):
        sys.modules.pop(name, None)


def test_the_second_of_a_name_is_named_and_the_others_live_on(installed, caplog):
    installed({
        "b-pack": {"dark": "of_packages:Bright", "brightness": "of_packages:dark", "good": "of_packages:Bright"},
        "a-pack": {"dark": "of_packages:dark"},
    })  # fmt: skip
    names = mfm_rewards.available()
    assert {"dark", "good", "brightness"} <= names.keys()
    x = torch.full((1, 3, 4, 4), 0.25)
    assert mfm_rewards.build("dark")(x).item() == -0.25  # of a-pack, whatever the order of installation
    assert mfm_rewards.build("brightness")(x).item() == 0.25
    assert (
        "reward 'dark' of the package b-pack is hidden by the package a-pack; of_packages.Bright names" in caplog.text
    )
    assert "reward 'brightness' of the package b-pack is hidden by mfm_rewards.statistics" in caplog.text
    caplog.clear()
    mfm_rewards.available()
    assert not caplog.text  # said once


def test_malformed_entry_points_take_no_other_with_them(installed, caplog, capsys):
    installed(
        {"bad": {"one": "no module here", "two": "of_packages", "three": "of_packages:", "four": "of_packages:dark"}}
    )
    run(["rewards"])
    assert "four" in capsys.readouterr().out
    for name in ("one", "two", "three"):
        assert f"reward '{name}' of the package bad is left out" in caplog.text


@pytest.mark.parametrize("value", ["that_fails:Reward", "of_packages:Nothing", "not_installed.at_all:Reward"])
def test_a_reward_that_cannot_be_imported_is_named(installed, value, capsys):
    installed({"bad": {"broken": value}, "good": {"fine": "of_packages:Bright"}})
    with pytest.raises(RewardError, match=rf"'broken' of the package bad cannot be imported from {value}: \w+Error"):
        mfm_rewards.build("broken")
    with pytest.raises(RewardError, match="'broken' of the package bad"):
        run(["rewards", "--show", "broken"])
    run(["rewards"])
    assert "fine" in capsys.readouterr().out
    assert mfm_rewards.build("fine")(torch.ones(1, 3, 4, 4)).item() == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"class_path": "subprocess.call", "args": ["touch", "PWNED"]},
        {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "PWNED"]}},
        {"class_path": "os._exit", "status": 1},
        {"class_path": "os.listdir"},
        {"class_path": "of_packages.Odd", "command": 1},
        {"class_path": "of_packages.unknown"},
        {"class_path": "builtins.dict", "a": 1},
        {"class_path": "sys.path"},
    ],
    ids=lambda settings: settings["class_path"],
)
def test_what_is_no_reward_is_not_called(installed, tmp_path, monkeypatch, settings):
    installed({})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardError, match=r"is not called, for it is no reward|options and|has no options"):
        mfm_rewards.build(settings)
    assert not Path("PWNED").exists()


def test_rewards_and_what_says_that_it_makes_one_are_taken(installed):
    installed({})
    x = torch.full((1, 3, 2, 2), 0.5)
    for path, value in (("dark", -0.5), ("Bright", 0.5), ("Plain", 6.0), ("made", 0.5)):
        assert mfm_rewards.build({"class_path": f"of_packages.{path}"})(x).item() == value, path
    assert isinstance(mfm_rewards.build({"class_path": "torch.nn.Identity"}), mfm_rewards.Reward)
