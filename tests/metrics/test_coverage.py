"""What intervals promise, simulated: how often they hold the true number.

A count of hits is binomial. A test fails where its count is out of what the range of coverages that it states makes
likely: with the true coverage at an end of the range with a probability of 1e-5 at most, and inside of it with less.
`python tests/metrics/test_coverage.py` prints the table of docs/statistics.md.
"""

import math

import pytest
import torch
from scipy.stats import binom

from mfm_lightning.metrics.distances import correlation
from mfm_lightning.metrics.measured import (
    Measured,
    interval,
    mean_of,
    mean_of_groups,
    of_runs,
    simultaneous,
    student,
    weights,
    widths,
)

SIZES, RUNS = (16, 32, 64, 128), (3, 4, 5)
NUM = 4000  # replications of what is computed for all at once
ALARM = 1e-5


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def log_normal(*shape, generator):
    return normal(*shape, generator=generator).exp()


MEANS = {normal: 0.0, log_normal: math.exp(0.5)}


def of_means(draw, n, paired_with=None, num=NUM):
    """Share of intervals of a mean, or of the mean of paired differences, that hold the truth."""
    generator = torch.Generator().manual_seed(n)
    x, truth = draw(num, n, generator=generator), MEANS[draw]
    if paired_with is not None:
        x, truth = x - paired_with(num, n, generator=generator), truth - MEANS[paired_with]
    below, above = widths(x)
    return float(((x.mean(1) - below < truth) & (truth < x.mean(1) + above)).double().mean())


def of_numbers(draw, truth, num):
    """Share of intervals of `draw(generator)`, a `Measured`, that hold the truth."""
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(num):
        low, high = interval(draw(generator))
        hits += low < truth < high
    return hits / num


def compatible(share, num, low=0.93, high=0.97):
    return binom.ppf(ALARM, num, low) <= round(share * num) <= binom.ppf(1 - ALARM, num, high)


@pytest.mark.parametrize("n", [*RUNS, *SIZES])
def test_means_of_normal_numbers(n):
    """n = 3 to 128, 4,000 replications, coverage 93 to 97 %: of means, and of means of paired differences."""
    assert compatible(of_means(normal, n), NUM)
    assert compatible(of_means(normal, n, normal), NUM)


@pytest.mark.parametrize("n", SIZES)
def test_means_of_log_normal_numbers(n):
    """4,000 replications: 93 to 97 % from n = 32 on, and for paired differences; 90.5 % at least with n = 16."""
    assert compatible(of_means(log_normal, n), NUM, low=0.905 if n == 16 else 0.93)
    assert compatible(of_means(log_normal, n, log_normal), NUM, high=0.975)


def test_differences_of_independent_runs_are_welchs():
    """3 runs of deviation 1 against 5 of deviation 2, and 4 against 32 samples, 500 replications: 93 to 97 %."""
    for k, n in ((3, 5), (4, 32)):

        def draw(generator, k=k, n=n):
            return of_runs(normal(k, generator=generator).tolist()) - of_runs(
                (2 * normal(n, generator=generator)).tolist()
            )

        assert compatible(of_numbers(draw, 0.0, 500), 500)


def correlated(rho, n, shape=lambda x: x):
    def draw(generator):
        x = normal(n, generator=generator)
        y = rho * x + math.sqrt(1 - rho**2) * normal(n, generator=generator)
        return correlation(shape(x), shape(y))

    return draw


@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_correlations(rho):
    """n = 32 pairs, 800 replications: 93 to 97 %."""
    assert compatible(of_numbers(correlated(rho, 32), rho, 800), 800)


def of_prompts(measured, num=500, prompts=32, images=4):
    """Share of intervals that hold the mean reward, where images of one prompt correlate by 0.8: a prompt is easy or
    hard for all of its images. `measured` takes the rewards and their prompts."""
    group = torch.arange(prompts).repeat_interleave(images)

    def draw(generator):
        of_prompt, own = normal(prompts, generator=generator), normal(prompts * images, generator=generator)
        return measured(0.8**0.5 * of_prompt[group] + 0.2**0.5 * own, group)

    return of_numbers(draw, 0.0, num)


def test_images_of_one_prompt_are_no_independent_samples():
    """32 prompts with 4 images each, 500 replications: groups cover 93 to 97 %. An interval that takes the images for
    independent has a standard error that is (1 + 3 * 0.8)^(1/2) = 1.84 times too small, so it covers 71 %, and must be
    found not to cover 93 %."""
    assert compatible(of_prompts(mean_of_groups), 500)
    naive = of_prompts(lambda rewards, _: mean_of(rewards))
    assert not compatible(naive, 500)
    assert compatible(naive, 500, low=0.68, high=0.75)


def level_settings(n, draw, generator, settings=20):
    """As many settings of one mean as a baseline's, each with noise of its own and some that all share."""
    baseline, shared = (draw(n, generator=generator) for _ in range(2))
    return [mean_difference(draw(n, generator=generator) + shared, baseline + shared) for _ in range(settings)]


def mean_difference(a, b):
    return of_runs(a.tolist()) - of_runs(b.tolist())


def false_alarms(n, draw, num):
    """Share of replications in which any of 20 settings that equal the baseline is declared above it."""
    generator, found = torch.Generator().manual_seed(n), 0
    for _ in range(num):
        numbers = level_settings(n, draw, generator)
        c = simultaneous(numbers)
        found += any(number.value > c * number.error for number in numbers)
    return found / num


def test_one_of_twenty_equal_settings_is_rarely_declared_above():
    """n = 32, 150 replications. Those with a false declaration are binomial: at 5 % more than 19 have a probability of
    7e-5; at 25 %, which is what bounds of each setting by itself give, 19 or fewer have one of 2e-4."""
    assert round(false_alarms(32, normal, 150) * 150) <= 19


def test_the_critical_value_of_several_is_above_that_of_each():
    generator = torch.Generator().manual_seed(0)
    numbers = level_settings(64, normal, generator)
    single = [simultaneous([number]) for number in numbers]
    assert simultaneous(numbers) > max(single)
    # of one normal mean it is about Student's: 1.669 with 63 degrees of freedom
    assert single[0] == pytest.approx(1.669, rel=0.1)
    # copies of one number are one comparison
    assert simultaneous([numbers[0]] * 5) == pytest.approx(single[0], rel=1e-9)
    with pytest.raises(ValueError, match="expected as many in all"):
        simultaneous([numbers[0], Measured(0.0, numbers[0].replicates, samples=3)])


def test_the_critical_value_is_the_largest_studentised_difference():
    """Against its formula: resampled sets drawn one by one, each setting with the error of its own resampled set."""
    generator = torch.Generator().manual_seed(1)
    x = -log_normal(3, 20, generator=generator)  # long tails below: bootstrap-t decides
    found, t = simultaneous([of_runs(row.tolist()) for row in x]), []
    for counts in weights(20)[1:].long():
        drawn = x.repeat_interleave(counts, dim=1)
        t.append(((drawn.mean(1) - x.mean(1)) / (drawn.var(1, correction=0) / 19).sqrt()).max())
    assert found == pytest.approx(float(torch.stack(t).quantile(0.95)), rel=1e-9)
    assert found > student(0.95, 20)
    # without parts, replicates share one error: the largest distance from their mean, with Student's factor
    numbers = [Measured(0.0, of_runs(row.tolist()).replicates, samples=20) for row in -x]
    z = torch.stack([(n.replicates - n.replicates.mean()) / n.replicates.std() for n in numbers]).max(dim=0).values
    plain = float(z.quantile(0.95)) * student(0.95, 20) / student(0.95, None)
    assert simultaneous(numbers) == pytest.approx(plain, rel=1e-9)


def table():
    """The table of docs/statistics.md: coverage in % by sample size."""

    def row(words, found):
        print(f"| {words} | " + " | ".join(f"{100 * share:.1f}" for share in found) + " |", flush=True)

    print("samples", *SIZES)
    for draw, words in ((normal, "normal"), (log_normal, "log-normal")):
        row(f"mean, {words}", [of_means(draw, n, num=10000) for n in SIZES])
        row(f"mean of paired differences, {words}", [of_means(draw, n, draw, num=10000) for n in SIZES])
    for rho in (0.3, 0.9):
        row(f"Pearson r = {rho}, normal", [of_numbers(correlated(rho, n), rho, 1500) for n in SIZES])
        r = (math.exp(rho) - 1) / (math.e - 1)
        row(f"Pearson r = {r:.2f}, log-normal", [of_numbers(correlated(rho, n, torch.exp), r, 1500) for n in SIZES])
    for draw, words in ((normal, "normal"), (log_normal, "log-normal")):
        row(f"any of 20 equal settings declared above, {words}", [false_alarms(n, draw, 300) for n in SIZES])
    print("runs", *RUNS)
    for draw, words in ((normal, "normal"), (log_normal, "log-normal")):
        row(f"mean, {words}", [of_means(draw, k, num=10000) for k in RUNS])
        row(f"mean of paired differences, {words}", [of_means(draw, k, draw, num=10000) for k in RUNS])


if __name__ == "__main__":
    torch.set_num_threads(1)
    table()
