"""Leases: which of many processes does which piece of work, told by files in a folder that all of them see.

A piece is claimed by giving a file of the process's own a second name, which must not be there yet: one step, on NFS,
too, after which the file says who has the piece. Its owner touches the file again and again. When it does no more,
being dead or cut off, the lease lapses, and another process takes the piece over by the name of the next generation: of
several that try, one succeeds. No clocks of different machines are compared: a lease has lapsed for who has watched it
for its whole length, by a clock of its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

SUFFIX, PROCESS = ".lease", ".process"
SIZE = 1024  # bytes of a process's file, which is written over in one go
BEATS = 8  # signs in the length of a lease: NFS may show one up to a minute late


@dataclass(frozen=True)
class Holder:
    """Who has a lease.

    Attributes:
        token: of this process and folder alone.
        host, process: where it runs, and its number there.
        machine: tells hosts, containers and boots apart; empty where the system does not.
        birth: tells the process from a later one of the same number; empty where the system does not.
        device: that it computes on.
        begun: when, in seconds since 1970, by its clock.
        seen: the same, of its last sign, by the file system's clock.
        generation: how many had the piece before and gave no sign any more.
    """

    token: str = ""
    host: str = "?"
    process: int = 0
    machine: str = ""
    birth: str = ""
    device: str = ""
    begun: float = 0.0
    seen: float = 0.0
    generation: int = 0

    @property
    def is_gone(self) -> bool:
        """Whether it ran on this machine, and does no more."""
        return bool(self.birth) and self.machine == machine() and birth(self.process) != self.birth


def machine() -> str:
    """What tells this host, container and boot from others; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def birth(process: int) -> str:
    """What tells a process of this machine from a later one of the same number; empty if there is none."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # a zombie is dead; the time it began, in ticks since the boot


class Lease:
    """A piece of work that is this process's, until `release`, the end of the `with` block, or a lapse."""

    def __init__(self, leases: Leases, name: str, token: str, generation: int) -> None:
        self._leases, self.name, self.token, self.generation = leases, name, token, generation

    @property
    def is_held(self) -> bool:
        """Whether nobody has taken the piece over, which may be after a stop of this process for the lease's length."""
        return self._leases.has(self) and not self._leases.path(self.name, self.generation + 1).exists()

    def release(self) -> None:
        """Give it back; no effect where it was taken over."""
        self._leases.drop(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Leases:
    """The leases of a folder.

    Args:
        folder: that all processes see; made where it is missing.
        seconds: after which a lease without a sign lapses; at once where its process ran on this machine and is gone.
        device: that this process computes on, for the others to read.
        clock: that the length is measured by, in seconds.

    Raises:
        ValueError: for a length that is not above 0.
    """

    def __init__(
        self,
        folder: str | Path,
        seconds: float = 120.0,
        device: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not seconds > 0:
            raise ValueError(f"a lease of {seconds} s: it must be above 0, and longer than files take to be seen")
        self.folder, self.seconds, self.device = Path(folder), seconds, device
        self._clock, self._watched = clock, {}
        self._held: dict[Path, Lease] = {}
        self._own: _ProcessFile | None = None
        self._guard, self._beat = threading.Lock(), threading.Event()
        self._heart: threading.Thread | None = None

    def path(self, name: str, generation: int = 0) -> Path:
        """The file of a piece's lease."""
        return self.folder / f"{name}~{generation}{SUFFIX}"

    def claim(self, name: str, take_over: bool = True) -> Lease | None:
        """The lease of a piece, which must be fit for the name of a file; None if another process has it.

        Who claims looks afterwards whether the piece is done: it may have been finished, and given back, just before.

        Args:
            take_over: also one that has lapsed; that costs a look at who has it.
        """
        generation, own, dead = 0, self._process(), ""
        if not self._held:
            own.write(self.device)
        while not self._has_made(own, name, generation):
            if not take_over or not self._has_lapsed(name, generation):
                return None
            holder = self.holder(name, generation)
            generation, dead = generation + 1, "" if holder is None else holder.token
        lease = Lease(self, name, own.token, generation)
        with self._guard:
            self._held[self.path(name, generation)] = lease
        self._start()
        if dead:
            (self.folder / f"{dead}{PROCESS}").unlink(missing_ok=True)
        return lease

    def _has_made(self, own: _ProcessFile, name: str, generation: int) -> bool:
        """Whether this process has the lease of a generation now, and there is no newer one."""
        path = self.path(name, generation)
        # NFS says that the name is there of what it has done itself, too, where its first answer was lost
        if not own.name_also(path) and (path in self._held or not own.is_named(path)):
            return False
        if not self.path(name, generation + 1).exists():
            return True
        # who has that is giving it back, or died doing so: what is older is gone already
        if own.is_named(path):
            path.unlink(missing_ok=True)
        return False

    def _process(self) -> _ProcessFile:
        # after a fork the file is the parent's; it is gone where others took us for dead
        if self._own is None or self._own.process != os.getpid() or not self._own.is_there:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._own = _ProcessFile(self.folder, self.device)
        return self._own

    def holder(self, name: str, generation: int) -> Holder | None:
        """Who has, or had, the lease of this generation; None if there is none."""
        path = self.path(name, generation)
        if (text := _text(path)) is None:
            return None
        try:
            seen = path.stat().st_mtime
        except FileNotFoundError:
            return None
        try:
            return Holder(**{**json.loads(text), "seen": seen, "generation": generation})
        except (ValueError, TypeError):  # it is being written, by who has no links
            return Holder(seen=seen, generation=generation)

    def _has_lapsed(self, name: str, generation: int) -> bool:
        path, holder = self.path(name, generation), self.holder(name, generation)
        if holder is None:  # given back just now: the next look finds it free, or done; or by who died before the rest
            return self.path(name, generation + 1).exists()
        if holder.is_gone:
            return True
        sign, now = (holder.token, holder.seen), self._clock()
        seen, since, last = self._watched.get(path, (None, now, now))
        # who did not look for long, being stopped or cut off from the files itself, has not watched
        if seen != sign or now - last > self.seconds / 2:
            since = now
        self._watched[path] = (sign, since, now)
        return now - since > self.seconds

    def holders(self) -> dict[str, Holder]:
        """Who has which piece now: of each the newest generation."""
        found: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.folder):
                name, mark, rest = entry.name.rpartition("~")
                if mark and rest.endswith(SUFFIX) and rest.removesuffix(SUFFIX).isdecimal():
                    found[name] = max(found.get(name, 0), int(rest.removesuffix(SUFFIX)))
        holders = {name: self.holder(name, generation) for name, generation in sorted(found.items())}
        return {name: holder for name, holder in holders.items() if holder is not None}

    def at_work(self) -> set[str]:
        """Names of pieces that some process has: without those whose lease has lapsed, as far as this one has watched
        them; to ask again and again is to watch."""
        return {name for name, holder in self.holders().items() if not self._has_lapsed(name, holder.generation)}

    def claimed(self) -> set[str]:
        """Names of pieces that some process has, or had when it died, by one look at the folder."""
        try:
            return {name.rpartition("~")[0] for name in os.listdir(self.folder) if name.endswith(SUFFIX)}
        except FileNotFoundError:
            return set()

    def has(self, lease: Lease) -> bool:
        """Whether the file of the lease is there."""
        return lease.token in (_text(self.path(lease.name, lease.generation)) or "")

    def drop(self, lease: Lease) -> None:
        """Give a lease back; no effect where it was taken over."""
        with self._guard:
            self._held.pop(self.path(lease.name, lease.generation), None)
        if not lease.is_held:  # who took it over removes our file with its own: without ours the piece would look free
            return
        # the oldest first: the newest says, until the end, that somebody is there
        for generation in range(lease.generation + 1):
            self._watched.pop(self.path(lease.name, generation), None)
            self.path(lease.name, generation).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what this process has left, and the folder where it is empty then."""
        for lease in list(self._held.values()):
            lease.release()
        if self._own is not None:
            self._own.close()
            self._own = None
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _start(self) -> None:
        with self._guard:
            if self._heart is None or not self._heart.is_alive():
                given = (weakref.ref(self), self._beat, self.seconds / BEATS)
                self._heart = threading.Thread(target=_signs, args=given, name="leases", daemon=True)
                self._heart.start()

    def sign(self) -> bool:
        """Give a sign of all that is held; False where that is nothing."""
        with self._guard:
            held = list(self._held)
            if not held:
                self._heart = None
        for path in held:
            with contextlib.suppress(OSError):  # taken over, or a file system that is away for a moment
                os.utime(path)
        return bool(held)


def _text(path: Path) -> str | None:
    """What a lease says; None where there is none."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:  # on NFS: removed while it was read
            return None
        raise


def _signs(leases: weakref.ref[Leases], end: threading.Event, every: float) -> None:
    while not end.wait(every):
        if (one := leases()) is None or not one.sign():
            return
        del one


class _ProcessFile:
    """What this process says of itself, in a file that gets a second name for each piece that it has."""

    def __init__(self, folder: Path, device: str) -> None:
        self.token, self.process = uuid.uuid4().hex, os.getpid()
        self._path, self._links = folder / f"{self.token}{PROCESS}", True
        self._file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        self.write(device)
        self.close = weakref.finalize(self, _forget, self._path, self._file, self.process)

    @property
    def is_there(self) -> bool:
        return self._path.exists()

    def write(self, device: str) -> None:
        """That it begins something now."""
        own = os.getpid()
        holder = Holder(self.token, socket.gethostname(), own, machine(), birth(own), device, time.time())
        self._text = json.dumps(asdict(holder)).encode().ljust(SIZE)
        os.pwrite(self._file, self._text, 0)

    def name_also(self, path: Path) -> bool:
        """Give the file another name; False where there is a file of that name."""
        try:
            if self._links:
                try:
                    os.link(self._path, path)
                    return True
                except (NotImplementedError, OSError) as error:
                    if isinstance(error, FileExistsError | FileNotFoundError):
                        raise
                    self._links = False  # a file system without them: a file of its own, made and then written
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "wb") as file:
                file.write(self._text)
            return True
        except FileExistsError:
            return False

    def is_named(self, path: Path) -> bool:
        """Whether the file of that name is this one."""
        return self.token in (_text(path) or "")


def _forget(path: Path, file: int, process: int) -> None:
    if os.getpid() == process:
        os.close(file)
        with contextlib.suppress(OSError):
            path.unlink()


def alone(leases: Leases, name: str, is_done: Callable[[], bool], wait: float = 1.0) -> Iterator[Lease]:
    """Yields a lease to do what others wait for, once, and nothing where it is done: `for _ in alone(...): do()`.

    Who finds that another process does it waits, and takes it over where that one's lease lapses.

    Args:
        wait: seconds between looks.
    """
    while not is_done():
        lease = leases.claim(name)
        if lease is None:
            time.sleep(min(wait, leases.seconds / 4))  # often enough to have watched
            continue
        with lease:
            if not is_done():
                yield lease
                return
