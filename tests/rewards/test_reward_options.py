"""Options of rewards: each has help text, those of networks stand under `execution`. Base classes are abstract."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from jsonargparse import ArgumentParser

import mfm_rewards
from mfm_lightning.commands.fit import MFMCLI
from mfm_lightning.commands.reward_tables import options_of
from mfm_rewards import Reward, RewardError
from mfm_rewards.execution import Execution, as_execution, autocast, warn_if_bf16_is_slow
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


CPUS = [(False, False, "x86_64"), (True, False, "x86_64"), (False, True, "x86_64"), (False, False, "arm64")]


@pytest.mark.parametrize(("bf16", "amx", "machine"), CPUS)
def test_bf16_on_a_cpu_that_multiplies_none_is_said_to_be_slow_once(monkeypatch, caplog, bf16, amx, machine):
    """By autocast, and by the command line before a job; not for fp32."""
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("platform.machine", lambda: machine)
    slow = not bf16 and not amx and machine == "x86_64"
    jobs = [
        lambda: [autocast("cpu", "bf16") for _ in range(2)],
        lambda: MFMCLI(["--config", "configs/digits/flow.yaml", "--trainer.precision", "bf16-mixed"], run=False),
    ]
    for job in jobs:
        warn_if_bf16_is_slow.cache_clear()
        autocast("cpu", "fp32")
        assert "bf16 is slower" not in caplog.text
        job()
        said = [record.message for record in caplog.records if "bf16 is slower than fp32 on this CPU" in record.message]
        assert len(said) == slow
        caplog.clear()
    warn_if_bf16_is_slow.cache_clear()


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
