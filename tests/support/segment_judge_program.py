"""What tests of a segment's judge run, alone or under torchrun: every rank has the judge score a picture of its own.

    python tests/support/segment_judge_program.py <config.json> <folder> [answers | ends]

Each rank writes `<folder>/<rank>.json`, what it was told and by whom. Then it waits as long as `<folder>/hold` exists.
With `answers` the server is `tests/support/faulty_server.py`, with `ends` one that ends at once.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from earl import judges
from earl.config.load import read
from earl.execution import processes, ranks
from earl.judges import segment
from tests.support import faulty_server


def scores_of(rank: int) -> tuple[int, int, int, int]:
    return 1 + rank, 2 + rank, 3 + rank, 4 + rank


def main(config: Path, folder: Path, stub: str | None) -> None:
    if stub is not None:
        words = [sys.executable, faulty_server.__file__]
        segment.command = lambda config, host, host_file: [*words, str(host_file)] if stub == "answers" else ["false"]
    with ranks.joined(torch.device("cpu")) as team, judges.in_segment(read(config), team) as judge:
        edited = faulty_server.picture(team.rank, scores_of(team.rank), faulty_server.NONE, False)
        (verdict,) = judge.score([judges.Judgement("make it red", np.full((8, 8, 3), 255, np.uint8), edited)])
        found = {
            "judge": judge.name,
            "model": judge.model,
            "revision": judge.revision,
            **vars(verdict),
            "pid": os.getpid(),
        }
        (folder / f"{team.rank}.part").write_text(json.dumps(found, default=list))
        (folder / f"{team.rank}.part").rename(folder / f"{team.rank}.json")
        while (folder / "hold").exists():
            time.sleep(0.05)
        if (folder / "fail").exists():
            raise RuntimeError("as the test wants it")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
    processes.end_at_once(0)
