"""Servers of rewards that tests start on this machine, and what goes wrong with servers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import mfm_rewards
from mfm_rewards.serving import RewardServer


@dataclass
class Fault:
    """In place of an answer: bytes as they go over the wire, after some seconds."""

    raw: bytes = b""
    after: float = 0.0

    @classmethod
    def status(cls, number: int, content: Any, *headers: str) -> Fault:
        """A whole answer, JSON unless it is bytes."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        lines = [f"HTTP/1.0 {number} As Told", f"Content-Length: {len(body)}", *headers]
        return cls("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


class FaultyServer(RewardServer):
    """A server whose next requests meet `faults`, and the others the reward; `asked` has the paths of all."""

    def __init__(self, reward: Any, **options: Any) -> None:
        self.faults: list[Fault] = []
        self.asked: list[str] = []
        self.dies_after: int | None = None
        super().__init__(mfm_rewards.build(reward), **options)

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            return  # the connection is closed, without a word
        handler = _faulty(self.faults.pop(0)) if self.faults else self.RequestHandlerClass
        handler(request, client_address, self)

    def answer(self, path: str, body: bytes) -> tuple[str, bytes]:
        self.asked.append(path)
        return super().answer(path, body)


def _faulty(fault: Fault) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.server.asked.append(self.path)
            time.sleep(fault.after)
            with suppress(ConnectionError):  # the client did not wait
                self.wfile.write(fault.raw)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def running(server: HTTPServer) -> Iterator[None]:
    """Its answers, in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def served(reward: str | dict[str, Any] | Callable, **options: Any) -> Iterator[FaultyServer]:
    """A reward behind a server."""
    server = FaultyServer(reward, **options)
    with running(server):
        yield server
