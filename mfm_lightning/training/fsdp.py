"""Fully sharded training: `trainer.strategy: fsdp2` instead of `ddp`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from mfm_lightning.training.run_checkpoints import check_checkpoint
from mfm_lightning.utils.atomic import PARTIAL, mend, put_in_place, remove


class FSDP(ModelParallelStrategy):
    """FSDP2: each rank keeps its shard of weights, gradients, optimiser state and EMA, and gathers a block's weights
    while it computes it. Lightning's `ModelParallelStrategy` with all devices in one data-parallel group; modules here
    say by `configure_model` what is sharded.

    Args:
        save_sharded: a checkpoint is a folder with a file for each rank, quicker for large models, but resumed only by
            FSDP. Else it is one file, as any strategy's.
        process_group_backend: of torch.distributed; nccl on GPUs and gloo on CPUs where None.
    """

    def __init__(self, save_sharded: bool = False, process_group_backend: str | None = None) -> None:
        super().__init__(save_distributed_checkpoint=save_sharded, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a folder beside its place and then move it there, so that the checkpoint before it stays, whatever
        happens (Lightning writes into the one before). A file is the `CheckpointIO`'s, which does the same."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint and not path.is_dir():
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if path.is_dir() and not (path / "meta.pt").is_file():
            raise IsADirectoryError(f"{path} is a folder, and no checkpoint in shards: it is not replaced by one")
        partial = path.with_name(f"{path.name}{PARTIAL}shards")
        if self.is_global_zero:
            remove(partial)  # of a run that was killed
        self.barrier()
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
        except (CheckpointException, OSError, RuntimeError) as error:
            if self.is_global_zero:
                remove(partial)
            raise OSError(f"checkpoint {path} could not be written, the one before it is intact: {error}") from error
        self.barrier()  # all ranks have written
        if self.is_global_zero:
            for part in partial.iterdir() if partial.is_dir() else ():
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
            put_in_place(partial, path)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load plain tensors and numbers alone. torch unpickles a folder's plan, and what is no tensor in its shards,
        whatever they hold: the plan is checked before, and the rest is read as weights."""
        if self.is_global_zero:
            mend(Path(checkpoint_path))
        self.barrier()
        if Path(checkpoint_path).is_dir():
            check_checkpoint(checkpoint_path)
        with _weights_only():
            return super().load_checkpoint(checkpoint_path, weights_only)


@contextmanager
def _weights_only() -> Iterator[None]:
    """Within the context torch.load takes no code, whatever its caller asks for."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})
