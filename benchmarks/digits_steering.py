"""Steered single samples against Best-of-N on digits:  python -m benchmarks.digits_steering

The reward of one MFM-G sample against that of the best of N samples of the same base flow, with the evaluations
that each cost and the Fréchet distance of each set to the data. As in the paper's ImageNet experiment, candidates
come from one pool, in as many groups as there are samples; a pool is the same for all rewards.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import rewards
from mfm_lightning.alignment import steer, time_grid
from mfm_lightning.checkpoints import load_model
from mfm_lightning.data import DigitsDataModule
from mfm_lightning.decoders import PixelDecoder
from mfm_lightning.evaluation.base import write_table
from mfm_lightning.metrics.classifier import DigitsClassifier, train_classifier
from mfm_lightning.metrics.distances import frechet_distance
from mfm_lightning.samplers import sample_ode
from mfm_lightning.target import Target
from mfm_lightning.values import gradient_estimator


def settings() -> dict[str, tuple[dict, float]]:
    """Rewards by name, each with its scale (the paper's multiplier). The classifier is not the one that measures the
    Fréchet distance."""
    classifier = DigitsClassifier(seed=1)

    def log_probability(weights: dict[int, float]) -> dict:
        return {"name": "class_mixture", "classifier": classifier, "weights": weights}

    return {
        # at most log 0.4, which any clear 9 has: with 1,000 candidates there is always one
        "class mixture": (log_probability({1: 1, 3: 1, 5: 2, 7: 2, 9: 4}), 1.0),
        # log p(3|x) + log p(5|x) + log p(8|x), at most -3 log 3: digits that are all three
        "3, 5 and 8": ({"name": "sum", "rewards": [log_probability({k: 1}) for k in (3, 5, 8)]}, 16.0),
        "brightness": ({"name": "brightness"}, 120.0),
        "contrast": ({"name": "contrast"}, 300.0),
        "symmetry": ({"name": "symmetry"}, 300.0),
    }


@torch.no_grad()
def sample_pool(model, num: int, steps: int, seed: int, batch: int = 2048) -> Tensor:
    """`(num, *shape)` Euler samples of the base flow, without a class."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for begin in range(0, num, batch):
        noise = torch.randn(min(batch, num - begin), *model.state_shape, generator=generator)
        parts.append(sample_ode(lambda t, x: model.drift(t, x), noise, steps))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="outputs/digits/mfm/model.safetensors")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--candidates", type=int, default=1000, help="N of Best-of-N")
    parser.add_argument("--ode-steps", type=int, default=25, help="Euler steps of a candidate")
    parser.add_argument("--steps", type=int, default=50, help="steps of the steered ODE")
    parser.add_argument("--draws", type=int, default=1, help="posterior draws of a steering step")
    parser.add_argument("--clip", type=float, default=2.0, help="largest steering, in norms of the drift")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all reward scales")
    parser.add_argument("--pool", type=Path, help="file to keep the pool in, and to take it from if it is there")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/digits_steering"))
    options = parser.parse_args()

    data = DigitsDataModule()
    data.setup("test")
    real, labels = data.splits["train"]
    classifier = train_classifier(data.decode(real), labels, data.num_classes)
    model, decoder = load_model(options.model), PixelDecoder()

    def frechet(images: Tensor) -> float:
        return frechet_distance(classifier.features_module(), classifier.num_features, data.decode(real), images)

    begin = time.monotonic()
    if options.pool and options.pool.is_file():
        pool = torch.load(options.pool, weights_only=True)
    else:
        pool = sample_pool(model, options.samples * options.candidates, options.ode_steps, seed=0)
        if options.pool:
            options.pool.parent.mkdir(parents=True, exist_ok=True)
            torch.save(pool, options.pool)
    if len(pool) != options.samples * options.candidates:
        parser.error(f"{options.pool} holds {len(pool)} samples, not {options.samples} x {options.candidates}")
    pool_seconds = time.monotonic() - begin

    rows = []
    for name, (reward, scale) in settings().items():
        target = Target(model, rewards.build(reward), decoder, reward_scale=scale * options.scale)
        with torch.no_grad():
            r = torch.cat([target.plain_rewards(x) for x in pool.split(4096)])
        groups = r.reshape(options.samples, options.candidates)
        best, which = groups.max(dim=1)
        chosen = pool.reshape(options.samples, options.candidates, *model.state_shape)[torch.arange(len(best)), which]
        noise = torch.randn(options.samples, *model.state_shape, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        estimator = gradient_estimator("mfm_g", num_draws=options.draws)
        steered = steer(
            target, noise, estimator, time_grid(options.steps), clip=options.clip or None, generator=generator
        )
        base = (r.mean(), r.std() / len(r) ** 0.5, pool[: options.samples], options.ode_steps)
        nfe = (options.ode_steps + 1) * options.candidates
        spread = options.samples**0.5
        for method, mean, error, states, cost in (
            ("base flow", *base),
            (f"Best-of-{options.candidates}", best.mean(), best.std() / spread, chosen, nfe),
            ("MFM-G", steered.rewards.mean(), steered.rewards.std() / spread, steered.states, steered.nfe_per_sample),
        ):
            with torch.no_grad():
                distance = frechet(decoder(states))
            rows.append(
                {"reward": name, "method": method, "mean": float(mean), "s.e.": float(error), "Fréchet": distance,
                 "NFE": round(cost), "fewer": f"{nfe / cost:.0f}x"}
            )  # fmt: skip
        steered.save(options.output, name.replace(" ", "_"))
    title = f"{options.samples} samples; mean reward and its standard error; pool made in {pool_seconds:.0f} s"
    write_table(rows, title, options.output, "table")


if __name__ == "__main__":
    main()
