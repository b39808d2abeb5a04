"""Files of our own come back as they were; others are refused with what they are."""

import pickle

import pytest
import torch

from mfm_lightning.checkpoints import CheckpointError, import_checkpoint, load_model, save_model
from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP, DiT
from tests.parity import ARCHITECTURE, DATA


def test_bad_checkpoints_are_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("run",))

    (tmp_path / "code.pt").write_bytes(pickle.dumps(Code()))
    torch.save({"weights": Code()}, tmp_path / "code.ckpt")
    for name in ("code.pt", "code.ckpt"):
        with pytest.raises(CheckpointError, match="not a file of plain tensors"):
            import_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        import_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="unknown source 'edm'"):
        import_checkpoint(DATA / "official_mfm.safetensors", source="edm")
    save_model(MetaFlowMap(MLP()), tmp_path / "mlp.safetensors")
    with pytest.raises(CheckpointError, match="names missing"):
        import_checkpoint(tmp_path / "mlp.safetensors", **ARCHITECTURE)
    torch.save(MetaFlowMap(DiT(8, 2, 4, 32, 4, 4, 3, 10)).network.state_dict(), tmp_path / "narrow.pt")
    with pytest.raises(CheckpointError, match=r"of another shape, first pos_embed: \(1, 16, 32\) in the file"):
        import_checkpoint(tmp_path / "narrow.pt", **ARCHITECTURE)


def test_save_and_load_are_exact(tmp_path):
    model = MetaFlowMap(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, qk_norm=True))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    loaded = load_model(save_model(model, tmp_path / "model.safetensors"))
    x = torch.randn(3, 1, 8, 8)
    arguments = (0.2, 0.9, x, 0.4, x.flip(0), Conditions(label=5))
    assert torch.equal(loaded.velocity(*arguments), model.velocity(*arguments))
    with pytest.raises(ValueError, match=r"this network takes \(B, 1, 8, 8\)"):
        model.velocity(0.2, 0.9, x[:, 0], 0.4, x[:, 0])
    with pytest.raises(ValueError, match="not a scale that this network knows"):
        model.velocity(*arguments, guidance=4.0)
