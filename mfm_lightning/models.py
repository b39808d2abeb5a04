"""The Meta Flow Map: a network for v_{s,u}(x; t, x_t) and what follows from it (paper, section 4)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import Generators, Times, as_times, expand, randn
from mfm_lightning.networks.base import EmbedsPrompts, VelocityNetwork
from mfm_lightning.networks.files import OF_ITS_WEIGHTS, weights_fingerprint
from mfm_lightning.tangents import velocity_and_jvp
from mfm_rewards.hub import require_hub
from mfm_rewards.weights import CheckpointError

__all__ = ["MetaFlowMap", "posterior_steps", "velocity_and_jvp"]

Pair = tuple[Tensor, Tensor]
log = logging.getLogger(__name__)
UNTRAINED = "untrained_labels"  # in a file's metadata: labels without a training sample, as JSON


class MetaFlowMap(nn.Module):
    """Average velocity, flow map, base drift and posterior draws of one network.

    Everywhere: inner times `s <= u` and outer time `t` are `(B,)` or numbers in [0, 1]; inner state `x` and outer state
    `x_t` are `(B, *shape)`; `conditions` have a row for each state or one for all, and `label=`, `guidance=` make them:
    a number or `(B,)`. What is not given is the network's null condition, without guidance; prompts without embeddings
    are embedded by a network that can (`EmbedsPrompts`, a text-to-image flow's).

    Args:
        network: a network of `mfm_lightning.networks`, or any module with the attributes and the `forward` of
            `mfm_lightning.networks.base.VelocityNetwork`.

    Raises:
        TypeError: for a module without them.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        needed = ("state_shape", "num_classes", "guidance_scales", "null_conditions")
        # the class first: to ask a network itself for its null condition may load text encoders
        if missing := [name for name in needed if not (hasattr(type(network), name) or hasattr(network, name))]:
            raise TypeError(f"a {type(network).__name__} has no {missing[0]}: see mfm_lightning.VelocityNetwork")
        self.network = cast(VelocityNetwork, network)  # or one that keeps to its attributes
        self.metadata: dict[str, str] = {}  # what the file that it was loaded from says besides class and config
        self._weights_loaded: str | None = None  # fingerprint of the weights that this is said of

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.network.state_shape)

    @property
    def num_classes(self) -> int:
        return self.network.num_classes

    @property
    def untrained_labels(self) -> list[int]:
        """Labels of which the training data had no sample, as its file says; none where it says nothing."""
        return json.loads(self.metadata.get(UNTRAINED, "[]"))

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """Class-guidance scales that the network knows besides 1."""
        return tuple(self.network.guidance_scales)

    @property
    def null_conditions(self) -> Conditions:
        """What the network takes for no condition at all, one row."""
        return self.network.null_conditions

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def check(self, conditions: Conditions) -> Conditions:
        """The conditions, if the network knows their labels and guidance scales.

        Only numbers on the CPU are looked at: elsewhere a look would make the device wait, and planning has none.

        Raises:
            ValueError: for a label outside 0..num_classes, or an unknown guidance scale.
        """
        label, guidance = readable(conditions.label), readable(conditions.guidance)
        if label is not None and len(label) and not 0 <= int(label.min()) <= int(label.max()) <= self.num_classes:
            raise ValueError(
                f"labels in {int(label.min())}..{int(label.max())} must lie in 0..{self.num_classes} "
                f"({self.num_classes} is the null label)"
            )
        known = [1.0, *self.guidance_scales]
        for scale in () if guidance is None else guidance.unique().tolist():
            if not any(abs(scale - g) < 1e-6 for g in known):
                raise ValueError(f"guidance {scale:g} is not a scale that this network knows: {known}")
        return conditions

    def forward(
        self,
        s: Times,
        u: Times,
        x: Tensor,
        t: Times,
        x_t: Tensor,
        conditions: Conditions | None = None,
        tangents: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor | Pair:
        """v_{s,u}(x; t, x_t), `(B, *shape)`; with `tangents` (see `velocity_and_jvp`) also its derivative, for networks
        that propagate tangents themselves. Unlike the methods below it does not `check` the conditions.

        Raises:
            ValueError: if a state's shape, or the number of conditions, does not fit.
        """
        if tuple(x.shape[1:]) != self.state_shape or x_t.shape != x.shape:
            raise ValueError(
                f"states of shape {tuple(x.shape)} and conditions of shape {tuple(x_t.shape)}: "
                f"this network takes (B, {', '.join(map(str, self.state_shape))}) for both"
            )
        s, u, t = (as_times(time, x) for time in (s, u, t))
        conditions = conditions or Conditions()
        if isinstance(self.network, EmbedsPrompts) and conditions.prompts is not None and conditions.text is None:
            conditions = self.network.embed(conditions)  # else the prompts would count for rewards alone
        conditions = conditions.filled(self.null_conditions)
        if conditions.num_rows not in (1, len(x)):
            raise ValueError(f"conditions of {conditions.num_rows} rows for {len(x)} states: expected one, or one each")
        conditions = conditions.expand(len(x), x.device)
        return self.network(s, u, x, t, x_t, conditions, **({} if tangents is None else {"tangents": tangents}))

    def velocity(
        self,
        s: Times,
        u: Times,
        x: Tensor,
        t: Times,
        x_t: Tensor,
        conditions: Conditions | None = None,
        *,
        label: Tensor | int | None = None,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """Average velocity v_{s,u}(x; t, x_t), `(B, *shape)`."""
        return self(s, u, x, t, x_t, self._conditions(conditions, label, guidance))

    def flow_map(
        self,
        s: Times,
        u: Times,
        x: Tensor,
        t: Times,
        x_t: Tensor,
        conditions: Conditions | None = None,
        *,
        label: Tensor | int | None = None,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """X_{s,u}(x; t, x_t) = x + (u-s) v_{s,u}(x; t, x_t), `(B, *shape)`."""
        velocity = self(s, u, x, t, x_t, self._conditions(conditions, label, guidance))
        return x + expand(as_times(u, x) - as_times(s, x), x) * velocity

    def drift(
        self,
        t: Times,
        x: Tensor,
        conditions: Conditions | None = None,
        *,
        label: Tensor | int | None = None,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """The base flow that every MFM contains: b_t(x) = v_{t,t}(x; 0, 0), `(B, *shape)`."""
        return self(t, t, x, 0.0, torch.zeros_like(x), self._conditions(conditions, label, guidance))

    def sample_posterior(
        self,
        x_t: Tensor,
        t: Times,
        num_samples: int = 1,
        steps: int = 1,
        noise: Tensor | None = None,
        conditions: Conditions | None = None,
        generator: Generators = None,
        *,
        label: Tensor | int | None = None,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """Draws from p_{1|t}(. | x_t) by `steps` flow-map steps on a uniform inner grid, `(B, N, *shape)`.

        Differentiable in `x_t`. With one step the draw is X_{0,1}(eps; t, x_t).

        Args:
            x_t: noisy states `(B, *shape)`.
            t: their times, one for all or `(B,)`.
            num_samples: N, draws for each state.
            steps: of the flow map.
            noise: inner noise eps, `(B, N, *shape)`; drawn from `generator` where None.
            conditions: of the states; `label=` and `guidance=` make them.
            generator: of the noise.
            label: class of all samples, or `(B,)`.
            guidance: guidance scale, one for all or `(B,)`.

        Raises:
            ValueError: for no steps or samples, or noise of another shape.
        """
        if steps < 1 or num_samples < 1:
            raise ValueError(f"steps ({steps}) and num_samples ({num_samples}) must be at least 1")
        if noise is None:
            noise = randn((len(x_t), num_samples, *x_t.shape[1:]), x_t, generator)
        if noise.shape[:1] + noise.shape[2:] != x_t.shape:
            raise ValueError(
                f"noise of shape {tuple(noise.shape)} for states of shape {tuple(x_t.shape)}: "
                f"expected (B, N, *shape) = ({len(x_t)}, N, {', '.join(map(str, x_t.shape[1:]))})"
            )
        drawn = self._conditions(conditions, label, guidance).expand(noise.shape[0] * noise.shape[1], noise.device)
        return posterior_steps(partial(self.flow_map, conditions=drawn), x_t, t, noise, steps)

    # -- Hugging Face's hub --------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> MetaFlowMap:
        """What `save_pretrained` or `push_to_hub` wrote; options as of huggingface_hub.

        Args:
            name: a folder, or a repository, "org/name", which is downloaded where it is not in the cache.
            revision: branch, tag or commit of the repository.
            token: for private repositories.
            cache_dir: where downloads are kept.
            force_download: also where the cache has it.
            local_files_only: never download.

        Raises:
            ImportError: without huggingface_hub.
            FileNotFoundError: if it is nowhere.
            CheckpointError: if its file holds another network, such as a classifier.
        """
        require_hub(str(name))
        from mfm_lightning.networks.hub import HubNetwork, find_folder

        found = HubNetwork.from_pretrained(
            find_folder(str(name), revision, token, cache_dir, force_download, local_files_only)
        )
        return cls.of_file(found.network, found.metadata, name)

    @classmethod
    def of_file(cls, network: nn.Module, metadata: dict[str, str], file: str | Path) -> MetaFlowMap:
        """The model of a file's network, with what the file says.

        Raises:
            CheckpointError: if the network is none for it.
        """
        try:
            model = cls(network)
        except TypeError as error:
            raise CheckpointError(f"{file} holds no Meta Flow Map: {error}") from error
        model.metadata = dict(metadata)
        if any(name in metadata for name in OF_ITS_WEIGHTS):  # else there is nothing that could become wrong
            model._weights_loaded = weights_fingerprint(network)
        return model

    def _said(self, metadata: dict[str, str] | None) -> dict[str, str]:
        """What a file of the model says: what its own file said, without figures of weights that it has no more."""
        said = dict(self.metadata)
        old = [name for name in OF_ITS_WEIGHTS if name in said]
        if old and self._weights_loaded not in (None, weights_fingerprint(self.network)):
            log.warning(
                "the weights are not those of the file that was loaded: what it said of them (%s) is left out; "
                "metadata={...} says what is true of these", ", ".join(old),
            )  # fmt: skip
            said = {name: text for name, text in said.items() if name not in old}
        return {**said, **(metadata or {})}

    def save_pretrained(self, folder: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Write `model.safetensors`, `config.json` and a model card (README.md) into a folder.

        Args:
            folder: where; it is made if need be.
            metadata: said in the file and in the card, beside what the model's own file said: `data`, `licence`,
                `command`, `kind`.

        Raises:
            ImportError: without huggingface_hub.
        """
        require_hub(str(folder))
        from mfm_lightning.networks.hub import HubNetwork

        HubNetwork(self.network, self._said(metadata)).save_pretrained(folder)

    def push_to_hub(
        self,
        repo_id: str,
        metadata: dict[str, str] | None = None,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        commit_message: str = "Push model using huggingface_hub.",
    ) -> str:
        """Upload what `save_pretrained` writes; options as of huggingface_hub. Returns the commit's address.

        Raises:
            ImportError: without huggingface_hub.
        """
        require_hub(repo_id)
        from mfm_lightning.networks.hub import HubNetwork

        return HubNetwork(self.network, self._said(metadata)).push_to_hub(
            repo_id, private=private, token=token, branch=branch, commit_message=commit_message,
            model_card_kwargs={"repository": repo_id},
        )  # fmt: skip

    # -- conditions ----------------------------------------------------------------------------------------------------

    def _conditions(
        self, conditions: Conditions | None, label: Tensor | int | None, guidance: Tensor | float | None
    ) -> Conditions:
        """Those of a call, checked."""
        return self.check(Conditions.of(conditions, label=label, guidance=guidance))


def readable(values: Tensor | None) -> Tensor | None:
    """Values that can be looked at for nothing; None for others: elsewhere than on the CPU, or without content."""
    return None if values is None or values.device.type != "cpu" or isinstance(values, FakeTensor) else values


def posterior_steps(
    flow_map: Callable[[Times, Times, Tensor, Times, Tensor], Tensor], x_t: Tensor, t: Times, noise: Tensor, steps: int
) -> Tensor:
    """Posterior draws `(B, N, *shape)` by `steps` steps of X_{s,u}(x; t, x_t) on a uniform inner grid.

    Args:
        flow_map: `flow_map(s, u, x, t, x_t)` of B*N states, draws of one state next to each other.
        x_t: noisy states `(B, *shape)`.
        t: their times, one for all or `(B,)`.
        noise: at s = 0, `(B, N, *shape)`.
        steps: of the flow map.
    """
    x, N = noise.flatten(0, 1), noise.shape[1]
    outer, time = x_t.repeat_interleave(N, dim=0), as_times(t, x_t).repeat_interleave(N)
    for k in range(steps):
        x = flow_map(k / steps, (k + 1) / steps, x, time, outer)
    return x.reshape(noise.shape)
