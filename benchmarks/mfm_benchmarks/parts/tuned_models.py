"""What policies are fine-tuned from: a Meta Flow Map, whose whole network is trained, or a text-to-image flow, which
has a LoRA."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mfm_benchmarks.finetuning import Policy
from mfm_benchmarks.finetuning.problem import weights_of
from mfm_benchmarks.models import ModelSettings, Subject, compute_in, probe
from mfm_benchmarks.parts.opened_flow import open_adapted, open_flow
from mfm_benchmarks.spec import Spec
from mfm_lightning.alignment.target import Flow, Target
from mfm_lightning.backbones import LoRANetwork
from mfm_lightning.checkpoints import find_weights, fingerprint, load_model
from mfm_lightning.conditions import Batch, Conditions, unlabelled
from mfm_lightning.data.base import StepDataModule
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks.decoders import Decoder
from mfm_lightning.sampling.prompts import as_prompts
from mfm_rewards import Reward, RewardError, build
from mfm_rewards.protocol import name_of


class Rewarded(Protocol):
    """A reward on a model: with the conditions of samples it gives their target, the reward not scaled."""

    @property
    def reward(self) -> Reward: ...

    def __call__(self, conditions: Conditions) -> Target: ...


class TunedModel(ABC):
    """The base flow of all policies, what draws from it, and what samples are conditioned on.

    Attributes:
        device: of everything.
        identity: what results depend on, as JSON.
    """

    device: torch.device
    identity: dict[str, Any]

    @property
    @abstractmethod
    def model(self) -> MetaFlowMap | Flow:
        """What targets are made of; its drift is the base flow's."""

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.model.state_shape)

    @abstractmethod
    def load(self, reward: dict[str, Any] | str, built: Reward | None = None) -> Rewarded:
        """A reward on this model.

        Args:
            reward: as `mfm_rewards.build` takes it.
            built: what `reward` describes, where it has been built already.

        Raises:
            RewardError: for one that needs what samples here have not.
        """

    @abstractmethod
    def conditions(self, num: int) -> Conditions:
        """Of `num` samples that are measured: the classes or prompts in turn."""

    @abstractmethod
    def draw(self, num: int) -> Conditions:
        """Of `num` samples of training: at random, by torch's global state."""

    @abstractmethod
    def of_data(self, batch: Batch) -> tuple[Tensor, Conditions]:
        """Clean states of a DataModule's batch, with a row of conditions each."""

    @abstractmethod
    def policy(self) -> tuple[Policy, list[nn.Parameter]]:
        """One that is as the base flow, and what is trained of it. What was got before is not to be used any more."""

    def meet(self, data: StepDataModule) -> None:  # noqa: B027
        """Raise ValueError for data that are not this model's."""

    def target(self, rewarded: Rewarded, num: int) -> Target:
        """For `num` samples that are measured."""
        return rewarded(self.conditions(num))

    def probe(self, rewarded: Rewarded) -> list[str]:
        """Of a reward, for the identity of results."""
        return probe(lambda num: self.target(rewarded, num), self.device)


class TunedMap(TunedModel):
    """A Meta Flow Map of this package.

    Args:
        settings: of the model.
    """

    def __init__(self, settings: ModelSettings, device: torch.device) -> None:
        self.settings, self.device, self._subject = settings, device, Subject(settings, device)
        self.identity = self._subject.identity

    @property
    def model(self) -> MetaFlowMap:
        return self._subject.model

    def load(self, reward: dict[str, Any] | str, built: Reward | None = None) -> Rewarded:
        return self._subject.load(reward, built)

    def conditions(self, num: int) -> Conditions:
        return self._subject.conditions(num)

    def draw(self, num: int) -> Conditions:
        if self.settings.labels is None:
            return Conditions()
        labels = torch.tensor(self.settings.labels)
        return Conditions(label=labels[torch.randint(len(labels), (num,))])

    def of_data(self, batch: Batch) -> tuple[Tensor, Conditions]:
        x1, given = batch if self.settings.labels is not None else unlabelled(batch)
        return x1.to(self.device), Conditions.of_batch(given).expand(len(x1), self.device)

    def policy(self) -> tuple[Policy, list[nn.Parameter]]:
        policy = load_model(find_weights(self.settings.file)).to(self.device).eval().requires_grad_(True)
        compute_in(policy, self.settings.precision)
        return policy, list(policy.parameters())


@dataclass
class FlowSettings:
    """A pretrained text-to-image flow. Policies are the flow with a LoRA, and begin with the same one.

    Args:
        pipeline: a folder of diffusers or a Hugging Face id; or, with options,
            `{class_path: mfm_lightning.backbones.load_flow, init_args: {name: ..., ...}}`.
        prompts: a file (`mfm_lightning.sampling.prompts.read_prompts`), or texts: what samples are conditioned on, in
            training at random.
        mfm: a `model.safetensors` of a `FlowAdapter` of this flow, for methods that draw from a Meta Flow Map; without
            it they are left out.
        column: of the file, that has the texts.
        guidance: scale of the flow's guidance; the pipeline's usual one where None, 1 for none. The policy has it too.
        negative: negative prompt; the pipeline's usual one where None.
        rank: of the LoRA (`mfm_lightning.backbones.LoRA`).
        alpha: its scale is alpha / rank; the rank where None.
        ranks: others by module, a regular expression to a rank.
        targets: regular expression of whole names of linear layers that have one; all of attention and MLP where None.
    """

    pipeline: Spec | str
    prompts: str | list[str]
    mfm: str | None = None
    column: str = "prompt"
    guidance: float | None = None
    negative: str | None = None
    rank: int = 16
    alpha: float | None = None
    ranks: dict[str, int] | None = None
    targets: str | None = None


class TunedFlow(TunedModel):
    """A text-to-image flow. Its transformer is there once: base, Meta Flow Map and policy are its adapters.

    Args:
        settings: of flow, prompts and LoRA.

    Raises:
        FileNotFoundError, ImportError, CheckpointError, ValueError: as `read_prompts`, `load_flow`, `AdaptedFlow.load`
            and `LoRA`; for a guidance that the Meta Flow Map has not learnt.
    """

    def __init__(self, settings: FlowSettings, device: torch.device) -> None:
        self.settings, self.device, s = settings, device, settings
        texts = list(dict.fromkeys(prompt.text for prompt in as_prompts(s.prompts, s.column)))
        self.flow = open_flow(s.pipeline).eval().requires_grad_(False)
        self._adapted = None if s.mfm is None else open_adapted(s.mfm, self.flow, s.guidance)
        lora = {"rank": s.rank, "alpha": s.alpha, "ranks": s.ranks, "targets": s.targets}
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.network = LoRANetwork.on_flow(self.flow, **lora).eval()
        self.flow.keep_embeddings(["", *texts], s.negative, s.guidance)  # the empty one in a row of guidance alone
        for part in (self.flow, self._adapted, self.network):
            if part is not None:
                part.to(device)
        self._prompts = self.network.guided(Conditions(prompts=texts), s.negative, s.guidance)
        self._first = weights_of(self._parameters)
        self.identity = {
            **self.flow.identity, "mfm": None if s.mfm is None else fingerprint(s.mfm), "lora": lora, "prompts": texts,
            "guidance": s.guidance, "negative": s.negative,
        }  # fmt: skip

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return list(self.network.parameters())

    @property
    def model(self) -> MetaFlowMap | Flow:
        return self.flow if self._adapted is None else self._adapted

    def load(self, reward: dict[str, Any] | str, built: Reward | None = None) -> Rewarded:
        found = (built or build(reward)).eval().requires_grad_(False).to(self.device)
        for needed in ("labels", "groups"):
            if needed in found.needs:
                raise RewardError(f"reward {name_of(found)!r} needs {needed}, and prompts have none here")
        return RewardedFlow(self.model, self.flow.decoder, found)

    def conditions(self, num: int) -> Conditions:
        return self._prompts.take(torch.arange(num) % self._prompts.num_rows)

    def draw(self, num: int) -> Conditions:
        return self._prompts.take(torch.randint(self._prompts.num_rows, (num,)))

    def of_data(self, batch: Batch) -> tuple[Tensor, Conditions]:
        x1, given = batch
        guided = self.network.guided(Conditions.of_batch(given), self.settings.negative, self.settings.guidance)
        return x1.to(self.device), guided.expand(len(x1), self.device)

    def policy(self) -> tuple[Policy, list[nn.Parameter]]:
        for p, first in zip(self._parameters, self._first, strict=True):
            p.data, p.grad = first.clone(), None
        return self.network, self._parameters

    def meet(self, data: StepDataModule) -> None:
        self.network.meet(data)


@dataclass(frozen=True)
class RewardedFlow:
    """A reward on a text-to-image flow, or on its adapter."""

    model: MetaFlowMap | Flow
    decoder: Decoder
    reward: Reward

    def __call__(self, conditions: Conditions) -> Target:
        return Target(self.model, self.reward, self.decoder, conditions)
