"""Weights in the layouts of released DiTs and SiTs: tables of labels with and without the null label, and QK-norm."""

import argparse

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mfm_lightning.checkpoints import (
    CheckpointError,
    import_checkpoint,
    load_model,
    save_model,
)
from mfm_lightning.commands.main import run
from mfm_lightning.networks import DiT
from mfm_lightning.networks.dit import Attention
from mfm_lightning.networks.dual import Dual
from tests.parity import NOT_IN_SHAPES, weights


def labels(rows: int) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))


def sit(tmp_path, rows, args=None):
    state = {**weights("sit"), "y_embedder.embedding_table.weight": labels(rows)}
    torch.save({"ema": state, **({} if args is None else {"args": args})}, tmp_path / "sit.pt")
    return tmp_path / "sit.pt"


@pytest.mark.parametrize(
    ("rows", "given", "args", "classes"),
    [
        (11, None, None, 10),
        (11, 10, None, 10),
        (10, 10, None, 10),
        (1, 1, None, 1),
        (2, 1, None, 1),
        (7, 7, None, 7),
        (10, None, argparse.Namespace(num_classes=10), 10),
        (10, None, {"num_classes": 9}, 9),
    ],
)
def test_a_table_without_the_null_label_gets_one(tmp_path, caplog, rows, given, args, classes):
    model = import_checkpoint(sit(tmp_path, rows, args), "sit", num_classes=given, **NOT_IN_SHAPES)
    table, expected = model.network.label_embedding.weight, labels(rows)
    assert model.num_classes == classes
    assert torch.equal(table[: min(rows, classes + 1)], expected[: classes + 1])
    assert ("has no row of the null label" in caplog.text) == (rows == classes)
    if rows == classes:
        torch.testing.assert_close(table[classes], expected.mean(dim=0))
    x = torch.randn(1, 4, 8, 8)
    assert torch.isfinite(model.drift(0.3, x)).all()  # the null label


@pytest.mark.parametrize("rows", [1, 2, 10, 1000])
def test_where_rows_do_not_tell_it_is_asked_for(tmp_path, rows, capsys):
    with pytest.raises(CheckpointError, match=rf"{rows} classes without the null label .*--num-classes {rows} or"):
        run(["import", str(sit(tmp_path, rows)), "--source", "sit", "--num-heads", "4", "--encoder-depth", "3",
             "--output", str(tmp_path / "out.safetensors")])  # fmt: skip
    with pytest.raises(CheckpointError, match=f"has {rows} rows: expected 20 classes"):
        import_checkpoint(sit(tmp_path, rows), "sit", num_classes=20, **NOT_IN_SHAPES)


def test_qk_norm_is_the_releases(tmp_path):
    """RMS over each head with one scale, eps 1e-6, against attention written out in float64."""
    torch.manual_seed(0)
    attention = Attention(32, 4, "rms").double()
    assert {"q_norm.scale", "k_norm.scale"} < set(attention.state_dict())
    for p in attention.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 5, 32, dtype=torch.float64) * torch.tensor([1.0, 1e-4])[:, None, None]

    q, k, v = F.linear(x, attention.qkv.weight, attention.qkv.bias).reshape(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)
    q, k = (
        y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.scale
        for y, norm in ((q, attention.q_norm), (k, attention.k_norm))
    )
    mixed = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v
    expected = F.linear(mixed.transpose(1, 2).reshape(2, 5, 32), attention.proj.weight, attention.proj.bias)
    torch.testing.assert_close(attention(Dual(x)).value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_weights_with_qk_norm_are_imported_with_their_norm(tmp_path, kind):
    """The release's (`scale`), and those of timm's attention (`weight`, `bias`)."""
    state = weights("sit")
    for i in range(4):
        for norm in "qk":
            names = ("scale",) if kind == "rms" else ("weight", "bias")
            state |= {f"blocks.{i}.attn.{norm}_norm.{name}": torch.randn(16) for name in names}
    torch.save(state, tmp_path / "a.pt")
    model = import_checkpoint(tmp_path / "a.pt", "sit", encoder_depth=3)
    assert (model.network.config["qk_norm"], model.network.config["num_heads"]) == (kind, 4)
    loaded, x = load_model(save_model(model, tmp_path / "ours.safetensors")), torch.randn(2, 4, 8, 8)
    assert torch.equal(loaded.drift(0.3, x, label=1), model.drift(0.3, x, label=1))


def test_an_unknown_qk_norm_is_refused():
    with pytest.raises(ValueError, match=r"qk_norm 'batch': expected true or 'rms'"):
        DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, qk_norm="batch")
