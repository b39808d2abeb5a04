"""The planner against what real steps allocate and compute."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mfm_benchmarks.parts.training_steps import Training, Variant
from mfm_benchmarks.timing import count_flops, peak_bytes
from mfm_lightning.modules import Execution
from mfm_lightning.networks import DiT
from mfm_lightning.objectives import Objective, PairSampler
from mfm_lightning.plan import plan_training
from mfm_lightning.plan_command import main, plan_config

NETWORK = {"input_size": 16, "hidden_size": 64, "depth": 4, "num_heads": 4, "encoder_depth": 2, "num_classes": 10}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_and_operations_are_those_of_a_real_step(precision, checkpointed):
    """Memory within 5 % (the real peak has some of the gradients), operations within 5 % (whose labels are dropped)."""
    with FakeTensorMode() as fake:
        network = DiT(**NETWORK)
    objective = Objective(pairs=PairSampler(guidance_scale=2.5), share_inner=True)
    execution = Execution(checkpoint_activations=checkpointed)
    plan = plan_training(network, objective, 32, bf16=precision == "bf16", execution=execution, fake=fake)
    training, variant = Training(NETWORK, 32, precision, torch.device("cpu")), Variant("", checkpoint=checkpointed)
    training.restore()
    real = peak_bytes(lambda: training.backward(variant), torch.device("cpu"))
    gradients = 4 * sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    assert plan.parameters == gradients // 4
    assert real - gradients < 1.05 * plan.activations
    assert plan.activations < 1.05 * real
    assert plan.flops == pytest.approx(count_flops(lambda: training.backward(variant)), rel=0.05)


def test_sharding_divides_what_is_trained():
    plan = plan_config("configs/imagenet256/mfm_b2.yaml", devices=16, batch_size=1)
    assert plan.parameters == pytest.approx(134.65e6, rel=1e-4)  # the release's
    replicated, sharded = plan.memory(False), plan.memory(True)
    for name in ("weights", "gradients", "optimiser's moments", "EMA"):
        assert sharded[name] == pytest.approx(replicated[name] / 16)
    assert sharded["activations"] == replicated["activations"]


def test_command_and_its_errors(capsys, tmp_path):
    main(["--config", "configs/digits/mfm.yaml", "--devices", "4", "--memory", "0.05"])
    printed = capsys.readouterr().out
    assert "1.51 M trained parameters" in printed
    assert "1,024 samples on 4 devices" in printed
    assert "too much" in printed
    with pytest.raises(ValueError, match=r"trains mfm_lightning\.modules\.RewardAlignment: mfm plan knows"):
        main(["--config", "configs/digits/steer.yaml"])
    text = Path("configs/digits/mfm.yaml").read_text().replace("hidden_size: 128", "hidden_sise: 128")
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match="hidden_sise"):
        main(["--config", str(tmp_path / "bad.yaml")])
    with pytest.raises(FileNotFoundError, match=r"no config at nowhere\.yaml"):
        main(["--config", "nowhere.yaml"])
