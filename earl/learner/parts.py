"""A writer for `torch.distributed.checkpoint`: safetensors, a file a rank, equal bytes for equal tensors."""

import json
import os
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import Metadata, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from earl.execution.ranks import Ranks
from earl.files import manifest
from earl.files import tensors as files
from earl.messages.errors import EarlError

OFFSETS = "DCP_SHARDING_INFO"
"""Entry of a file's header where HuggingFaceStorageReader looks for the place of each part in its tensor."""


class PartWriter(StorageWriter):
    """Writes what a rank holds of each tensor into `optimizer-<rank + 1>-of-<ranks>.safetensors` of a folder.

    Attributes:
        entry: digest and size of the file, once it is written.
    """

    entry: manifest.Entry

    def __init__(self, folder: Path, team: Ranks) -> None:
        self.path = folder / f"optimizer-{team.rank + 1:05d}-of-{team.size:05d}.safetensors"

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # Of a tensor with fewer rows than there are ranks some have none.
        items = {item.index.fqn: item for item in plan.items if item.tensor_data.chunk.sizes.numel()}
        shapes = {
            name: (item.tensor_data.properties.dtype, item.tensor_data.chunk.sizes) for name, item in items.items()
        }
        places = {name: {"saved_offsets": list(item.tensor_data.chunk.offsets)} for name, item in items.items()}
        with files.Writer(self.path, shapes, {OFFSETS: json.dumps(places, sort_keys=True)}) as writer:
            for name in writer.names:
                tensor = planner.resolve_data(items[name])
                if not files.is_finite(tensor):
                    raise EarlError(
                        f"{name!r} is not finite, so the trainer state was not written; go back to an earlier "
                        "checkpoint and lower learning_rate"
                    )
                writer.put(name, tensor)
            self.entry = writer.finish()
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(item.index, item.tensor_storage_size(), None) for item in plan.items])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing: each file says what it holds, and the folder's manifest which files there are."""

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing: a writer writes once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True
