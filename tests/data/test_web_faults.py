"""Shards that others made: what is refused, named, or counted where it is damaged; against tars written by tarfile."""

import io
import json
import logging

import numpy as np
import pytest

from mfm_lightning.data.images.pixels import PixelForm
from mfm_lightning.data.latents.image_sources import WebDatasetSource
from tests.data.web_shards import data, image_shards, latents, numbers, picture, png, sample, write

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*")


@pytest.fixture
def urls(tmp_path) -> str:
    return image_shards(tmp_path / "shards", [8, 8, 8, 8])


def test_wrong_latents_are_refused(tmp_path):
    good = np.ones((4, 2, 2), dtype=np.float32)
    broken = good.copy()
    broken[0, 0, 0] = np.nan
    for bad, holds, message in (
        (good[:, :1], "latent", r"l.tar:folder/00001.npy has torch.float32 \(4, 1, 2\), expected floats \(4, 2, 2\)"),
        (broken, "latent", r"00001.npy has numbers that are not finite"),
        (-good, "mean_std", r"00001.npy has deviations below 0: are they logarithms"),
        (good.astype(np.int32), "latent", "00001.npy has torch.int32"),
    ):
        given = latents(tmp_path, [good, bad])
        with pytest.raises(ValueError, match=message):
            list(data(batch_size=2, scale=1.0, holds=holds, **given).loader())
    given = latents(tmp_path, [good[:3]])
    with pytest.raises(ValueError, match=r"00000.npy: an array \(3, 2, 2\), expected \(2C, H, W\) or \(2, C, H, W\)"):
        data(scale=1.0, holds="mean_std", **given).state_shape  # noqa: B018
    with pytest.raises(ValueError, match="scale has 2 numbers, latents 3 channels"):
        data(scale=[1.0, 2.0], **given).state_shape  # noqa: B018


def test_other_orders_of_bytes_are_read_and_other_kinds_named(tmp_path):
    good = np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32)
    given = latents(tmp_path, [good.astype(">f4")])
    x, _ = next(iter(data(scale=1.0, val_urls=given["urls"], **given).val_dataloader()))
    np.testing.assert_array_equal(x[0], good)
    given = latents(tmp_path, [good, np.full((4, 2, 2), "text")])
    with pytest.raises(ValueError, match=r"00001.npy has <U4, expected floats"):
        list(data(batch_size=2, scale=1.0, **given).loader())
    file = io.BytesIO()
    np.savez(file, good)
    for content, message in ((file.getvalue(), "it is an .npz"), (b"PK\x03\x04 nothing", "not a zip file")):
        write(tmp_path / "z.tar", [{"npz": content, "cls": b"0"}])
        with pytest.raises(ValueError, match=rf"z.tar:folder/00000.npz cannot be read as .npy: .*{message}"):
            data(str(tmp_path / "z.tar"), image=None, latent="npz", scale=1.0).state_shape  # noqa: B018
    for scale, message in ((0.0, r"scale \[0.0\]: expected finite"), (float("nan"), r"scale \[nan\]: expected finite")):
        with pytest.raises(ValueError, match=message):
            data(scale=scale, **latents(tmp_path, [good])).state_shape  # noqa: B018


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_that_are_no_text_are_found_without_counting(tmp_path, workers):
    """The first one when the data are set up, another one when it is read."""
    given = {"caption": "json:text", "num_classes": 3, "num_samples": 2, "size": 8, "channels": 3}
    for text, said in ((b"3", "3"), (b'["a"]', r"\['a'\]"), (b"null", "None")):
        wrong = {"json": b'{"text": ' + text + b"}"}
        write(tmp_path / "0.tar", [sample(0) | wrong, sample(1)])
        with pytest.raises(ValueError, match=rf"0.tar:folder/00000.json:text is {said}, expected a text"):
            data(str(tmp_path / "0.tar"), **given).state_shape  # noqa: B018
        write(tmp_path / "0.tar", [sample(0), sample(1) | wrong])
        with pytest.raises(ValueError, match=rf"0.tar:folder/00001.json:text is {said}, expected a text") as error:
            list(data(str(tmp_path / "0.tar"), 2, workers, **given).loader())
        assert "\n" not in str(error.value)


def test_captions_that_are_no_text_are_found_when_samples_are_counted(tmp_path):
    write(tmp_path / "0.tar", [sample(0), sample(1) | {"json": b'{"text": 3}'}])
    with pytest.raises(ValueError, match=r"0.tar:folder/00001.json:text is 3, expected a text"):
        data(str(tmp_path / "0.tar"), caption="json:text").num_samples  # noqa: B018
    assert data(str(tmp_path / "0.tar"), caption="json:text", corrupt="skip").num_samples == 1


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("2", 2),
        (" +2\n", 2),
        ("002", 2),
        ("1_0", None),
        ("\uff17", None),
        ("\u0967", None),
        ("", None),
        ("1.0", None),
        ("- 1", None),
    ],
)
def test_labels_are_digits_in_ascii(tmp_path, text, label):
    """`int` would read 1_0 as 10, and digits of other scripts; also for the shards of `mfm prepare-latents`."""
    write(tmp_path / "0.tar", [sample(0) | {"cls": text.encode(), "json": json.dumps({"label": text}).encode()}])
    by_command = WebDatasetSource([str(tmp_path / "0.tar")])
    if label is None:
        for key in ("cls", "json:label"):
            with pytest.raises(
                ValueError, match=rf"0.tar:folder/00000.{key} is {text!r}, expected a label, a whole num"
            ):
                data(str(tmp_path / "0.tar"), label=key).num_classes  # noqa: B018
        with pytest.raises(ValueError, match="not a label in ASCII"):
            list(by_command.read(0))
        return
    assert [data(str(tmp_path / "0.tar"), label=key).num_classes for key in ("cls", "json:label")] == [label + 1] * 2


def test_shards_that_are_given_twice_are_said(urls, tmp_path, caplog):
    folder = tmp_path / "shards"
    (tmp_path / "link.tar").symlink_to(folder / "003.tar")
    data(f"{folder}/{{000..001}}.tar", val_urls=f"{folder}/{{002..003}}.tar")
    assert not caplog.messages
    data(f"{folder}/000.tar::file:{folder}/000.tar", val_urls=f"{folder}/001.tar")
    assert caplog.messages == [f"urls have 1 shards more than once: {folder}/000.tar"]
    caplog.clear()
    WebDatasetSource([f"{folder}/{{000..002}}.tar", f"{folder}/002.tar"])  # of mfm prepare-latents
    assert caplog.messages == [f"urls have 1 shards more than once: {folder}/002.tar"]
    caplog.clear()
    data(urls, val_urls=f"{tmp_path}/link.tar")
    said = "val_urls have 1 shards of urls: validation is on what is trained on"
    assert caplog.messages == [f"{said}: {folder}/003.tar"]


def test_a_wrong_number_of_samples_is_refused_where_they_are_read_or_said_in_training(urls, caplog):
    caplog.set_level(logging.WARNING)
    for wrong in (31, 1000):
        with pytest.raises(
            ValueError, match=rf"num_samples {wrong}: .*000.tar, .* have 32; give that, or leave it out"
        ):
            data(urls, num_samples=wrong).num_classes  # noqa: B018
    assert data(urls, num_samples=32).num_classes == 3
    given = {"num_classes": 3, "size": 8, "channels": 3}
    for number, world in ((32, 1), (32, 2), (48, 1)):
        for rank in range(world):
            list(data(urls, num_samples=number, **given).loader(rank, world, length=30))
    list(data(urls, num_samples=4, resampled=True, batch_size=100, **given).loader(length=2))
    assert not caplog.messages
    list(data(urls, num_samples=1000, **given).loader(length=30))
    (said,) = caplog.messages
    assert said.startswith("the shards of a data worker have 32 samples, and its epoch 1000: num_samples is too large")


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_named_or_counted(tmp_path, caplog, workers):
    samples = [sample(i) for i in range(12)]
    samples[5]["png"] = samples[5]["png"][:40]
    samples[7]["cls"] = b"cat"
    del samples[9]["png"]
    for k in range(2):
        write(tmp_path / f"{k}.tar", samples[6 * k : 6 * k + 6], 6 * k)
    urls, given = f"{tmp_path}/{{0..1}}.tar", {"num_classes": 3, "num_samples": 12}
    broken = r"0.tar:folder/00005.png cannot be decoded"
    with pytest.raises(ValueError, match=broken):
        list(data(f"{tmp_path}/0.tar", num_workers=workers, **given).loader(length=3))
    with pytest.raises(ValueError, match=r"1.tar:folder/00007.cls is 'cat', expected a label"):
        data(f"{tmp_path}/1.tar").num_classes  # noqa: B018
    found = data(urls, num_workers=workers, corrupt="skip", val_urls=urls, **given)
    with caplog.at_level(logging.WARNING):
        assert set(numbers(found.loader(length=9))) == set(range(12)) - {5, 7, 9}
    assert found.skipped == 3
    if not workers:
        assert "skipped: " in caplog.text
        assert "00009 has cls, txt, json, expected jpg or png" in caplog.text
    for world in (1, 2):
        ranks = [list(found.held_out(rank, world)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        assert {n for batches in ranks for n in numbers(batches)} == set(range(12)) - {5, 7, 9}
    found.teardown("fit")
    assert found.skipped == 3  # once each, in whatever split and pass
    assert data(urls, corrupt="skip", num_classes=3).num_samples == 10  # one cannot be decoded, which is not tried
    write(tmp_path / "2.tar", [{"png": b"x", "cls": b"0"}])
    with pytest.raises(ValueError, match=r"no sample that can be used in .*2.tar"):
        list(data(f"{tmp_path}/2.tar", 1, workers, corrupt="skip", size=8, channels=3, **given).loader())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_of_another_size_is_no_damage(tmp_path, workers):
    """As many as one likes would be left out, with a word for ten of them."""
    shard = write(tmp_path / "s.tar", [{"png": png(picture(i, size)), "cls": b"0"} for i, size in enumerate((8, 9))])
    found = data(str(shard), 2, workers, corrupt="skip", num_samples=2, num_classes=1)
    with pytest.raises(ValueError, match=r"00001.png has 9 x 9 pixels, the first 8 x 8: give a size"):
        list(found.loader(length=2))


@pytest.mark.parametrize("resampled", [False, True])
def test_workers_and_ranks_pass_over_shards_that_are_damaged_as_a_whole(urls, tmp_path, resampled):
    """One shard each: in each epoch the garbage is another one's."""
    (tmp_path / "shards/001.tar").write_bytes(b"garbage" * 1000)
    given = {"corrupt": "skip", "num_classes": 3, "num_samples": 32, "resampled": resampled}
    for workers, world in ((4, 1), (0, 2), (0, 4)):
        for rank in range(world):
            found = data(urls, num_workers=workers, **given)
            batches = numbers(found.loader(rank, world, length=16))
            assert len(batches) == 16 * 4
            assert set(batches) <= set(range(32)) - set(range(8, 16))
            assert found.skipped
    for k in (0, 2, 3):
        (tmp_path / f"shards/00{k}.tar").write_bytes(b"garbage" * 1000)
    with pytest.raises(ValueError, match=r"no sample that can be used in .*000.tar, .*001.tar, .*002.tar, \.\.\."):
        data(urls, size=8, channels=3, **given).loader(0, 2, length=2)
    (tmp_path / "shards/000.tar").write_bytes(b"garbage" * 1000)
    found = data(urls, size=8, channels=3, **given)
    found.form = PixelForm(8, 3, True, True)  # they were damaged since
    with pytest.raises(ValueError, match=r"no sample that can be used in .*000.tar, .*001.tar, .*002.tar, \.\.\."):
        list(found.loader(0, 2, length=2))


def test_damaged_and_missing_shards(urls, tmp_path):
    path = tmp_path / "shards/002.tar"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"shard .*002.tar cannot be read after \d+ files"):
        data(urls).num_samples  # noqa: B018
    found = data(urls, corrupt="skip")
    assert found.num_samples == 26  # the third sample of the third shard has lost its label
    assert found.skipped == 1
    batches = found.loader(length=6)
    assert set(numbers(batches)) <= {*range(18), *range(24, 32)}
    assert found.skipped == 1
    header = bytearray((tmp_path / "shards/001.tar").read_bytes())
    header[512 * 6 + 10] ^= 255  # which Python's tarfile takes for the end
    (tmp_path / "shards/001.tar").write_bytes(header)
    with pytest.raises(ValueError, match=r"001.tar cannot be read"):
        data(str(tmp_path / "shards/001.tar")).num_samples  # noqa: B018
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no shard .*002.tar"):
        data(urls)


def test_urls(urls, tmp_path):
    folder = tmp_path / "shards"
    pipe = f"pipe:cat {folder}/{{000..003}}.tar"
    with pytest.raises(ValueError, match="runs a shell command"):
        data(pipe)
    assert sorted(numbers(data(pipe, allow_pipe=True).loader(length=8))) == list(range(32))
    assert data(f"{folder}/000.tar::{folder}/001.tar").num_samples == 16
    assert data([f"{folder}/000.tar", f"file:{folder}/00{{1..2}}.tar"]).num_samples == 24
    failing = data("pipe:exit 3", allow_pipe=True)
    with pytest.raises(ValueError, match="shard pipe:exit 3 cannot be read"):
        failing.num_samples  # noqa: B018
    for given, message in (
        ([], "name no shard"),
        ("${WHERE}/a.tar", "missing environment variable"),
        ("foo://a.tar", "nothing opens foo:"),
    ):
        with pytest.raises(ValueError, match=message):
            data(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": None}, "give image or latent"),
        ({"latent": "npy"}, "give image or latent"),
        ({"image": None, "latent": "npy"}, "scale must be given for latents"),
        ({"image": None, "latent": "npy", "scale": 1.0, "mirror": True}, "size, channels and mirror are for images"),
        ({"scale": 1.0}, "holds, scale and shift are for latents"),
        ({"image": None, "latent": "npy", "scale": 1.0, "holds": "moments"}, "holds 'moments': expected one of latent"),
        ({"channels": 2}, "channels 2: expected 1"),
        ({"num_classes": 0}, "num_classes 0 with label cls: set label: null"),
        ({"num_samples": 0}, "num_samples 0 must be at least 1"),
        ({"corrupt": "drop"}, "corrupt 'drop': expected one of raise, skip"),
    ],
)
def test_settings_that_do_not_fit(urls, given, message):
    with pytest.raises(ValueError, match=message):
        data(urls, **given)
