"""Latent shards read in any constellation of ranks and workers."""

import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from mfm_lightning.data import LatentShards
from mfm_lightning.data.latents.epoch_plan import EpochPlan
from mfm_lightning.data.latents.verify import verify
from tests.latent_data import COUNTS, data, numbers, shards

pytestmark = pytest.mark.usefixtures("one_thread")


# -- order -------------------------------------------------------------------------------------------------------------


def epochs(module: LatentShards, rank: int, world_size: int, workers: int, count: int = 1) -> list[list[int]]:
    """The samples of each batch, by the streams that the workers would have, in DataLoader's order."""
    loader = module.loader("train", rank, world_size, num_workers=workers)
    length = count * loader.stream.plan.batches
    streams = [
        module.loader("train", rank, world_size, length=length, num_workers=workers).stream for _ in range(workers)
    ]
    return [numbers(streams[k % workers].batch(k)) for k in range(length)]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 3), (2, 1), (2, 2), (5, 1), (5, 4)])
def test_every_sample_once_whatever_ranks_and_workers(uneven, world_size, workers):
    module = data(uneven, batch_size=2, shuffle_buffer=4)
    by_rank = [epochs(module, rank, world_size, workers, count=2) for rank in range(world_size)]
    assert {len(batches) for batches in by_rank} == {2 * 20 // world_size}
    assert {len(batch) for batches in by_rank for batch in batches} == {2}
    both = [[i for batches in by_rank for batch in half(batches, e) for i in batch] for e in range(2)]
    assert sorted(both[0]) == sorted(both[1]) == list(range(40))
    assert both[0] != both[1] != list(range(40))


def half(batches: list, e: int) -> list:
    n = len(batches) // 2
    return batches[e * n : (e + 1) * n]


def test_what_is_left_over_differs_by_epoch(uneven):
    module = data(uneven, batch_size=7)  # on two ranks: 28 of 40
    left = []
    for e in range(6):
        seen = [i for r in range(2) for b in epochs(module, r, 2, 1, 6)[2 * e : 2 * e + 2] for i in b]
        assert len(set(seen)) == len(seen) == 28
        left.append(set(range(40)) - set(seen))
    assert set.intersection(*left) == set()


def test_more_ranks_than_shards(tmp_path):
    folder = shards(tmp_path, [20, 21])
    module = data(folder)
    seen = [i for rank in range(8) for batch in epochs(module, rank, 8, 1) for i in batch]
    assert len(seen) == len(set(seen)) == 32
    with pytest.raises(ValueError, match="2 shards for 8 ranks"):
        data(folder, few_shards="error").loader("train", 0, 8)
    resampled = data(folder, few_shards="resample")
    by_rank = [epochs(resampled, rank, 8, 1, 2) for rank in range(8)]
    assert {tuple(map(len, batches)) for batches in by_rank} == {(4, 4)}
    assert by_rank[0] != by_rank[1]
    assert by_rank == [epochs(resampled, rank, 8, 1, 2) for rank in range(8)]
    # fewer samples than one batch for each rank
    with pytest.raises(ValueError, match="41 samples are not one batch of 4 for each of 11 ranks"):
        module.loader("train", 0, 11)
    assert [len(b) for b in epochs(resampled, 10, 11, 2)] == [4]
    wide = data(folder, few_shards="resample", batch_size=64)  # more than all samples
    assert [len(b) for b in epochs(wide, 1, 2, 1)] == [64]


def test_validation_is_complete_and_equal_on_all_ranks(uneven):
    module = data(uneven, batch_size=3, val_shards=3)  # 16 samples, 24..39
    for world_size in (1, 2, 3, 5, 40):
        for workers in (0, 2):
            found = []
            for rank in range(world_size):
                stream = module.loader("val", rank, world_size, num_workers=workers).stream
                found.append([numbers(stream.batch(k)) for k in range(len(module.loader("val", rank, world_size)))])
            assert len({tuple(map(len, batches)) for batches in found}) == 1
            seen = [i for batches in found for batch in batches for i in batch]
            assert set(seen) == set(range(24, 40))
            assert len(seen) == max(16 + (-16) % world_size, world_size)
    train = {i for batch in epochs(module, 0, 1, 1) for i in batch}
    assert train == set(range(24))


def test_plans_of_large_sets_are_exact():
    counts = np.random.default_rng(0).integers(1, 2000, 1281)
    for world_size, lanes in ((8, 4), (48, 7)):
        plan = EpochPlan(counts, 256, world_size - 1, world_size, lanes)
        assert plan.batches == counts.sum() // (256 * world_size)
        assert sum(plan.lane_length(lane) for lane in range(lanes)) == plan.batches * 256
        stretches = [s for lane in range(lanes) for s in plan.stretches(3, lane, 0, plan.lane_length(lane))]
        assert sum(s.last - s.first for s in stretches) == plan.batches * 256
        assert len({s.shard for s in stretches}) <= 2 * math.ceil(1281 / world_size) + 2 * lanes
        assert all(0 <= s.first < s.last <= counts[s.shard] for s in stretches)


def test_workers_and_resume_see_the_same_batches(tmp_path):
    """Through real worker processes; started at any step, as a resumed run is."""
    folder = shards(tmp_path, COUNTS, std=1.0)
    for workers in (0, 2):
        module = data(folder, shuffle_buffer=8, num_workers=workers)
        whole = list(module.loader(length=23))
        assert len(whole) == 23
        for start in (7, 12):
            rest = list(module.loader(start=start, length=23))
            assert len(rest) == 23 - start
            for ours, theirs in zip(rest, whole[start:], strict=True):
                assert torch.equal(ours[0], theirs[0])
                assert torch.equal(ours[1], theirs[1])
        assert not torch.equal(whole[0][0], whole[10][0])  # ten batches an epoch
    other = next(iter(data(folder, seed=1, num_workers=0).loader()))
    assert not torch.equal(other[0], whole[0][0])


def test_class_filter(uneven):
    module = data(uneven, classes=[1, 3], batch_size=5, shuffle_buffer=10)
    for workers in (1, 3):
        seen = [i for rank in range(2) for batch in epochs(module, rank, 2, workers) for i in batch]
        assert sorted(seen) == [i for i in range(40) if i % 4 in (1, 3)]
    with pytest.raises(ValueError, match=r"classes \[7\]: the shards have labels 0..3"):
        data(uneven, classes=[7]).loader()


@pytest.mark.parametrize("folder", ["Straße/日本", "x" * 150, "x" * 90])
def test_any_name_leaves_the_layout_as_it_is(tmp_path, folder):
    """Names that are not ASCII, or longer than the field of a tar's header, once took more blocks."""
    shards(tmp_path, [5, 3], key=folder + "/" + "n" * 80 + "é{:06d}")
    assert sorted(i for batch in data(tmp_path, batch_size=2).loader() for i in numbers(batch)) == list(range(8))
    assert verify(str(tmp_path)).samples == 8


# -- draws -------------------------------------------------------------------------------------------------------------


def test_latents_are_draws_from_the_moments(tmp_path):
    folder = shards(tmp_path, [64], state_shape=(4, 16, 16), std=0.5)
    module = data(folder, batch_size=64, shuffle_buffer=64)
    x, label = next(iter(module.loader()))
    assert (x.dtype, label.dtype, x.shape, label.shape) == (torch.float32, torch.int64, (64, 4, 16, 16), (64,))
    z = x / 0.5  # the index's scale
    mean = z.mean(dim=(1, 2, 3)).round()
    assert torch.equal(mean.abs().long() % 4, label)
    assert 15 < int((mean < 0).sum()) < 49  # mirrored
    assert abs(float((z - mean[:, None, None, None]).std()) - 0.5) < 0.01
    steady = data(folder, batch_size=64, flip=False, scale=2.0)
    assert next(iter(steady.loader()))[0].mean(dim=(1, 2, 3)).min() > -0.1
    assert float(next(iter(steady.loader()))[0].max()) > 100


# -- another run's shards ----------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_with_other_shards_says_so_and_other_classes_are_refused(tmp_path, caplog):
    """Of as many samples: values are others, so that the index has other checksums. A folder that moved is the same."""
    names = {"ant": 0, "bee": 1, "cat": 2, "dog": 3}
    first, moved = shards(tmp_path / "a", [6, 6]), shards(tmp_path / "moved", [6, 6])
    other = shards(tmp_path / "other", [6, 6], std=0.5)
    for folder in (first, moved, other):
        (folder / "classes.json").write_text(json.dumps(names))
    state = data(first).state_dict()
    with caplog.at_level(logging.WARNING):
        data(moved).load_state_dict(state)
        older = {key: value for key, value in state.items() if key not in ("contents", "class_names")}
        data(other).load_state_dict(older)
        assert not caplog.records
        data(other).load_state_dict(state)
        assert len(caplog.records) == 1
        assert "the training files are not as in the run before" in caplog.text
    (moved / "classes.json").write_text(json.dumps({**names, "ant": 1, "bee": 0}))
    with pytest.raises(ValueError, match="'ant' had the label 0, and has 1 now"):
        data(moved).load_state_dict(state)
    for kind in (TrainerFn.TESTING, TrainerFn.VALIDATING):  # to evaluate on other data is no fault
        caplog.clear()
        evaluated = data(moved)
        evaluated.trainer = SimpleNamespace(state=SimpleNamespace(fn=kind), world_size=1, global_rank=0)
        evaluated.load_state_dict(state)
        (message,) = [record.getMessage() for record in caplog.records]
        assert message == "the model was trained on other classes: 'ant' had the label 0, and has 1 now"
    caplog.clear()
    (moved / "classes.json").unlink()  # numbers alone: nothing to compare
    data(moved).load_state_dict(state)
    assert not caplog.records


def test_a_list_of_classes_that_cannot_be_read_does_not_stop_training_at_its_first_checkpoint(tmp_path, caplog):
    folder = shards(tmp_path, [6, 6])
    (folder / "classes.json").write_text("<html>")
    module = data(folder)
    with caplog.at_level(logging.WARNING):
        module.setup("fit")
    assert "classes.json is no JSON of labels by class name" in caplog.text
    assert module.state_dict()["class_names"] == []
