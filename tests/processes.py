"""Processes that tests start: forked, so that they have all imported already."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from mfm_lightning.commands.main import run


@contextmanager
def one_thread() -> Iterator[None]:
    """In this process and in spawned ones, as forked ones have it: then sums are the same to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        yield
    torch.set_num_threads(threads)


def forked(function: Callable, *arguments: object) -> multiprocessing.Process:
    """A process that has all imported already; with one thread, since a fork does not take OpenMP's along."""

    def alone() -> None:
        torch.set_num_threads(1)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # the tests run under nohup
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    return process


def ended(process: multiprocessing.Process) -> int:
    process.join(timeout=120)
    if process.is_alive():  # it hangs: that is no exit status
        process.kill()
    return process.exitcode


def torchrun(folder: Path, ranks: int, *arguments: str) -> None:
    """`mfm` in processes such as torchrun starts, but for the time that each takes to import all."""
    assert torchrun_statuses(folder, ranks, *arguments) == [0] * ranks


def torchrun_statuses(folder: Path, ranks: int, *arguments: str) -> list[int]:
    """Their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
            os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "test"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.chdir(folder)
        sys.argv = ["mfm"]
        run(arguments)

    return [ended(worker) for worker in [forked(work, rank) for rank in range(ranks)]]
