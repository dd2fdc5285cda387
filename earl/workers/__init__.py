"""Resident workers: processes that stay, and run stages on what they have already loaded.

A stage that starts cold imports torch and loads its models each time. Where a workflow has opened a *pool*, the stage's
command is a client of it: it sends its own command line to a worker, which runs the very same stage function, and shows
what the worker prints. Without a pool, or where the worker is lost, the command runs in its own process, to the same
bytes.

* `pool`: the folder that workers and clients of one workflow share, and who may use what in it; `opening`: what the
  workflow does with it.
* `channel`: messages between them: JSON, with a length before it, after both sides have proved that they know the
  pool's secret.
* `client`: what `python -m earl <stage>` does first. It imports nothing heavy, and neither do the two above.
* `server`: what `earl worker` does; `output`: how what it prints comes to the client.
* `team`: how a worker that is several ranks acts as one; `local_team`: ranks that a learner's worker starts and keeps.
* `jobs`: workers that are Slurm jobs; `launcher` sends stages to them that would be jobs themselves.
* `earl.residents`: what a process keeps in memory between stages.
"""

KINDS = {
    "generate": "engine",
    "score": "judge",
    "evaluate": "judge",
    "tokenise": "learner",
    "sft": "learner",
    "train": "learner",
    "prune": "learner",
}
"""Commands that workers take, and the kind of worker: each holds one kind of model, since engines, judges and learners
set process-wide switches of their own and, on GPUs, have shares of memory of their own."""

RANKS = "ranks"
"""Kind of a worker that is several ranks, and that a learner's worker has started for its own commands."""

TOGETHER = ("sft", "train")
"""Commands that all ranks of a worker run; any other its first rank runs alone."""

EVERY_ITERATION = ("generate", "score", "train")
"""Commands that a worker is worth a Slurm job of its own for: the others come once in a run."""
