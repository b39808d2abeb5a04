"""Checkpoints are there whole, whatever happens while one is written."""

import subprocess
import sys
import time

import pytest
import torch

from mfm_lightning.callbacks.checkpoint import AtomicCheckpointIO

SAVES = """
import resource, sys
from pathlib import Path
import torch
from mfm_lightning.callbacks.checkpoint import AtomicCheckpointIO

path, kind = Path(sys.argv[1]), sys.argv[2]
if kind == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
while True:
    AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(5_000_000), "last": True}, path)
    print("saved", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "killed"])
def test_what_goes_wrong_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, kind):
    """A disk that takes no more (a quota on the file's size), and kill -9 at several moments."""
    path = tmp_path / "last.ckpt"
    for attempt in range(1 if kind == "full" else 4):
        (tmp_path / "last.ckpt.partial-killed").write_bytes(b"half")  # of a run before this one
        AtomicCheckpointIO().save_checkpoint({"x": torch.ones(3), "last": False}, path)
        worker = subprocess.Popen(
            [sys.executable, "-c", SAVES, str(path), kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if kind == "full":
            message = worker.communicate(timeout=60)[1]
            assert worker.returncode != 0
            assert "could not be written, the one before it is intact" in message
            assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
            assert not torch.load(path, weights_only=True)["last"]
        else:
            worker.stdout.readline()  # it is in its loop
            time.sleep(0.013 * (attempt + 1))
            worker.kill()
            worker.communicate()
            assert torch.load(path, weights_only=True)["x"].numel() == 5_000_000
            assert len(list(tmp_path.iterdir())) <= 2
