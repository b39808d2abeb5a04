"""The server of a reward over HTTP (`mfm rewards --serve`), which `remote` asks."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import logging
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from mfm_rewards.protocol import INPUTS, Reward, RewardError, device_of, evaluate, name_of
from mfm_rewards.wire import INTEGERS, TYPES, VERSION, pack, unpack

log = logging.getLogger(__name__)
BYTES = "application/octet-stream"
LARGEST = 2**30  # bytes of a request that is refused, which are read all the same so that its sender hears why


class Refused(Exception):
    """A request that is answered with an HTTP status and a line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Answers with rewards and gradients; one request at a time reaches the reward, whatever the number of clients.

    `GET /` is what the reward needs. `POST /rewards` takes what `wire.pack` makes of images `(B, *shape)` in float32,
    or in uint8 (0 to 255), with lists of prompts, labels and groups as the reward needs them; the answer is the JSON
    `{"rewards": [...]}`. `POST /gradients` takes `weights` `(B,)` as well, and float32 images; the answer is what
    `pack` makes of `gradients`, that of sum(rewards * weights), and `rewards`. What fails is a JSON `{"error": ...}`,
    with the status 400 (no such request), 409 (the client has another reward in mind), 411 and 413 (no length, too
    large) or 422 (the reward's own error). There is no password: whoever reaches the port may ask.

    Args:
        reward: what is served, on its device.
        host: address that is listened at; 127.0.0.1 is reached from this machine alone.
        port: 0 takes a free one.
        max_bytes: of the largest request.
        options: of the reward, which tell it from others of its name.

    Raises:
        RewardError: if host and port cannot be listened at.
        ValueError: for a port or a size out of range.
    """

    daemon_threads = True

    def __init__(
        self,
        reward: Reward,
        host: str = "127.0.0.1",
        port: int = 0,
        max_bytes: int = 256 * 2**20,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= port < 2**16:
            raise ValueError(f"port {port} must be in 0..65535")
        if max_bytes < 1:
            raise ValueError(f"max_bytes {max_bytes} must be at least 1")
        self.reward, self.max_bytes, self._one = reward, max_bytes, threading.Lock()
        named = json.dumps([name_of(reward), dict(options or {})], sort_keys=True, default=repr)
        self.description = {
            "version": VERSION,
            "name": name_of(reward),
            "needs": list(reward.needs),
            "differentiable": bool(reward.differentiable),
            "identity": hashlib.sha256(named.encode()).hexdigest()[:16],
            "max_bytes": max_bytes,
        }
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise RewardError(f"cannot listen at {host}, port {port}: {error.strerror}; give another") from error

    @property
    def url(self) -> str:
        """Where it is reached, from this machine where it listens at all addresses."""
        host, port = self.server_address[:2]
        return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"

    @property
    def only_this_machine(self) -> bool:
        """Whether no other machine reaches it."""
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def wait_for_the_last(self, seconds: float) -> bool:
        """Let the request that is with the reward end; whether it did, within so many seconds. No other gets there."""
        return self._one.acquire(timeout=seconds)

    def answer(self, path: str, body: bytes) -> tuple[str, bytes]:
        """Type and bytes of the answer to a POST.

        Raises:
            Refused: for a request that is wrong, or that the reward fails at.
        """
        if path not in ("/rewards", "/gradients"):
            raise Refused(404, f"no {path} here: there are GET /, POST /rewards and POST /gradients")
        try:
            tensors, fields = unpack(body)
        except ValueError as error:
            raise Refused(400, str(error)) from error
        if fields.pop("identity", None) != self.description["identity"]:
            raise Refused(
                409, f"another reward, or other options, than when this client began: now {self.reward.name!r}"
            )
        wanted, images = path == "/gradients", _images(tensors)
        if wanted and not self.reward.differentiable:
            raise Refused(422, f"reward {self.reward.name!r} is not differentiable")
        if wanted and images.dtype != torch.float32:
            raise Refused(400, f"gradients are of float32 images, got {images.dtype}")
        context, device = _context(fields, len(images)), device_of(self.reward)
        images = images.to(device).float() / (255 if images.dtype == torch.uint8 else 1)
        context = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in context.items()}
        weights = tensors.get("weights")
        if wanted and (weights is None or weights.shape != (len(images),) or weights.dtype != torch.float32):
            raise Refused(400, f"gradients need float32 weights of shape ({len(images)},)")
        with self._one:
            try:
                values, gradients = _computed(self.reward, images, context, weights if wanted else None)
            except RewardError as error:
                raise Refused(422, str(error)) from error
        if gradients is not None:
            return BYTES, pack({"rewards": values, "gradients": gradients})
        return "application/json", json.dumps({"rewards": values.tolist()}).encode()


def _computed(
    reward: Reward, images: Tensor, context: dict[str, Any], weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Rewards `(B,)`, and the gradient of their weighted sum where there are weights."""
    if weights is None:
        with torch.no_grad():
            return evaluate(reward, images, **context).float(), None
    images.requires_grad_()
    with torch.enable_grad():
        values = evaluate(reward, images, **context)
        if not values.requires_grad:
            raise RewardError(f"reward {reward.name!r} gave values that carry no gradient")
        try:
            (gradients,) = torch.autograd.grad((values * weights.to(values)).sum(), images)
        except RuntimeError as error:
            raise RewardError(f"the gradient of reward {reward.name!r}: {error}") from error
    return values.detach().float(), gradients


def _images(tensors: dict[str, Tensor]) -> Tensor:
    images = tensors.get("images")
    if images is None or images.dtype not in TYPES.values() or images.dim() < 2:
        found = "none" if images is None else f"{images.dtype} of shape {tuple(images.shape)}"
        raise Refused(400, f"images (B, *shape) in {' or '.join(TYPES)} are needed, got {found}")
    return images


def _context(fields: dict[str, Any], num: int) -> dict[str, Any]:
    """Prompts, labels and groups of a request, checked."""
    context: dict[str, Any] = {}
    for name, values in fields.items():
        if name not in INPUTS[1:]:
            raise Refused(400, f"unknown field {name!r}: expected {', '.join(INPUTS[1:])}")
        kind = int if name in INTEGERS else str
        if not isinstance(values, list) or len(values) != num or any(type(value) is not kind for value in values):
            raise Refused(400, f"{name} must be a list of {num} of {kind.__name__}, one an image")
        context[name] = torch.tensor(values, dtype=torch.long) if kind is int else values
    return context


class _Handler(BaseHTTPRequestHandler):
    timeout = 60.0  # seconds that a client may be silent in the middle of a request
    server: RewardServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, "application/json", json.dumps(self.server.description).encode())
        else:
            self._refuse(Refused(404, f"no {self.path} here: there are GET /, POST /rewards and POST /gradients"))

    def do_POST(self) -> None:
        try:
            kind, answer = self.server.answer(self.path, self._body())
        except Refused as refused:
            self._refuse(refused)
        except (ConnectionError, TimeoutError) as error:
            log.warning("%s: %s", self.address_string(), error)
        except Exception as error:  # the server goes on, whatever a request brings up
            log.exception("a request failed")
            self._refuse(Refused(500, f"{type(error).__name__}: {error}"))
        else:
            self._send(200, kind, answer)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(411, "a request needs its Content-Length")
        if int(length) > self.server.max_bytes:
            left = min(int(length), LARGEST)
            while left and (part := self.rfile.read(min(left, 2**20))):
                left -= len(part)
            raise Refused(
                413, f"a request of {length} bytes: at most {self.server.max_bytes} are taken (--max-request)"
            )
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError(f"the client went away after {len(body)} of {length} bytes")
        return body

    def _refuse(self, refused: Refused) -> None:
        log.warning("%s %s: status %d, %s", self.command, self.path, refused.status, refused)
        self._send(refused.status, "application/json", json.dumps({"error": str(refused)}).encode())

    def _send(self, status: int, kind: str, answer: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
        except ConnectionError as error:
            log.warning("%s did not wait for the answer: %s", self.address_string(), error)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.address_string(), format % args)
