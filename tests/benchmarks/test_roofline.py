"""Operations, bytes and memory on paper, against closed forms and against what torch allocates."""

import pytest
import torch
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mfm_benchmarks.roofline import Counter, PaperStep, Work, largest_batch, parts
from mfm_benchmarks.timing import count_flops, peak_bytes
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT
from mfm_lightning.tangents import velocity_and_jvp

SIZES = {
    "input_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 64, "depth": 3, "num_heads": 4,
    "encoder_depth": 2, "num_classes": 10,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    network = {"class_path": "mfm_lightning.networks.DiT", "init_args": SIZES}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"network": network}}}))
    return str(tmp_path / "job.yaml")


def test_a_linear_layer_and_what_is_no_work():
    layer, x = nn.Linear(30, 50, bias=False), torch.randn(20, 30)
    with torch.no_grad(), Counter(peak=1e3, bandwidth=1e2) as counter:
        y = layer(x)
        y.reshape(2, 10, 50).transpose(0, 1)  # views
        torch.empty(1000)
    flops, moved = 2 * 20 * 30 * 50, 4 * (20 * 30 + 30 * 50 + 20 * 50)
    assert counter.work == Work(flops, moved, max(flops / 1e3, moved / 1e2), flops / 1e3)
    with torch.no_grad(), Counter(1e3, 1e2) as counter:
        y + y
        y.mul_(2.0)
    assert counter.work.flops == 0
    assert counter.work.moved == 4 * y.numel() * (3 + 2)


def test_tensors_without_content_move_what_real_ones_do():
    """They ask for devices through the same door as operations go."""

    def moved() -> float:
        layer, x = nn.Linear(30, 50), torch.ones(4, 20, 30)
        with Counter(1e3, 1e2) as counter:
            nn.functional.gelu(layer(x.to(x.device))).sum().backward()
        return counter.work.moved

    with FakeTensorMode():
        without = moved()
    assert without == moved()


def test_fused_attention_counts_as_its_products():
    q = torch.randn(2, 3, 100, 16, requires_grad=True)
    with Counter(1.0, 1.0) as counter:
        out = nn.functional.scaled_dot_product_attention(q, q.detach(), q.detach())
        forward = counter.work.flops
        out.sum().backward()
    assert forward == 4 * 2 * 3 * 100 * 100 * 16  # q k^T and S v, two operations a product
    assert counter.work.flops - forward == 2.5 * forward  # q k^T again, and four products of gradients


def test_operations_are_those_that_torch_counts(config):
    """Of the forward pass, and of the step's parts in its own multiples."""
    step = PaperStep(config, 6, "fp32")
    model = MetaFlowMap(DiT(**SIZES))
    x, s = torch.randn(6, *model.state_shape), torch.rand(6)
    with torch.no_grad():
        expected = count_flops(lambda: model.velocity(s, s, x, s, x))
    found = parts(step, 1.8, 1e12, 1e12)
    assert found["forward, no graph (for comparison)"].flops == expected
    assert found["teacher"].flops == pytest.approx(1.8 * expected)
    assert 2.5 * expected < found["diagonal term: forward and backward"].flops < 3.2 * expected
    assert found["clipping and optimiser, at least"].moved == 10 * 4 * sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    whole = found.pop("step")
    found.pop("forward, no graph (for comparison)")
    assert whole.seconds == pytest.approx(sum(work.seconds for work in found.values()))


@pytest.mark.parametrize("backend", ["explicit", "functorch"])
def test_memory_is_what_torch_allocates(config, backend):
    """Within a tenth of a real step's on this CPU; what is planned for a GPU is the same step."""
    model = MetaFlowMap(DiT(**SIZES))
    x, s = torch.randn(16, *model.state_shape), torch.rand(16)
    along = (torch.ones_like(s), torch.zeros_like(s), x)

    def real() -> None:
        diagonal = model.velocity(s, s, x, s, x).square().sum()
        v, dv = velocity_and_jvp(model, s, s, x, s, x, along, None, backend)
        (diagonal + (v - dv.detach()).square().sum()).backward()

    real()  # gradients are there from now on
    allocated = peak_bytes(real, torch.device("cpu"))
    planned = PaperStep(config, 16, "fp32").memory(backend, plain=backend == "functorch")
    assert planned == pytest.approx(allocated, rel=0.1)


def test_the_largest_batch_fits_and_one_more_does_not(config):
    memory = 40e6
    batch = largest_batch(lambda n: PaperStep(config, n, "fp32"), memory, "explicit")
    states = 6 * 4 * PaperStep(config, 1, "fp32").parameters
    assert batch > 8
    assert states + PaperStep(config, batch, "fp32").memory("explicit") <= 1.01 * memory
    assert states + PaperStep(config, batch + 2, "fp32").memory("explicit") > 0.99 * memory
