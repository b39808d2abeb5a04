"""Signals that ask a run to stop: Ctrl-C (SIGINT), SIGTERM, SIGHUP of a terminal that goes."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from mfm_lightning.utils.stopping import SIGNALS, Stopped, in_main_thread

log = logging.getLogger(__name__)
_heard: set[int] = set()  # that this process listens to
_told = [False]  # whether processes that are forked from here on learn of it


def listen(numbers: Iterable[int], act: Callable[[int, Any], None]) -> None:
    """Call `act(number, frame)` at these signals; at none that is ignored, as a shell does for background jobs (SIGINT)
    and `nohup` (SIGHUP). Only the main thread can."""
    if not in_main_thread():
        return
    if not _told[0]:
        os.register_at_fork(after_in_child=_leave)
        _told[0] = True
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, act)
            _heard.add(number)


def unlisten() -> None:
    """Who sets the handlers back says so: processes that are forked from here on are not meant any more."""
    _heard.clear()


def _leave() -> None:
    """In a process that a run forked (a data worker): it goes on until the one that runs ends it."""
    for number in _heard:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    unlisten()


@contextmanager
def stopped_at_once(what: str) -> Iterator[None]:
    """Within the context a signal raises `Stopped` wherever the process is, after a line that says so.

    Args:
        what: is stopped, such as "mfm predict".
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def stop(number: int, frame: Any) -> NoReturn:
        say_and_stop(what, number)

    listen(SIGNALS, stop)
    try:
        yield
    finally:
        unlisten()
        if in_main_thread():
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def say_and_stop(what: str, number: int, more: str = "") -> NoReturn:
    """Log a line and raise `Stopped`; further signals of the kind are let pass, so that the end is not disturbed."""
    for other in _heard:
        signal.signal(other, signal.SIG_IGN)
    log.info("%s: stopped by %s%s", what, signal.Signals(number).name, more)
    raise Stopped(number)


def end_at_signals(trainer: L.Trainer, what: str) -> None:
    """In `validate`, `test` and `predict`, once they run: Lightning takes SIGTERM for a sign to be heeded after a
    training step only."""

    def stop(number: int, frame: Any) -> NoReturn:
        if isinstance(launcher := trainer.strategy.launcher, _SubprocessScriptLauncher):
            launcher.kill(number)  # the other ranks
        then = "goes on with what is missing" if what == "mfm predict" else "begins again"
        say_and_stop(what, number, f"; what is written so far is whole, and the same command {then}")

    listen(SIGNALS, stop)
