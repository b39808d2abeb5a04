"""GLASS teachers and the objectives' expected values against the release."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mfm_lightning.checkpoints import import_checkpoint
from mfm_lightning.conditions import Conditions
from mfm_lightning.objectives import TERMS, Objective, PairSampler
from mfm_lightning.objectives.objective import adaptive_loss, squared_error
from mfm_lightning.objectives.teachers import ModelTeacher, teacher_velocity
from tests.parity import DATA, released_architecture


def imported(name: str, prefix: str, folder, **options):
    tensors = load_file(DATA / name)
    save_file({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, folder / "w.safetensors")
    with safe_open(DATA / name, "pt") as file:
        config = json.loads(file.metadata()["config"])
    return import_checkpoint(folder / "w.safetensors", **released_architecture(config), **options), tensors


@pytest.mark.parametrize(("name", "omega", "flip"), [("dmf", 0.6, True), ("sit", 0.0, False)])
def test_glass_teachers(name, omega, flip, tmp_path):
    model, data = imported("official_glass.safetensors", f"{name}.weights.", tmp_path, flip_time=flip)
    teacher = ModelTeacher(model, omega)
    s, x_s, t, x_t = (data[f"{name}.{k}"] for k in ("s", "x_s", "t", "x_t"))
    given = Conditions(label=data[f"{name}.label"], guidance=data[f"{name}.cfg_scale"])
    guided = teacher_velocity(teacher, s, x_s, t, x_t, given)
    torch.testing.assert_close(guided, data[f"{name}.velocity"], atol=1e-5, rtol=1e-5)
    unlabelled = teacher_velocity(teacher, s, x_s, t, x_t)
    torch.testing.assert_close(unlabelled, data[f"{name}.velocity_unlabelled"], atol=1e-5, rtol=1e-5)


CASES = [
    ("data_diagonal", 0.5, 30),
    ("distilled_diagonal", 0.5, 30),
    ("mean_flow", 1.0, 30),
    ("eulerian_teacher", 1.0, 20),
    ("semigroup", 1.0, 30),
    ("lagrangian_self", 1.0, 30),
]


@pytest.mark.parametrize(("name", "p", "batches"), CASES)
@pytest.mark.slow
def test_expected_value_within_four_standard_errors(name, p, batches, tmp_path):
    # Two-sided z-test at 4 standard errors: false-alarm rate 6e-5 for each of the ten numbers.
    student, data = imported("official_objectives.safetensors", "student.", tmp_path)
    teacher = ModelTeacher(imported("official_objectives.safetensors", "teacher.", tmp_path)[0], omega=0.6)
    expected = json.loads((DATA / "official_objectives.json").read_text())[name]
    objective, term = Objective(pairs=PairSampler(class_dropout=0.2, guidance_scale=2.5)), TERMS[name]()
    torch.manual_seed(0)
    x1, label = data["x1"].repeat(8, 1, 1, 1), data["label"].repeat(8)
    means = {"squared_error": [], "adaptive_loss": [], "squared_error_over_samples_with_label": []}
    with torch.no_grad():
        for _ in range(batches):
            pair = objective.pairs.sample(x1, Conditions(label=label), student.null_conditions)
            error = squared_error(objective.residual(term, student, teacher, pair))
            means["squared_error"].append(error.mean())
            means["squared_error_over_samples_with_label"].append(
                error[pair.conditions.label != student.num_classes].mean()
            )
            means["adaptive_loss"].append(adaptive_loss(error, p).mean())
    for key, (value, standard_error) in expected.items():
        ours = torch.stack(means[key])
        spread = (ours.var() / batches + standard_error**2 + 5e-6**2).sqrt()  # the last: their printed rounding
        assert abs(ours.mean() - value) < 4 * spread, f"{name} {key}: {ours.mean():.5f} against {value}"
