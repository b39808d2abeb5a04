"""Requests over HTTP that do not give up at once: the one door to servers, of rewards and of language models."""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from mfm_rewards.protocol import RewardError

log = logging.getLogger(__name__)
LONGEST_WAIT = 60.0  # seconds between two tries
SHOWN = 300  # characters of a server's message


@dataclass(frozen=True)
class Endpoint:
    """A server, and how patiently it is asked.

    Args:
        url: http:// or https://, a host, and maybe a port and a path.
        timeout: seconds in which the connection must stand, and then in which the next bytes must come.
        retries: tries after the first one; 0 is none. Tried again are refused or broken connections, timeouts, answers
            that end too early, and the statuses 429 (too many requests) and 5xx (the server's own failure).
        wait: seconds before the second try, doubled from try to try, up to a minute; a longer `Retry-After` counts.
        headers: of each request, such as a key. No message and no log shows them.

    Raises:
        ValueError: for a URL of another kind, or with a password in it; for numbers out of range.
    """

    url: str
    timeout: float = 120.0
    retries: int = 6
    wait: float = 0.5
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url) if isinstance(self.url, str) else None
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url {self.url!r} must be like http://127.0.0.1:8765")
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"url of {parts.hostname} holds a user or password, which logs would show: leave it out")
        for name in ("timeout", "wait"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise ValueError(f"retries must be a whole number, at least 0, got {self.retries!r}")

    def ask(self, path: str = "", body: bytes | None = None, kind: str = "application/json") -> bytes:
        """The answer to a GET, or to a POST of `body`.

        Args:
            path: after the URL, such as "/rewards".
            body: of a POST; None for a GET.
            kind: the body's type.

        Raises:
            RewardError: if the server says that the request is wrong, or does not answer after all tries; the message
                has the URL, what went wrong last, and how often and how long it was tried.
        """
        url, began, what = self.url.rstrip("/") + path, time.monotonic(), ""
        for tried in range(1, self.retries + 2):
            try:
                return self._once(url, body, kind)
            except urllib.error.HTTPError as error:
                what, again = self._without_keys(_status(error)), error.code == 429 or error.code >= 500
                asked = error.headers.get("Retry-After", "") if error.headers else ""
            except (OSError, http.client.HTTPException) as error:
                what, again, asked = _failure(error, self.timeout), True, ""
            if not again:
                raise RewardError(f"{url}: {what}")
            if tried > self.retries:
                break
            wait = min(LONGEST_WAIT, max(self.wait * 2 ** (tried - 1), float(asked) if asked.isdecimal() else 0.0))
            log.warning("%s: %s; try %d of %d in %.3g s", url, what, tried + 1, self.retries + 1, wait)
            time.sleep(wait)
        times = "once" if self.retries == 0 else f"{self.retries + 1} times"
        raise RewardError(f"{url}: {what}; tried {times} in {time.monotonic() - began:.1f} s: is the server running?")

    def ask_json(self, path: str = "", body: bytes | None = None, kind: str = "application/json") -> dict[str, Any]:
        """The same, where the answer must be a JSON object.

        Raises:
            RewardError: as `ask`, and for another answer.
        """
        answer = self.ask(path, body, kind)
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise self.wrong(path, f"no JSON ({error})", answer) from error
        if not isinstance(found, dict):
            raise self.wrong(path, "JSON, but no object", answer)
        return found

    def wrong(self, path: str, what: str, answer: bytes = b"") -> RewardError:
        """The error for an answer that is not what it should be."""
        shown = f": {_shown(answer)}" if answer else ""
        return RewardError(f"{self.url.rstrip('/')}{path}: the server's answer is {self._without_keys(what + shown)}")

    def _without_keys(self, text: str) -> str:
        """Servers may repeat a key that they refuse."""
        for secret in " ".join(self.headers.values()).split():
            text = text.replace(secret, "***")
        return text

    def _once(self, url: str, body: bytes | None, kind: str) -> bytes:
        headers = {"Content-Type": kind, **self.headers}
        request = urllib.request.Request(url, data=body, headers=headers)
        proxies = urllib.request.ProxyHandler({} if is_this_machine(url) else None)
        with urllib.request.build_opener(proxies, _NoRedirects).open(request, timeout=self.timeout) as answer:
            return answer.read()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the headers, and a key in them, to another server."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def is_this_machine(url: str) -> bool:
    """Whether a server is on this machine, where no proxy leads."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _status(error: urllib.error.HTTPError) -> str:
    """What a server says with a status: the text under "error" where its answer is JSON, as ours and OpenAI's are."""
    try:
        answer = error.read()
    except (OSError, http.client.HTTPException):
        answer = b""
    try:
        said = json.loads(answer)["error"]
        said = said if isinstance(said, str) else said["message"]
    except (ValueError, LookupError, TypeError):
        said = _shown(answer)
    return f"status {error.code}" + (f", {str(said)[:SHOWN]}" if said else f" ({error.reason})")


def _failure(error: Exception, timeout: float) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(reason, http.client.IncompleteRead):
        return f"the answer ended after {len(reason.partial)} bytes, {reason.expected or 0} before its end"
    said = " ".join(str(reason).split())
    return f"{type(reason).__name__}: {said}" if isinstance(reason, Exception) else said


def _shown(answer: bytes) -> str:
    text = answer.decode(errors="replace")
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
