"""Servers of rewards that tests start on this machine, and what goes wrong with servers."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

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


class FakeJudge(ThreadingHTTPServer):
    """Chat completions of a model whose score is ten times an image's mean; the next answers are `faults`, if any.

    `asked` has all requests, as (path, Authorization, body).
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.faults: list[Fault | str] = []
        self.asked: list[tuple[str, str | None, dict[str, Any]]] = []
        super().__init__(("127.0.0.1", 0), _Chat)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Chat(BaseHTTPRequestHandler):
    server: FakeJudge  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        fault = self.server.faults.pop(0) if self.server.faults else None
        content = fault if isinstance(fault, str) else json.dumps({"score": judged(body)})
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        answer = {"id": "1", "object": "chat.completion", "model": body["model"], "choices": [choice]}
        raw = fault.raw if isinstance(fault, Fault) else Fault.status(200, answer).raw
        with suppress(ConnectionError):
            self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


def judged(body: dict[str, Any]) -> float:
    """Ten times the mean of the image in a request."""
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return float(np.asarray(image).mean() / 25.5)


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
def judging() -> Iterator[FakeJudge]:
    """A server of a vision-language model."""
    server = FakeJudge()
    with running(server):
        yield server


@contextmanager
def served(reward: str | dict[str, Any] | Callable, **options: Any) -> Iterator[FaultyServer]:
    """A reward behind a server."""
    server = FaultyServer(reward, **options)
    with running(server):
        yield server
