"""`max_rows: auto`: the largest number of rows for which memory does not end is found, and kept."""

import json
import logging

import pytest
import torch

from mfm_lightning.utils.row_budget import RowBudget, RowsNote, check_max_rows, device_context, in_parts

CPU = torch.device("cpu")


class Memory:
    """Has room for so many rows; counts the tries."""

    def __init__(self, room: int) -> None:
        self.room, self.tries = room, []

    def take(self, rows: int) -> int:
        self.tries.append(rows)
        if rows > self.room:
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory: {rows} rows\nand more")
        return rows


@pytest.mark.parametrize("num", [1, 7, 64])
@pytest.mark.parametrize("room", [1, 2, 3, 5, 24, 63, 64, 100])
def test_the_most_that_fit_are_found_and_no_row_is_lost(room, num):
    memory, budget = Memory(room), RowBudget("the network")
    for _ in range(10):
        parts = in_parts(
            lambda rows: list(range(num))[rows][: memory.take(rows.stop - rows.start)], num, "auto", budget, CPU
        )
        assert [i for part in parts for i in part] == list(range(num))
    assert budget.fits == min(room, num)
    assert budget.settled == (room < num)
    failed = sum(rows > room for rows in memory.tries)
    assert failed <= num.bit_length()  # by halves
    before = len(memory.tries)
    in_parts(lambda rows: memory.take(rows.stop - rows.start), num, "auto", budget, CPU)
    assert memory.tries[before:] == [min(room, num)] * (num // min(room, num)) + [num % room] * (
        num % min(room, num) > 0
    )


def test_memory_that_becomes_less_is_found_again(caplog):
    caplog.set_level(logging.INFO)
    memory, budget = Memory(20), RowBudget("the network")
    for _ in range(8):
        in_parts(lambda rows: memory.take(rows.stop - rows.start), 64, "auto", budget, CPU)
    memory.room = 9  # another process takes the rest
    for _ in range(8):
        in_parts(lambda rows: memory.take(rows.stop - rows.start), 64, "auto", budget, CPU)
    assert (budget.fits, budget.fails) == (9, 10)
    said = [r.getMessage() for r in caplog.records if "at once fit" in r.getMessage()]
    assert said == [
        "max_rows: auto, the network: 20 at once fit, 21 do not",
        "max_rows: auto, the network: 9 at once fit, 10 do not",
    ]
    # on the CPU there is nothing to measure, which is said once
    lines = [r.getMessage() for r in caplog.records if "on the CPU" in r.getMessage()]
    assert lines == ["max_rows: auto measures a GPU's memory; on the CPU the network takes all 64 rows at once"]
    memory.room = 0
    with pytest.raises(
        torch.OutOfMemoryError, match="the network runs out of memory with 1 at once, the fewest: CUDA out of"
    ):
        budget.attempt(memory.take, 64, CPU)
    few = RowBudget("draws of a state", lowest=4)
    memory.room = 3
    with pytest.raises(torch.OutOfMemoryError, match="draws of a state runs out of memory with 4 at once, the fewest"):
        few.attempt(memory.take, 64, CPU)


def test_what_was_found_is_written_down_and_begun_with(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path, context = tmp_path / "max_rows.json", {**device_context(CPU), "image_size": [512, 512]}

    def note() -> tuple[RowBudget, RowsNote]:
        budget = RowBudget("the network")
        return budget, RowsNote(path, {"transformer": budget}, context)

    memory, (budget, written) = Memory(5), note()
    written.save()
    assert not path.exists()  # nothing is known yet
    while not budget.settled:
        budget.attempt(memory.take, 64, CPU)
    written.save()
    said = json.loads(path.read_text())
    assert said == {
        "context": {"device": "cpu", "image_size": [512, 512]}, "rows": {"transformer": {"fits": 5, "fails": 6}},
    }  # fmt: skip
    memory.tries.clear()
    budget, _ = note()
    assert budget.attempt(memory.take, 64, CPU) == (5, 5)
    assert memory.tries == [5]  # no try failed
    assert f"max_rows: auto begins with what {path} says" in caplog.text
    context["image_size"] = [64, 64]
    budget, _ = note()
    assert budget.fails is None
    assert "is of another device or other settings: max_rows is measured anew" in caplog.text
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"max_rows\.json is no note of max_rows .*: delete it"):
        note()


@pytest.mark.parametrize("wrong", [0, -1, "most", 2.5])
def test_other_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"max_rows {wrong!r} must be at least 1, or auto"):
        check_max_rows(wrong)
