"""The text-to-image suite with a Meta Flow Map's adapter: its methods, posterior draws and values, each by hand."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mfm_benchmarks.command import load_suite
from mfm_benchmarks.parts.captioned_states import captioned_states
from mfm_benchmarks.parts.prompt_images import PromptFlow
from mfm_benchmarks.suites.text_to_image import TextToImageSuite
from mfm_lightning.alignment import DrawGradient, Steering, Target, TimeGrid
from mfm_lightning.alignment.posteriors import further_noise
from mfm_lightning.backbones import AdaptedFlow, FlowAdapter, load_flow
from mfm_lightning.commands.main import main
from mfm_lightning.data import ImageDataModule
from mfm_lightning.data.images import CaptionedImages, EncodedImages
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.metrics.distances import sliced_wasserstein
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks.files import save_network
from mfm_lightning.utils.decoding import load_image
from mfm_rewards import build
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401
from tests.backbones.test_adapter import stirred

STATES, DRAWS, ROLLOUTS, T, GUIDANCE = 6, 5, 4, 0.3, 3.0
CAPTIONS = ["a red cat", "the dog"]
PART = {"times": [T], "num_states": STATES, "num_draws": DRAWS, "rollout_steps": ROLLOUTS, "model_steps": [1, 2],
        "glass_steps": [1, 2], "max_rows": 10}  # fmt: skip
OF_MODEL = {"steps": 2, "of_model": True}
DRAW = {"class_path": "mfm_lightning.alignment.DrawGradient"}
METHODS = {
    "MFM-G": {"method": {"class_path": "Steering", "init_args": {"grid": OF_MODEL, "estimator": DRAW}}},
    "FMTT": {"method": {"class_path": "TrajectoryTilting", "init_args": {"grid": {"steps": 1}}}},
    "DPS": {
        "method": {
            "class_path": "Steering",
            "init_args": {"grid": OF_MODEL, "estimator": {"class_path": "mfm_lightning.alignment.DPSGradient"}},
        }
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline, two adapters of it, and captioned pictures."""
    folder = tmp_path_factory.mktemp("small")
    tiny.sd3(**encoders.of_sd3(folder / "words")).save_pretrained(folder / "pipe")
    for name, size in (("mfm", 0.3), ("other", 0.2)):
        adapter = FlowAdapter(str(folder / "pipe"), rank=2, image_size=8, guidance_scales=[GUIDANCE])
        save_network(stirred(adapter, size), folder / f"{name}.safetensors")
    tiny.pictures(folder / "pictures")
    return folder


def data_of(place, **options):
    pictures = CaptionedImages(str(place / "pictures"), CAPTIONS)
    return EncodedImages(pictures, str(place / "pipe/vae"), test_source=pictures, **options)


@pytest.fixture(scope="module")
def settings(place):
    pictures = {
        "class_path": "mfm_lightning.data.images.CaptionedImages",
        "init_args": {"source": str(place / "pictures"), "captions": CAPTIONS},
    }
    return {
        "flow": {
            "class_path": "mfm_lightning.backbones.load_flow",
            "init_args": {"name": str(place / "pipe"), "image_size": 8, "torch_dtype": "float32", "max_rows": 7},
        },
        "mfm": str(place / "mfm.safetensors"),
        "prompts": ["a blue mat", "the cat"],
        "images_per_prompt": 1,
        "guidance": GUIDANCE,
        "rewards": {"brightness": {"reward": "brightness", "scale": 20.0}, "contrast": {"reward": "contrast"}},
        "best_of_n": {"numbers": [2], "steps": 2},
        "methods": METHODS,
        "posterior": PART,
        "value": PART,
        "data": {
            "class_path": "mfm_lightning.data.images.EncodedImages",
            "init_args": {"source": pictures, "test_source": pictures, "vae": str(place / "pipe/vae")},
        },
    }


WITHOUT = {"mfm": None, "data": None, "posterior": None, "value": None}


def benchmark(settings, *args):
    Path("small.yaml").write_text(yaml.safe_dump(settings))
    main(["benchmark", "text-to-image", "--config", "small.yaml", "--device", "cpu", *map(str, args)])
    return Path("outputs/benchmarks/small")


def rows(folder, name):
    with open(folder / f"report/{name}.csv") as file:
        return list(csv.DictReader(file))


def results(folder):
    return {r["reward"] + ", " + r["method"]: r for r in rows(folder, "results")}


def images(folder, row):
    """With the time when they were written."""
    return {path: path.stat().st_mtime_ns for path in sorted((folder / row["images"]).rglob("*.png"))}


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory):
    """A run without the adapter, and the same command with it; and what the first one left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        folder = benchmark({**settings, **WITHOUT}).absolute()
        record = json.loads((folder / "report/environment.json").read_text())
        before = {name: images(folder, row) for name, row in results(folder).items()}
        benchmark(settings)
        yield folder, record, before


def test_what_needs_an_adapter_is_left_out_and_comes_with_it(runs):
    """The other images are those of before, not made again."""
    folder, without, before = runs
    assert set(without["skipped"]) == {"MFM-G", "FMTT", "diversity"}
    assert "and a SD3Flow gives none" in without["skipped"]["MFM-G"]
    assert without["skipped"]["MFM-G"].endswith("; or give an adapter's file (mfm)")
    assert without["skipped"]["FMTT"].endswith("; or give an adapter's file (mfm)")
    record = json.loads((folder / "report/environment.json").read_text())
    assert (record["failures"], set(record["skipped"])) == ({}, {"diversity"})
    found = results(folder)
    assert set(found) == {f"{r}, {m}" for r in ("brightness", "contrast") for m in (*METHODS, "base flow", "Best-of-N")}
    assert len(before) == 6
    for name, files in before.items():
        assert files
        assert images(folder, found[name]) == files


def test_images_of_an_adapters_draws_are_those_of_two_transformers(runs, place):
    """MFM-G of a target whose drift and Meta Flow Map are flows of their own; NFE with guidance by two evaluations."""
    folder, row = runs[0], results(runs[0])["brightness, MFM-G"]
    flow = load_flow(place / "pipe", 8, "float32")
    model: Any = MetaFlowMap(adapter_of(place))
    model.time_grid = flow.time_grid
    for index, prompt in enumerate(("a blue mat", "the cat")):
        given = flow.encode(prompt, guidance=GUIDANCE)
        target = Target(model, build("brightness"), flow.decoder, given, reward_scale=20.0, drift=flow.drift)
        x0 = torch.randn(1, *flow.state_shape, generator=sample_generators(0, [index])[0])
        method = Steering(DrawGradient(), TimeGrid(2, of_model=True))
        found = method(target, x0, sample_generators((0, 1), [index]))
        stored = load_image(folder / row["images"] / f"{index:06d}.png")
        assert (found.images[0] - stored).abs().max() < 1.01 / 255
    # K steps: two passes of the drift, and a draw and its gradient
    assert (float(row["transformer evaluations"]), float(row["reward evaluations"])) == (2 * (2 + 2), 2 * 2)


def adapter_of(place):
    """On a flow of its own."""
    flow = load_flow(place / "pipe", 8, "float32")
    return FlowAdapter.of_file(place / "mfm.safetensors", flow).eval().requires_grad_(False)


def states_by_hand(place):
    """From diffusers' VAE, in the order of random keys."""
    files = sorted((place / "pictures").rglob("*.png"))
    pixels = torch.stack([load_image(file) for file in files]) * 2 - 1
    vae = tiny.diffusers.AutoencoderKL.from_pretrained(place / "pipe/vae")
    with torch.no_grad():
        latents = (vae.encode(pixels).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    keys = torch.rand(len(files), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = keys.argsort()[:STATES].tolist()
    return latents[order], [CAPTIONS["ab".index(files[i].parent.name)] for i in order]


def draws_by_hand(place, seed):
    """Of each state, with its caption, `(STATES, DRAWS, ...)`: two steps of the adapter, two of the GLASS ODE, and
    the base SDE."""
    x1, captions = states_by_hand(place)
    noise = torch.randn(STATES, DRAWS, *x1.shape[1:], generator=torch.Generator().manual_seed(seed))
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(1))
    flow, adapter = load_flow(place / "pipe", 8, "float32"), adapter_of(place)
    found = {"MFM 2": [], "GLASS 2": [], "rollouts": []}
    for i, caption in enumerate(captions):
        given = flow.encode(caption, guidance=GUIDANCE)
        rows = given.expand(DRAWS)
        x_t = ((1 - T) * x0[i] + T * x1[i]).expand(DRAWS, -1, -1, -1)
        times = {k: torch.full((DRAWS,), k) for k in (0.0, 0.5, 1.0, T)}
        x = noise[i]
        for s, u in ((0.0, 0.5), (0.5, 1.0)):
            x = x + 0.5 * adapter(times[s], times[u], x, times[T], x_t, rows)
        found["MFM 2"].append(x)
        x = noise[i]
        for s in (0.0, 0.5):
            a = T**2 / (1 - T) ** 2 + s**2 / (1 - s) ** 2
            star = a**0.5 / (1 + a**0.5)
            both = star * (T * x_t / (1 - T) ** 2 + s * x / (1 - s) ** 2) / a
            x = x + 0.5 * (both + (1 - star) * flow.drift(star, both, given) - x) / (1 - s)
        found["GLASS 2"].append(x)
        x, generators = x_t, further_noise(noise[i : i + 1])
        grid = torch.linspace(T, 1, ROLLOUTS + 1, dtype=torch.float64).tolist()
        for k, t in enumerate(grid[:-1]):
            b, dt = flow.drift(t, x, given), grid[k + 1] - t
            if k == ROLLOUTS - 1:
                x = x + (1 - t) * b
            else:
                fresh = torch.cat([torch.randn((1, *x.shape[1:]), generator=g) for g in generators])
                x = x + dt * (2 * b - x / t) + (2 * (1 - t) / t * dt) ** 0.5 * fresh
        found["rollouts"].append(x)
    return {name: torch.stack(draws) for name, draws in found.items()}, captions


def stored(folder, cell):
    (path,) = (folder / "results").glob(f"{re.sub(r'[^A-Za-z0-9.=_-]+', '_', cell)}-*.safetensors")
    return load_file(path)


@torch.no_grad()
def test_posterior_draws_are_those_of_each_states_caption(runs, place):
    reference = draws_by_hand(place, 1)[0]["rollouts"]
    torch.testing.assert_close(
        stored(runs[0], f"posterior, t = {T}, reference")["draws"], reference, atol=2e-4, rtol=1e-4
    )
    made, captions = draws_by_hand(place, 2)
    assert len(set(captions)) == 2
    names = {"MFM 2": "MFM 2", "GLASS 2": "GLASS 2", "SDE rollouts again (floor)": "rollouts"}
    table = {row["draws"]: row for row in rows(runs[0], "posterior_recovery")}
    assert set(table) == {"MFM 1", "MFM 2", "GLASS 1", "GLASS 2", "SDE rollouts again (floor)"}
    for name, ours in names.items():
        pair = made[ours].flatten(2), reference.flatten(2)
        expected = sliced_wasserstein(*pair, 128, torch.Generator().manual_seed(0))
        found = stored(runs[0], f"posterior, t = {T}, {name}")["distance"]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
        assert float(table[name]["sliced W2"]) == pytest.approx(float(expected.mean()), rel=1e-3)
    # guidance takes two passes of the flow's drift, and one of the adapter
    assert {name: int(row["evaluations"]) for name, row in table.items()} == {
        "MFM 1": 1, "MFM 2": 2, "GLASS 1": 2, "GLASS 2": 4, "SDE rollouts again (floor)": 2 * ROLLOUTS,
    }  # fmt: skip


@torch.no_grad()
def test_pictures_beside_the_curves_are_of_the_states_and_their_draws(runs, place):
    decode = load_flow(place / "pipe", 8, "float32").decoder
    x1, _ = states_by_hand(place)
    x_t = (1 - T) * torch.randn(x1.shape, generator=torch.Generator().manual_seed(1)) + T * x1
    given = torch.stack([decode(x1), decode(x_t)], dim=1)[:3]
    for cell, seed, ours in (("reference", 1, "rollouts"), ("MFM 2", 2, "MFM 2"), ("GLASS 2", 2, "GLASS 2")):
        draws = draws_by_hand(place, seed)[0][ours][:3, :9]
        pictures = torch.stack([decode(of_state) for of_state in draws])
        found = stored(runs[0], f"posterior, t = {T}, {cell}")["images"].float() / 255
        torch.testing.assert_close(found, pictures, atol=4e-3, rtol=0)
    value = stored(runs[0], f"value, brightness, t = {T}, MFM 1")
    for tensors in (stored(runs[0], f"posterior, t = {T}, reference"), value):
        torch.testing.assert_close(tensors["given"].float() / 255, given, atol=4e-3, rtol=0)
    # draws of other noise than the value's: no two alike
    drawn = value["images"].float()
    assert drawn.shape[:2] == (len(given), 9)
    assert all((drawn[0, i] - drawn[0, j]).abs().max() > 1 for i in range(9) for j in range(i))
    for name in ("posterior_draws", "value_states", "value_states_2"):
        assert (runs[0] / f"report/{name}.png").is_file()


@torch.no_grad()
def test_values_of_each_reward_are_those_of_the_draws(runs, place):
    made, _ = draws_by_hand(place, 302)
    made["rollouts again"] = draws_by_hand(place, 303)[0]["rollouts"]
    flow = load_flow(place / "pipe", 8, "float32")
    for name, table, scale in (("brightness", "value_estimates", 20.0), ("contrast", "value_estimates_2", 1.0)):
        reward, found = build(name), {}
        drawn = {
            "MFM 2": "MFM 2",
            "GLASS 2": "GLASS 2",
            "reference": "rollouts",
            "SDE rollouts again": "rollouts again",
        }
        for kind, ours in drawn.items():
            r = scale * reward(flow.decoder(made[ours].flatten(0, 1))).reshape(STATES, DRAWS).double()
            found[kind] = r.exp().mean(dim=1).log()
            values = stored(runs[0], f"value, {name}, t = {T}, {kind}")["values"]
            torch.testing.assert_close(values.double(), found[kind], atol=2e-3, rtol=1e-3)
        lines = {row["estimator"]: row for row in rows(runs[0], table)}
        for kind in ("MFM 2", "GLASS 2", "SDE rollouts again"):
            r = np.corrcoef(found[kind].numpy(), found["reference"].numpy())[0, 1]
            assert float(lines[kind]["Pearson r"]) == pytest.approx(r, abs=0.02)
            assert float(lines[kind]["bias"]) == pytest.approx(
                float((found[kind] - found["reference"]).mean()), abs=2e-3
            )
        nfe = {"MFM 1": 2 * DRAWS, "MFM 2": 3 * DRAWS, "GLASS 2": 5 * DRAWS, "DPS point estimate": 3}
        assert {kind: int(lines[kind]["NFE"]) for kind in nfe} == nfe
    page = re.sub(r"</?abbr[^>]*>", "", (runs[0] / "report/index.html").read_text())
    assert "Value estimates from one-step draws, contrast" in page
    assert "6 for posterior draws and 6 for values, with their captions as conditions" in page


def test_another_adapter_computes_its_own_and_no_other(runs, settings, place, monkeypatch):
    folder = runs[0]
    monkeypatch.chdir(folder.parents[2])
    before = {name: (row, images(folder, row)) for name, row in results(folder).items()}
    kept = {path: path.stat().st_mtime_ns for path in (folder / "results").glob("*-*.*")}
    less = {
        **settings,
        "mfm": str(place / "other.safetensors"),
        "rewards": {"brightness": settings["rewards"]["brightness"]},
    }
    benchmark({**less, "value": None, "posterior": {**PART, "model_steps": [1], "glass_steps": [1]}})
    for name, row in results(folder).items():
        old, files = before[name]
        if name.endswith(("MFM-G", "FMTT")):
            assert row["images"] != old["images"]
        else:
            assert row["images"] == old["images"]
            assert images(folder, row) == files
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    added = {path.name for path in set((folder / "results").glob("*-*.*")) - set(kept)}
    assert all(name.startswith(("MFM-G", "FMTT", "posterior_t_=_0.3_MFM_1")) for name in added)


def test_states_are_in_one_random_order_whatever_the_batches(place):
    flow = load_flow(place / "pipe", 8, "float32")
    latents, captions = states_by_hand(place)
    for batch_size, num in ((24, STATES), (5, STATES), (24, 3)):
        found = captioned_states(data_of(place, batch_size=batch_size), flow, num, 0)
        torch.testing.assert_close(found.x1, latents[:num], atol=1e-5, rtol=1e-5)
        assert found.captions == captions[:num]
    other = captioned_states(data_of(place), flow, STATES, 1)
    assert not torch.equal(other.x1, found.x1)
    for data, message in (
        (data_of(place, size=4), r"EncodedImages has states of shape \(4, 2, 2\), and the flow has \(4, 4, 4\)"),
        (EncodedImages(str(place / "pictures"), str(place / "pipe/vae")), "EncodedImages without captions"),
        (ImageDataModule(str(place / "pictures")), r"ImageDataModule has states of shape \(3, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            captioned_states(data, flow, 1, 0)
    with pytest.raises(ValueError, match="EncodedImages with 24 test states, and 25 are wanted: lower num_states"):
        captioned_states(data_of(place), flow, 25, 0)


def test_packaged_methods_run_on_a_flow_with_an_adapter(place, tmp_path, monkeypatch):
    """Each setting of each sweep, in two steps; those called MFM need the adapter, and no other does."""
    monkeypatch.chdir(tmp_path)
    suite, given, _ = load_suite("text-to-image", ["--config", "benchmarks/text-to-image-small"])
    assert isinstance(suite, TextToImageSuite)
    assert suite.missing()[0].startswith("rewards, CLIP score")  # which is to be trained first
    sources = given["data"]["init_args"]["source"]["init_args"]["sources"]
    assert given["prompts"] == [caption for source in sources for caption in source["init_args"]["captions"]]
    flow = load_flow(place / "pipe", 8, "float32").eval().requires_grad_(False)
    adapted = AdaptedFlow.load(place / "mfm.safetensors", flow)
    source = PromptFlow(flow, [], 1, "flat", 0, 1.0, None, 1, torch.device("cpu"), adapted)
    conditions, made = flow.encode("a red cat", guidance=1.0), []
    for point in suite._points:
        one, made = point.build(), [*made, point.name]
        model = source.model_for(one, build("brightness"))
        assert (model is adapted) == point.method.startswith("MFM")
        setattr(getattr(one, "grid", one), "steps", 2)  # noqa: B010 # search has its own
        target = Target(model, build("brightness"), flow.decoder, conditions)
        result = one(target, torch.randn(1, *flow.state_shape), [torch.Generator().manual_seed(0)])
        assert torch.isfinite(result.images).all()
    assert len(made) == len(set(made)) == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mfm": None}, "posterior and value need both data"),
        ({"data": None}, "posterior and value need both data"),
        ({"posterior": None, "value": None}, "data are for posterior and value"),
        ({"mfm": "none.safetensors"}, "mfm: .*none.safetensors"),
        ({"guidance": 2.0}, r"mfm: guidance 2 is not a scale that this network knows: \[1.0, 3.0\]"),
        ({"posterior": {**PART, "num_states": 99}}, "data: EncodedImages with 24 test states, and 99 are wanted"),
    ],
)
def test_bad_settings_are_refused_before_any_image(settings, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError)) as stopped:
        benchmark({**settings, **change})
    assert re.search(message, " ".join(f"{stopped.value} {capsys.readouterr().err}".split()))
    assert not list(Path().rglob("*.png"))
