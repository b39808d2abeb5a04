"""A reward that another process or machine computes: the client of `mfm rewards --serve`."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mfm_rewards.endpoint import Endpoint
from mfm_rewards.protocol import INPUTS, Reward, RewardError
from mfm_rewards.registry import register
from mfm_rewards.wire import INTEGERS, TYPES, VERSION, pack, unpack


@register("remote")
class Remote(Reward):
    """A reward that a server computes (`mfm rewards --serve NAME`), in an environment or on a machine of its own.

    What it needs is asked of the server when it is built. A server that is started again goes on, if it serves the
    same reward with the same options.

    Args:
        url: of the server, such as http://127.0.0.1:8765.
        gradients: whether gradients are asked for, too, so that methods that take them work. Each is a request more,
            and the server computes the rewards again for it.
        dtype: what images are sent as: "float32", exact, or "uint8", a quarter of the bytes, for images that are
            rounded to 8 bits anyway; it has no gradients.
        max_rows: largest number of images in a request; a group is in one request, however large.
        timeout: seconds without any byte from the server after which a try has failed.
        retries: tries after the first one, where the server does not answer, or not to the end.
        wait: seconds before the second try, doubled from try to try, up to a minute.

    Raises:
        ValueError: for a value out of range, or gradients of 8-bit images.
        RewardError: if the server is not there, is none of rewards, or its reward has no gradient where that is wanted.
    """

    differentiable = False

    def __init__(
        self,
        url: str,
        gradients: bool = False,
        dtype: str = "float32",
        max_rows: int = 64,
        timeout: float = 120.0,
        retries: int = 6,
        wait: float = 0.5,
    ) -> None:
        super().__init__()
        if dtype not in TYPES:
            raise ValueError(f"unknown dtype {dtype!r}: expected one of {', '.join(TYPES)}")
        if gradients and dtype != "float32":
            raise ValueError(f"gradients need dtype float32, got {dtype}")
        if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1:
            raise ValueError(f"max_rows must be a whole number, at least 1, got {max_rows!r}")
        self.endpoint = Endpoint(url, timeout, retries, wait)
        self.dtype, self.max_rows = TYPES[dtype], max_rows
        served = _description(self.endpoint)
        self.name, self.needs, self.served = served["name"], tuple(served["needs"]), served
        if gradients and not served["differentiable"]:
            raise RewardError(f"{url}: its reward {self.name!r} is not differentiable: leave out gradients")
        self.differentiable = gradients

    def forward(self, images: Tensor, *context: Any) -> Tensor:
        given = dict(zip(self.needs[1:], context, strict=True))
        if self.differentiable:
            return _Scored.apply(images, self, given)
        return self.rewards(images.detach(), given)

    def rewards(self, images: Tensor, given: dict[str, Any]) -> Tensor:
        """Rewards `(B,)` in float32, on the images' device.

        Args:
            images: `(B, *shape)`.
            given: prompts, labels and groups, as far as the reward needs them, by these names.

        Raises:
            RewardError: if the server does not answer, or wrongly.
        """
        values = images.new_empty(len(images), dtype=torch.float32)
        for rows in self._parts(images, given.get("groups")):
            values[rows] = self._checked(self._scored(images[rows], _taken(given, rows))).to(values)
        return values

    def gradient(self, images: Tensor, given: dict[str, Any], weights: Tensor) -> Tensor:
        """The gradient of sum(rewards * weights) in the images, `(B, *shape)`.

        Args:
            images: `(B, *shape)`.
            given: as in `rewards`.
            weights: `(B,)`.

        Raises:
            RewardError: if the server does not answer, or wrongly.
        """
        gradient = torch.empty_like(images)
        for rows in self._parts(images, given.get("groups")):
            part = {"images": images[rows].float(), "weights": weights[rows].float()}
            answer = self.endpoint.ask("/gradients", self._body(part, _taken(given, rows)), "application/octet-stream")
            try:
                found = unpack(answer)[0]["gradients"]
            except (ValueError, KeyError) as error:
                raise self.endpoint.wrong("/gradients", f"no gradients ({error})") from error
            if found.shape != part["images"].shape or found.dtype != torch.float32 or not found.isfinite().all():
                what = f"{found.dtype} of shape {tuple(found.shape)}" + (
                    "" if found.isfinite().all() else ", not finite"
                )
                raise self.endpoint.wrong("/gradients", f"{what}: expected float32 {tuple(part['images'].shape)}")
            gradient[rows] = found.to(gradient)
        return gradient

    def _parts(self, images: Tensor, groups: Tensor | None) -> list[Tensor]:
        """The rows of each request: no more than `max_rows`, nor than the server takes, but for a larger group."""
        size = images[0].numel() * self.dtype.itemsize if len(images) else 1
        fitting = int(0.9 * self.served["max_bytes"]) // size  # prompts and header take the rest
        most = max(1, min(self.max_rows, fitting))
        if groups is None:
            return list(torch.arange(len(images)).split(most))
        parts: list[Tensor] = []
        for group in groups.cpu().unique():
            rows = (groups.cpu() == group).nonzero().flatten()
            if parts and len(parts[-1]) + len(rows) <= most:
                parts[-1] = torch.cat([parts[-1], rows])
            else:
                parts.append(rows)
        return parts

    def _scored(self, images: Tensor, given: dict[str, Any]) -> tuple[int, list[Any]]:
        """How many rewards are expected, and what came."""
        if self.dtype == torch.uint8:
            if not images.isfinite().all():
                raise RewardError(f"{self.endpoint.url}: images that are not finite cannot be sent as uint8")
            images = (images.float().clamp(0, 1) * 255).round()
        body = self._body({"images": images.to(self.dtype)}, given)
        answer = self.endpoint.ask_json("/rewards", body, "application/octet-stream")
        values = answer.get("rewards")
        if not isinstance(values, list):
            raise self.endpoint.wrong("/rewards", "without a list of rewards", json.dumps(answer).encode())
        return len(images), values

    def _checked(self, scored: tuple[int, list[Any]]) -> Tensor:
        expected, values = scored
        if len(values) != expected:
            raise self.endpoint.wrong("/rewards", f"{len(values)} rewards for {expected} images")
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
            raise self.endpoint.wrong("/rewards", "not numbers alone", json.dumps(values).encode())
        found = torch.tensor(values, dtype=torch.float32)
        if bad := (~found.isfinite()).nonzero().flatten().tolist():
            raise self.endpoint.wrong("/rewards", f"not finite for {len(bad)} of {expected} images, first {bad[0]}")
        return found

    def _body(self, tensors: dict[str, Tensor], given: dict[str, Any]) -> bytes:
        fields = {name: given[name].tolist() if name in INTEGERS else list(given[name]) for name in given}
        body = pack(tensors, identity=self.served["identity"], **fields)
        if len(body) > self.served["max_bytes"]:
            raise RewardError(
                f"{self.endpoint.url}: a request of {len(tensors['images'])} images is {len(body)} bytes, and the "
                f"server takes {self.served['max_bytes']}: raise its --max-request"
            )
        return body


class _Scored(torch.autograd.Function):
    """Rewards by one request, and their gradient by another when it is asked for."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, reward: Remote, given: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(images)
        ctx.reward, ctx.given = reward, given
        return reward.rewards(images, given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (images,) = ctx.saved_tensors
        return ctx.reward.gradient(images, ctx.given, grad_outputs[0]), None, None


def _description(endpoint: Endpoint) -> dict[str, Any]:
    """What a server says of itself, checked."""
    served = endpoint.ask_json()
    kinds = {"version": int, "name": str, "needs": list, "differentiable": bool, "identity": str, "max_bytes": int}
    if wrong := [name for name, kind in kinds.items() if not isinstance(served.get(name), kind)]:
        raise endpoint.wrong("", f"not that of mfm rewards --serve: no {wrong[0]}", json.dumps(served).encode())
    if served["version"] != VERSION:
        raise endpoint.wrong("", f"of version {served['version']}, expected {VERSION}: install the same mfm-lightning")
    if served["needs"][:1] != ["images"] or not set(served["needs"]) <= set(INPUTS):
        raise endpoint.wrong(
            "", f"that its reward needs {served['needs']}: expected images, and {', '.join(INPUTS[1:])}"
        )
    return served


def _taken(given: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The rows of prompts, labels and groups."""
    return {
        name: value[rows.to(value.device)] if isinstance(value, Tensor) else [value[i] for i in rows.tolist()]
        for name, value in given.items()
    }
