"""Adapters of text-to-image flows on two processes: FSDP2, the frozen transformer in shards, trains as DDP does."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from mfm_lightning.checkpoints import CheckpointError, save_model
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT
from mfm_lightning.training.consolidation import consolidate
from tests.backbones import encoders, tiny
from tests.modules.test_prompt_finetuning import config, images  # noqa: F401
from tests.processes import torchrun
from tests.training.test_distributed import NETWORK


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """An SD3 with tiny text encoders, and a VAE without a shift."""
    folder = tmp_path_factory.mktemp("flows")
    tiny.sd3(**encoders.of_sd3(folder / "words")).save_pretrained(folder / "sd3")
    tiny.kl_vae(shift=None).save_pretrained(folder / "plain_vae")
    return folder


def finetuning(places, images):  # noqa: F811
    return config(places, images, 4)


def pretraining(places, images):  # noqa: F811
    """A Meta Flow Map as an adapter, on the same data."""
    found = config(places, images, 4)
    flow = {"name": str(places / "sd3"), "image_size": 16, "rank": 2}
    found["model"] = {
        "class_path": "mfm_lightning.modules.MFMPretraining",
        "init_args": {
            "network": {"class_path": "mfm_lightning.backbones.FlowAdapter", "init_args": flow},
            "objective": {"terms": [{"name": "distilled_diagonal"}, {"name": "semigroup"}],
                          "pairs": {"guidance_scale": 1.0}},
            "optimization": {"learning_rate": 0.01, "warmup_steps": 0},
        },
    }  # fmt: skip
    found["data"] = found["data"]["init_args"]["data"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("job", [finetuning, pytest.param(pretraining, marks=pytest.mark.long)])
def test_fsdp_is_the_training_of_ddp(places, images, tmp_path, job):  # noqa: F811
    """The same batches and random numbers on each rank; weights after four steps, tables of `test`, and a run that was
    stopped after two and gone on with by the other strategy."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(job(places, images)))
    common = ["--config=run.yaml", "--trainer.devices=2"]
    for name, strategy in (("ddp", "ddp"), ("fsdp", "fsdp2")):
        where = f"--trainer.default_root_dir={name}"
        torchrun(tmp_path, 2, "fit", *common, where, f"--trainer.strategy={strategy}")
    # a checkpoint in shards of its own, whose network is put together by one process
    shards = ["--trainer.strategy=mfm_lightning.training.fsdp.FSDP", "--trainer.strategy.save_sharded=true"]
    shards += ["--trainer.default_root_dir=shards", "--trainer.max_steps=2"]
    torchrun(tmp_path, 2, "fit", *common, *shards)
    assert (tmp_path / "shards/last.ckpt/.metadata").is_file()
    consolidate(tmp_path / "shards/last.ckpt", tmp_path / "together.safetensors")
    together, left = (load_file(tmp_path / name) for name in ("together.safetensors", "shards/model.safetensors"))
    assert together.keys() == left.keys()
    assert all(torch.equal(together[key], value) for key, value in left.items())
    with safe_open(tmp_path / "together.safetensors", "pt") as file, \
            safe_open(tmp_path / "shards/model.safetensors", "pt") as other:  # fmt: skip
        assert file.metadata() == {**other.metadata(), "averaged": "true"}
        assert other.metadata()["network"].startswith("mfm_lightning.backbones.")  # no class that FSDP has made of it
    parts = [*common, "--trainer.default_root_dir=parts"]
    torchrun(tmp_path, 2, "fit", *parts, "--trainer.strategy=fsdp2", "--trainer.max_steps=2")
    torchrun(tmp_path, 2, "fit", *parts, "--trainer.strategy=ddp", "--ckpt_path=last")
    ddp = load_file(tmp_path / "ddp/model.safetensors")
    assert sum(v.abs().sum() for k, v in ddp.items() if k.endswith(".1.weight")) > 0.1  # LoRA begins at zero there
    for name in ("fsdp", "parts"):
        ours = load_file(tmp_path / name / "model.safetensors")
        assert ours.keys() == ddp.keys()
        for key, value in ddp.items():
            assert torch.allclose(ours[key], value, atol=1e-5, rtol=1e-3), (name, key)
    if job is not finetuning:
        return
    lora = [load_file(tmp_path / name / "lora/pytorch_lora_weights.safetensors") for name in ("ddp", "fsdp")]
    assert all(torch.allclose(lora[1][key], value, atol=1e-5, rtol=1e-3) for key, value in lora[0].items())
    tests = [*common, "--trainer.default_root_dir=fsdp", "--ckpt_path=fsdp/last.ckpt"]
    torchrun(tmp_path, 2, "test", *tests, "--trainer.strategy=fsdp2")
    sharded = json.loads((tmp_path / "fsdp/test/policy.json").read_text())
    noted = json.loads((tmp_path / "fsdp/test/weights.json").read_text())["policy.json"]["weights"]
    tests = [*common[:1], "--trainer.default_root_dir=fsdp", "--ckpt_path=fsdp/last.ckpt"]
    torchrun(tmp_path, 1, "test", *tests)
    assert json.loads((tmp_path / "fsdp/test/policy.json").read_text()) == sharded
    again = json.loads((tmp_path / "fsdp/test/weights.json").read_text())["policy.json"]["weights"]
    assert again == noted
    assert Path(tmp_path / "fsdp/test/before_after.png").is_file()


def networks_finetuning(folder):
    """Of a network, by low-rank adapters."""
    torch.manual_seed(0)
    model = MetaFlowMap(DiT(**NETWORK))
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    save_model(model, folder / "mfm.safetensors")
    target = {"model": str(folder / "mfm.safetensors"), "reward": "brightness", "reward_scale": 10.0,
              "decoder": {"class_path": "mfm_lightning.networks.PixelDecoder"}}  # fmt: skip
    options = {"target": target, "adapters": {"rank": 2}, "optimization": {"learning_rate": 0.01, "warmup_steps": 0}}
    return {
        "seed_everything": 0,
        "trainer": {"max_steps": 4, "val_check_interval": 2, "logger": False, "accelerator": "cpu"},
        "model": {"class_path": "mfm_lightning.modules.RewardFinetuning", "init_args": options},
        "data": {"class_path": "tests.distributed_parts.StepData"},
    }


def test_low_rank_adapters_of_a_network_in_shards(tmp_path):
    """As DDP; and gone on with on one process from FSDP's checkpoint, whose frozen weights are not in it."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(networks_finetuning(tmp_path)))
    common = ["--config=run.yaml", "--trainer.devices=2"]
    for name, strategy in (("ddp", "ddp"), ("fsdp", "fsdp2")):
        torchrun(tmp_path, 2, "fit", *common, f"--trainer.default_root_dir={name}", f"--trainer.strategy={strategy}")
    ddp, fsdp = (load_file(tmp_path / name / "model.safetensors") for name in ("ddp", "fsdp"))
    before = load_file(tmp_path / "mfm.safetensors")
    moved = [key for key, value in ddp.items() if not torch.equal(value, before[key])]
    assert moved
    assert all(key.endswith("weight") for key in moved)
    assert all(torch.allclose(fsdp[key], value, atol=1e-5, rtol=1e-3) for key, value in ddp.items())
    state = torch.load(tmp_path / "fsdp/last.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name or "normaliser" in name for name in state)
    with pytest.raises(CheckpointError, match="its file is made of more than its weights; go on from it by mfm fit"):
        consolidate(tmp_path / "fsdp/last.ckpt", tmp_path / "together.safetensors")  # it is merged into the base
    more = ["--trainer.default_root_dir=fsdp", "--ckpt_path=last", "--trainer.max_steps=5"]
    torchrun(tmp_path, 1, "fit", "--config=run.yaml", *more)
