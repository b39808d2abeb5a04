"""Power-function averages of weights, and those of any length from a run's snapshots."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from mfm_lightning.callbacks import EMA, EMASnapshots
from mfm_lightning.checkpoints import CheckpointError, load_model, read_metadata
from mfm_lightning.checkpoints.post_hoc_ema import Profile, combination, power, snapshots_in
from mfm_lightning.commands.averages import average
from mfm_lightning.commands.errors import CommandLineError
from mfm_lightning.commands.main import call
from mfm_lightning.modules import Autoencoding, Classification, RewardFinetuning
from tests.inputs.tiny_runs import CONFIG, fit, last
from tests.processes import torchrun

PATH = "mfm_lightning.callbacks.EMASnapshots"
SNAPSHOTS = f'[{{"class_path": "{PATH}", "init_args": {{"every": 2}}}}]'


def shares(steps: int, gamma: float) -> Tensor:
    """What each step's weights count in an average whose profile is t^gamma: its integral over the step."""
    k = torch.arange(steps + 1, dtype=torch.float64) / steps
    return (k ** (gamma + 1)).diff()


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.25, 12**-0.5])
def test_a_width_is_the_standard_deviation_of_its_profile(width):
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    profile = t ** power(width)
    mean, square = (torch.trapezoid(t**k * profile, t) / torch.trapezoid(profile, t) for k in (1, 2))
    assert (square - mean**2).sqrt().item() == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.289, float("nan")])
def test_a_width_that_no_power_has_is_refused(width):
    with pytest.raises(ValueError, match=r"must lie in \(0, 0.2887\]"):
        EMA(sigma_rel=width)


def test_the_longest_width_is_the_plain_mean():
    assert power(0.2887) == power(12**-0.5) == 0
    assert EMA(sigma_rel=0.2887)._decay_at(4) == 3 / 4


@pytest.mark.parametrize("width", [0.05, 0.2])
@pytest.mark.parametrize("start", [0, 3])
def test_the_running_average_is_the_weighted_sum_of_all_steps(width, start):
    torch.manual_seed(0)
    module = nn.Linear(3, 2).double()
    ema = EMA(sigma_rel=width, start_step=start)
    ema.start(module)
    weights = []
    for step in range(1, 31):
        nn.init.normal_(module.weight)
        weights.append(module.weight.detach().clone())
        ema.update(module, step)
    expected = torch.einsum("k,kij->ij", shares(30 - start, power(width)), torch.stack(weights[start:]))
    torch.testing.assert_close(ema.average["weight"], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("wanted", "largest"), [(0.05, 1e-6), (0.1, 1e-6), (0.03, 0.03), (0.075, 3e-3), (0.2, 0.02)])
def test_snapshots_add_up_to_another_profile(wanted, largest):
    """On a grid of 4,000 steps, against the profile itself; lengths that were kept are found again."""
    steps, every = 4000, 200
    kept = [Profile(step, width) for step in range(every, steps + 1, every) for width in (0.05, 0.1)]
    weights, missed = combination(kept, Profile(steps, wanted))
    assert sum(weights) == pytest.approx(1, abs=1e-9)
    found = torch.zeros(steps, dtype=torch.float64)
    for profile, weight in zip(kept, weights, strict=True):
        found[: profile.last] += weight * shares(profile.last, power(profile.sigma_rel))
    exact = shares(steps, power(wanted))
    error = ((found - exact).norm() / exact.norm()).item()
    assert error < largest
    assert missed == pytest.approx(error, rel=0.05, abs=1e-6)  # of continuous profiles


class Recorder(L.Callback):
    """Keeps the network's weights after each step, here and for the process that goes on."""

    kept: dict[int, dict[str, Tensor]] = {}  # noqa: RUF012 # of the class: jsonargparse makes the object

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = pl_module.exported.state_dict()
        self.kept[trainer.global_step] = {name: tensor.detach().clone() for name, tensor in state.items()}


def mfm_average(*arguments: str) -> None:
    """As the command line calls it."""
    call(average, "average", arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """40 steps, stopped after 21, and the weights after each of them."""
    folder = tmp_path_factory.mktemp("averaged")
    Recorder.kept = {}
    callbacks = f'[{{"class_path": "{PATH}", "init_args": {{"every": 2}}}}, {{"class_path": "{__name__}.Recorder"}}]'
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        options = ["--trainer.callbacks", callbacks, "--model.optimization.learning_rate=0.01"]
        fit("run", 21, *options)
        fit("run", 40, *options, "--ckpt_path=last")
    return folder


@pytest.mark.parametrize(
    ("width", "step", "within"),
    [(0.05, 40, 0.02), (0.1, 40, 0.02), (0.07, 40, 0.02), (0.2, 40, 0.05), (0.1, 20, 0.02)],
)
def test_the_average_of_a_run_after_the_fact(run, monkeypatch, caplog, width, step, within):
    """Of a run that was stopped and went on, against the sum over all steps; errors as a share of how far the average
    is from the last step's weights."""
    monkeypatch.chdir(run)
    caplog.set_level("INFO")
    mfm_average("run", f"--sigma_rel={width}", "--output=found.safetensors", f"--step={step}")
    found = load_file("found.safetensors")
    share = shares(step, power(width))
    errors, moved = [], []
    for name, tensor in found.items():
        weights = torch.stack([Recorder.kept[k][name].double() for k in range(1, step + 1)])
        exact = torch.tensordot(share, weights, dims=1)
        errors.append((tensor - exact).flatten())
        moved.append((weights[-1] - exact).flatten())
    assert torch.cat(errors).norm() < within * torch.cat(moved).norm()
    assert torch.cat(moved).norm() > 0.05  # there is something to be wrong about
    said = read_metadata("found.safetensors")
    number = step + 2 * (step > 21)  # the end of the run that was stopped stays
    assert (said["step"], said["kind"]) == (str(step), "meta_flow_map")
    assert said["averaged"] == f"sigma_rel {width:g}, of {number} snapshots"
    assert not {"sigma_rel", "begin"} & said.keys()  # it is no snapshot itself
    assert load_model("found.safetensors").state_shape == (1, 8, 8)
    # 21 is the end of the run that was stopped, and stays
    assert (
        f"average of sigma_rel {width:g} up to step {step}, of {step + 2 * (step > 21)} snapshots in run/ema"
        in caplog.text
    )


def test_a_length_far_from_those_kept_is_said(run, monkeypatch, caplog):
    monkeypatch.chdir(run)
    mfm_average("run/ema", "--sigma_rel=0.01", "--output=found.safetensors")
    assert "that is much: the snapshots are too few for this length" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["run", "--sigma_rel=0.4", "--output=a.safetensors"], ValueError, r"sigma_rel 0.4 must lie in \(0, 0.2887\]"),
        (["run", "--sigma_rel=0.1", "--output=a.safetensors", "--step=3"], FileNotFoundError, "no snapshot of step 3"),
        ([".", "--sigma_rel=0.1", "--output=a.safetensors"], FileNotFoundError, "no snapshots of averages in"),
        (["run/logs", "--sigma_rel=0.1", "--output=a.safetensors"], FileNotFoundError, "no snapshots of averages in"),
        (["run", "--sigma_rel=0.1", "--output=run/ema/a.safetensors"], ValueError, "would lie among the snapshots"),
        (["run", "--sigma_rel=0.1", "--output=a.pt"], CommandLineError, "expected a name that ends in .safetensors"),
    ],
)
def test_what_cannot_be_averaged_is_refused(run, monkeypatch, options, error, message):
    monkeypatch.chdir(run)
    with pytest.raises(error, match=message):
        mfm_average(*options)
    assert not Path("a.safetensors").exists()


def test_snapshots_of_two_runs_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit("run", 2, "--trainer.callbacks", SNAPSHOTS)
    kept = {path.name: path.read_bytes() for path in Path("run/ema").iterdir()}
    assert sorted(kept) == ["00000002-0.05.safetensors", "00000002-0.1.safetensors"]
    fit("other", 4, "--trainer.callbacks", SNAPSHOTS, "--model.network.init_args.hidden_size=8")
    for name, content in kept.items():
        (Path("other/ema") / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="hold different networks, of two runs"):
        mfm_average("other", "--sigma_rel=0.07", "--output=a.safetensors")


def test_a_run_anew_removes_the_snapshots_of_the_one_before(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    fit("run", 6, "--trainer.callbacks", SNAPSHOTS)
    assert len(list(Path("run/ema").iterdir())) == 6
    fit("run", 3, "--trainer.callbacks", SNAPSHOTS, "--overwrite")
    assert "6 snapshots in run/ema were of a run before this one, and are removed" in caplog.text
    names = ["00000002-0.05", "00000002-0.1", "00000003-0.05", "00000003-0.1"]  # the last step has one, too
    assert sorted(path.stem for path in Path("run/ema").iterdir()) == names


def test_what_else_is_in_the_folder_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit("run", 2, "--trainer.callbacks", SNAPSHOTS)
    mine = Path("run/ema/mine.safetensors")
    mine.write_bytes(Path("run/model.safetensors").read_bytes())
    fit("run", 2, "--trainer.callbacks", SNAPSHOTS, "--overwrite")
    assert mine.is_file()
    assert len(snapshots_in("run/ema")) == 2
    copy = Path("run/ema/00000002-0.10.safetensors")
    copy.write_bytes(Path("run/ema/00000002-0.1.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="are of one step and width: keep one of them"):
        mfm_average("run", "--sigma_rel=0.07", "--output=a.safetensors")


def test_averages_that_begin_at_a_later_step(run, tmp_path, monkeypatch, caplog):
    """A run whose checkpoint has none: their profile is that of the steps since."""
    monkeypatch.chdir(tmp_path)
    recorder, Recorder.kept = f'{{"class_path": "{__name__}.Recorder"}}', {}
    fit("run", 6, "--trainer.callbacks", f"[{recorder}]")
    callbacks = f'[{{"class_path": "{PATH}", "init_args": {{"every": 4}}}}, {recorder}]'
    fit("run", 10, "--trainer.callbacks", callbacks, "--ckpt_path=last")
    assert "no averages of EMASnapshots: they begin at step 6" in caplog.text
    fit("run", 14, "--trainer.callbacks", callbacks, "--ckpt_path=last")  # which knows where they began
    (*_, last) = snapshots_in("run/ema")
    assert (last.last, last.begin, last.steps) == (14, 6, 8)
    mfm_average("run", "--sigma_rel=0.1", "--output=found.safetensors")
    assert "the averages begin at step 6: the width is a share of the steps since" in caplog.text
    for name, tensor in load_file("found.safetensors").items():
        weights = torch.stack([Recorder.kept[k][name].double() for k in range(7, 15)])
        exact = torch.tensordot(shares(8, power(0.1)), weights, dims=1)
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-5, atol=1e-6)


def test_an_average_that_goes_on_with_another_profile_is_said(caplog):
    module = nn.Linear(2, 2)
    ema = EMA(sigma_rel=0.1)
    ema.start(module)
    ema.update(module, 1)
    EMA(sigma_rel=0.1).load_state_dict(ema.state_dict())
    EMA().load_state_dict({"average": {}, "num_updates": 3})  # of an older checkpoint
    assert not caplog.text
    EMA().load_state_dict(ema.state_dict())
    assert "goes on with ema.sigma_rel None, and was made with 0.1 until step 1" in caplog.text


@pytest.mark.parametrize(("precision", "trainer"), [("bf16", "32-true"), ("fp32", "bf16-true")])
def test_the_numbers_of_files(tmp_path, monkeypatch, caplog, precision, trainer):
    """As `precision` says, also where the weights are of 16 bits: the averages are float32."""
    monkeypatch.chdir(tmp_path)
    settings = {"every": 2, "precision": precision, "sigma_rel": [0.1, 0.2]}
    callbacks = json.dumps([{"class_path": PATH, "init_args": settings}])
    fit("run", 2, "--trainer.callbacks", callbacks, f"--trainer.precision={trainer}")
    snapshot = load_file("run/ema/00000002-0.2.safetensors")
    dtypes = {tensor.dtype for tensor in snapshot.values() if tensor.is_floating_point()}
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
    averaged = last("run")["callbacks"]["EMASnapshots"]["averages"]["0.2"]["average"]
    for name, tensor in averaged.items():
        found = snapshot[name.removeprefix("model.network.")]
        assert torch.equal(found, tensor.to(found.dtype)), name
    mfm_average("run", "--sigma_rel=0.1", "--output=a.safetensors")
    assert {tensor.dtype for tensor in load_file("a.safetensors").values()} == {torch.float32}
    assert ("rounding of the files' numbers" in caplog.text) == (precision == "bf16")


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="two lengths at least"):
        EMASnapshots(10, sigma_rel=[0.1, 0.1])
    with pytest.raises(ValueError, match="every 0"):
        EMASnapshots(0)
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        EMASnapshots(10, precision="half")
    for folder in (".", "", "/tmp", "../other"):
        with pytest.raises(ValueError, match="one for the snapshots alone"):
            EMASnapshots(10, folder=folder)
    callback = EMASnapshots(10, sigma_rel=(0.1, 0.2))
    with pytest.raises(ValueError, match=r"the checkpoint has averages of sigma_rel 0.05, 0.1, not 0.2"):
        callback.load_state_dict(EMASnapshots(10).state_dict())


@pytest.mark.parametrize("kind", [Classification, Autoencoding])
def test_a_file_that_says_more_than_weights_has_no_average(kind):
    module = nn.Module()
    module.__class__ = kind
    with pytest.raises(ValueError, match="made of more than its weights"):
        EMASnapshots(10).setup(L.Trainer(logger=False, enable_checkpointing=False), module, "fit")


def test_merged_adapters_have_no_average():
    module = nn.Module()
    module.__class__ = RewardFinetuning
    module.adapters = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="made of more than its weights"):
        EMASnapshots(10).setup(L.Trainer(logger=False, enable_checkpointing=False), module, "fit")


@pytest.mark.slow
def test_of_sharded_weights(tmp_path, monkeypatch):
    """FSDP2 on two ranks: the snapshot of the last step is what the run's own average of that length exports."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump({**CONFIG, "ema": {"sigma_rel": 0.1}}))
    torchrun(
        tmp_path, 2, "fit", "--config=tiny.yaml", "--trainer.max_steps=5", "--trainer.default_root_dir=run",
        "--trainer.devices=2", "--trainer.logger=false", "--trainer.strategy=fsdp2",
        "--trainer.callbacks", SNAPSHOTS,
    )  # fmt: skip
    exported, snapshot = load_file("run/model.safetensors"), load_file("run/ema/00000005-0.1.safetensors")
    assert exported.keys() == snapshot.keys()
    for name, tensor in exported.items():
        assert torch.equal(snapshot[name], tensor), name
    other = load_file("run/ema/00000005-0.05.safetensors")
    assert any(not torch.equal(other[name], tensor) for name, tensor in exported.items())
