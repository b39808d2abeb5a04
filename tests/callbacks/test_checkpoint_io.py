"""Checkpoints are there whole, whatever happens while one is written."""

import multiprocessing
import resource
import signal
import sys
import time

import pytest
import torch

from mfm_lightning.callbacks.checkpoint import AtomicCheckpointIO
from tests.processes import ended, forked


def saves(path, kind, said):
    """Writes checkpoints until it is killed or the disk takes no more; `said` has a line for each, or the error."""
    if kind == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        while True:
            AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(5_000_000), "last": True}, path)
            said.send("saved")
    except Exception as error:
        said.send(str(error))
        sys.exit(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "killed"])
def test_what_goes_wrong_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, kind):
    """A disk that takes no more (a quota on the file's size), and kill -9 at several moments."""
    path = tmp_path / "last.ckpt"
    for attempt in range(1 if kind == "full" else 4):
        (tmp_path / "last.ckpt.partial-killed").write_bytes(b"half")  # of a run before this one
        AtomicCheckpointIO().save_checkpoint({"x": torch.ones(3), "last": False}, path)
        heard, said = multiprocessing.Pipe(duplex=False)
        worker = forked(saves, path, kind, said)
        assert heard.poll(60)
        if kind == "full":
            assert "could not be written, the one before it is intact" in heard.recv()
            assert ended(worker) == 1
            assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
            assert not torch.load(path, weights_only=True)["last"]
        else:
            assert heard.recv() == "saved"  # it is in its loop
            time.sleep(0.013 * (attempt + 1))
            worker.kill()
            assert ended(worker) == -signal.SIGKILL
            assert torch.load(path, weights_only=True)["x"].numel() == 5_000_000
            assert len(list(tmp_path.iterdir())) <= 2
