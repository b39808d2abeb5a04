"""Latents as other tools leave them: files written by numpy, zipfile and safetensors alone."""

import json
import logging
import zipfile
from collections import Counter
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mfm_lightning.checkpoints import load_model, read_metadata
from mfm_lightning.commands.main import run
from mfm_lightning.data import LatentDataModule, WebDatasetDataModule
from mfm_lightning.data.latent_files import LatentArrays, LatentFolder
from mfm_lightning.data.latent_files.arrays import _Npz
from mfm_lightning.data.stream import WorkerStream
from mfm_lightning.networks import VAEDecoder
from tests.data.web_shards import npy, write
from tests.processes import torchrun

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*")
SHAPE = (2, 3, 3)
LABELS = [i % 3 for i in range(20)]


def moments(i: int, std: float = 0.0) -> np.ndarray:
    """Latent i: mean i all over."""
    return np.concatenate([np.full(SHAPE, i, np.float32), np.full(SHAPE, std, np.float32)])


def edm2(folder: Path, num: int = 20, std: float = 0.0, zipped: bool = False, labels: bool = True) -> str:
    """As `dataset_tool.py encode` of EDM2 and REPA: folders of files, and dataset.json; or all in a zip."""
    names = [f"{i // 8:05d}/img-mean-std-{i:08d}.npy" for i in range(num)]
    content = {name: npy(moments(i, std)) for i, name in enumerate(names)}
    index = {"labels": [[name, i % 3] for i, name in enumerate(names)] if labels else None}
    content["dataset.json"] = json.dumps(index).encode()
    if zipped:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        return str(folder / "a.zip")
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def lightning_dit(folder: Path, lengths=(9, 4, 7), kind: str = "safetensors") -> str:
    """As LightningDiT's `extract_features.py`: latents, those of mirror images (here -i), labels."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for k, length in enumerate(lengths):
        rows = torch.arange(first, first + length).float()[:, None, None, None].expand(length, *SHAPE).contiguous()
        arrays = {
            "latents": rows,
            "latents_flip": -rows.clone(),
            "labels": torch.tensor(LABELS[first : first + length]),
        }
        path = folder / f"latents_rank00_shard{k:03d}.{kind}"
        if kind == "safetensors":
            save_file(arrays, path)
        else:
            save = np.savez_compressed if k == 1 else np.savez
            save(path, **{name: array.numpy() for name, array in arrays.items()})
        first += length
    return str(folder)


def numbers(batches) -> list[int]:
    return [round(float(x.mean())) for batch in batches for x in batch[0]]


SOURCES = {
    "folder": lambda path: ({"source": edm2(path), "holds": "mean_std"}),
    "zip": lambda path: ({"source": edm2(path, zipped=True), "holds": "mean_std"}),
    "safetensors": lambda path: ({"source": lightning_dit(path)}),
    "npz": lambda path: ({"source": lightning_dit(path, kind="npz")}),
}


def data(batch_size: int = 4, **more) -> LatentDataModule:
    return LatentDataModule(**({"scale": 1.0, "val_fraction": 0.0, "num_workers": 0} | more), batch_size=batch_size)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_latent_once_an_epoch_on_any_ranks_and_exactly_resumed(tmp_path, kind, workers):
    given = SOURCES[kind](tmp_path)
    found = data(num_workers=workers, **given)
    assert (found.state_shape, found.num_classes) == (SHAPE, 3)
    assert found.label_counts()["train"].tolist() == [7, 7, 6]
    for world in (1, 2, 5):
        line = [[numbers([found.batches(rank, world)(step)]) for rank in range(world)] for step in range(10)]
        flat = [number for step in line for batch in step for number in batch]
        for epoch in range(len(flat) // 20):
            assert sorted(flat[20 * epoch : 20 * epoch + 20]) == list(range(20))
    x, label = found.batches()(3)
    assert label.tolist() == [LABELS[i] for i in numbers([(x, label)])]
    again = data(num_workers=workers, **given).batches()(3)
    torch.testing.assert_close(again[0], x, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_mirror_images_are_their_own_latents(tmp_path, kind):
    with pytest.raises(ValueError, match="has no latents of mirror images: set flip: false"):
        data(source=lightning_dit(tmp_path, kind=kind), flip=True)
    source = LatentArrays(str(tmp_path), mirrored="latents_flip")
    found = data(source=source, flip=True, val_source=source)
    drawn = [n for n in numbers(found.batches()(step) for step in range(50)) if n]
    assert 0.35 < np.mean(np.array(drawn) < 0) < 0.65  # 190 draws: 4 deviations
    assert numbers(found.val_dataloader()) == list(range(20))  # never mirrored


def test_draws_and_scales(tmp_path):
    """A channel's mean and deviation of many draws, 5 standard errors."""
    found = data(2000, source=edm2(tmp_path, 1, std=3.0, labels=False), holds="mean_std", scale=[0.5, 2.0], shift=1.0)
    assert (found.num_classes, found.label_counts()) == (0, {})
    x, label = found.batches()(0)
    assert label.tolist() == [0] * 2000
    for k, scale in enumerate((0.5, 2.0)):
        values = x[:, k].double()
        assert abs(values.mean() + scale) < 5 * 3 * scale / np.sqrt(values.numel())
        assert abs(values.std() - 3 * scale) < 5 * 3 * scale / np.sqrt(2 * values.numel())
    assert not torch.equal(found.batches()(1)[0], x)
    assert not torch.equal(found.batches(1, 2)(0)[0], x)


def test_validation_is_a_share_of_each_class_or_other_latents(tmp_path):
    source = lightning_dit(tmp_path / "a")
    found = data(source=source, val_fraction=0.3)
    val, train = numbers(found.val_dataloader()), numbers(found.batches()(step) for step in range(14))
    assert Counter(LABELS[i] for i in val) == {0: 2, 1: 2, 2: 2}
    assert set(train) == set(range(20)) - set(val)
    assert data(source=source).val_dataloader() == []
    other = edm2(tmp_path / "b", std=1.0)
    held_out = data(source=other, holds="mean_std", val_source=other)
    first, second = (torch.cat([x for x, _ in held_out.val_dataloader()]) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert next(iter(held_out.predict_dataloader()))[1]["index"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"has labels up to 2, .* 2 classes"):
        data(source=edm2(tmp_path / "c", 2), holds="mean_std", val_source=other).setup()
    with pytest.raises(ValueError, match=r"has no labels, .* 3 classes"):
        data(source=other, holds="mean_std", val_source=edm2(tmp_path / "d", 2, labels=False)).setup()


def test_held_out_latents_of_another_shape_are_refused_before_training(tmp_path):
    save_file({"latents": torch.ones(3, 2, 4, 4), "labels": torch.tensor([0, 1, 2])}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"latent 0 of .*b.safetensors has torch.float32 \(2, 4, 4\), expected floats"):
        data(source=lightning_dit(tmp_path / "a"), val_source=str(tmp_path / "b.safetensors")).setup()


@pytest.mark.parametrize("web", [False, True])
def test_pictures_of_shifted_latents_are_those_of_the_latents(monkeypatch, tmp_path, web):
    """A VAE that gives back what it decodes, the factor 0.5 of its own scale taken away."""

    def make(decoder, **more):
        if web:
            write(tmp_path / "a.tar", [{"npy": npy(np.ones(SHAPE, np.float32))}])
            return WebDatasetDataModule(str(tmp_path / "a.tar"), latent="npy", label=None, decoder=decoder, **more)
        return data(source=lightning_dit(tmp_path), decoder=decoder, **more)

    class Plain:
        config = MappingProxyType({"scaling_factor": 0.5})

        def to(self, device):
            return self

        def decode(self, z):
            return SimpleNamespace(sample=z)

    monkeypatch.setattr("mfm_lightning.networks.decoders.load_vae", lambda *_: Plain())
    z = torch.rand(3, *SHAPE) - 0.5
    for scale, shift in (([0.25, 4.0], [3.0, -1.0]), (2.0, 0.7), ([2.0, 3.0], 0.0)):
        factor, moved = (torch.tensor(v).expand(2).reshape(2, 1, 1) for v in (scale, shift))
        decoder = VAEDecoder(scale=scale, shift=shift)
        for decode in (make(decoder, scale=scale, shift=shift).decode, decoder):  # and by itself, as in steering
            torch.testing.assert_close(decode((z - moved) * factor), (z + 1) / 2)
        for missing in ({}, {"scale": scale}, {"shift": shift}):
            with pytest.raises(ValueError, match=r"the latents are shifted or scaled by channel: give decoder"):
                make(VAEDecoder(**missing), scale=scale, shift=shift)
    torch.testing.assert_close(make(VAEDecoder(), scale=0.5).decode(z * 0.5), (z + 1) / 2)
    with pytest.raises(ValueError, match=r"decoder.shift has 3 numbers, states have 2 channels"):
        VAEDecoder(shift=[1.0, 2.0, 3.0])(z)
    for wrong in ({"scale": [0.5, 0.0]}, {"scale": 0.0}, {"shift": float("nan")}):
        with pytest.raises(ValueError, match="expected finite numbers"):
            VAEDecoder(**wrong)


def test_orders_of_bytes_and_damaged_compression(tmp_path):
    array = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(">f4")
    np.savez(tmp_path / "a.npz", latents=array)
    np.save(tmp_path / "a.npy", array[0])
    (tmp_path / "dataset.json").write_text('{"labels": [["a.npy", 0]]}')
    for source in (LatentArrays(str(tmp_path / "a.npz"), labels=None), LatentFolder(str(tmp_path))):
        np.testing.assert_array_equal(source.array(0), array[0])
    np.savez_compressed(tmp_path / "b.npz", latents=array)
    content = (tmp_path / "b.npz").read_bytes()
    begin = 30 + int.from_bytes(content[26:28], "little") + int.from_bytes(content[28:30], "little")
    (tmp_path / "b.npz").write_bytes(content[:begin] + b"\xff" * 20 + content[begin + 20 :])
    with pytest.raises(ValueError, match=r"b.npz cannot be read as .npz: .*decompress"):
        LatentArrays(str(tmp_path / "b.npz"), labels=None).array(0)


def test_arrays_are_mapped_and_compressed_ones_said(tmp_path, caplog):
    folder = Path(lightning_dit(tmp_path, kind="npz"))
    stored, packed = (_Npz(folder / f"latents_rank00_shard00{k}.npz") for k in (0, 1))
    assert isinstance(stored._array("latents"), np.memmap)
    with caplog.at_level(logging.INFO):
        assert not isinstance(packed._array("latents"), np.memmap)
    assert "shard001.npz is compressed: latents is read whole" in caplog.text
    for file in (stored, packed):
        with np.load(file.path) as expected:
            np.testing.assert_array_equal(file.whole("latents"), expected["latents"])
    half = torch.arange(12).reshape(2, 6, 1, 1).to(torch.bfloat16)
    save_file({"x": half, "y": torch.tensor([0, 1])}, tmp_path / "half.safetensors")
    source = LatentArrays(str(tmp_path / "half.safetensors"), "x", "y")
    x = data(2, source=source, val_source=source).val_dataloader()
    torch.testing.assert_close(next(iter(x))[0], half.float())


def test_what_cannot_be_read_is_named(tmp_path):
    root = Path(edm2(tmp_path / "a"))
    (root / "00001/img-mean-std-00000009.npy").write_bytes(b"\x93NUMPY")
    np.save(root / "00001/img-mean-std-00000011.npy", np.ones((4, 3, 2), np.float32))
    found = data(source=str(root), holds="mean_std")
    for i, kind, message in (
        (9, ValueError, r"img-mean-std-00000009.npy cannot be read as .npy"),
        (11, ValueError, r"00000011.npy has torch.float32 \(4, 3, 2\), expected floats \(4, 3, 3\)"),
    ):
        with pytest.raises(kind, match=message):
            found.parts["train"].sample(i)
    for workers in (0, 2):
        with pytest.raises((ValueError, FileNotFoundError)):
            list(data(source=str(root), holds="mean_std", val_source=str(root), num_workers=workers).val_dataloader())
    (root / "a.npy").write_bytes(npy(moments(0)))
    for content, message in (
        ('{"labels": [["a.npy", 1], ["./a.npy", 2]]}', r"dataset.json lists a.npy twice, with the labels 1 and 2"),
        (
            '{"labels": [["a.npy", 1], ["a.npy", 1]]}',
            r"lists a.npy twice, with the labels 1 and 1: expected each file o",
        ),
        ('{"labels": [["._a.npy", 1]]}', r"names '._a.npy': expected a .npy inside of .* that is not hidden"),
        ('{"labels": [["a.npy", "cat"]]}', "has 1 latents and labels"),
        ('{"labels": [["../a.npy", 1]]}', r"names '../a.npy': expected a .npy inside of"),
        ('{"labels": [["a.png", 1]]}', r"names 'a.png': expected a .npy"),
        ('{"labels": [["a.npy", -1]]}', r"has labels -1..-1: expected numbers of classes"),
        ('{"labels": []}', "no latents in"),
        ('{"names": []}', 'is not {"labels"'),
        ("[1", 'is not {"labels"'),
    ):
        (root / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            len(LatentFolder(str(root)))
    with pytest.raises(FileNotFoundError, match=r"no dataset.json in"):
        len(LatentFolder(str(tmp_path)))


@pytest.mark.parametrize("zipped", [False, True])
def test_files_that_are_listed_or_there_alone(tmp_path, caplog, zipped):
    """20 files, of which 10 are listed, beside a hidden one; and a list of files that are not there."""
    root = Path(edm2(tmp_path / "a"))
    (root / "00000/._x.npy").write_bytes(b"of macOS")
    rows = [[f"{i // 8:05d}/img-mean-std-{i:08d}.npy", 0] for i in range(22)]

    def folder(labels: list | None) -> LatentDataModule:
        (root / "dataset.json").write_text(json.dumps({"labels": labels}))
        if not zipped:
            return data(source=str(root), holds="mean_std")
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for path in filter(Path.is_file, root.rglob("*")):
                archive.write(path, path.relative_to(root))
        return data(source=str(tmp_path / "a.zip"), holds="mean_std")

    found = folder(rows[:10])
    found.setup()
    place = tmp_path / "a.zip" if zipped else root
    (line,) = caplog.messages
    assert line.startswith(f"{place}: 10 of 20 .npy are left out, for dataset.json does not list them: 00001/img-mean")
    assert len(found.parts["train"]) == 10
    with pytest.raises(
        FileNotFoundError, match=r"2 of the 22 files that .*dataset.json lists are not there, .*020.npy"
    ):
        folder(rows).setup()
    every = folder(None)
    every.setup()
    assert sorted(numbers([every.batches()(step) for step in range(5)])) == list(range(20))


def test_a_share_for_validation_that_is_none_is_refused(tmp_path):
    source = lightning_dit(tmp_path)
    wanted = "no val latents: val_fraction 0.01 of the 20 of .*, of which each class keeps one .*: set 0.05 or more, "
    with pytest.raises(ValueError, match=wanted):
        LatentDataModule(source, 1.0, num_workers=0).setup()
    assert len(data(source=source, val_fraction=0.05).parts["val"]) == 1
    found = data(source=source, val_fraction=0.95).parts
    assert len(found["train"]) == len(np.unique(found["train"].labels)) == 3


@pytest.mark.parametrize("web", [False, True])
def test_what_arrays_are_taken_for_is_said_where_they_could_be_moments(tmp_path, caplog, web):
    def of(array: np.ndarray, **more):
        if web:
            write(tmp_path / "a.tar", [{"npy": npy(array)}])
            return WebDatasetDataModule(str(tmp_path / "a.tar"), latent="npy", label=None, scale=1.0, **more)
        np.savez(tmp_path / "a.npz", latents=array[None])
        return data(source=LatentArrays(str(tmp_path / "a.npz"), labels=None), **more)

    even, odd = np.ones((8, 4, 4), np.float32), np.ones((3, 4, 4), np.float32)
    assert of(even).state_shape == (8, 4, 4)
    (said,) = caplog.messages
    assert "arrays (8, 4, 4) are taken for latents of 8 channels (holds: latent); if they are moments of 4 chan" in said
    assert ("folder/00000.npy" if web else "latent 0 of ") in said
    caplog.clear()
    assert of(odd).state_shape == (3, 4, 4)
    assert of(even, holds="latent").state_shape == (8, 4, 4)
    assert of(even, holds="mean_std").state_shape == (4, 4, 4)
    assert not caplog.messages
    for wrong, message in (
        (even.astype(np.int8), r"has torch.int8, expected floats: float16, bfloat16"),
        (even * np.nan, "has numbers that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            of(wrong).state_shape  # noqa: B018 # at setup, not in the batch that draws one


def test_validation_on_the_training_latents_is_said(tmp_path, caplog):
    """Also of a copy of them; not of as many others."""
    first, copy, other = (lightning_dit(tmp_path / name) for name in "abc")
    arrays = {"latents": torch.rand(7, *SHAPE), "latents_flip": torch.rand(7, *SHAPE), "labels": torch.zeros(7).long()}
    save_file(arrays, Path(other) / "latents_rank00_shard002.safetensors")
    data(source=first, val_source=other).setup()
    assert "validation is on" not in caplog.text
    data(source=first, val_source=copy).setup()
    assert f"val_source {copy} has the same 20 latents as source {first}: validation is on what" in caplog.text


def test_other_latents_in_a_resumed_run_are_said(tmp_path, caplog):
    root = Path(edm2(tmp_path))
    given = {"source": str(root), "holds": "mean_std"}
    saved = data(**given).state_dict()
    data(**given).load_state_dict(saved)
    data(**given).load_state_dict({key: value for key, value in saved.items() if key != "contents"})  # an older run's
    assert not caplog.messages
    index = json.loads((root / "dataset.json").read_text())
    index["labels"] = [[name, {0: 1, 1: 0}.get(label, label)] for name, label in index["labels"]]
    (root / "dataset.json").write_text(json.dumps(index))
    (root / "00002/img-mean-std-00000019.npy").write_bytes(npy(moments(3)))
    data(**given).load_state_dict(saved)
    said = "the latents are not those of the run that goes on, or are scaled otherwise; there changed"
    assert caplog.messages == [f"{root}: {said} labels, the last latent"]


def test_arrays_that_do_not_fit_are_named(tmp_path):
    folder = Path(lightning_dit(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"shard000.safetensors has no array 'z': it has labels, latents, "):
        data(source=LatentArrays(str(folder), "z")).state_shape  # noqa: B018
    save_file({"latents": torch.ones(3, 1), "labels": torch.ones(3).long()}, folder / "z.safetensors")
    with pytest.raises(ValueError, match=r"z.safetensors has latents \(3, 1\), .*shard000.safetensors \(N, 2, 3, 3\)"):
        data(source=str(folder)).num_classes  # noqa: B018
    save_file({"latents": torch.ones(3, *SHAPE), "labels": torch.ones(2).long()}, folder / "z.safetensors")
    with pytest.raises(ValueError, match=r"z.safetensors has 3 latents and labels \(2,\)"):
        data(source=str(folder)).num_classes  # noqa: B018
    (folder / "z.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"z.safetensors is no safetensors file, or damaged"):
        data(source=str(folder)).num_classes  # noqa: B018
    (folder / "z.safetensors").unlink()
    np.savez(folder / "a.npz", latents=np.ones((2, *SHAPE)))
    with pytest.raises(ValueError, match=r"has both .safetensors and .npz"):
        data(source=str(folder)).num_classes  # noqa: B018
    (tmp_path / "b.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b.npz cannot be read as .npz"):
        data(source=str(tmp_path / "b.npz")).num_classes  # noqa: B018


def test_wrong_paths_and_settings(tmp_path):
    for path, kind, message in (
        ("nowhere", FileNotFoundError, "no latents at .*nowhere: expected a folder"),
        (".", ValueError, r"has no dataset.json with .npy files, and no .safetensors or .npz"),
    ):
        with pytest.raises(kind, match=message):
            data(source=str(tmp_path / path))
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="read them with LatentShards"):
        data(source=str(tmp_path))
    source = lightning_dit(tmp_path / "a")
    for given, message in (
        ({"holds": "moments"}, "holds 'moments': expected one of"),
        ({"val_fraction": 1.0}, "val_fraction 1.0 must be in"),
        ({"num_classes": 2}, r"has labels 0..2, more than num_classes 2"),
        ({"scale": [1.0, 2.0, 3.0]}, "scale has 3 numbers, latents 2 channels"),
        ({"holds": "mean_std", "scale": [1.0, 2.0]}, "scale has 2 numbers, latents 1 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            data(source=source, **given).setup()
    assert data(source=source, num_classes=5).num_classes == 5


def test_workers_take_no_number_from_trainings_noise(tmp_path):
    found = data(source=lightning_dit(tmp_path), num_workers=2, val_fraction=0.3)
    for loader in (WorkerStream(found.batches(), 2, 3), found.val_dataloader()):
        torch.manual_seed(0)
        list(loader)
        ours = torch.rand(3)
        torch.manual_seed(0)
        assert torch.equal(ours, torch.rand(3))


TINY = """
seed_everything: 0
trainer: {max_steps: 6, accelerator: cpu, val_check_interval: 3, log_every_n_steps: 1, enable_progress_bar: false}
checkpoint: {every_n_steps: 3}
model:
  class_path: mfm_lightning.modules.MFMPretraining
  init_args:
    network:
      class_path: mfm_lightning.networks.UNet
      init_args: {channels: 8, channel_multipliers: [1], num_heads: 2, norm_groups: 2}
    objective: {terms: [{name: data_diagonal}]}
    optimization: {optimizer: adamw, learning_rate: 1.0e-3, warmup_steps: 0}
data:
  class_path: mfm_lightning.data.LatentDataModule
  init_args:
    source:
      class_path: mfm_lightning.data.latent_files.LatentArrays
      init_args: {path: latents, mirrored: latents_flip}
    scale: 0.1
    flip: true
    val_fraction: 0.2
    batch_size: 2
    num_workers: 2
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_fit_resumes_exactly_and_runs_on_two_processes(tmp_path, monkeypatch):
    """The network's sizes are the data's."""
    monkeypatch.chdir(tmp_path)
    lightning_dit(tmp_path / "latents")
    Path("tiny.yaml").write_text(TINY)

    def fit(folder: str, *more: str) -> dict:
        run(["fit", "--config", "tiny.yaml", f"--trainer.default_root_dir={folder}", *more])
        return load_model(f"{folder}/model.safetensors").network.state_dict()

    whole = fit("whole")
    assert json.loads(read_metadata("whole/model.safetensors")["latents"]) == {"scale": 0.1, "shift": 0.0}
    fit("parts", "--trainer.max_steps=3")
    for name, weight in fit("parts", "--ckpt_path=last").items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=0)
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.default_root_dir=two"]
    torchrun(tmp_path, 2, "fit", "--config", "tiny.yaml", *more)
    assert "val/loss" in Path("two/logs/csv/metrics.csv").read_text()
