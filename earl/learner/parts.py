"""A writer for `torch.distributed.checkpoint`: safetensors, a file a rank, equal bytes for equal tensors."""

import json
import os
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import Metadata, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from earl.execution.ranks import Ranks
from earl.files import tensors as files

OFFSETS = "DCP_SHARDING_INFO"
"""Entry of a file's header where HuggingFaceStorageReader looks for the place of each part in its tensor. It must stay
the only entry: of several, safetensors writes the order at random."""


class PartWriter(StorageWriter):
    """Writes what a rank holds of each tensor into `optimizer-<rank + 1>-of-<ranks>.safetensors` of a folder."""

    def __init__(self, folder: Path, team: Ranks) -> None:
        self.path = folder / f"optimizer-{team.rank + 1:05d}-of-{team.size:05d}.safetensors"

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors, places, results = {}, {}, []
        for item in plan.items:
            results.append(WriteResult(item.index, item.tensor_storage_size(), None))
            chunk = item.tensor_data.chunk
            if chunk.sizes.numel():  # of a tensor with fewer rows than there are ranks some have none
                tensors[item.index.fqn] = planner.resolve_data(item).detach().cpu().contiguous()
                places[item.index.fqn] = {"saved_offsets": list(chunk.offsets)}
        files.write(self.path, tensors, {OFFSETS: json.dumps(places, sort_keys=True)})
        with open(self.path, "rb") as stream:
            os.fsync(stream.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
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
