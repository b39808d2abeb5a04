"""Options of rewards: each has help text, those of networks stand under `execution`. Base classes are abstract."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from jsonargparse import ArgumentParser

import mfm_rewards
from mfm_lightning.commands.reward_tables import options_of
from mfm_rewards import Reward, RewardError
from mfm_rewards.execution import Execution, as_execution, autocast
from mfm_rewards.pretrained import PretrainedReward

FACTORIES = {name: mfm_rewards.registry.factory(name) for name in mfm_rewards.available()}
OURS = {name: made for name, made in FACTORIES.items() if made.__module__.startswith("mfm_rewards.")}
PRETRAINED = [name for name, made in OURS.items() if issubclass(made, PretrainedReward)]


@pytest.mark.parametrize("name", OURS)
def test_every_option_has_help(name):
    assert not [option for option, text in options_of(OURS[name]).items() if not text]
    parser = ArgumentParser()  # what the command line of a job makes of it
    parser.add_class_arguments(OURS[name], "reward")
    actions = [action for action in parser._actions if action.dest.startswith("reward.")]
    assert not [action.dest for action in actions if not action.help or action.help == "==SUPPRESS=="]


def test_pretrained_rewards_share_the_options_of_execution():
    assert set(PRETRAINED) == {"aesthetic", "clip_score", "hpsv2", "image_reward", "pickscore"}
    for name in PRETRAINED:
        shown = [option.split(":")[0] for option in options_of(OURS[name])]
        assert shown[-5:] == ["execution", *(f"execution.{field.name}" for field in fields(Execution))]


def test_execution_from_what_a_config_holds():
    assert as_execution(None) == Execution() == as_execution({})
    given = Execution("bf16", max_rows=8)
    assert as_execution(given) is given
    assert as_execution({"precision": "bf16", "max_rows": 8}) == given
    with pytest.raises(RewardError, match=r"execution\.checkpoint: did you mean 'checkpoint_activations'\? Known are"):
        as_execution({"checkpoint": True})


def test_precisions_are_those_of_matrix_products():
    x = torch.ones(2, 2)
    for precision, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        with torch.autocast("cpu", torch.bfloat16), autocast(x.device, precision):  # whatever is around it
            assert (x @ x).dtype == dtype
    with pytest.raises(ValueError, match="unknown precision 'fp8': expected one of fp32, bf16, fp16"):
        autocast("cpu", "fp8")


def test_base_classes_are_abstract():
    class Unfinished(Reward):
        pass

    class NoScore(PretrainedReward):
        pass

    for kind in (Reward, Unfinished, NoScore):
        with pytest.raises(TypeError, match="abstract"):
            kind()
    with pytest.raises(RewardError, match=r"cannot be built: .*abstract"):
        mfm_rewards.build(
            {"class_path": "mfm_rewards.linear_gaussian.ImageMeasurement", "observation": 0.0, "noise_std": 1}
        )
