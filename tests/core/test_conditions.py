"""Conditions as a value: rows, null, batches; and texts in place of labels through models, teachers and training."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.distributed.utils import _apply_to_tensors
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from mfm_lightning.alignment import Steering, Target, TargetSettings, TimeGrid
from mfm_lightning.checkpoints import save_model
from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import MFMPretraining, Optimization, ValueEstimation
from mfm_lightning.networks import MLP, NETWORKS, DiT, ValueMLP
from mfm_lightning.networks.base import VelocityNetwork
from mfm_lightning.objectives import ModelTeacher, Objective, PairSampler, WeightedTerm
from mfm_lightning.samplers import sample_refinement

EMPTY = torch.zeros(1, 3, 4)  # the empty prompt's embedding
NULL = Conditions(text=EMPTY, guidance=1.0)


class TextNetwork(VelocityNetwork):
    """Reads the mean embedding of the prompt, and the guidance scale."""

    state_shape, num_classes, guidance_scales = (2,), 0, (2.5,)

    def __init__(self):
        super().__init__()
        self.config = {}
        self.state, self.words, self.scale = nn.Linear(6, 2), nn.Linear(4, 2, bias=False), nn.Linear(1, 2, bias=False)

    @property
    def null_conditions(self):
        return NULL

    def forward(self, s, u, x, t, x_t, conditions):
        known = torch.cat([x, x_t, s[:, None], u[:, None]], dim=1)
        return self.state(known) + self.words(conditions.text.mean(1)) + self.scale(conditions.guidance[:, None] - 1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MetaFlowMap(TextNetwork())


def three():
    return Conditions(label=torch.tensor([4, 0, 2]), guidance=2.5, prompts=["a", "b", "c"])


def test_rows_follow_their_samples():
    given = three()
    assert given.num_rows == 3
    wide = given.expand(6)
    assert wide.label.tolist() == [4, 4, 0, 0, 2, 2]
    assert wide.prompts == ("a", "a", "b", "b", "c", "c")
    assert wide.guidance.tolist() == [2.5] * 6
    assert wide.expand(6, "cpu") is wide  # nothing to do
    for index in (torch.tensor([2, 0]), slice(None, None, 2)):
        part = given.take(index)
        order = [2, 0] if isinstance(index, torch.Tensor) else [0, 2]
        assert part.prompts == tuple("abc"[i] for i in order)
        assert part.label.tolist() == [[4, 0, 2][i] for i in order]
    assert given.expand(3).cat(wide.take(slice(1))).prompts == ("a", "b", "c", "a")
    assert Conditions().expand(5).num_rows == 1


def test_null_rows():
    null = Conditions(label=9, guidance=1.0)
    dropped = three().drop(torch.tensor([False, True, False]), null)
    assert dropped.label.tolist() == [4, 9, 2]
    assert dropped.guidance.tolist() == [2.5, 1.0, 2.5]
    assert dropped.prompts == ("a", "", "c")
    assert dropped.is_null(null).tolist() == [False, True, False]
    assert Conditions().filled(null).expand(2).label.tolist() == [9, 9]
    texts = Conditions(text=torch.randn(3, 3, 4), mask=torch.ones(3, 3, dtype=torch.bool))
    nothing = Conditions(text=EMPTY, mask=torch.tensor([[True, False, False]]))
    dropped = texts.drop(torch.tensor([True, False, True]), nothing)
    assert torch.equal(dropped.text[1], texts.text[1])
    assert dropped.text[[0, 2]].abs().sum() == 0
    assert dropped.mask.sum(1).tolist() == [1, 3, 1]
    assert dropped.is_null(nothing).tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"null condition: text of shape \(1, 3, 4\) for rows of \(3, 5, 4\)"):
        Conditions(text=torch.randn(3, 5, 4)).drop(torch.ones(3, dtype=torch.bool), nothing)


def test_what_does_not_fit_is_refused(model):
    for make, message in (
        (lambda: Conditions(label=torch.tensor([0.5])), "expected integers"),
        (lambda: Conditions(text=torch.zeros(2, 3)), r"text of shape \(2, 3\), expected \(B, L, D\)"),
        (lambda: Conditions(label=torch.zeros(4, dtype=torch.long), prompts=["a", "b"]), "different numbers of rows"),
        (lambda: three().expand(4), "4 states for 3 rows of label"),
        (lambda: three().cat(Conditions(label=1)), "different fields cannot be joined"),
        (lambda: Conditions.of(three(), label=1), "label is given twice"),
        (lambda: Conditions.of_batch({"lable": torch.zeros(2)}), "got lable, expected labels"),
        (lambda: Conditions.of_batch([1, 2]), "got list"),
        (lambda: model.drift(0.5, torch.zeros(2, 2), guidance=2.0), "guidance 2 is not a scale"),
        (lambda: model.drift(0.5, torch.zeros(2, 2), Conditions(guidance=2.0)), "guidance 2 is not a scale"),
        (lambda: sample_refinement(model, torch.zeros(2, 2), 1, Conditions(guidance=2.0)), "guidance 2 is not a scale"),
        (lambda: model.drift(0.5, torch.zeros(4, 2), label=torch.tensor([0, 0])), "2 rows for 4 states"),
        (lambda: MetaFlowMap(MLP(2, 8, 1, 3)).drift(0.5, torch.zeros(2, 2), label=4), r"labels in 4..4 .* 0..3"),
        (lambda: Target(MetaFlowMap(MLP(2, 8, 1, 3)), sum, label=1, guidance=7.0), "guidance 7 is not a scale"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="conditions are a Tensor"):
        model.drift(0.5, torch.zeros(2, 2), torch.tensor([0, 1]))


def test_small_integer_types_have_room_for_the_null_label():
    """Of 300 classes the null label, 300, is 44 in 8 bits."""
    given = Conditions(label=torch.tensor([44, 7], dtype=torch.uint8))
    null = Conditions(label=300)
    assert given.is_null(null).tolist() == [False, False]
    assert given.drop(torch.tensor([True, False]), null).label.tolist() == [300, 7]
    network = MLP(2, 8, 1, 300)
    assert MetaFlowMap(network).drift(0.5, torch.zeros(2, 2), given).shape == (2, 2)


def test_a_network_that_lacks_an_attribute_is_refused():
    network = torch.nn.Linear(2, 2)
    network.state_shape, network.num_classes, network.guidance_scales = (2,), 0, ()
    with pytest.raises(TypeError, match="a Linear has no null_conditions"):
        MetaFlowMap(network)


def test_transformations_see_the_tensors():
    """Batch transfer, FSDP's casts and torch.func go through these."""
    given = Conditions(label=torch.tensor([1, 2]), text=torch.randn(2, 3, 4), prompts=["a", "b"])
    doubled = pytree.tree_map(lambda x: 2 * x, {"given": given})["given"]
    assert doubled.label.tolist() == [2, 4]
    assert doubled.prompts == ("a", "b")
    leaves, spec = pytree.tree_flatten(given)
    assert len(leaves) == 2
    assert torch.equal(pytree.tree_unflatten(leaves, spec).text, given.text)
    cast = _apply_to_tensors(lambda x: x.to(torch.bfloat16) if x.is_floating_point() else x, (given,))[0]
    assert (cast.text.dtype, cast.label.dtype) == (torch.bfloat16, torch.int64)
    moved = L.fabric.utilities.move_data_to_device({"given": given}, torch.device("meta"))["given"]
    assert moved.text.device.type == moved.label.device.type == "meta"
    assert copy.deepcopy(given).prompts == ("a", "b")
    batch = given.as_batch()
    assert batch["prompts"] == ["a", "b"]
    assert torch.equal(Conditions.of_batch(batch).text, given.text)
    assert Conditions.of_batch(Conditions(label=torch.tensor([3])).as_batch()).label.tolist() == [3]


def test_a_model_knows_what_stands_for_nothing(model):
    """Without a text it is the empty prompt; a label or scale given for all is that of each."""
    x, x_t = torch.randn(2, 4, 2)
    empty = Conditions(text=EMPTY.expand(4, 3, 4), guidance=torch.ones(4))
    with torch.no_grad():
        torch.testing.assert_close(model.velocity(0.1, 0.6, x, 0.3, x_t), model.velocity(0.1, 0.6, x, 0.3, x_t, empty))
        dit = MetaFlowMap(DiT(4, 2, 1, 16, 2, 2, 1, num_classes=3, guidance_scales=(2.5,)))
        for p in dit.parameters():
            p.add_(0.1 * torch.randn_like(p))
        x = torch.randn(4, 1, 4, 4)
        one = dit.drift(0.3, x, label=2, guidance=2.5)
        each = Conditions(label=torch.full((4,), 2), guidance=torch.full((4,), 2.5))
        torch.testing.assert_close(one, dit.drift(0.3, x, each))
        torch.testing.assert_close(dit.drift(0.3, x), dit.drift(0.3, x, label=3))
        assert (one - dit.drift(0.3, x)).abs().max() > 1e-3
        draws = dit.sample_posterior(x, 0.3, 2, label=torch.tensor([0, 1, 2, 3]), noise=torch.randn(4, 2, 1, 4, 4))
        assert draws.shape == (4, 2, 1, 4, 4)


@pytest.mark.parametrize("omega", [0.0, 0.6])
def test_a_teacher_guides_texts_as_labels(model, omega):
    """b_null + g (1 - omega) (b_text - b_null), and no second evaluation for the empty prompt."""
    text = torch.randn(4, 3, 4)
    text[2] = 0
    scale, x = torch.tensor([2.5, 1.0, 2.5, 4.0]), torch.randn(4, 2)
    rows = []
    model.network.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    with torch.no_grad():
        found = ModelTeacher(model, omega).drift(0.4, x, Conditions(text=text, guidance=scale))
        unguided, null = model.drift(0.4, x, Conditions(text=text)), model.drift(0.4, x)
    torch.testing.assert_close(found, null + (scale * (1 - omega))[:, None] * (unguided - null))
    assert rows[0] == 4 + ((scale * (1 - omega) != 1) & (text.abs().sum((1, 2)) > 0)).sum()


class Captions(L.LightningDataModule):
    """Batches `(x1, {text, prompts})`."""

    state_shape, num_classes = (2,), 0

    def train_dataloader(self):
        torch.manual_seed(1)
        rows = [(torch.randn(2), {"text": torch.randn(3, 4), "prompts": f"number {i}"}) for i in range(64)]
        return DataLoader(rows, batch_size=16)


def test_texts_train_and_steer(tmp_path):
    """A batch with texts goes through Lightning, dropout and model guidance into the weights that read texts."""
    torch.manual_seed(0)
    terms = [WeightedTerm("data_diagonal", p=0.0), WeightedTerm("mean_flow", p=0.0)]
    objective = Objective(terms, PairSampler(class_dropout=0.5, guidance_scale=2.5))
    module = MFMPretraining(TextNetwork(), objective, optimization=Optimization(learning_rate=1e-2, warmup_steps=1))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, Captions())
    assert all((p - before[name]).abs().max() > 1e-4 for name, p in module.named_parameters())

    def reward(states, prompts):
        return states[:, 0] * torch.tensor([float(len(prompt)) for prompt in prompts])

    given = Conditions(text=torch.randn(2, 3, 4), prompts=["long enough", ""])
    method, x0 = Steering(grid=TimeGrid(5)), torch.randn(2, 2)
    target = Target(module.model.requires_grad_(False), reward, conditions=given)
    result = method(target, x0, torch.Generator().manual_seed(0))
    base = Steering(grid=TimeGrid(5), strength=0.0)(target, x0)
    moved = (result.states - base.states).norm(dim=1)
    assert moved[0] > 1e-3
    assert moved[1] < 1e-6  # a reward of an empty prompt asks for nothing


def test_values_of_texts_are_fitted(tmp_path, model, monkeypatch):
    """Dropped texts become the model's empty prompt; a value network that reads none has nothing to say of it."""
    monkeypatch.setitem(NETWORKS, "TextNetwork", TextNetwork)
    path = str(save_model(model, tmp_path / "model.safetensors"))
    reward = {"name": "linear_gaussian", "operator": [1.2, -0.8], "observation": -1.0, "noise_std": 1.0}
    module = ValueEstimation(ValueMLP(2, 8, 1), TargetSettings(path, reward), class_dropout=0.5)
    seen = []
    module.target.model.network.register_forward_hook(lambda network, inputs, output: seen.append(inputs[5].text))
    module.losses(torch.randn(64, 2), Conditions(text=torch.ones(64, 3, 4)), training=False)
    (text,) = seen
    assert 12 < (text.abs().sum((1, 2)) == 0).sum() < 52  # P < 1e-6


def test_wrong_batches_of_conditions_are_refused(model):
    from mfm_lightning.modules import check_batch

    x1 = torch.zeros(4, 2)
    for given, message in (
        ({"text": torch.zeros(3, 3, 4)}, "3 rows of text in a batch of 4"),
        ({"txt": torch.zeros(4, 3, 4)}, "got txt"),
        ({"label": torch.full((4,), 7)}, r"labels in 7..7, outside 0..0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_batch((x1, given), (2,), 0)
    check_batch((x1, {"text": torch.zeros(4, 3, 4), "prompts": list("abcd")}), (2,), 0)


def test_a_users_network_may_call_a_layer_embed():
    """What embeds prompts is known by its class."""

    class WithLayer(TextNetwork):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(2, 2)

    network = WithLayer()
    terms = [WeightedTerm("data_diagonal", p=0.0)]
    module, text = MFMPretraining(network, Objective(terms, PairSampler(guidance_scale=2.5))), torch.randn(4, 3, 4)
    assert torch.isfinite(module.losses(torch.randn(4, 2), Conditions(text=text), training=True)["loss"])
    given = Conditions(prompts=["a cat"])
    assert torch.isfinite(MetaFlowMap(network).drift(0.5, torch.randn(4, 2), given)).all()
