"""The planner against what real steps allocate and compute."""

from pathlib import Path

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from mfm_benchmarks.parts.training_steps import VARIANTS, Training, Variant
from mfm_benchmarks.timing import count_flops, peak_bytes
from mfm_lightning.commands.config_plan import MODULE, plan_config
from mfm_lightning.commands.errors import CommandLineError
from mfm_lightning.commands.main import run
from mfm_lightning.commands.planning import Plan, _largest, plan_training
from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import TrainingExecution
from mfm_lightning.networks import DiT
from mfm_lightning.objectives import InnerTimes, ModelTeacher, Objective, PairSampler, WeightedTerm

NETWORK = {"input_size": 16, "in_channels": 4, "hidden_size": 64, "depth": 4, "num_heads": 4, "encoder_depth": 2}
NETWORK |= {"num_classes": 10}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.slow
def test_activations_and_operations_are_those_of_a_real_step(precision, checkpointed):
    """Memory within 5 % (the real peak has some of the gradients), operations within 5 % (whose labels are dropped)."""
    with FakeTensorMode() as fake:
        network = DiT(**NETWORK)
    objective = Objective(pairs=PairSampler(guidance_scale=2.5), share_inner=True)
    execution = TrainingExecution(checkpoint_activations=checkpointed)
    plan = plan_training(network, objective, 32, precision=precision, execution=execution, fake=fake)
    training, variant = Training(NETWORK, 32, precision, torch.device("cpu")), Variant("", checkpoint=checkpointed)
    training.restore()
    real = peak_bytes(lambda: training.backward(variant), torch.device("cpu"))
    gradients = 4 * sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    assert plan.parameters == gradients // 4
    assert real - gradients < 1.05 * plan.activations
    assert plan.activations < 1.05 * real
    assert plan.flops == pytest.approx(count_flops(lambda: training.backward(variant)), rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.slow
def test_memory_of_the_straightforward_step_is_that_of_a_real_one(precision):
    """Within 10 % of `torch.func.jvp` with attention as written, whichever way the planned step itself goes."""
    training = Training(NETWORK, 32, precision, torch.device("cpu"))
    training.restore()
    gradients = 4 * sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    real = peak_bytes(lambda: training.backward(VARIANTS[0]), torch.device("cpu"))
    objective = Objective(pairs=PairSampler(guidance_scale=2.5), share_inner=True)
    execution = TrainingExecution(checkpoint_activations=True)
    plans = []
    for asked in (True, False):
        with FakeTensorMode() as fake:
            network = DiT(**NETWORK)
        plans.append(plan_training(network, objective, 32, 1, 1, precision, execution, fake, reference=asked))
    assert plans[0].reference == pytest.approx(real - gradients, rel=0.1)
    assert plans[1].reference is None
    assert plans[0].activations == plans[1].activations < 0.3 * plans[0].reference  # nothing is left behind


@pytest.mark.slow
def test_the_largest_batch_is_the_one_that_just_fits():
    """Planned anew at that batch, all fits; at one of one percent and a sample more it does not. By any first batch,
    with bf16's casts, which do not grow with it."""

    def plan(batch: int, memory: float | None = None) -> Plan:
        with FakeTensorMode() as fake:
            network = DiT(**NETWORK | {"depth": 2, "encoder_depth": 1})
        return plan_training(network, Objective(), batch, devices=4, precision="bf16", fake=fake, memory=memory)

    assert plan(1).most is None
    replicated, sharded = plan(1, 1e8).most
    assert 20 < replicated < sharded
    assert plan(400, 1e8).most[0] == pytest.approx(replicated, rel=0.012)
    for most, of_shards in ((replicated, False), (sharded, True)):
        more = most + 1 + most // 100
        assert sum(plan(most).memory(of_shards).values()) <= 1e8 < sum(plan(more).memory(of_shards).values())
    assert plan(4, 1e6).most == (0, 0)  # less than the weights


def test_the_search_for_a_batch_ends_at_what_fits():
    """Of costs that are no line: a constant part, and one that stops growing."""
    for held, room, expected in (
        (lambda n: 1000 + 7 * n, 8000, 1000),
        (lambda n: 10 * n + min(n, 64) * 30, 5000, 308),
        (lambda n: 7 * n, 6, 0),
        (lambda n: 7 * n, 7, 1),
        (lambda n: n, -5, 0),
    ):
        for first in (1, 40, 5000):
            known = {first: held(first)}
            assert 0.99 * expected - 1 <= _largest(held, room, known) <= expected
            assert len(known) < 8


@pytest.mark.slow
def test_a_share_without_tangents_is_planned_without():
    """`equal_rate`: operations within 3 % of a real step's, which has tangents for half of the batch."""
    torch.manual_seed(0)
    objective = Objective([WeightedTerm("eulerian_teacher")], inner_times=InnerTimes(equal_rate=0.5))
    with FakeTensorMode() as fake:
        network = DiT(**NETWORK)
    plan = plan_training(network, objective, 32, precision="fp32", fake=fake)
    model, teacher = MetaFlowMap(DiT(**NETWORK)), ModelTeacher(MetaFlowMap(DiT(**NETWORK)))
    x, label = torch.randn(32, 4, 16, 16), torch.randint(10, (32,))
    real = count_flops(lambda: objective(model, teacher, x, Conditions(label=label))["loss"].backward())
    assert plan.flops == pytest.approx(real, rel=0.03)


@pytest.mark.slow
def test_guidance_of_the_data_by_the_model_itself_is_counted():
    """Operations within 5 % of real steps of the from-data objectives, whose guidance takes two more passes."""
    torch.manual_seed(0)
    pairs = PairSampler(guidance_scale=2.5)
    for names in (["flow_matching"], ["data_diagonal", "mean_flow"]):
        objective = Objective([WeightedTerm(name) for name in names], pairs=pairs)
        with FakeTensorMode() as fake:
            network = DiT(**NETWORK)
        plan = plan_training(network, objective, 64, precision="fp32", fake=fake)
        model, x, label = MetaFlowMap(DiT(**NETWORK)), torch.randn(64, 4, 16, 16), torch.randint(10, (64,))
        real = count_flops(lambda: objective(model, None, x, Conditions(label=label))["loss"].backward())  # noqa: B023
        assert plan.flops == pytest.approx(real, rel=0.05), names


PRETRAINING = [p for p in sorted(Path("configs").glob("*/*.yaml")) if MODULE in p.read_text()]


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.slow] * ("imagenet256" in str(p)), id=str(p)) for p in PRETRAINING]
)
def test_every_config_can_be_planned(path, tmp_path):
    config = yaml.safe_load(path.read_text())
    network = config["model"]["init_args"]["network"]["init_args"]
    if "encoder_depth" in network:  # of two blocks, for time
        network |= {"depth": 2, "encoder_depth": 1}
    if path.parent.name == "pictures":  # sizes are those of data that are the user's
        network |= {"input_size": 16, "in_channels": 3, "num_classes": 2}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    plan = plan_config(tmp_path / "job.yaml")
    assert plan.activations > 0
    # a forward and a backward pass of each weight of the blocks, at least
    assert plan.flops > 4 * plan.batch_size * plan.accumulate * plan.largest
    assert (plan.teacher > 0) == ("teacher:" in path.read_text())


def test_a_solved_teacher_counts_each_of_its_evaluations():
    def teacher_flops(term: WeightedTerm) -> int:
        with FakeTensorMode() as fake:
            network = DiT(**NETWORK)
        return plan_training(network, Objective([term]), 8, precision="fp32", fake=fake).teacher_flops

    one, solved = teacher_flops(WeightedTerm("eulerian_teacher")), WeightedTerm("ode_teacher", options={"steps": 3})
    assert teacher_flops(solved) == 6 * one > 0


@pytest.mark.slow
def test_sharding_divides_what_is_trained():
    plan = plan_config("configs/imagenet256/mfm_b2.yaml", devices=16, batch_size=1)
    assert plan.parameters == pytest.approx(134.65e6, rel=1e-4)  # the release's
    replicated, sharded = plan.memory(False), plan.memory(True)
    for name in ("weights", "gradients", "optimiser's moments", "EMA"):
        assert sharded[name] == pytest.approx(replicated[name] / 16)
    assert sharded["activations"] == replicated["activations"]


def test_command_and_its_errors(capsys, tmp_path):
    run(["plan", "--config", "configs/digits/mfm.yaml", "--devices", "4", "--memory", "0.05"])
    printed = capsys.readouterr().out
    assert "1.51 M trained parameters" in printed
    assert "1,024 samples on 4 devices" in printed
    assert "too much" in printed
    assert "most samples" not in printed
    assert "straightforward" not in printed
    run(["plan", "--config", "configs/digits/mfm.yaml", "--reference", "--largest_batch"])
    printed = capsys.readouterr().out
    assert "most samples at once in 80 GB" in printed
    assert "activations of the straightforward step (the same terms by torch.func.jvp" in " ".join(printed.split())
    for option in ("--reference", "--largest_batch"):
        with pytest.raises(CommandLineError, match=f"{option} is for training by MFMPretraining"):
            run(["plan", "--config", "text_to_image/sd3/steer", option])
    with pytest.raises(ValueError, match=r"trains mfm_lightning\.modules\.RewardAlignment: mfm plan knows"):
        run(["plan", "--config", "configs/digits/steer.yaml"])
    text = Path("configs/digits/mfm.yaml").read_text().replace("hidden_size: 128", "hidden_sise: 128")
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match="hidden_sise"):
        run(["plan", "--config", str(tmp_path / "bad.yaml")])
    for text, message in (
        ("", r"bad\.yaml holds no settings"),
        ("model: [", r"bad\.yaml is no YAML"),
        (f"model: {{class_path: {MODULE}}}", r"bad\.yaml: model\.init_args has no network"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            run(["plan", "--config", str(tmp_path / "bad.yaml")])
    with pytest.raises(FileNotFoundError, match=r"no config at nowhere\.yaml"):
        run(["plan", "--config", "nowhere.yaml"])
