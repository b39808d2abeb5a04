"""Training of a Meta Flow Map: any network, any objective, an optional frozen teacher."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from mfm_lightning.alignment.described import BUDGETS, described
from mfm_lightning.backbones import FlowAdapter
from mfm_lightning.checkpoints import CheckpointError, load_model
from mfm_lightning.conditions import INDEX, Batch, Conditions
from mfm_lightning.evaluation.base import Evaluation, datamodule_of
from mfm_lightning.models import UNTRAINED, MetaFlowMap
from mfm_lightning.modules.base import TrainingModule
from mfm_lightning.modules.execution import TrainingExecution
from mfm_lightning.modules.optimization import Optimization
from mfm_lightning.networks.base import EmbedsPrompts, differing
from mfm_lightning.networks.dit import DiT
from mfm_lightning.objectives import END, Objective
from mfm_lightning.objectives.teachers import ModelTeacher, Teacher


class MFMPretraining(TrainingModule):
    """Trains `model = MetaFlowMap(network)` on an objective (Eq. 33).

    Args:
        network: a network of `mfm_lightning.networks`, or a `mfm_lightning.backbones.FlowNetwork` or `FlowAdapter`,
            whose prompts are the captions of the data, or whose embeddings the data bring.
        objective: the terms, and how their samples are drawn.
        teacher: frozen base drift for the distilled terms. It is in neither the checkpoint nor the optimiser: the
            checkpoint names it by its `identity`, and resuming with another one is refused. Of a `FlowAdapter` it is
            the flow without the adapter where None.
        initial: a `model.safetensors`, a name ("mnist/flow") or a Hugging Face id to start from; must have this
            network's architecture, or be a DiT with fewer blocks (`DiT.start_from`).
        optimization: the optimiser and its learning rate.
        evaluation: what `validate` draws and `test` measures.
        execution: compilation and activation checkpointing, of the network; the teacher is compiled with it.

    Raises:
        ValueError: for a distilled term without a teacher, a teacher of another shape, or a guidance scale or an
            execution that the network does not know.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        teacher: Teacher | None = None,
        initial: str | None = None,
        optimization: Optimization | None = None,
        evaluation: Evaluation | None = None,
        execution: TrainingExecution | None = None,
    ) -> None:
        super().__init__(optimization, evaluation)
        if objective.needs_teacher and teacher is None and isinstance(network, FlowAdapter):
            flow = json.dumps(network.flow.identity, sort_keys=True, default=str)
            teacher = ModelTeacher(MetaFlowMap(network.teacher_network), identity={"kind": "base", "flow": flow})
        if objective.needs_teacher and teacher is None:
            raise ValueError(f"objective {objective.needs_teacher[0]!r} needs a teacher: set model.teacher")
        self.model = MetaFlowMap(network)
        self.state_shape, self.num_classes = self.model.state_shape, self.model.num_classes
        if teacher is not None and tuple(teacher.state_shape) != self.state_shape:
            raise ValueError(
                f"the teacher's states have shape {tuple(teacher.state_shape)}, the network's {self.state_shape}"
            )
        if initial is not None:
            _initialise(self.model, initial)
            self.measures_untrained = True  # it is a model already
        if self.model.guidance_scales:  # a network without scales learns the one it is trained with
            self.model.check(Conditions(guidance=objective.pairs.guidance_scale))
        self.objective, self.teacher = objective, teacher
        if objective.base_flow_only:
            self.exported_kind = "base_flow"
        execution = execution or TrainingExecution()
        execution.prepare(network)
        if execution.compile and isinstance(teacher, ModelTeacher):
            TrainingExecution(compile=True).prepare(teacher.model.network)

    @property
    def trained(self) -> nn.Module:
        return self.model

    @property
    def exported(self) -> nn.Module:
        return self.model.network

    @property
    def frozen(self) -> dict[str, Any]:
        return {"teacher": self.teacher.identity} if self.teacher is not None else {}

    def file_metadata(self) -> dict[str, str]:
        return super().file_metadata() | self._untrained

    @cached_property
    def _untrained(self) -> dict[str, str]:
        """Labels of which the data have no training sample, which whoever samples should know."""
        counts = getattr(datamodule_of(self.trainer), "label_counts", dict)()
        if not self.num_classes or "train" not in counts:
            return {}
        missing = [label for label, count in enumerate(counts["train"]) if not count]
        return {UNTRAINED: json.dumps(missing)} if missing else {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if isinstance(self.model.network, EmbedsPrompts):
            self.model.network.meet(datamodule_of(self.trainer))

    def to_device(self, device: torch.device) -> None:
        if self.teacher is not None:
            self.teacher.to(device)

    def losses(self, x1: Tensor, conditions: Conditions, training: bool) -> dict[str, Tensor]:
        if isinstance(self.model.network, EmbedsPrompts):
            conditions = self.model.network.embed(conditions)
        # a loss that is not trained on is that of the end of every curriculum, at all steps and in `mfm test` the same
        step = self.global_step if training else END
        return self.objective(self.model, self.teacher, x1, conditions, step)

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        if self.evaluation is None:
            raise ValueError("predict needs model.evaluation, which says what to draw")
        if (left := self.predicted.left(batch, batch_idx)) is not None:
            self.predicted.folder.write(left[1][INDEX], self.evaluation.predict(self, left))

    def predicted_settings(self) -> dict[str, Any]:
        return {"evaluation": described(self.evaluation, BUDGETS)}

    def predicts(self) -> bool:
        return self.evaluation is not None


def _initialise(model: MetaFlowMap, path: str) -> None:
    start, network = load_model(path), model.network
    if isinstance(network, DiT):
        try:
            return network.start_from(cast(DiT, start.network))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    kinds = type(network).__name__, type(start.network).__name__
    if kinds[0] != kinds[1]:
        raise CheckpointError(f"{path}: a {kinds[0]} starts from a {kinds[0]}, not from a {kinds[1]}")
    if different := differing(network.config, start.network.config):
        raise CheckpointError(f"{path}: another architecture than the network's: {', '.join(different)}")
    model.load_state_dict(start.state_dict())
