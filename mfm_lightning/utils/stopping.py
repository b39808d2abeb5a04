"""A stop by Ctrl-C, SIGTERM or SIGHUP: a line instead of a traceback, status 128 + signal, within seconds."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE = 4.0  # seconds in which the main thread is to hear of a signal; schedulers kill after 30
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def in_main_thread() -> bool:
    """Whether this is the thread that hears signals."""
    return threading.current_thread() is threading.main_thread()


class Stopped(SystemExit):
    """A signal asks the process to end, with status 128 + its number. Not an Exception: nothing that handles those may
    go on.

    Args:
        number: of the signal.
        message: for the terminal; nothing where it was said already.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(128 + number)
        self.signal, self.message = signal.Signals(number), message


@contextmanager
def stoppable(what_next: str) -> Iterator[None]:
    """Within, a signal raises `Stopped`; where the main thread does not come to it, being in one long operation, the
    process ends after `GRACE` seconds. What is written by `utils.atomic` is whole either way. A signal that is ignored
    (nohup) stays so; a second one ends at once.

    Args:
        what_next: what the user may do then, for the message.
    """
    if not in_main_thread():
        yield  # only the main thread may hear signals
        return
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    done = threading.Event()

    def message(number: int) -> str:
        return f"stopped by {signal.Signals(number).name}: {what_next}"

    def stop(number: int, _frame: FrameType | None) -> None:
        for other in heard:
            signal.signal(other, signal.SIG_DFL)
        raise Stopped(number, message(number))

    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {number: signal.signal(number, stop) for number in heard}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # written to by C, whatever Python is in

    def watch() -> None:
        # of other signals, such as that a child has ended, nothing is to be done
        while (numbers := os.read(read, 1)) and numbers[0] not in heard:
            pass
        if numbers and not done.wait(GRACE):
            print(f"mfm: {message(numbers[0])}", file=sys.stderr, flush=True)
            os._exit(128 + numbers[0])

    watcher = threading.Thread(target=watch, name="stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)  # the watcher reads the end
        watcher.join()
        os.close(read)
