"""A fine-tuned text-to-image flow beside its base: rewards by prompt, what was not asked for, and pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mfm_lightning.backbones import LoRANetwork, TextToImageFlow
from mfm_lightning.conditions import Conditions
from mfm_lightning.evaluation.base import EvaluatedModule, Evaluation
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.metrics.measured import Measured, mean_of_groups
from mfm_lightning.sampling.prompts import as_prompts
from mfm_lightning.utils.console import track, write_table
from mfm_lightning.utils.figures import pairs_in_rows
from mfm_rewards import Reward, build, evaluate
from mfm_rewards.composition import parts_of_rewards
from mfm_rewards.protocol import name_of


class PromptPolicyModule(EvaluatedModule, Protocol):
    """With a LoRA that is trained on a base flow to a reward of prompts."""

    policy: LoRANetwork

    @property
    def reward(self) -> Reward: ...

    @property
    def flow(self) -> TextToImageFlow: ...

    def policy_path(self, noise: Tensor, conditions: Conditions, steps: int) -> tuple[Tensor, Tensor]: ...

    def sample_base(self, noise: Tensor, conditions: Conditions | None, steps: int) -> Tensor: ...

    def sample_policy(self, noise: Tensor, conditions: Conditions | None, steps: int) -> Tensor: ...


class PromptPolicyEvaluation(Evaluation[PromptPolicyModule]):
    """Images of prompts by base flow and policy, from the same noise: the reward, its parts, and held-out rewards, each
    with the paired difference and intervals over prompts; and how far the policy went: the mean control cost along its
    samples (KL of its SDE from the base's, once it is near its optimum), and the root mean square of the difference of
    both images.

    Args:
        prompts: a file, the name of a set, or texts (`mfm_lightning.sampling.prompts.read_prompts`).
        images_per_prompt: of each prompt.
        steps: of Euler, on the flow's own times.
        held_out: rewards that are not optimised, by name.
        pictures: pairs in the picture; 0 for none.
        batch_size: images at once.
        seed: of the noise.

    Raises:
        FileNotFoundError, ValueError: as `read_prompts`; for numbers below 1.
        RewardError: for a held-out reward that is unknown.
    """

    def __init__(
        self,
        prompts: str | list[str],
        images_per_prompt: int = 4,
        steps: int = 28,
        held_out: dict[str, Any] | None = None,
        pictures: int = 8,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        if min(images_per_prompt, steps, batch_size) < 1 or pictures < 0:
            raise ValueError(
                f"images_per_prompt {images_per_prompt}, steps {steps} and batch_size {batch_size} must be at least 1, "
                f"pictures {pictures} at least 0"
            )
        self.prompts = [prompt.text for prompt in as_prompts(prompts)]
        self.images_per_prompt, self.steps, self.pictures = images_per_prompt, steps, pictures
        self.held_out = {name: build(reward).eval() for name, reward in (held_out or {}).items()}
        self.batch_size, self.seed = batch_size, seed
        self._base: dict[str, Tensor] = {}  # of its images, `(M,)` each: flow and noise stay as they are
        self._base_states = torch.empty(0)

    def check(self, module: PromptPolicyModule) -> None:
        for name, reward in self.held_out.items():
            if missing := [needed for needed in ("labels", "groups") if needed in reward.needs]:
                raise ValueError(f"held-out reward {name!r} needs {missing[0]}, which prompts have not")
        if name_of(module.reward) in self.held_out:
            raise ValueError(f"held_out has {name_of(module.reward)!r}, the name of what is optimised: take another")

    @torch.no_grad()
    def measure(self, module: PromptPolicyModule, folder: Path) -> None:
        self._embed(module)
        if not self._base:
            self._measure_base(module)
        after, group = self._measure_policy(module), self._prompt_of()
        stage, rows = "test" if module.trainer.testing else "val", []
        for name, values in after.items():
            texts: dict[str, str]
            if name in self._base:
                found = (mean_of_groups(self._base[name], group), mean_of_groups(values, group))
                gain = mean_of_groups(values - self._base[name], group)
                texts = dict(zip(("base", "policy", "difference"), (n.text() for n in (*found, gain)), strict=True))
                logged: tuple[tuple[str, Measured], ...] = (("base", found[0]), ("policy", found[1]), ("gain", gain))
                for kind, number in logged:
                    module.log(f"{stage}/{kind}/{name}", number.value, rank_zero_only=True)
            else:
                number = mean_of_groups(values, group)
                texts = {"base": "", "policy": number.text(), "difference": ""}
                module.log(f"{stage}/policy/{name}", number.value, rank_zero_only=True)
            rows.append({"measure": name, "images": len(values), **texts})
        title = f"{len(self.prompts)} prompts, {self.steps} steps, the same noise for both"
        # of ranks that compute in step each is here
        write_table(rows, title, folder, "policy", show=module.trainer.testing and module.trainer.is_global_zero)

    @torch.no_grad()
    def draw(self, module: PromptPolicyModule, folder: Path) -> None:
        chosen = [k * self.images_per_prompt for k in range(min(self.pictures, len(self.prompts)))]
        if not chosen:
            return
        self._embed(module)
        noise, prompts = self._noise(module, chosen), [self.prompts[i // self.images_per_prompt] for i in chosen]
        pairs = []
        for rows in torch.arange(len(chosen)).split(self.batch_size):
            given = Conditions(prompts=[prompts[i] for i in rows.tolist()])
            both = [sample(noise[rows], given, self.steps) for sample in (module.sample_base, module.sample_policy)]
            pairs.append(torch.stack([module.flow.decoder(x) for x in both], dim=1).cpu())
        names = [[textwrap.shorten(text, 34, placeholder="..."), "policy"] for text in prompts]
        title = "base flow and policy, the same noise"
        pairs_in_rows(torch.cat(pairs), names, folder / "before_after.png", title)

    def _embed(self, module: PromptPolicyModule) -> None:
        """All prompts at once, for text encoders are large: batch by batch they would be loaded for each."""
        module.flow.keep_embeddings(self.prompts, guidance=module.flow.no_guidance)

    def _prompt_of(self) -> Tensor:
        return torch.arange(len(self.prompts)).repeat_interleave(self.images_per_prompt)

    def _noise(self, module: PromptPolicyModule, index: Sequence[int]) -> Tensor:
        drawn = [torch.randn(module.state_shape, generator=g) for g in sample_generators(self.seed, list(index))]
        return torch.stack(drawn).to(module.device)

    def _batches(self, name: str) -> Iterator[tuple[list[int], Conditions]]:
        total = len(self.prompts) * self.images_per_prompt
        starts = range(0, total, self.batch_size)
        for k in track(list(starts), lambda k: f"{name}: image {k + 1} of {total}"):
            index = list(range(k, min(k + self.batch_size, total)))
            yield index, Conditions(prompts=[self.prompts[i // self.images_per_prompt] for i in index])

    def _measure_base(self, module: PromptPolicyModule) -> None:
        states, values = [], []
        for index, given in self._batches("base flow"):
            states.append(module.sample_base(self._noise(module, index), given, self.steps))
            values.append(self._rewards(module, module.flow.decoder(states[-1]), given))
        self._base, self._base_states = _joined(values), torch.cat([x.cpu() for x in states])

    def _measure_policy(self, module: PromptPolicyModule) -> dict[str, Tensor]:
        """With how far it is from the base."""
        found = []
        for index, given in self._batches("policy"):
            states, cost = module.policy_path(self._noise(module, index), given, self.steps)
            images, before = (module.flow.decoder(x) for x in (states, self._base_states[index].to(states)))
            values = self._rewards(module, images, given)
            values["control cost"] = cost
            values["RMS difference of images"] = (images - before).flatten(1).square().mean(dim=1).sqrt()
            found.append(values)
        return _joined(found)

    def _rewards(self, module: PromptPolicyModule, images: Tensor, given: Conditions) -> dict[str, Tensor]:
        """By name, one value an image `(B,)`."""
        parts: dict[str, Tensor] = {}
        own = name_of(module.reward)
        with parts_of_rewards(parts):
            total = evaluate(module.reward, images, given.prompts)
        values = {own: total, **{f"{own}: {part}": value for part, value in parts.items()}}
        for other, reward in self.held_out.items():
            values[other] = evaluate(reward.to(images.device), images, given.prompts)
        return values


def _joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([values[key].float().cpu() for values in batches]) for key in batches[0]}
