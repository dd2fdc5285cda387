"""What start-up, loading and saving cost a long run on a cluster: a calculation, its assumptions, and a check of both.

    PYTHONPATH=. python benchmarks/overheads.py
    PYTHONPATH=. python benchmarks/overheads.py --check --cold 20.5 --resident 9.2

The first prints, for 2,000 iterations of an 8B policy and a 72B judge on eight GPUs, the seconds an iteration that are
not work, by cause, for three ways to run it. Everything assumed stands in `CLUSTER`; --set changes it. The second
applies the same formulas to the demo on this machine, with start-up measured here, and compares the difference between
cold and resident with what was measured (seconds an iteration).
"""

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace

GB = 1e9
WAYS = {
    "stage": "every stage a job, cold",
    "segment": "a window a job, stages cold",
    "resident": "a window a job, all resident",
}
REPEATS = 3


@dataclass(frozen=True)
class Cluster:
    """Assumptions. Seconds, bytes a second, parameters, tokens."""

    iterations: int = 2000
    gpus: int = 8
    policy_parameters: float = 8e9
    judge_parameters: float = 72e9
    episodes: int = 128
    prompt_tokens: int = 1100
    completion_tokens: int = 1060
    # Work. Rates of the whole node; the judge answers two questions an episode.
    generated_per_second: float = 15_000.0  # completion tokens, policy in vLLM
    judged_per_second: float = 8.0  # questions, 72B on four GPUs
    flops_per_gpu: float = 400e12  # what the learner reaches: 40% of an H100's bfloat16 peak
    forward_passes: float = 3.0  # of the learner: its own, recomputed layers, the reference
    # Start-up of a process, before it reads a weight.
    queue: float = 30.0  # sbatch to first instruction, nodes free
    imports_learner: float = 12.0  # Python, torch, transformers from a shared file system
    imports_vllm: float = 25.0
    engine_policy: float = 60.0  # memory profiling, compilation from cache, CUDA graphs
    engine_judge: float = 120.0  # the same over four GPUs
    ranks: float = 15.0  # NCCL and FSDP2
    # Reading and writing checkpoints from and to the shared file system, all GPUs of the node together.
    read: float = 5 * GB
    write: float = 3 * GB
    swap: float = 10 * GB  # new weights into a running engine, from the page cache
    window: int = 50  # iterations in one allocation, by segment


CLUSTER = Cluster()


def work(c: Cluster) -> dict[str, float]:
    """Seconds of an iteration that are work, by stage.

    A forward pass takes 2 FLOP a parameter and token, a backward pass 4 (Kaplan et al. 2020, arXiv:2001.08361); the
    reference has a forward pass alone, and recomputed layers add one.
    """
    tokens = c.episodes * (c.prompt_tokens + c.completion_tokens)
    flops = tokens * c.policy_parameters * (2 * c.forward_passes + 4)
    return {
        "generate": c.episodes * c.completion_tokens / c.generated_per_second,
        "score": 2 * c.episodes / c.judged_per_second,
        "train": flops / (c.flops_per_gpu * c.gpus),
    }


def overhead(c: Cluster, way: str) -> dict[str, float]:
    """Seconds of an iteration that are not work, by cause.

    Each of three jobs queues, or one job a window. What is cold starts and loads in every iteration, what is resident
    once a window, and an engine that stays swaps weights. The policy is written in bfloat16, the trainer's float32
    weights and two moments beside it; the frozen reference is read in bfloat16.
    """
    policy, judge, trainer = 2 * c.policy_parameters, 2 * c.judge_parameters, 12 * c.policy_parameters
    start = 2 * c.imports_vllm + c.engine_policy + c.engine_judge + c.imports_learner + c.ranks
    load, swap = (3 * policy + judge + trainer) / c.read, 0.0
    if way == "resident":
        start, load, swap = start / c.window, load / c.window, policy / c.swap
    return {
        "queue": 3 * c.queue if way == "stage" else c.queue / c.window,
        "start": start,
        "load": load + swap,
        "save": (policy + trainer) / c.write,
    }


def report(c: Cluster) -> None:
    print("assumed: " + ", ".join(f"{f.name} = {getattr(c, f.name):g}" for f in fields(c)) + "\n")
    done = work(c)
    total = sum(done.values())
    print(f"work, seconds an iteration: {', '.join(f'{k} {v:.0f}' for k, v in done.items())}; together {total:.0f}\n")
    causes = list(overhead(c, "stage"))
    columns = [*(f"{cause}, s" for cause in causes), "not work, s", "share of an iteration", "hours a run"]
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for way, name in WAYS.items():
        found = overhead(c, way)
        lost = sum(found.values())
        cells = [f"{found[cause]:.1f}" for cause in causes]
        share, hours = lost / (lost + total), c.iterations * (lost + total) / 3600
        print(f"| {name} | {' | '.join(cells)} | {lost:.0f} | {share:.0%} | {hours:.0f} |")


IMPORTS = {
    "generate": "import earl.cli, earl.stages.generate, earl.engines.torch_engine, earl.emu3.models",
    "score": "import earl.cli, earl.stages.score, earl.judges.program",
    "train": "import earl.cli, earl.stages.train, earl.emu3.models",
}
"""What a stage of the demo has loaded before it does any work."""


def check(cold: float, resident: float) -> None:
    """Compare the saving that start-up alone predicts for the demo with the one that was measured."""
    starts = {stage: seconds_of(code) for stage, code in IMPORTS.items()}
    predicted = sum(starts.values())
    print("measured here, median seconds: " + ", ".join(f"{stage} starts in {s:.2f}" for stage, s in starts.items()))
    print("models of this size load in no time, shards run side by side")
    measured = f"{cold - resident:.1f} s ({cold:g} -> {resident:g})"
    print(f"predicted saving an iteration: {predicted:.1f} s; measured: {measured}")


def seconds_of(code: str) -> float:
    taken = []
    for _ in range(REPEATS):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
        taken.append(time.monotonic() - started)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another assumption")
    parser.add_argument("--check", action="store_true", help="compare with the demo on this machine")
    parser.add_argument("--cold", type=float, help="measured seconds of the demo's iteration, cold")
    parser.add_argument("--resident", type=float, help="the same with models that stay in memory")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.cold, arguments.resident)
        return
    types = {f.name: type(getattr(CLUSTER, f.name)) for f in fields(CLUSTER)}
    given = dict(text.split("=", 1) for text in arguments.set)
    report(replace(CLUSTER, **{name: types[name](float(value)) for name, value in given.items()}))


if __name__ == "__main__":
    main()
