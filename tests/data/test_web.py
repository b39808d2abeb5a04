"""Shards that others made: which samples are read, by whom, in which order; against tars written by tarfile."""

import logging
import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from mfm_lightning.conditions import Conditions
from mfm_lightning.data import ImageDataModule
from mfm_lightning.data.latent_form import LatentForm
from tests.data.web_shards import data, image_shards, latents, numbers, picture, png, warnings_of, write

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*")


@pytest.fixture
def urls(tmp_path) -> str:
    return image_shards(tmp_path / "shards", [8, 8, 8, 8])


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_every_sample_once_in_another_order_each_time(urls, workers):
    stream = data(urls, num_workers=workers).loader(length=16)
    batches = list(stream)
    assert len(batches) == 16
    epochs = [numbers(batches[:8]), numbers(batches[8:])]
    for epoch in epochs:
        assert sorted(epoch) == list(range(32))
    assert epochs[0] != epochs[1] != list(range(32))
    x, label = batches[0]
    assert label.tolist() == [i % 3 for i in numbers(batches[:1])]
    expected = torch.from_numpy(picture(numbers(batches[:1])[0])).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(x[0], expected, rtol=0, atol=0)


def test_ranks_share_an_epoch_and_take_other_shards_in_the_next(urls):
    ranks = [numbers(data(urls).loader(rank, 2, length=16)) for rank in range(2)]
    for first in (0, 16):
        epoch = [r[first : first + 16] for r in ranks]
        assert sorted(epoch[0] + epoch[1]) == list(range(32))
    shards = [[{i // 8 for i in r[first : first + 16]} for first in range(0, 64, 16)] for r in ranks]
    assert len({tuple(sorted(s)) for s in shards[0]}) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_uneven_shards_give_all_ranks_as_many_batches(tmp_path, workers):
    urls = image_shards(tmp_path, [1, 13, 2, 9, 3])
    for world in (1, 2, 3):
        for rank in range(world):
            batches = list(data(urls, num_workers=workers).loader(rank, world, length=11))
            assert [len(x) for x, _ in batches] == [4] * 11


def test_fewer_shards_than_ranks_are_refused_or_drawn(tmp_path):
    urls = image_shards(tmp_path, [9, 7])
    with pytest.raises(ValueError, match="2 shards for 3 ranks: set resampled: true"):
        data(urls).loader(0, 3)
    with pytest.raises(ValueError, match="16 samples are not one batch of 20 for each of 1 ranks"):
        data(urls, 20).loader()
    drawn = [numbers(data(urls, resampled=True).loader(rank, 3, length=40)) for rank in range(3)]
    assert drawn[0] != drawn[1] != drawn[2]
    for found in drawn:
        assert set(found) == set(range(16))


def test_a_resumed_run_goes_on_at_its_epoch(urls, caplog):
    """The rest of its epoch is in an order of its own; the next epoch is as it would have been."""
    whole = numbers(data(urls).loader(length=24))
    with caplog.at_level(logging.WARNING):
        rest = numbers(data(urls).loader(start=11, length=24))
    assert "goes on at epoch 1 of the shards, not at its step 3: they are begun anew" in caplog.text
    assert rest[5 * 4 :] == whole[16 * 4 :]
    assert rest[: 5 * 4] != whole[8 * 4 : 13 * 4]
    assert len(set(rest[:20])) == 20
    caplog.clear()
    assert numbers(data(urls).loader(start=8, length=24)) == whole[8 * 4 :]
    assert not warnings_of(caplog)
    others = [tuple(numbers(data(urls).loader(start=8 + k, length=9 + k))) for k in range(4)]
    assert len(set(others)) == 4  # one that is often stopped does not see the same samples again and again


def test_other_shards_than_before_are_said(tmp_path, urls, caplog):
    """Of as many shards and samples: one was replaced. A folder that has moved is the same data."""
    state = data(urls).state_dict()
    (tmp_path / "moved").mkdir()
    moved = [str(shutil.copy(url, tmp_path / "moved")) for url in data(urls).urls]
    with caplog.at_level(logging.WARNING):
        data(moved).load_state_dict(state)
        data(urls).load_state_dict({key: value for key, value in state.items() if key != "contents"})  # an older run
        assert not warnings_of(caplog)
        with open(moved[0], "ab") as file:
            file.write(bytes(10240))
        module = data(moved)
        module.setup("fit")
        assert module.num_samples  # counted before training
        os.rename(moved[0], f"{moved[0]}.gone")
        module.load_state_dict(state)  # also of shards that went in the meantime, as at a checkpoint
    assert caplog.text.count("the training files are not as in the run before") == len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("workers", [2, 3])
def test_epochs_after_that_of_a_resumed_run_do_not_depend_on_where_it_was_stopped(urls, workers):
    """8 steps an epoch, of 2 and of 3 workers: steps 16.. are the same batches from wherever it goes on."""
    whole = numbers(data(urls, num_workers=workers).loader(length=24))
    for start in (0, 1, 8, 11, 13):
        rest = numbers(data(urls, num_workers=workers).loader(start=start, length=24))
        assert len(rest) == 4 * (24 - start)
        assert rest[-8 * 4 :] == whole[-8 * 4 :]


def test_reading_that_begins_within_an_epoch_is_said_once(urls, caplog):
    """As with `trainer.limit_train_batches` of 3, and where `OffPolicyDataModule` asks for other steps."""
    position = iter([0, 3, 6, 8])
    stream = data(urls).loader(length=24, where=lambda: next(position))
    walked = data(urls)
    said = "goes on at epoch 0 of the shards, not at its step 3"
    with caplog.at_level(logging.WARNING):
        next(iter(stream))
        assert not warnings_of(caplog)
        for _ in range(3):
            next(iter(stream))
        assert caplog.text.count(said) == len(warnings_of(caplog)) == 1
        caplog.clear()
        for step in (0, 1, 8, 3, 4, 6):
            walked.train_batch(step)
        assert caplog.text.count(said) == len(warnings_of(caplog)) == 1


def test_training_batches_by_step(urls):
    walked = data(urls)
    whole = numbers(data(urls).loader(length=12))
    assert numbers(walked.train_batch(step) for step in range(12)) == whole
    assert numbers([walked.train_batch(8)]) == whole[32:36]


def test_mirror_images_are_half_and_none_in_validation(urls):
    found = data(urls, mirror=True, val_urls=urls)
    left = torch.cat([x[:, 0, 0, 0] == 1 for x, _ in found.loader(length=48)])
    assert 0.35 < left.float().mean() < 0.65  # 192 draws: 4 deviations
    assert all((x[:, 0, 0, 0] == 1).all() for x, _ in found.val_dataloader())


# -- validation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_has_every_sample_and_equal_batches(tmp_path, workers, world):
    urls = image_shards(tmp_path, [5, 1, 8])
    found = data(urls, num_workers=workers, val_urls=urls)
    ranks = [list(found.held_out(rank, world)) for rank in range(world)]
    assert len({tuple(len(x) for x, _ in batches) for batches in ranks}) == 1
    counts = Counter(number for batches in ranks for number in numbers(batches))
    assert set(counts) == set(range(14))
    assert sum(counts.values()) - 14 <= max(1, workers) * (world - 1)
    assert numbers(found.held_out()) == numbers(found.held_out())
    assert data(urls).val_dataloader() == []


# -- labels, captions, sizes -------------------------------------------------------------------------------------------


def test_labels_are_counted_or_given(urls, caplog):
    with caplog.at_level(logging.INFO):
        found = data(urls)
        assert (found.num_classes, found.num_samples, found.state_shape) == (3, 32, (3, 8, 8))
    assert "4 shards read once: num_samples: 32, num_classes: 3" in caplog.text
    assert found.label_counts()["train"].tolist() == [11, 11, 10]
    given = data(urls, num_classes=10, num_samples=32)
    assert (given.num_classes, given.label_counts()) == (10, {})
    assert data(urls, label=None).num_classes == 0
    _, label = next(iter(data(urls, label=None).loader()))
    assert label.tolist() == [0] * 4  # the null label
    with pytest.raises(ValueError, match=r"\.cls: label 2 is outside 0\.\.1"):
        list(data(urls, num_classes=2).loader(length=8))


def test_keys_of_json_and_captions_as_prompts(urls):
    found = data(urls, label="json:label", caption="json:text", num_classes=3)
    batch = next(iter(found.loader()))
    conditions = Conditions.of_batch(batch[1], 4)
    assert conditions.prompts == tuple(f"picture {i}" for i in numbers([batch]))
    assert conditions.label.tolist() == [i % 3 for i in numbers([batch])]
    text = next(iter(data(urls, label=None, caption="txt", num_classes=7).loader()))[1]
    assert text["label"].tolist() == [7] * 4
    assert all(caption.startswith("picture") and not caption.endswith("\n") for caption in text["prompts"])
    for key, message in (
        ("json:nothing", "has no key 'nothing': it has label, text"),
        ("cls2", "has png, cls, txt, json, expected cls2"),
        ("txt", r"\.txt is 'picture \d+\\n', expected a label"),
        ("png", "is no text in UTF-8"),
        ("cls:a", "has no key 'a': it has int"),
    ):
        with pytest.raises(ValueError, match=message):
            data(urls, label=key).num_classes  # noqa: B018


def test_images_are_decoded_and_cut_as_a_folder_of_them(tmp_path):
    """16 bits, grey and colour, of other sizes: bit for bit what ImageDataModule makes of the same files."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 2**16, (20, 31), dtype=np.uint16)]
    pictures += [random.integers(0, 256, shape, dtype=np.uint8) for shape in ((40, 12, 3), (17, 17), (9, 30, 4))]
    for i, pixels in enumerate(pictures):
        (tmp_path / "folder/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"folder/a/{i}.png").write_bytes(png(pixels))
    write(tmp_path / "0.tar", [{"png": png(pixels), "cls": b"0"} for pixels in pictures])
    for channels in (1, 3):
        form = {"size": 10, "channels": channels}
        folder = ImageDataModule(str(tmp_path / "folder"), **form, val_fraction=0.0, test_fraction=0.0)
        expected = folder.splits["train"][0]
        found = data(str(tmp_path / "0.tar"), **form, val_urls=str(tmp_path / "0.tar"))
        torch.testing.assert_close(next(iter(found.val_dataloader()))[0], expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"0.tar:folder/00000.png has 31 x 20 pixels: give a size to cut it to"):
        data(str(tmp_path / "0.tar")).state_shape  # noqa: B018


# -- latents -----------------------------------------------------------------------------------------------------------


def test_latents_are_shifted_and_scaled(tmp_path):
    arrays = [np.random.default_rng(i).normal(size=(2, 3, 3)).astype(np.float16) for i in range(4)]
    given = latents(tmp_path, arrays)
    found = data(**given, scale=[0.5, 2.0], shift=[1.0, -1.0], val_urls=given["urls"])
    assert found.state_shape == (2, 3, 3)
    expected = (np.stack(arrays).astype(np.float32) - [[[1]], [[-1]]]) * [[[0.5]], [[2.0]]]
    np.testing.assert_allclose(next(iter(found.val_dataloader()))[0], expected, rtol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("holds", ["mean_std", "mean_logvar"])
def test_moments_are_drawn_from(tmp_path, holds, stacked):
    """Against diffusers' own distribution for the logarithms; 2,000 draws of each number, 5 standard errors."""
    random = np.random.default_rng(1)
    mean, std = random.normal(size=(2, 4, 4)), random.uniform(0.1, 2, size=(2, 4, 4))
    second = std if holds == "mean_std" else 2 * np.log(std)
    array = np.stack([mean, second]) if stacked else np.concatenate([mean, second])
    given = latents(tmp_path, [array.astype(np.float32)])
    found = data(batch_size=200, holds=holds, scale=0.18215, resampled=True, **given)
    assert found.state_shape == (2, 4, 4)
    draws = torch.cat([x for x, _ in found.loader(length=10)]).double() / 0.18215
    error = std / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(0).numpy() - mean) < 5 * error)
    assert np.all(np.abs(draws.std(0).numpy() - std) < 5 * error)


def test_log_variances_are_those_of_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.randn(3, 8, 5, 5, generator=torch.Generator().manual_seed(0)) * 20  # also beyond its clamps
    form = LatentForm.of(moments[0], "here", "mean_logvar", 1.0)
    found = form.states(moments, torch.Generator().manual_seed(1))
    noise = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    theirs = DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(found, theirs.mean + theirs.std * noise)
