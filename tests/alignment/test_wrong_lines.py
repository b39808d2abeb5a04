"""One-line errors of the alignment methods: each of tests/mutations/alignment.json fails one of these tests.

Methods run on scripted posteriors, values and moves that record what they are called with, so that what must follow is
computed here, without chance, whatever the random numbers were.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
from scipy import stats

from mfm_lightning.alignment import DrawValue, Search, Steering, Target, TimeGrid
from mfm_lightning.alignment.posteriors import Posterior
from mfm_lightning.alignment.smc import ParticleMethod, sde_step
from mfm_lightning.alignment.values import Estimate, GradientEstimator, ValueEstimator
from tests.noise import seeded

B, M, N, D = 4, 3, 5, 64


class Slow:
    """A model of drift 0.1 x; what it flows to does not matter here."""

    state_shape = (D,)

    def drift(self, t, x, conditions=None):
        return 0.1 * x


def target(reward=lambda x: x[:, 0]):
    return Target(Slow(), reward)


class WorseAndWorse(Posterior):
    """Draws around 2 - 4t, recorded with their time and state."""

    def __init__(self):
        self.calls = []

    def __call__(self, target, t, x_t, noise):
        drawn = 2 - 4 * float(t) + noise
        self.calls.append((float(t), x_t.clone(), drawn.clone()))
        return drawn


def chosen(draws, selection):
    """`(B*M, D)` of `(B*M, N, D)`: the draw of highest first coordinate, of a particle or of all of its sample's."""
    groups = draws if selection == "per_particle" else draws.reshape(B, M * N, D)
    best = torch.stack([group[group[:, 0].argmax()] for group in groups])
    return best if selection == "per_particle" else best.repeat_interleave(M, dim=0)


@pytest.mark.parametrize("selection", ["overall", "per_particle"])
def test_search_renoises_deterministically_to_the_next_time(selection):
    """x' = (1-t') z + t' c with the z that leads from the chosen draw c to the present state, x = (1-t) z + t c."""
    posterior = WorseAndWorse()
    Search(M, N, 4, selection=selection, stochastic=False, posterior=posterior)(
        target(), torch.randn(B, D, generator=seeded()), seeded(1)
    )
    assert [t for t, _, _ in posterior.calls] == pytest.approx([(k / 4) ** 2.5 for k in range(4)])
    for (t, x, draws), (then, following, _) in zip(posterior.calls, posterior.calls[1:], strict=False):
        c = chosen(draws, selection)
        torch.testing.assert_close(following, then * c + (1 - then) * (x - t * c) / (1 - t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("selection", ["overall", "per_particle"])
def test_search_renoises_with_fresh_noise_to_the_next_time(selection):
    """z = (x' - t' c) / (1-t') of each step is n = 768 standard normal numbers: the sum of their squares is chi-square
    with n degrees of freedom, and their product with the noise before, over sqrt(n), nearly standard normal. Six sums
    at 1e-6 each, both sides, and four products beyond 5: false alarms below 2e-5."""
    posterior = WorseAndWorse()
    Search(M, N, 4, selection=selection, posterior=posterior)(
        target(), torch.randn(B, D, generator=seeded()), seeded(1)
    )
    before = None
    for (_, _, draws), (then, following, _) in zip(posterior.calls, posterior.calls[1:], strict=False):
        z = (following - then * chosen(draws, selection)) / (1 - then)
        low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], z.numel())
        assert low < z.square().sum() < high
        if before is not None:
            assert (z * before).sum().abs() / z.numel() ** 0.5 < 5
        before = z


def test_search_keeps_the_best_draw_of_all_times():
    """Draws get worse, so that the last ones' best is not the best."""
    posterior = WorseAndWorse()
    result = Search(M, N, 4, posterior=posterior)(target(), torch.randn(B, D, generator=seeded()), seeded(1))
    every = torch.cat([draws.reshape(B, M * N, D) for _, _, draws in posterior.calls], dim=1)
    best = torch.stack([draws[draws[:, 0].argmax()] for draws in every])
    assert (every[:, -M * N :, 0].amax(1) < best[:, 0]).all()
    assert torch.equal(result.states, best)
    torch.testing.assert_close(result.rewards, best[:, 0])


class ScriptedValue(ValueEstimator):
    """V_t(x) = (2 + 3 sin 9t) x_0, recorded."""

    def __init__(self):
        self.calls = []

    @staticmethod
    def value(t, x):
        return (2 + 3 * math.sin(9 * t)) * x[:, 0]

    def __call__(self, target, t, x, generator=None):
        self.calls.append((float(t), x.clone()))
        return Estimate(None, self.value(float(t), x), torch.ones(len(x)))


@dataclass(kw_only=True)
class Still(ParticleMethod):
    """Particles that stay where they are, and so tell whose copies they are; `twist` x_1 is a move's log-ratio."""

    twist: float = 0.0
    value: ScriptedValue = field(default_factory=ScriptedValue)
    moves: list = field(default_factory=list)

    @property
    def estimate(self):
        return self.value

    def describe(self):
        return {"name": "still"}

    def move(self, target, step, x, estimate, generator):
        self.moves.append((step, x.clone(), estimate.value.clone()))
        return x, self.twist * x[:, 1]


@pytest.mark.parametrize("ess_threshold", [0.0, 0.6, 1.0])
def test_weights_resampling_and_normaliser_of_smc(ess_threshold):
    """The weights of each step from the recorded states: resampled particles have floor or ceil of their expected
    copies, start again from weight 1 with their own values, and the normaliser is the product of the mean weights."""
    particles = 16
    method = Still(num_particles=particles, grid=TimeGrid(6), ess_threshold=ess_threshold, twist=0.4, keep="all")
    result = method(target(), torch.randn(B, D, generator=seeded()), seeded(1))
    t, x = method.value.calls[0]
    log_weights, log_normaliser = ScriptedValue.value(t, x).double().reshape(B, particles), torch.zeros(B).double()
    resampled = torch.zeros(B)
    for (now, then), following, value in method.moves:
        torch.testing.assert_close(value, ScriptedValue.value(now, following), rtol=1e-5, atol=1e-6)
        weights = log_weights.softmax(1)
        poor = 1 / weights.square().sum(1) < ess_threshold * particles
        for b in range(B):
            own, new = x.reshape(B, particles, D)[b], following.reshape(B, particles, D)[b]
            if not poor[b]:
                assert torch.equal(new, own)
                continue
            places, which = own[:, 0].unique(return_inverse=True)  # copies lie side by side, and count together
            expected = torch.zeros(len(places)).double().scatter_add(0, which, particles * weights[b])
            copies = (new[:, :1] == places).sum(0)
            assert copies.sum() == particles
            assert ((copies - expected).abs() < 1 + 1e-5).all()
            log_normaliser[b] += log_weights[b].logsumexp(0) - math.log(particles)
            log_weights[b] = 0
            resampled[b] += 1
        x = following
        after = x[:, 0] if then == 1 else ScriptedValue.value(then, x)
        change = after - ScriptedValue.value(now, x) + 0.4 * x[:, 1]
        log_weights = log_weights + change.double().reshape(B, particles)
    assert (resampled == 6 if ess_threshold == 1 else resampled >= bool(ess_threshold)).all()
    log_normaliser = log_normaliser + log_weights.logsumexp(1) - math.log(particles)
    torch.testing.assert_close(result.log_normaliser.double(), log_normaliser, rtol=1e-5, atol=1e-5)


def kept(keep, rows, weights):
    """How many copies of each of a sample's particles, of the given weights, are returned: `(rows, particles)`."""
    method = Still(num_particles=len(weights), grid=TimeGrid(1), ess_threshold=0.0, keep=keep)
    calls = []

    def reward(x):  # of the particles by their place; later, of what is returned
        calls.append(len(x))
        return torch.tensor(weights).log().repeat(rows) if len(calls) == 1 else x[:, 0]

    states = method(target(reward), torch.randn(rows, D, generator=seeded()), seeded(1)).states.reshape(rows, -1, D)
    particles = method.moves[0][1].reshape(rows, len(weights), D)
    return (states[:, :, None, 0] == particles[:, None, :, 0]).sum(1)


def test_what_smc_returns_has_the_weights():
    """keep="sample": Pearson's chi-square of n = 4,000 independent samples' particles against weights 1, 2, 3, 4, three
    degrees of freedom, 1e-5 false alarms. "all": floor or ceil of the expected copies. "best": the highest reward."""
    counts = kept("sample", 4000, [1.0, 2.0, 3.0, 4.0])
    assert (counts.sum(1) == 1).all()
    assert stats.chisquare(counts.sum(0), [400, 800, 1200, 1600]).pvalue > 1e-5
    copies = kept("all", 50, [1.0, 2.0, 3.0, 4.0])
    assert (copies >= torch.tensor([0, 0, 1, 1])).all()
    assert (copies <= torch.tensor([1, 1, 2, 2])).all()
    assert kept("best", 5, [1.0, 9.0, 3.0, 4.0]).tolist() == [[0, 1, 0, 0]] * 5
    assert kept("sample", 5, [1e-30, 1e-30, 1.0]).tolist() == [[0, 0, 1]] * 5


class Constant(GradientEstimator):
    """The same gradient everywhere."""

    def __init__(self, gradient):
        self.gradient = gradient

    def __call__(self, target, t, x, generator=None):
        return Estimate(self.gradient, x[:, 0], torch.ones(len(x)))


@pytest.mark.parametrize("dynamics", ["ode", "sde"])
def test_clip_bounds_the_steering(dynamics):
    """By clip norms of the base drift, its direction kept; what is smaller stays. At t = 1/2, sigma^2/2 = 1."""
    x, direction = torch.randn(B, D, generator=seeded()), torch.randn(B, D, generator=seeded(1))
    drift = 0.1 * x
    size = torch.tensor([0.1, 1.9, 2.1, 50.0])[:, None] * drift.norm(dim=1, keepdim=True)
    gradient = direction / direction.norm(dim=1, keepdim=True) * size
    method = Steering(Constant(gradient), TimeGrid(1, 0.5), dynamics, clip=2.0)
    found = method(target(), x).states
    shorter = gradient * torch.tensor([1.0, 1.0, 2 / 2.1, 2 / 50])[:, None]
    torch.testing.assert_close(found, x + 0.5 * (drift + shorter))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_clip_and_weights_of_twisted_smc(clip):
    """The twist is strength * deviation * gradient, in deviations of the step, and at most clip sqrt(D) long; the
    move's weight is the ratio of the base's density to the twisted one's at the new state."""
    x, direction = torch.randn(B, D, generator=seeded()), torch.randn(B, D, generator=seeded(1))
    now, then, strength = 0.5, 0.6, 0.7
    deviation = math.sqrt(2 * 1.0 * 0.1)
    length = torch.tensor([0.1, 3.9, 4.1, 20.0])[:, None]  # the limit is 4
    gradient = direction / direction.norm(dim=1, keepdim=True) * length / (strength * deviation)
    estimate = Estimate(gradient, x[:, 0], torch.ones(B))
    moved, log_ratio = sde_step(target(), (now, then), x, estimate, 25.0, strength, clip, seeded(2))
    straight, none = sde_step(
        target(), (now, then), x, Estimate(None, x[:, 0], torch.ones(B)), 25.0, generator=seeded(2)
    )
    wanted = length if clip is None else length.clamp(max=4.0)
    twist = deviation * wanted * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(moved - straight, twist, rtol=1e-4, atol=1e-5)
    mean = x + 0.1 * (2 * 0.1 * x - x / now)
    base, twisted = (torch.distributions.Normal(m, deviation).log_prob(moved).sum(1) for m in (mean, mean + twist))
    torch.testing.assert_close(log_ratio, base - twisted, rtol=1e-3, atol=1e-3)
    assert (none == 0).all()


def test_the_antithetic_half_is_the_negative_of_the_first():
    class Noise(Posterior):
        def __call__(self, target, t, x_t, noise):
            self.noise = noise
            return noise

    posterior = Noise()
    DrawValue(6, posterior, antithetic=True)(target(), 0.3, torch.zeros(B, D), seeded())
    first, second = posterior.noise[:, :3], posterior.noise[:, 3:]
    assert torch.equal(first, -second)
    assert len(posterior.noise.abs().unique()) == B * 3 * D
