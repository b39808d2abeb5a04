"""Training as a user runs it: through the command line, interrupted, resumed, and given bad input."""

import signal
from pathlib import Path

import lightning as L
import pytest
import torch

from mfm_lightning.callbacks import EMA
from mfm_lightning.commands.main import main, run
from mfm_lightning.conditions import Conditions
from mfm_lightning.data import DigitsDataModule
from mfm_lightning.modules import MFMPretraining, NonFiniteLossError, Optimization, check_batch
from mfm_lightning.networks import DiT
from mfm_lightning.objectives import InnerTimes, Objective, WeightedTerm
from tests.short_jobs import FOUR_STEPS

ROOT = Path(__file__).parents[2]


def digits_module() -> MFMPretraining:
    torch.manual_seed(0)
    network = DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, guidance_scales=())
    return MFMPretraining(
        network,
        Objective([WeightedTerm("data_diagonal"), WeightedTerm("mean_flow")]),
        optimization=Optimization(learning_rate=1e-3, warmup_steps=3),
    )


def test_a_network_without_classes_gets_no_labels(tmp_path, caplog):
    class Relabelled(DigitsDataModule):
        def train_batch(self, step):
            x, label = super().train_batch(step)
            return x, 9 - label

    def weights(data):
        torch.manual_seed(0)
        module = MFMPretraining(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=0), Objective([WeightedTerm("flow_matching")]))
        trainer = L.Trainer(
            max_steps=2, default_root_dir=tmp_path, logger=False, enable_progress_bar=False, accelerator="cpu",
            enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, data)
        return module.state_dict()

    with caplog.at_level("INFO"):
        ours, theirs = weights(DigitsDataModule(32)), weights(Relabelled(32))
    assert "has no classes: the labels of the data (10 classes) are not given to it" in caplog.text
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_not_trained_on_is_the_loss_after_every_curriculum():
    """Of alpha, of the gap u - s and of terms that set in later: else losses of two steps could not be compared, and
    `mfm test`, which has no step, would tell that of the first one."""
    torch.manual_seed(0)
    network = DiT(8, 4, 1, 16, 2, 2, 1, num_classes=0)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.5)
    late = [WeightedTerm("data_diagonal"), WeightedTerm("mean_flow", start_step=50, options={"alpha_steps": 200})]
    early = [WeightedTerm("data_diagonal"), WeightedTerm("mean_flow")]
    modules = [
        MFMPretraining(network, Objective(late, inner_times=InnerTimes(annealing_steps=100))),
        MFMPretraining(network, Objective(early)),
    ]
    x, found = torch.randn(8, 1, 8, 8), []
    for module in modules:
        for training in (False, True):
            torch.manual_seed(1)
            found.append({k: v.item() for k, v in module.losses(x, Conditions(), training).items()})
    assert found[0] == found[2] == found[3]
    assert "mean_flow" not in found[1]


class Interrupt(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "five.ckpt")


def trained(folder, steps: int, resume=None, callbacks=()):
    ema = EMA(0.9)
    module = digits_module()
    trainer = L.Trainer(
        max_steps=steps, max_epochs=1, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, accelerator="cpu", callbacks=[ema, *callbacks],
    )  # fmt: skip
    trainer.fit(module, DigitsDataModule(batch_size=32), ckpt_path=resume, weights_only=True if resume else None)
    return module, ema


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, whole_ema = trained(tmp_path, 10, callbacks=[Interrupt()])
    resumed, resumed_ema = trained(tmp_path, 10, resume=tmp_path / "five.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for name, tensor in whole_ema.average.items():
        assert torch.equal(tensor, resumed_ema.average[name]), name
        assert not name.endswith("linear.weight") or not torch.equal(tensor, whole.state_dict()[name])


def test_ema_is_the_recursion_and_steps_aside(tmp_path):
    class Record(L.Callback):
        history: list = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, module, *_):
            self.history.append(module.model.network.final_layer.linear.bias.detach().clone())

    record = Record()
    start = digits_module().model.network.final_layer.linear.bias.detach().clone()
    module, ema = trained(tmp_path, 6, callbacks=[record])
    average = start
    for k, value in enumerate(record.history, start=1):
        decay = min(0.9, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * value
    name = "model.network.final_layer.linear.bias"
    torch.testing.assert_close(ema.average[name], average)
    assert "model.network.pos_embed" not in ema.average  # not trained, not averaged
    with ema.applied(module):
        torch.testing.assert_close(module.state_dict()[name], average)
    assert torch.equal(module.state_dict()[name], record.history[-1])


def test_non_finite_loss_stops_with_a_description(tmp_path):
    class Poison(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 2:
                batch[0][0] = float("nan")

    with pytest.raises(NonFiniteLossError, match=r"step 2 in data_diagonal.*batch of 32: mean nan"):
        trained(tmp_path, 10, callbacks=[Poison()])


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_that_fit_continues_from(folder, monkeypatch):
    step = MFMPretraining.training_step

    def interrupted(self, batch, batch_idx):
        if batch_idx == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, batch_idx)

    config = ["fit", "--config", "configs/gmm/mfm.yaml", "--trainer.max_steps=6", "--trainer.val_check_interval=6"]
    monkeypatch.setattr(MFMPretraining, "training_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(config)
    assert stopped.value.code == 128 + signal.SIGINT
    assert torch.load("outputs/gmm/mfm/last.ckpt", weights_only=True)["global_step"] == 4
    monkeypatch.setattr(MFMPretraining, "training_step", step)
    run([*config, "--ckpt_path", "outputs/gmm/mfm/last.ckpt"])
    assert torch.load("outputs/gmm/mfm/last.ckpt", weights_only=True)["global_step"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.init_args.objective.terms=[{name: eulerian}]"], "unknown objective 'eulerian'"),
        (["--model.init_args.network.class_path=mfm_lightning.networks.Perceiver"], "Perceiver"),
        (["--model.init_args.learning_rte=1"], "learning_rte"),
        (["--model.init_args.teacher=null"], "needs a teacher"),
        (["--model.init_args.network.init_args.dim=3"], "the teacher's states have shape (2,)"),
        (["--model.init_args.optimization.optimizer=sgd"], "unknown optimizer 'sgd'"),
    ],
)
def test_bad_configs_are_refused_before_training(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "configs/gmm/mfm.yaml", *FOUR_STEPS, *arguments])
    assert message in str(stopped.value) + capsys.readouterr().err
    assert not Path("outputs/gmm/mfm/last.ckpt").exists()


def test_missing_teacher_says_what_to_run(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "configs/digits/mfm.yaml", *FOUR_STEPS])
    assert "fit the base flow first" in str(stopped.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 11])), "labels in 0..11, outside 0..10"),
        ((torch.zeros(4, 8, 8), torch.zeros(4).long()), r"expected float \(B, 1, 8, 8\)"),
        ((torch.zeros(4, 1, 8, 8), torch.zeros(4)), "expected integers"),
        (torch.zeros(4, 1, 8, 8), r"must be \(x1, label\)"),
    ],
)
def test_bad_batches_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        check_batch(batch, (1, 8, 8), 10)
