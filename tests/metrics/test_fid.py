"""FID and Inception score against torch-fidelity's own, with its real Inception network and random weights."""

import csv
import io
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from mfm_lightning.callbacks import SampleFID
from mfm_lightning.checkpoints import CheckpointError, load_model
from mfm_lightning.commands.errors import CommandLineError
from mfm_lightning.commands.main import run
from mfm_lightning.data.latents.image_sources import RawImage
from mfm_lightning.metrics.fid import RunningStatistics, Statistics, measure_images, reference_statistics
from mfm_lightning.metrics.frechet import frechet
from mfm_lightning.metrics.inception import Inception, find_inception_weights
from mfm_lightning.modules import MFMPretraining
from mfm_lightning.networks import DiT, VAEDecoder
from mfm_lightning.objectives import Objective, WeightedTerm
from mfm_lightning.sampling import ModelSampler, SamplePlan
from mfm_lightning.utils.images import ImageSet, to_uint8


def main(args):
    run(["fid", *args])


torch_fidelity = pytest.importorskip("torch_fidelity")
ROOT = Path(__file__).parents[2]
NUM = 12  # images of each set: the network takes 6 GFLOP for one


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of torch-fidelity's network that keep the signal's size."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Fresh(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_args, **_kwargs):
            pass

    torch.save({}, nothing := io.BytesIO())
    nothing.seek(0)
    torch.manual_seed(0)
    network = Fresh("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.nn.init.normal_(network.fc.weight, std=0.5)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two folders of images, and what is in them, bytes `(N, 3, H, W)`."""
    folder, images = tmp_path_factory.mktemp("images"), {}
    generator = torch.Generator().manual_seed(0)
    for name, level in (("samples", 0.6), ("real", 0.4)):
        coarse = torch.rand(NUM, 3, 4, 4, generator=generator) * 0.8 + 0.4 * (level - 0.5)
        images[name] = to_uint8(torch.nn.functional.interpolate(coarse, size=(24, 24), mode="bilinear"))
        (folder / name).mkdir()
        for i, image in enumerate(images[name]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name / f"{i:03d}.png")
    return folder, images


@pytest.mark.long
@pytest.mark.slow
def test_the_command_agrees_with_torch_fidelity(weights, sets, tmp_path):
    """FID of 2048 features to 1e-6 relative (torch-fidelity's mean is float32), the Inception score to 1e-6."""
    folder, _ = sets
    options = {"cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True, "batch_size": 8}
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folder / "samples"), input2=str(folder / "real"), isc=True, fid=True, isc_splits=3,
        feature_extractor_weights_path=str(weights), **options,
    )  # fmt: skip
    main([
        "--samples", str(folder / "samples"), "--reference", str(folder / "real"), "--weights", str(weights),
        "--splits=3", "--batch-size=5", "--device=cpu", "--cache", str(tmp_path / "cache"),
        "--output", str(tmp_path / "out.json"), "--save-statistics", str(tmp_path / "samples.npz"),
    ])  # fmt: skip
    ours = json.loads((tmp_path / "out.json").read_text())
    assert ours["num_samples"] == NUM
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["inception_score_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-5)
    assert ours["fid"] > 1
    assert ours["inception_score"] > 1.01
    kept = list((tmp_path / "cache").glob("real-2048-*.npz"))
    assert len(kept) == 1
    assert Statistics.load(kept[0]).num_samples == Statistics.load(tmp_path / "samples.npz").num_samples == NUM


@pytest.fixture(scope="module")
def early(weights):
    """The real network up to its first pooling, which is cheap."""
    return Inception(weights, num_features=64)


def test_folders_arrays_shards_and_streams_are_the_same(early, sets, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    folder, images = sets
    array = images["samples"].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "plain.npz", array)
    np.savez_compressed(tmp_path / "packed.npz", array, np.arange(NUM))
    (tmp_path / "shards").mkdir()
    with webdataset.TarWriter(str(tmp_path / "shards/a.tar")) as tar:
        for i, image in enumerate(array):
            tar.write({"__key__": f"{i:03d}", "png": image, "cls": 0})
    for path in (folder / "samples", tmp_path / "plain.npz", tmp_path / "packed.npz", tmp_path / "shards"):
        assert torch.equal(torch.cat(list(ImageSet(path).batches(5))), images["samples"])
    shard = tmp_path / "shards/a.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: 4 * len(whole) // 5 // 512 * 512])  # not taken for a set of fewer images
    with pytest.raises(ValueError, match=r"a\.tar cannot be read"):
        list(ImageSet(tmp_path / "shards").batches(5))
    reference = reference_statistics(folder / "real", early, tmp_path / "cache")
    direct = RunningStatistics(64)
    direct.update(early(images["samples"])[0])
    expected = frechet(direct.statistics().gaussian, reference.gaussian)
    live = (images["samples"][i : i + 5].float() / 255 for i in range(0, NUM, 5))  # a sampler, as it goes
    assert measure_images(live, early, reference).fid == pytest.approx(expected, rel=1e-6)


def test_a_reference_is_cropped_as_the_training_data_are(tmp_path):
    random = np.random.default_rng(0)
    for i, shape in enumerate(((150, 70, 3), (33, 90, 3), (20, 24, 3))):
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(tmp_path / f"{i}.png")
    prepared = np.stack([RawImage("", 0, path).open(32) for path in sorted(tmp_path.iterdir())])
    assert (next(ImageSet(tmp_path, crop=32).batches()).permute(0, 2, 3, 1).numpy() == prepared).all()


def test_statistics_of_a_reference_are_kept(early, sets, tmp_path, monkeypatch):
    folder, images = sets
    first = reference_statistics(folder / "real", early, tmp_path)
    features = early(images["real"])[0].double().numpy()
    np.testing.assert_allclose(first.mu, features.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(first.sigma, np.cov(features, rowvar=False), rtol=1e-7, atol=1e-12)
    monkeypatch.setattr(Inception, "forward", lambda *_: pytest.fail("computed again"))
    assert (reference_statistics(folder / "real", early, tmp_path).sigma == first.sigma).all()
    adm = tmp_path / "adm.npz"  # statistics win over images in one file
    np.savez(adm, arr_0=np.zeros((2, 8, 8, 3), np.uint8), mu=first.mu, sigma=first.sigma)
    assert (reference_statistics(adm, early, tmp_path).mu == first.mu).all()
    other = tmp_path / "other"
    other.mkdir()
    for i, image in enumerate(images["real"][:3]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(other / f"{i}.png")
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        reference_statistics(other, early, tmp_path)


def test_what_is_wrong_is_named(weights, early, sets, tmp_path, monkeypatch):
    _, images = sets
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*weights-inception.*allow_download"):
        find_inception_weights()

    class Code:
        def __reduce__(self):
            return (print, ("run",))

    (tmp_path / "code.pth").write_bytes(pickle.dumps(Code()))
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        Inception(tmp_path / "code.pth")
    state = torch.load(weights, weights_only=True)
    state["fc.bias"] = state["fc.bias"][:5].clone()
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"short.safetensors does not hold Inception's weights: .*fc\.bias"):
        Inception(tmp_path / "short.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no images .* in"):
        ImageSet(tmp_path)
    np.savez(tmp_path / "float.npz", np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"float.npz: arr_0 is float64 \(2, 8, 8, 3\), expected uint8"):
        ImageSet(tmp_path / "float.npz")
    (mixed := tmp_path / "mixed").mkdir()
    for size in (8, 12):
        Image.new("RGB", (size, size + 4)).save(mixed / f"{size}.png")
    with pytest.raises(ValueError, match=r"\(12, 8\) pixels after .*\(16, 12\): give .* crop a reference's"):
        list(ImageSet(mixed).batches())
    assert next(ImageSet(mixed, crop=6).batches()).shape == (2, 3, 6, 6)
    (mixed / "broken.png").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"broken\.png cannot be decoded: no image that Pillow knows"):
        list(ImageSet(mixed, crop=6).batches())
    with pytest.raises(ValueError, match="statistics of 5 features, expected 64"):
        reference_statistics(Statistics(np.zeros(5), np.eye(5)).save(tmp_path / "five.npz"), early)
    with pytest.raises(ValueError, match="statistics need two at least"):
        measure_images([images["real"][:1]], early)


def test_too_many_splits_are_refused_before_work(sets, tmp_path):
    folder, _ = sets
    for part in (range(5), range(5, NUM)):
        with tarfile.open(tmp_path / f"{part.start}.tar", "w") as tar:
            for i in part:
                tar.add(folder / f"samples/{i:03d}.png", f"{i:03d}.png")
    for samples in (folder / "samples", tmp_path):  # before the weights are looked for
        with pytest.raises(ValueError, match="12 images, too few for 20 splits"):
            main(["--samples", str(samples), "--splits=20", "--weights", "nowhere"])
        with pytest.raises(FileNotFoundError, match="no Inception weights at nowhere"):
            main(["--samples", str(samples), "--splits=12", "--weights", "nowhere"])
    with pytest.raises(ValueError, match="--splits 0 must be at least 1"):
        main(["--samples", str(tmp_path), "--splits=0"])


def test_the_benchmark_s_features_are_the_same_and_kept(weights, early, sets, tmp_path):
    from mfm_benchmarks.quality import InceptionQuality

    folder, images = sets
    shutil.copytree(folder / "real", tmp_path / "real")
    quality = InceptionQuality(str(weights), str(tmp_path / "real"), num_features=64, batch_size=5)
    assert quality.missing() == []
    quality.prepare(torch.device("cpu"))
    torch.testing.assert_close(quality.real, early(images["real"])[0])
    torch.testing.assert_close(quality.features(images["samples"].float() / 255), early(images["samples"])[0])
    shutil.rmtree(tmp_path / "real")
    (tmp_path / "real").mkdir()
    quality.prepare(torch.device("cpu"))
    assert len(quality.real) == NUM


def test_several_processes_find_the_statistics_or_the_command_that_makes_them(weights, early, sets, tmp_path):
    digits = DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, guidance_scales=())
    module = MFMPretraining(digits, Objective([WeightedTerm("mean_flow")]))
    options = {
        "weights": str(weights),
        "num_samples": 9,
        "num_features": 64,
        "crop": 16,
        "cache": str(tmp_path / "a b"),
    }
    strategy = SimpleNamespace(root_device=torch.device("cpu"), barrier=lambda name: None)
    trainer = SimpleNamespace(world_size=2, local_rank=0, is_global_zero=True, strategy=strategy)
    shifted = SimpleNamespace(**vars(trainer), datamodule=SimpleNamespace(latents={"scale": 1.0, "shift": 0.5}))
    with pytest.raises(ValueError, match=r"the latents are shifted or scaled by channel: give decoder.scale"):
        SampleFID("none", **options, decoder=VAEDecoder("none")).setup(shifted, module, "fit")
    with pytest.raises(FileNotFoundError, match=r"are not kept yet: make them first, by `mfm fid --reference") as error:
        SampleFID(str(sets[0] / "real"), **options).setup(trainer, module, "fit")
    main([*shlex.split(str(error.value).split("`")[1])[2:], "--save-statistics", str(tmp_path / "real.npz")])
    (callback := SampleFID(str(sets[0] / "real"), **options)).setup(trainer, module, "fit")
    kept = reference_statistics(sets[0] / "real", early, tmp_path / "a b", crop=16, compute=False)
    assert (callback.real.mu == kept.mu).all()
    assert (callback.real.sigma == kept.sigma).all()
    assert callback.real.num_samples == NUM
    assert (Statistics.load(tmp_path / "real.npz").sigma == kept.sigma).all()
    for wrong in ([], ["--reference", str(tmp_path / "real.npz")], ["--reference", str(sets[0]), "--output=f.json"]):
        with pytest.raises(CommandLineError):
            main(wrong)


def config(folder: Path, weights: Path, reference: Path, strategy: str = "auto", ema: bool = True) -> list[str]:
    """A run on digits with FID of 9 samples at validation, as a YAML; of two processes with a strategy."""
    settings = yaml.safe_load((ROOT / "configs/digits/mfm.yaml").read_text())
    model = settings["model"]["init_args"]
    model["network"]["init_args"] |= {"hidden_size": 16, "depth": 2, "num_heads": 2, "encoder_depth": 1}
    for name in ("teacher", "initial", "evaluation"):
        del model[name]
    model["objective"]["terms"] = [{"name": "mean_flow"}]
    model["optimization"] |= {"learning_rate": 0.05, "warmup_steps": 0}
    fid = {"reference": str(reference), "weights": str(weights), "num_samples": 9, "batch_size": 3, "num_features": 64}
    fid |= {"sampler": {"steps": 2}, "cache": str(folder.parent / "cache")}
    settings["trainer"] |= {
        "default_root_dir": str(folder), "devices": 1 if strategy == "auto" else 2, "strategy": strategy,
        "accelerator": "cpu", "max_steps": 4, "val_check_interval": 4, "limit_val_batches": 1,
        "enable_progress_bar": False, "log_every_n_steps": 1,
        "callbacks": [{"class_path": "mfm_lightning.callbacks.SampleFID", "init_args": fid}],
    }  # fmt: skip
    settings["ema"] = {"decay": 0.9 if ema else 0.0}  # with 0 the average is the weights
    settings["data"]["init_args"]["batch_size"] = 8
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path)]


def two_processes(folder: Path, subcommand: str, arguments: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mfm_lightning", subcommand, *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def fid_of(file: Path, inception: Inception, reference: Statistics) -> float:
    """FID of the samples that `config` asks for, from a model's file, in this process."""
    model, plan = load_model(file).eval(), SamplePlan(9, tuple(range(10)))
    states = ModelSampler(steps=2)(model, plan.label(range(9)), plan.generators(range(9)))
    return measure_images([(states + 1) / 2], inception, reference).fid


def logged(folder: Path) -> float:
    (path,) = (folder / "logs").rglob("metrics.csv")  # each stage has a log of its own
    with open(path) as file:
        return next(float(row["val/fid"]) for row in csv.DictReader(file) if row.get("val/fid"))


@pytest.mark.long
@pytest.mark.slow
def test_fid_in_training_is_that_of_the_averaged_weights_over_all_ranks(weights, early, sets, tmp_path, monkeypatch):
    """One process fits and measures; what it exports (the averaged weights) has the same FID here; two processes that
    validate one model report the same as one: to 1e-4."""
    monkeypatch.setattr(sys, "argv", ["mfm"])
    reference = sets[0] / "real"
    (one := tmp_path / "one").mkdir()
    run(["fit", *config(one, weights, reference)])
    expected = fid_of(one / "model.safetensors", early, reference_statistics(reference, early, tmp_path / "cache"))
    assert logged(one) == pytest.approx(expected, rel=1e-4)
    for devices in (1, 2):
        (tmp_path / f"validate{devices}").mkdir()
    trained = ["--ckpt_path", str(one / "last.ckpt")]
    run(["validate", *config(tmp_path / "validate1", weights, reference), *trained])
    two_processes(tmp_path, "validate", [*config(tmp_path / "validate2", weights, reference, "ddp"), *trained])
    found = [logged(tmp_path / f"validate{devices}") for devices in (1, 2)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] == pytest.approx(expected, rel=1e-4)  # the averaged weights of the checkpoint


@pytest.mark.long
@pytest.mark.slow
def test_fid_in_sharded_training_is_that_of_one_process_with_the_same_weights(weights, early, sets, tmp_path):
    """Two processes that fit and validate under FSDP2; one, here, with the weights that they export: to 1e-4."""
    statistics = reference_statistics(sets[0] / "real", early, tmp_path / "cache")
    (two := tmp_path / "two").mkdir()
    two_processes(tmp_path, "fit", config(two, weights, sets[0] / "real", "fsdp2", ema=False))
    expected = fid_of(two / "model.safetensors", early, statistics)
    assert logged(two) == pytest.approx(expected, rel=1e-4)
