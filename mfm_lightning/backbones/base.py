"""A pretrained text-to-image flow of diffusers as a base flow: its drift, its prompts, its images, its times."""

from __future__ import annotations

import copy
import itertools
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from mfm_lightning.backbones.decoder import LatentDecoder
from mfm_lightning.backbones.placement import Placement
from mfm_lightning.backbones.prompted_pipeline import PromptedPipeline
from mfm_lightning.backbones.schedulers import require_flow
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import Times, as_times, expand
from mfm_lightning.networks.tiny_decoder import TinyDecoder
from mfm_lightning.utils.devices import out_of_memory
from mfm_lightning.utils.row_budget import MaxRows, RowBudget, check_max_rows, in_parts

log = logging.getLogger(__name__)


class TextToImageFlow(PromptedPipeline):
    """The base flow of a diffusers pipeline, in the conventions of this package: noise at t = 0, data at t = 1, and
    states that are scaled latents `(B, C, h, w)` in float32, whatever type the transformer computes in.

    With sigma = 1 - t the pipeline's state is the same, and the velocity that it integrates over sigma is -b_t.
    Guidance is the pipeline's own. Where it takes two evaluations (with and without the prompt), both count (`passes`).

    Args:
        pipe: the pipeline. Its transformer, VAE and scheduler's settings are used; its text encoders where prompts are
            encoded.
        image_size: height and width of the images in pixels; the pipeline's own where None.
        max_rows: states at once in the transformer, and latents at once in the VAE; more are cut. It bounds memory, not
            that of gradients of the transformer: see `checkpointing`. "auto" finds the most that a GPU has room for.
        attention: "math" is torch's plain one, which has derivatives along a direction (`torch.func.jvp`); other names
            are those of diffusers' backends. The usual one where None.
        checkpointing: keep only the input of each block of the transformer, and of the VAE where it can
            (`AutoencoderKL`), for the gradient, and compute the rest again.
        tiled: decode large latents in overlapping tiles that are blended (diffusers' tiling; not exactly the same).
        cache: folder that keeps the embeddings of prompts; in memory where None.
        load_encoders: gives a pipeline with text encoders where `pipe` has none; it is dropped after each use.
        encoders: what the embeddings depend on besides the prompt and the pipeline's class, for the cache: a name, with
            a revision or the like.
        weights: the same of transformer and VAE, for `identity`.
        encoder_device: where prompts are encoded; the CPU where None.
        max_sequence_length: tokens of a prompt, as the pipeline's call takes it; its own usual number where None.
        devices: where transformer and VAE are; they move with the flow where None.
        fingerprint: gives a short name of the contents of the files of "vae", "text_encoders" or "transformer", equal
            for copies.

    Raises:
        ValueError: for a pipeline of another class, one that is no flow, or sizes that do not fit.
    """

    patch_size: ClassVar[int] = 1  # latents must be multiples of it
    # modules of the transformer whose output is the tokens `(B, T, D)`, and the embedding of the time `(B, D)`
    adapter_places: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        pipe: Any,
        image_size: tuple[int, int] | int | None = None,
        max_rows: MaxRows = 8,
        attention: str | None = None,
        checkpointing: bool = False,
        tiled: bool = False,
        cache: str | Path | None = None,
        load_encoders: Callable[[], Any] | None = None,
        encoders: str = "",
        weights: str = "",
        encoder_device: str | torch.device | None = None,
        max_sequence_length: int | None = None,
        fingerprint: Callable[[str], str] | None = None,
        devices: Placement | None = None,
    ) -> None:
        super().__init__(pipe, cache, load_encoders, encoders, encoder_device, max_sequence_length)
        self.placement = devices or Placement()
        check_max_rows(max_rows)
        require_flow(pipe.scheduler, found := type(pipe).__name__)
        if not type(pipe.scheduler).__name__.startswith("FlowMatchEuler"):
            log.warning(
                "%s: its %s takes steps of its own; here its times have Euler's steps, which give other images",
                found, type(pipe.scheduler).__name__,
            )  # fmt: skip
        self.transformer = pipe.transformer.eval().requires_grad_(False)
        self.decoder = LatentDecoder(pipe.vae, self._unscaled, max_rows, tiled, self.placement.vae)
        if self.placement.transformer is not None:
            self.transformer.to(self.placement.transformer)
        self.max_rows: MaxRows = max_rows
        self.budget = RowBudget("the transformer")
        self._weights, self.fingerprint = weights, fingerprint
        # what a block is computed again in, for a gradient: an adapter that is on in this call is on again
        self.recomputing: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._opened_by: dict[str, Any] | None = None
        self.attention = attention
        if attention not in (None, "math"):
            set_backend(self.transformer, attention)
        if checkpointing:
            self.enable_checkpointing()
        self.image_size = self._checked(image_size or self._usual_size())
        latent = pipe.vae.config.get("latent_channels", pipe.vae.config.get("z_dim", self.channels))
        if latent != self.channels:
            raise ValueError(f"the VAE has latents of {latent} channels, and the {found}'s transformer {self.channels}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves the flow, `to` and its like, leaves a transformer on devices of its own where it is."""
        if self.placement.transformer is None and self.placement.transformer_map is None:
            return super()._apply(fn, recurse)
        kept = self._modules.pop("transformer")
        try:
            return super()._apply(fn, recurse)
        finally:
            self._modules["transformer"] = kept

    def enable_checkpointing(self) -> None:
        """What the option `checkpointing` does."""
        self.transformer.enable_gradient_checkpointing(self._recomputed)
        if getattr(self.decoder.vae, "_supports_gradient_checkpointing", False):
            cast(Any, self.decoder.vae).enable_gradient_checkpointing(self._recomputed)

    def use_for_gradients(self, decoder: TinyDecoder) -> None:
        """Have the gradients of images go back through a small decoder; images are still the VAE's.

        Raises:
            ValueError: for a decoder of other latents.
            FileNotFoundError, ImportError, CheckpointError: as `TinyDecoder`.
        """
        decoder.check_channels(self.channels)
        self.decoder.gradients = decoder

    @property
    def identity(self) -> dict[str, Any]:
        """What its images depend on besides conditions, noise and times, as far as it is known: as JSON."""
        small = self.decoder.gradients
        return {
            **({} if small is None else {"gradients": repr(small)}),
            "flow": type(self).__name__, "config": repr(self.transformer.config), "weights": self._weights,
            "image_size": list(self.image_size), "dtype": str(self.transformer.dtype), "tiled": self.decoder.tiled,
            "attention": self.attention, "encoders": self._encoders, "tokens": self.max_sequence_length,
        }  # fmt: skip

    @property
    def budgets(self) -> dict[str, RowBudget]:
        """What `max_rows: auto` measures, by name; nothing with a number."""
        if self.max_rows != "auto":
            return {}
        return {"transformer": self.budget, "vae": self.decoder.budget, "vae, gradients": self.decoder.gradient_budget}

    @property
    def parts(self) -> dict[str, Any]:
        """What its latents and embeddings depend on, and its weights do not: as JSON, equal for a copy of its files.
        Without fingerprints where it was made of a pipeline in memory."""
        names = () if self.fingerprint is None else ("vae", "text_encoders")
        found = {name: self.fingerprint(name) for name in names if self.fingerprint is not None}
        return {"family": type(self).__name__, "max_sequence_length": self.max_sequence_length, **found}

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def opened_by(self) -> dict[str, Any]:
        """What opens it again, for files of networks on it: arguments of `load_flow`, which sets them.

        Raises:
            ValueError: for a flow of a pipeline that was made otherwise.
        """
        if self._opened_by is None:
            raise ValueError(f"a file of a network on this {type(self).__name__} could not be opened: use load_flow")
        return self._opened_by

    @opened_by.setter
    def opened_by(self, settings: dict[str, Any]) -> None:
        self._opened_by = settings

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of latents: channels, height and width."""
        height, width = self.image_size
        return self.channels, height // self.compression, width // self.compression

    @property
    def channels(self) -> int:
        """Of the latents."""
        return int(self.transformer.config.in_channels)

    @property
    def compression(self) -> int:
        """Pixels a latent, along each side."""
        return int(self.pipe.vae_scale_factor)

    def _usual_size(self) -> tuple[int, int]:
        side = int(self.pipe.default_sample_size) * self.compression
        return side, side

    def _checked(self, size: tuple[int, int] | int) -> tuple[int, int]:
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        unit = self.compression * self.patch_size
        if height < unit or width < unit or height % unit or width % unit:
            raise ValueError(f"image_size {height} x {width}: height and width must be multiples of {unit}")
        return height, width

    # -- the flow ------------------------------------------------------------------------------------------------------

    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        """b_t(x) `(B, C, h, w)` in float32, with guidance where the conditions have a scale.

        Args:
            t: `(B,)` in [0, 1], or a number.
            x: latents `(B, C, h, w)`; of any size that the transformer takes.
            conditions: of `encode`, a row for each state or one for all.

        Raises:
            ValueError: for latents or conditions that do not fit.
            torch.OutOfMemoryError: with what to lower.
        """
        return self.evaluated(as_times(t, x), x, conditions)

    def evaluated(self, t: Tensor, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        """The transformer's velocity `(B, C, h, w)` in float32 at times `(B,)`, guided and in parts of `max_rows`;
        raises as `drift`. Flow maps have pairs of times, `(B, 2)`."""
        self._check(x, conditions)
        given = (conditions or Conditions()).expand(len(x), x.device)
        guided = self.passes(given) > 1  # once: on an accelerator the look at the scales waits
        if guided and given.negative_text is None:
            raise ValueError(
                "guidance by two evaluations needs a negative prompt, and the conditions have none: give "
                "flow.encode(prompts, negative=...), or guidance 1"
            )
        home = x.device
        if (place := self.placement.transformer) is not None:  # a map's hooks bring inputs to their modules, and back
            t, x, given = t.to(place), x.to(place), given.to(place)
        with (
            self._kernel(),
            out_of_memory("the transformer", "max_rows or image_size (gradients: set checkpointing)"),
        ):
            parts = in_parts(
                lambda rows: self._drift(t[rows], x[rows], given.take(rows), guided),
                len(x),
                # the graph of all parts is kept: cutting leaves memory as it is
                len(x) if self.max_rows == "auto" and torch.is_grad_enabled() and x.requires_grad else self.max_rows,
                self.budget,
                x.device,
            )
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(home)

    def _kernel(self) -> AbstractContextManager[Any]:
        return sdpa_kernel(SDPBackend.MATH) if self.attention == "math" else nullcontext()

    def _recomputed(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """A block that keeps only its inputs for the gradient; the second time with the same attention, too."""
        again = self.recomputing  # as it is now

        @contextmanager
        def second() -> Iterator[None]:
            with self._kernel(), again():
                yield

        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), second()))

    def _drift(self, t: Tensor, x: Tensor, given: Conditions, guided: bool) -> Tensor:
        velocity = self._velocity(t, x, given).float()
        if not guided:
            return velocity
        null = self._velocity(t, x, given.negative).float()
        return self._guided(null, velocity, expand(cast(Tensor, self._scale(given)).to(x.device), x))

    def passes(self, conditions: Conditions) -> int:
        """Evaluations of the transformer in one of the drift: 2 where guidance leads away from a negative prompt."""
        scale = self._scale(conditions)
        return 1 if scale is None or bool((scale == 1).all()) else 2

    def _scale(self, conditions: Conditions) -> Tensor | None:
        """Of guidance by two evaluations."""
        return conditions.guidance

    def velocity(self, t: Times, x: Tensor, conditions: Conditions) -> Tensor:
        """The transformer's one evaluation `(B, C, h, w)` in float32, without guidance and in one part: what training
        fits. Raises as `drift`."""
        self._check(x, conditions)
        with self._kernel():
            return self._velocity(as_times(t, x), x, conditions.expand(len(x), x.device)).float()

    @abstractmethod
    def _velocity(self, t: Tensor, x: Tensor, given: Conditions) -> Tensor:
        """b_t(x) of the transformer's one evaluation, in any floating type."""

    def _guided(self, null: Tensor, velocity: Tensor, scale: Tensor) -> Tensor:
        return null + scale * (velocity - null)

    def _typed(self, value: Tensor | None) -> Tensor | None:
        """In the transformer's floating type."""
        return None if value is None else value.to(self.transformer.dtype)

    def _check(self, x: Tensor, given: Conditions | None) -> None:
        """Raise ValueError for what the transformer would refuse in its own words, or take wrongly."""
        name = type(self).__name__
        if x.dim() != 4 or x.shape[1] != self.channels or any(side % self.patch_size for side in x.shape[2:]):
            raise ValueError(
                f"latents of shape {tuple(x.shape)}: a {name} takes (B, {self.channels}, h, w)"
                + (f", h and w multiples of {self.patch_size}" if self.patch_size > 1 else "")
            )
        if given is None or given.text is None:
            raise ValueError(f"a {name} needs conditions with text: give flow.encode(prompts)")

    # -- times and images ----------------------------------------------------------------------------------------------

    def time_grid(self, steps: int, shift: float | None = None) -> list[float]:
        """The `steps + 1` times of the pipeline's scheduler for images of `image_size`, increasing, the last one 1.

        Args:
            steps: at least 1.
            shift: in place of the scheduler's own: a uniform sigma becomes shift sigma / (1 + (shift - 1) sigma);
                above 1 the grid is finer near noise.

        Raises:
            ValueError: for no steps, or a shift that is not positive.
        """
        if steps < 1 or (shift is not None and not shift > 0):
            raise ValueError(f"steps {steps} must be at least 1, and shift {shift} positive")
        scheduler = copy.deepcopy(self.pipe.scheduler)
        if shift is not None:
            names = {"shift": shift, "flow_shift": shift, "use_dynamic_shifting": False}
            known = {name: value for name, value in names.items() if name in scheduler.config}
            scheduler = type(scheduler).from_config(scheduler.config, **known)
        scheduler.set_timesteps(**self._scheduler_arguments(steps, scheduler))
        sigmas = scheduler.sigmas.double().tolist()
        times = [1 - sigma for sigma in sigmas]
        if times[-1] != 1 or any(b <= a for a, b in itertools.pairwise(times)):
            raise ValueError(
                f"a {type(scheduler).__name__} with {steps} steps gives no increasing times: {times[:3]}..."
            )
        return [max(times[0], 0.0), *times[1:]]

    @abstractmethod
    def _scheduler_arguments(self, steps: int, scheduler: Any) -> dict[str, Any]:
        """Of the scheduler's `set_timesteps`, as the pipeline gives them."""

    def _unscaled(self, latents: Tensor) -> Tensor:
        """What the VAE decodes."""
        config = self.pipe.vae.config
        return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)


def set_backend(transformer: Any, name: str) -> None:
    """Give a transformer an attention backend of diffusers; ValueError where it would be without effect, or unknown."""
    processors = [p for module in transformer.modules() if (p := getattr(module, "processor", None)) is not None]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ValueError(
            f"attention {name!r}: a {type(transformer).__name__} takes no attention backend of diffusers; 'math' is "
            "torch's plain one"
        )
    # diffusers also makes it the one of all models of this process that have none of their own
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend():  # which puts back what was there
        transformer.set_attention_backend(name)
