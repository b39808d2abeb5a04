"""What a suite like `alignment` will take: evaluations by part, operations, GPU hours; without weights, data or GPU.

    python -m mfm_benchmarks.costs imagenet256 --network imagenet256/mfm_xl2

Evaluations are counted, not estimated: each setting runs on a small network with the config's steps, draws and
particles. Operations are those of the matrix products of one evaluation, of networks without content. Hours are
operations by the peak of a device times the share of it that is reached; `--measure` measures that share for the same
networks on the CPU at hand.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mfm_benchmarks.command import load_suite
from mfm_benchmarks.suites.alignment import AlignmentSuite
from mfm_benchmarks.suites.imagenet256 import ImageNetSuite
from mfm_benchmarks.timing import clock, count_flops, product_peak
from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.alignment.target import Target
from mfm_lightning.commands.flow_plan import part_of
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP
from mfm_lightning.utils.configs import find_config, read_config

# the image towers, which take nearly all of it: source of the sizes are the models' own configs
TOWERS: dict[str, dict[str, Any]] = {
    "image_reward": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096, "patch_size": 16},
    "hpsv2": {"hidden_size": 1280, "num_hidden_layers": 32, "intermediate_size": 5120, "patch_size": 14},
    "pickscore": {"hidden_size": 1280, "num_hidden_layers": 32, "intermediate_size": 5120, "patch_size": 14},
}
VAE = {  # of stabilityai/sd-vae-ft-mse
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
}


Networks = dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]]


@dataclass
class Part:
    """Evaluations of one part of a suite, and the cells that it is cut into.

    Attributes:
        name: of the part.
        reward: that it evaluates; empty for none, or for a decoder alone.
        network, scored, decoded: evaluations of networks, of rewards, and of the decoder, a backward being one more.
        cells: pieces that processes share.
    """

    name: str
    reward: str
    network: float
    scored: float
    decoded: float
    cells: int


@dataclass
class Total:
    """Several parts together; `network` and `scored` are evaluations, `flops` operations."""

    name: str
    cells: int = 0
    network: float = 0.0
    scored: float = 0.0
    flops: float = 0.0

    def add(self, part: Part, flops: dict[str, int]) -> None:
        """Count a part."""
        self.cells, self.network, self.scored = (
            self.cells + part.cells,
            self.network + part.network,
            self.scored + part.scored,
        )
        self.flops += part.network * flops["network"] + part.decoded * flops["decoder"]
        self.flops += part.scored * flops.get(part.reward, 0)

    def hours(self, tera: float) -> float:
        """Of one device of so many TFLOP/s."""
        return self.flops / tera / 1e12 / 3600


def totals(parts: Iterator[Part], flops: dict[str, int]) -> list[Total]:
    """By method, and of all."""
    found, everything = dict[str, Total](), Total("all")
    for part in parts:
        name = re.split(r" \(|,", part.name)[0]
        found.setdefault(name, Total(name)).add(part, flops)
        everything.add(part, flops)
    return [*found.values(), everything]


def parts_of(suite: AlignmentSuite) -> Iterator[Part]:
    """The parts of a suite, in its order.

    Raises:
        ValueError: for a method that is trained, whose training is not planned.
    """
    num, pool = suite.num_samples * len(suite.seeds), suite.best_of_n
    most = pool.numbers[-1]
    blocks = len(list(pool.parts(max(1, min(pool.block // suite.num_samples, pool.max_rows)))))
    yield Part("pool", "", num * most * pool.steps, 0, 0, blocks * len(suite.seeds))
    for name in suite.rewards:
        yield Part("Best-of-N", name, 0, num * most, num * most, len(suite.seeds))
    cut = len(suite._blocks()) * len(suite.seeds)
    for point in suite._points:
        if point.fit is not None:
            raise ValueError(f"method {point.method!r} is trained, which is not planned: see mfm plan --config")
        method = point.build()
        counted = count(method)
        for name in suite.methods[point.method].rewards or suite.rewards:
            scales = len(suite.scales) if method.uses_reward_scale else 1
            network, scored = (scales * num * n for n in (counted.network, counted.reward))
            yield Part(point.name, name, network, scored, scored, scales * cut)
    if isinstance(suite, ImageNetSuite):
        for steps in suite.samples.steps:
            number = suite.samples.num_samples
            yield Part(f"{steps}-step samples", "", number * steps, 0, number, -(-number // suite.samples.chunk))


def count(method: Callable[..., Any]) -> Meter:
    """Evaluations of a sample, counted on a small network."""
    torch.manual_seed(0)
    target = Target(MetaFlowMap(MLP(2, 4, 1)), lambda x: -x.square().mean(dim=1))
    target.meter = Meter()
    method(target, torch.randn(1, 2), sample_generators((0, 1), [0]))
    return target.meter


def networks(suite: AlignmentSuite, config: str) -> Networks:
    """Makers and one evaluation of: the network, the decoder and the rewards' image towers."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPVisionConfig, CLIPVisionModel

    def velocity(network: nn.Module) -> Tensor:
        model = MetaFlowMap(network)
        x = torch.zeros(1, *model.state_shape, dtype=next(network.parameters()).dtype)
        return model.velocity(0.0, 0.5, x, 0.5, x)

    def decode(vae: Any) -> Tensor:
        return vae.decode(torch.zeros(1, 4, 32, 32, dtype=vae.dtype)).sample

    found: dict[str, Any] = {
        "network": (lambda: network_of(config), velocity),
        "decoder": (lambda: AutoencoderKL(**VAE), decode),
    }
    for name, settings in suite.rewards.items():
        kind = settings.plain if isinstance(settings.plain, str) else settings.plain.get("name")
        if kind not in TOWERS:
            raise ValueError(f"reward {name!r} ({kind}): known are the sizes of {', '.join(TOWERS)}")
        sizes = CLIPVisionConfig(image_size=224, num_attention_heads=16, **TOWERS[kind])
        found[name] = (
            lambda sizes=sizes: CLIPVisionModel(sizes),
            lambda tower: tower(torch.zeros(1, 3, 224, 224, dtype=tower.dtype)).pooler_output,
        )
    return found


def network_of(config: str) -> nn.Module:
    """The network that a config of `mfm fit` names.

    Raises:
        ValueError: if it names none.
    """
    path = find_config(config)
    described = ((read_config(path).get("model") or {}).get("init_args") or {}).get("network")
    if described is None:
        raise ValueError(f"{path}: model.init_args has no network")
    return part_of(path, "network", nn.Module, described)


def operations(made: Networks) -> dict[str, int]:
    """Of one evaluation of each."""
    found = {}
    for name, (make, evaluate) in made.items():
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            network = make().eval()
            found[name] = count_flops(lambda network=network, evaluate=evaluate: evaluate(network))
    return found


def shares(
    made: Networks,
    flops: dict[str, int],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int = 3,
) -> dict[str, float]:
    """The share of the peak of matrix products that one evaluation reaches here, of weights of chance."""
    peak, found = product_peak(device, dtype), {}
    for name, (make, evaluate) in made.items():
        network, best = make().eval().to(dtype), float("inf")
        with torch.no_grad(), device if device.type == "cuda" else nullcontext():
            network.to(device)
            for _ in range(rounds):
                begin = clock(device)
                evaluate(network)
                best = min(best, clock(device) - begin)
        found[name] = flops[name] / best / peak
        del network
    return found


def main() -> None:
    """The command of this module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", help="alignment, imagenet256, or another of their kind")
    parser.add_argument("--config", help="of the suite; the packaged one where left out")
    parser.add_argument("--network", required=True, help="config of mfm fit, whose network it is")
    parser.add_argument("--peak", type=float, default=989.0, help="of a GPU, TFLOP/s; H100 SXM in dense bf16: 989")
    parser.add_argument("--share", type=float, nargs="+", default=[0.3, 0.5], help="of the peak that is reached")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--measure", action="store_true", help="also the share that this machine's CPU reaches, fp32")
    given = parser.parse_args()
    suite, _, _ = load_suite(given.suite, [] if given.config is None else ["--config", given.config])
    if not isinstance(suite, AlignmentSuite):
        raise SystemExit(f"{given.suite} is no suite of the kind of alignment")
    made = networks(suite, given.network)
    flops = operations(made)
    print("TFLOP an evaluation: " + ", ".join(f"{name} {n / 1e12:.3f}" for name, n in flops.items()))
    if given.measure:
        reached = shares(made, flops, torch.device("cpu"), torch.float32)
        print(f"share of the CPU's peak ({torch.get_num_threads()} threads, fp32, one sample): "
              + ", ".join(f"{name} {share:.2f}" for name, share in reached.items()))  # fmt: skip
    rates = [share * given.peak for share in sorted(given.share, reverse=True)]
    heads = [f"h on {n} GPU{'s' * (n > 1)}" for n in (1, *given.gpus)]
    print(f"{'part':16} cells  networks [M]  rewards [M]    EFLOP  " + "  ".join(f"{head:>14}" for head in heads))
    for total in totals(parts_of(suite), flops):
        hours = [" to ".join(f"{total.hours(rate) / n:.2f}" for rate in rates) for n in (1, *given.gpus)]
        print(
            f"{total.name:16} {total.cells:5d}  {total.network / 1e6:12.2f}  {total.scored / 1e6:11.2f}  "
            f"{total.flops / 1e18:7.2f}  " + "  ".join(f"{text:>14}" for text in hours)
        )
    print(f"at {' to '.join(f'{rate:.0f}' for rate in rates)} TFLOP/s on each GPU: {given.share} of {given.peak:g}")


if __name__ == "__main__":
    main()
