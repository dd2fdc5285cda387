"""Starts the ranks of a program as torchrun does, each forked from a process that has imported torch.

That `earl` starts its ranks by torchrun is seen where a stage is called with `train_processes` or `segment_processes`.
"""

import select
import socket
import tempfile

from tests.support.forked import Forked, environment


def launch(count: int, module: str, *arguments: object) -> str:
    """Run a module as `count` ranks to its end and return all they said; fail with that where a rank fails."""
    said, failed = run(count, module, *arguments)
    assert not failed, said
    return said


def run(count: int, module: str, *arguments: object) -> tuple[str, bool]:
    """Run a module as `count` ranks, which end when one fails; return all they said, and whether one failed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    failed = False
    with tempfile.TemporaryFile("w+") as said:
        ranks = []
        for rank in range(count):
            env = environment(**shared, RANK=rank, LOCAL_RANK=rank)
            ranks.append(Forked(module, arguments, env=env, output=said))
        running = set(ranks)
        while running:
            ended = select.select(running, [], [], 600)[0]
            if not ended or any(rank.poll() for rank in ended):
                failed = True
                for rank in running:
                    rank.kill()
            running = {rank for rank in running if rank.poll() is None}
        said.seek(0)
        return said.read(), failed
