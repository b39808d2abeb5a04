"""Samples of a model in place of data: the same whatever the batches, of each class as many, as jobs ask of data."""

import pytest
import torch

from mfm_lightning.checkpoints import save_model
from mfm_lightning.data import ModelSamplesDataModule
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT
from mfm_lightning.sampling.model_sampler import ModelSampler


def saved(path, num_classes):
    torch.manual_seed(0)
    network = DiT(4, 2, 1, 16, 2, 2, 1, num_classes=num_classes, guidance_scales=())
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(MetaFlowMap(network), path)
    return str(path)


def test_samples_are_those_of_the_model(tmp_path):
    data = ModelSamplesDataModule(saved(tmp_path / "m.safetensors", 3), 30, ModelSampler("ode", 2), batch_size=8)
    data.setup()
    assert (data.state_shape, data.num_classes) == ((1, 4, 4), 3)
    assert [len(x) for x, _ in data.splits.values()] == [24, 3, 3]
    x, label = (torch.cat(parts) for parts in zip(*data.splits.values(), strict=True))
    assert label.tolist() == [i % 3 for i in range(30)]
    # two Euler steps by hand, of sample 7 alone, from its own noise
    x0 = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(first_seed(data, 7)))
    model = data._loaded
    half = x0 + 0.5 * model.drift(0.0, x0, label=torch.tensor([1]))
    by_hand = half + 0.5 * model.drift(0.5, half, label=torch.tensor([1]))
    torch.testing.assert_close(x[7:8], by_hand, atol=1e-5, rtol=1e-5)
    seen = torch.cat([data.train_batch(step)[0] for step in range(3)])
    assert len(seen.flatten(1).unique(dim=0)) == 24  # each once in an epoch


def first_seed(data, i):
    from mfm_lightning.interpolant import sample_generators

    (generator,) = sample_generators((data.seed, 17), [i])
    return generator.initial_seed()


def test_a_model_without_classes(tmp_path):
    data = ModelSamplesDataModule(saved(tmp_path / "m.safetensors", 0), 10, ModelSampler(steps=1), pixels=True)
    data.setup()
    assert data.splits["train"][1].unique().tolist() == [0]  # the null label
    assert data.decode(torch.tensor([-1.0, 1.0])).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="num_samples 5 must be at least 10"):
        ModelSamplesDataModule("m.safetensors", 5)
    with pytest.raises(FileNotFoundError, match=r"no model at .*none\.safetensors"):
        _ = ModelSamplesDataModule(str(tmp_path / "none.safetensors")).state_shape
