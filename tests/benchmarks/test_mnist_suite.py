"""The MNIST suite on real images of 28x28 and an untrained model; scores of inverse problems against closed forms."""

import itertools

import pytest
import torch
import yaml

import mfm_rewards
from mfm_benchmarks.blocks import Picture
from mfm_benchmarks.measure import noise
from mfm_benchmarks.parts.frequencies import FrequencyComparison
from mfm_benchmarks.parts.inverse_problems import InverseProblems, at_misfit, class_score, energy_score
from mfm_benchmarks.parts.posterior_recovery import PosteriorRecovery
from mfm_benchmarks.parts.sample_quality import SampleQuality
from mfm_benchmarks.parts.value_estimation import ValueComparison
from mfm_benchmarks.quality import Quality
from mfm_benchmarks.suite import Results
from mfm_lightning.alignment import Steering, Target
from mfm_lightning.checkpoints import save_model
from mfm_lightning.networks import DiT
from mfm_lightning.networks.decoders import IdentityDecoder, PixelDecoder
from mfm_rewards.linear_gaussian import ray_lengths
from tests.benchmarks.test_benchmarks import ROOT, benchmark, model, rows
from tests.fashion_mnist import EXTRACT

CLASSIFIER = {"class_path": "mfm_lightning.metrics.classifier.SmallClassifier", "init_args": {"in_channels": 1, "size": 28, "num_classes": 10}}  # fmt: skip  # noqa: E501


def tiny_settings(folder):
    """The packaged config with an untrained model, real images, and few of everything."""
    settings = yaml.safe_load((ROOT / "configs/benchmarks/mnist.yaml").read_text())
    file = folder / "model.safetensors"
    save_model(model(DiT(28, 14, 1, 16, 2, 2, 1, num_classes=0)), file)
    settings["model"]["file"] = str(file)
    data = {"source": str(EXTRACT), "val_fraction": 0.1, "test_fraction": 0.1}
    settings["quality"]["init_args"] = {"steps": 20, "data": {"class_path": "mfm_lightning.data.ImageDataModule", "init_args": data}}  # fmt: skip  # noqa: E501
    settings["reward"]["classifier"] = CLASSIFIER
    settings["frequencies"] |= {
        "draws": [1, 2],
        "population": 4,
        "runs": 10,
        "num_samples": 12,
        "steps": 3,
        "other_steps": [6],
    }
    settings["inverse"] |= {
        "num_images": 3,
        "num_samples": 4,
        "draws": [1],
        "free_draws": 2,
        "diamond_draws": 2,
        "particles": 2,
        "steps": 3,
        "strengths": [3.0],
    }
    few = {"times": [0.3], "num_states": 4, "num_draws": 4, "rollout_steps": 3, "model_steps": [1], "glass_steps": [1]}
    settings["posterior"], settings["value"] = few, few
    settings["samples"] |= {"num_samples": 12, "steps": [1], "ode_steps": 3, "base": str(file), "replicates": 20}
    settings |= {"num_samples": 12, "best_of_n": {"numbers": [1, 3], "steps": 3}}
    settings["rewards"] = {"brightness": {"reward": "brightness", "scale": 10.0}}
    settings["methods"] = {
        name: {**settings["methods"][name], "sweep": {"grid.steps": [2]}} for name in ("MFM-G", "DPS")
    }
    (folder / "mnist.yaml").write_text(yaml.safe_dump(settings))


@pytest.mark.slow
def test_mnist_suite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_settings(tmp_path)
    benchmark("mnist", "--config", "mnist.yaml", "--output", "out")
    found = rows(tmp_path / "out", "class_frequencies")
    by = {(row["method"], row["draws or particles"]): row for row in found}
    wanted = {(f"{kind} {d}", n) for kind, d, n in itertools.product(["MFM-G", "MFM-GF"], ["ODE", "SDE"], ["1", "2"])}
    wanted -= {("MFM-GF ODE", "1"), ("MFM-GF SDE", "1")}  # one draw has no gradient-free form
    wanted |= {("MFM-G ODE, 6 steps", "1")}
    wanted |= {(f"{kind}, all particles", "4") for kind in ("SMC-TDS", "FK-SDE", "FK-GLASS")}
    assert set(by) == {*wanted, ("base flow", ""), ("DPS", "")}
    # 3 steps: one evaluation each of the drift; MFM-G with a draw also 2 of the network and 2 of the reward
    assert by["base flow", ""]["NFE"] == "3"
    assert by["MFM-G ODE", "1"]["NFE"] == str(3 + 2 * 2 * 3)
    assert by["MFM-G ODE, 6 steps", "1"]["NFE"] == str(6 + 2 * 2 * 6)
    inverse = rows(tmp_path / "out", "inverse_problems")
    assert {row["problem"] for row in inverse} == {"left half missing", "4x super-resolution", "tomography"}
    steered = {"MFM-G, N = 1", "MFM-GF, N = 2", "DPS", "Flow map's end", "Diamond-G, N = 2"}
    assert {row["method"] for row in inverse} == {*steered, "FK-SDE, 2 particles"}
    strengths = {(row["problem"], row["method"]): set() for row in inverse}
    for row in inverse:
        strengths[row["problem"], row["method"]].add(float(row["strength"]))
    assert all(strengths["tomography", name] == {1.0, 3.0} for name in steered)
    assert strengths["tomography", "FK-SDE, 2 particles"] == strengths["left half missing", "DPS"] == {1.0}
    assert {row["method"] for row in rows(tmp_path / "out", "equal_misfit")} == steered
    assert {row["t"] for row in rows(tmp_path / "out", "value_estimates")} == {"0.3"}
    quality = rows(tmp_path / "out", "sample_quality")
    assert [(row["samples"], row["number"]) for row in quality] == [("MFM, 1 step", "12"), ("base flow, 3 steps", "12")]
    distances = [float(row["Fréchet"]) for row in quality]
    assert float(quality[0]["ratio to the base flow"]) == pytest.approx(distances[0] / distances[1], rel=1e-3)
    curves = ("posterior_recovery", "value_r_nfe")
    samples = ("class_samples", "inverse_inpainting", "inverse_tomography", "posterior_draws", "value_states")
    for picture in (*curves, *samples):
        assert (tmp_path / "out/report" / f"{picture}.png").is_file()


@pytest.fixture
def measured():
    """Draws and values of a random network at two times, the parts that measured them, and the test images."""
    torch.manual_seed(0)
    mfm = model(DiT(4, 2, 1, 16, 2, 2, 1, num_classes=0))
    target = Target(mfm, mfm_rewards.build("brightness", scale=30.0), PixelDecoder())
    x1 = torch.rand(6, 1, 4, 4) * 2 - 1
    settings = {"times": [0.3, 0.7], "num_states": 6, "num_draws": 4, "glass_steps": [1, 2, 4], "rollout_steps": 2}
    parts = PosteriorRecovery(**settings), ValueComparison(**settings)
    results = Results()
    for cell in (cell for part in parts for cell in part.cells(target, x1, {})):
        results.add(cell, cell.compute(*(results[other] for other in cell.needs)))
    return parts, results, x1


def test_pictures_are_of_the_states_of_which_numbers_are_told(measured):
    (posterior, value), results, x1 = measured
    images = ((x1 + 1) / 2)[:3]
    (picture,) = (b for b in value.blocks(results) if isinstance(b, Picture) and b.name == "value_states")
    told = [float(row.note.removeprefix("rollouts ")) for row in picture.plot.rows]
    reference = results[value._reference[0.7]].tensors["values"]
    order = sorted(range(3), key=lambda k: -reference[k])
    assert told == [pytest.approx(float(reference[k]), abs=0.006) for k in order]
    estimates = results[value._cells[0.7, "MFM 1"]].tensors["values"]
    for row, k in zip(picture.plot.rows, order, strict=True):
        assert row.name == f"V = {estimates[k]:.2f}"
        torch.testing.assert_close(row.images[0], images[k], atol=2 / 255, rtol=0)
        assert len(row.images) == 11
    (picture,) = (b for b in posterior.blocks(results) if isinstance(b, Picture) and b.name == "posterior_draws")
    assert [row.name for row in picture.plot.rows] == 3 * ["SDE rollouts", "MFM 1", "MFM 4", "GLASS 1", "GLASS 4"]
    for k, row in enumerate(picture.plot.rows):
        torch.testing.assert_close(row.images[0], images[k // 5], atol=2 / 255, rtol=0)


def test_results_from_before_there_were_pictures_are_reported_without(measured):
    parts, results, _ = measured
    for outcome in results._outcomes.values():
        outcome.tensors = {k: x for k, x in outcome.tensors.items() if k not in ("images", "given")}
    for part, curves in zip(parts, (["posterior_recovery"], ["value_r_nfe", "value_error_nfe"]), strict=True):
        assert [block.name for block in part.blocks(results) if isinstance(block, Picture)] == curves


class FirstPixels(Quality):
    """Features that are the images' first row."""

    def prepare(self, device):
        pass

    def features(self, images):
        return images[:, 0, 0]

    @property
    def real(self):
        return torch.eye(4)

    @property
    def identity(self):
        return {}


@pytest.mark.parametrize("of_its_own", [True, False])
def test_samples_of_the_base_flow_are_eulers(tmp_path, of_its_own):
    """Euler's method written out, from the same noise as the Meta Flow Map's."""
    mfm, flow = (model(DiT(4, 2, 1, 16, 2, 2, 1, num_classes=0)) for _ in range(2))
    save_model(flow, tmp_path / "flow.safetensors")
    base = None if of_its_own else str(tmp_path / "flow.safetensors")
    part = SampleQuality(30, [1], ode_steps=3, base=base, batch_size=7, chunk=20, guidance=None, replicates=5)
    found = {}
    for cell in part.cells(lambda: mfm, IdentityDecoder(), FirstPixels(), torch.device("cpu"), {"model": "m"}):
        kind = cell.name.split(":")[0]
        found[kind] = torch.cat([found.get(kind, torch.empty(0, 4)), cell.compute().tensors["features"]])
    x = torch.cat([noise(n, (1, 4, 4), 31_337 + begin, torch.device("cpu")) for begin, n in ((0, 20), (20, 10))])
    for k in range(3):
        with torch.no_grad():
            x = x + (mfm if of_its_own else flow).drift(torch.full((30,), k / 3), x) / 3
    assert torch.allclose(found["base flow, 3 steps"], x[:, 0, 0], atol=1e-5)
    assert not torch.allclose(found["MFM, 1 step"], x[:, 0, 0], atol=1e-2)


def test_an_absent_base_flow_is_said_before_any_work(tmp_path):
    assert SampleQuality(ode_steps=3, base=str(tmp_path / "no.safetensors")).missing()[0].startswith("samples.base: no")
    assert not SampleQuality(ode_steps=3).missing()


def test_names_of_methods_do_not_depend_on_the_other_dynamics():
    assert ("MFM-G", 2) in FrequencyComparison(draws=[2])._settings()
    sde = FrequencyComparison(draws=[2], dynamics=["ode", "sde"])._settings()["MFM-G SDE", 2].method
    assert isinstance(sde, Steering)
    assert sde.dynamics == "sde"
    with pytest.raises(ValueError, match=r"frequencies\.runs 4: the interval of populations needs 10"):
        FrequencyComparison(population=8, runs=4)


def test_energy_score_is_its_definition_and_least_for_the_posterior():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 5, 2, 2, generator=generator), torch.randn(3, 2, 2, generator=generator)
    for b in range(3):
        first = sum((x[b, i] - y[b]).norm() for i in range(5)) / 5
        second = sum((x[b, i] - x[b, j]).norm() for i in range(5) for j in range(5) if i != j) / 20
        assert energy_score(x, y)[b] == pytest.approx(float(first - second / 2), rel=1e-6)
    # truth N(0, 1) in two dimensions: samples of it score less than those of half and of twice its deviation, and than
    # copies of its mean. 4,000 truths, paired; the least difference is over 8 standard errors from 0 (P < 1e-15)
    truth, samples = torch.randn(4000, 2, generator=generator), torch.randn(4000, 8, 2, generator=generator)
    exact = energy_score(samples, truth)
    for scale in (0.0, 0.5, 2.0):
        difference = energy_score(scale * samples, truth) - exact
        assert difference.mean() > 5 * difference.std() / 4000**0.5


def test_class_score_has_briers_mean():
    # samples of p against a truth of q: 1 - 2 p.q + p.p, whatever m; 4,000 truths, 5 standard errors (P < 1e-6)
    generator = torch.Generator().manual_seed(1)
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    truth = torch.multinomial(q, 4000, replacement=True, generator=generator)
    for m in (2, 7):
        classes = torch.multinomial(p, 4000 * m, replacement=True, generator=generator).reshape(4000, m)
        score = class_score(classes, truth)
        exact = 1 - 2 * float(p @ q) + float(p @ p)
        assert abs(float(score.mean()) - exact) < 5 * float(score.std()) / 4000**0.5
    assert class_score(torch.tensor([[1, 1, 1]]), torch.tensor([1])).item() == 0.0
    assert class_score(torch.tensor([[1, 1, 1]]), torch.tensor([0])).item() == 2.0


def test_measurements_are_of_the_images():
    """The right half with noise, and means of 4x4 pixels with noise."""
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    part = InverseProblems(noise_std=0.1)
    half, coarse, rays = part._measured(images).values()
    inpainting, shown, small = half.likelihoods, half.shown, coarse.likelihoods
    residual = torch.stack([r.residuals(x[None])[0] for r, x in zip(inpainting, images, strict=True)])
    assert residual.shape == (40, 32)
    assert residual.square().mean().sqrt() == pytest.approx(0.1, rel=0.1)  # 1,280 normals: 5 deviations
    torch.testing.assert_close(shown[:, :, :, :4], torch.full((40, 1, 8, 4), 0.5))
    of_small = torch.stack([r.residuals(x[None])[0] for r, x in zip(small, images, strict=True)])
    means = images.reshape(40, 1, 2, 4, 2, 4).mean(dim=(3, 5)).flatten(1)
    observed = torch.stack([r.observation for r in small]).flatten(1)
    torch.testing.assert_close(observed - means, of_small)
    assert of_small.square().mean().sqrt() == pytest.approx(0.1, rel=0.3)  # 160 normals: 5 deviations
    # 36 rays from edge to edge: the first is along the first row, whose pixels it meets for 1/8 each (row 0 at 8 x 8)
    of_rays = torch.stack([r.residuals(x[None])[0] for r, x in zip(rays.likelihoods, images, strict=True)])
    assert of_rays.shape == (40, 36)
    assert of_rays.square().mean().sqrt() == pytest.approx(0.02, rel=0.1)  # 1,440 normals: 5 deviations
    first = torch.stack([r.observation[0, 0, 0] for r in rays.likelihoods])
    torch.testing.assert_close(first - images[:, 0, 0].mean(dim=1), of_rays[:, 0], atol=1e-5, rtol=1e-4)
    # of a flat image the rays' means are the image
    flat = part._measured(torch.full((2, 1, 8, 8), 0.5))["tomography"].shown
    crossed = flat[flat > 0]
    assert len(crossed) > 80
    assert (crossed - 0.5).abs().max() < 0.1


def test_errors_at_equal_misfit_are_interpolated():
    def run(misfit, energy, error):
        tensors = {"misfit": misfit, "energy": energy, "error": error}
        return {key: torch.tensor(value, dtype=torch.float64) for key, value in tensors.items()}

    curve = {1.0: run([2.0, 4.0], [5.0, 7.0], [0.3, 0.5]), 3.0: run([1.0, 2.0], [4.0, 9.0], [0.4, 0.8])}
    curve[10.0] = run([0.5, 0.5], [9.0, 9.0], [0.9, 0.9])
    found = at_misfit(curve, (3.0 * 1.5) ** 0.5)  # halfway in the logarithm between means of 3 and of 1.5
    torch.testing.assert_close(found["energy"], torch.tensor([4.5, 8.0], dtype=torch.float64))
    torch.testing.assert_close(found["error"], torch.tensor([0.35, 0.65], dtype=torch.float64))
    assert at_misfit(curve, 3.0)["energy"].tolist() == [5.0, 7.0]
    assert at_misfit(curve, 0.5)["error"].tolist() == [0.9, 0.9]
    assert at_misfit(curve, 3.1) is None
    assert at_misfit(curve, 0.4) is None


def test_wrong_rays_and_strengths_are_refused():
    with pytest.raises(ValueError, match=r"rays need sources \(0\) and receivers"):
        InverseProblems(sources=0)
    with pytest.raises(ValueError, match=r"ray_noise_std \(0.0\) above 0"):
        InverseProblems(ray_noise_std=0.0)
    with pytest.raises(ValueError, match=r"inverse.strengths \[-1.0\]: expected numbers above 0"):
        InverseProblems(strengths=[-1.0])


class GaussianPixels:
    """Pixels of [0, 1] images that are independent N(0.5, 0.2^2): a model of which all is known."""

    state_shape = (1, 6, 6)

    def drift(self, t, x, conditions=None):
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        mean, variance = 0.5, 0.04
        return mean + (t * variance - (1 - t)) / ((1 - t) ** 2 + t**2 * variance) * (x - t * mean)


def test_tomography_of_gaussian_pixels_has_the_exact_posteriors_score():
    """FK-SDE on a Gaussian prior, whose posterior given the rays is Gaussian: misfit and image error of its 72 samples
    are those of exact draws, within 10 and 3 %, and the prior's misfit is 50 % larger. More strength fits better."""
    generator = torch.Generator().manual_seed(3)
    images = 0.5 + 0.2 * torch.randn(6, 1, 6, 6, generator=generator)
    part = InverseProblems(6, 12, [1], particles=64, steps=40, sources=3, receivers=3, ray_noise_std=0.1, clip=None)
    target = Target(GaussianPixels(), lambda x: x.mean(dim=(1, 2, 3)), IdentityDecoder())
    cells = part.cells(target, images, lambda x: torch.zeros(len(x), dtype=torch.long), torch.device("cpu"), {})
    by = dict(zip(part._cells, cells, strict=True))
    found = by["tomography", "FK-SDE, 64 particles", 1.0].compute().tensors
    matrix = ray_lengths(6, 6, 3, 3).double()
    covariance = torch.linalg.inv(matrix.T @ matrix / 0.1**2 + torch.eye(36) / 0.2**2)
    normal = torch.randn(6, 400, 36, generator=generator, dtype=torch.float64)
    y = torch.stack([r.observation.flatten() for r in part._problems["tomography"].likelihoods]).double()
    mean = (y @ matrix / 0.1**2 + 0.5 / 0.2**2) @ covariance
    exact = mean[:, None] + normal @ torch.linalg.cholesky(covariance).T
    prior = 0.5 + 0.2 * normal

    def misfit(draws):
        return ((draws @ matrix.T - y[:, None]) / 0.1).square().mean(dim=(1, 2)).sqrt().mean()

    error = (exact - images.flatten(1)[:, None]).square().mean(dim=(1, 2)).sqrt().mean()
    assert float(found["misfit"].mean()) == pytest.approx(float(misfit(exact)), rel=0.1)
    assert float(found["error"].mean()) == pytest.approx(float(error), rel=0.03)
    assert misfit(prior) > 1.4 * misfit(exact)
    misfits = [by["tomography", "DPS", s].compute().tensors["misfit"].mean() for s in (0.3, 1.0, 3.0)]
    assert misfits[0] > misfits[1] > misfits[2]
