"""What start-up, loading and saving cost a long run on a cluster, and how much it writes: a calculation.

    PYTHONPATH=. python benchmarks/overheads.py
    PYTHONPATH=. python benchmarks/overheads.py --set checkpoint_every=100 --set write=1e9
    PYTHONPATH=. python benchmarks/overheads.py --count runs/demo

The first prints, for 2,000 iterations of an 8B policy and a 72B judge on eight GPUs, the seconds an iteration that are
not work, by cause, and the bytes written, by stage and by segment. Everything assumed stands in `Cluster`; --set
changes it. --count prints what an iteration of a run on disk takes, by kind of file.
"""

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path

GB = 1e9
WAYS = {"stage": "every stage a job", "segment": "a segment a job"}


@dataclass(frozen=True)
class Cluster:
    """Assumptions. Seconds, bytes a second, parameters, tokens."""

    iterations: int = 2000
    gpus: int = 8
    policy_parameters: float = 8_492_011_520
    judge_parameters: float = 72e9
    episodes: int = 128
    prompt_tokens: int = 1100
    completion_tokens: int = 1060
    weight_bytes: int = 4  # `policy_dtype` float32; 2 for bfloat16, whose float32 weights are then in `trainer/`
    # Work. Rates of the whole node; the judge answers two questions an episode.
    generated_per_second: float = 15_000.0  # completion tokens, policy in vLLM
    judged_per_second: float = 8.0  # questions, 72B on four GPUs
    flops_per_gpu: float = 400e12  # what the learner reaches: 40% of an H100's bfloat16 peak
    forward_passes: float = 3.0  # of the learner: its own, recomputed layers, the reference
    # Start-up of a process, before it reads a weight.
    queue: float = 30.0  # sbatch to first instruction, nodes free
    snakemake: float = 3.0  # on the node, before a stage
    imports_learner: float = 12.0  # Python, torch, transformers from a shared file system
    imports_vllm: float = 25.0
    engine_policy: float = 60.0  # memory profiling, compilation from cache, CUDA graphs
    engine_judge: float = 120.0  # the same over four GPUs
    ranks: float = 15.0  # NCCL and FSDP2
    # Reading and writing checkpoints from and to the shared file system, all GPUs of the node together.
    read: float = 5 * GB
    write: float = 3 * GB
    hashing: float = 1.1 * GB  # SHA-256 of one rank, as measured; all ranks hash at once
    swap: float = 50 * GB  # new weights from the learner into the engine, on the GPU
    segment: int = 50  # iterations in one program, `segment_length`
    checkpoint_every: int = 25  # `segment_checkpoint_every_n_iterations`
    # Rollouts and scores of an episode: three pictures as PNG, tokens, log-probs, answers.
    episode_bytes: float = 0.5e6

    @property
    def policy(self) -> float:
        """Bytes of `policy/`."""
        return self.weight_bytes * self.policy_parameters

    @property
    def trainer(self) -> float:
        """Bytes of `trainer/`: two float32 moments, and the weights where the policy's are rounded."""
        return (8 + (4 if self.weight_bytes == 2 else 0)) * self.policy_parameters


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


def written(c: Cluster, way: str) -> float:
    """Bytes that an iteration writes: its episodes, and a checkpoint, or its share of one."""
    share = 1.0 if way == "stage" else 1 / c.checkpoint_every
    return c.episodes * c.episode_bytes + share * (c.policy + c.trainer)


def overhead(c: Cluster, way: str) -> dict[str, float]:
    """Seconds of an iteration that are not work, by cause.

    By stage each of three jobs queues, starts and loads. A segment does so once, gives its engines the new weights in
    memory, and hashes what the policy's files would be, each of its ranks a share.
    """
    judge = 2 * c.judge_parameters
    start = 2 * c.imports_vllm + c.engine_policy + c.engine_judge + c.imports_learner + c.ranks
    load = (3 * c.policy + judge + c.trainer) / c.read
    hashed = c.policy / (c.hashing * c.gpus)
    if way == "stage":
        return {
            "queue": 3 * c.queue,
            "start": start + 3 * c.snakemake,
            "load": load,
            "save": written(c, way) / c.write,
            "hash": hashed + c.trainer / (c.hashing * c.gpus),
        }
    return {
        "queue": c.queue / c.segment,
        "start": (start + c.snakemake) / c.segment,
        "load": load / c.segment + c.policy / c.swap,
        "save": written(c, way) / c.write,
        "hash": hashed + c.trainer / (c.hashing * c.gpus) / c.checkpoint_every,
    }


def report(c: Cluster) -> None:
    print("assumed: " + ", ".join(f"{f.name} = {getattr(c, f.name):g}" for f in fields(c)) + "\n")
    done = work(c)
    total = sum(done.values())
    print(f"work, seconds an iteration: {', '.join(f'{k} {v:.0f}' for k, v in done.items())}; together {total:.0f}\n")
    causes = list(overhead(c, "stage"))
    columns = [*(f"{cause}, s" for cause in causes), "not work, s", "share", "hours a run", "GB an iteration"]
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for way, name in WAYS.items():
        found = overhead(c, way)
        lost = sum(found.values())
        cells = [f"{found[cause]:.1f}" for cause in causes]
        share, hours = lost / (lost + total), c.iterations * (lost + total) / 3600
        size = written(c, way) / GB
        print(f"| {name} | {' | '.join(cells)} | {lost:.0f} | {share:.0%} | {hours:.0f} | {size:.1f} |")
    print(f"\nA segment writes {written(c, 'stage') / written(c, 'segment'):.0f} times fewer bytes.")


KINDS = ("rollouts", "scores", "train", "policy", "trainer")


def count(run: Path) -> None:
    """Print the mean bytes of an iteration's files, by kind, over the iterations of a run that have them."""
    print("| kind | iterations that have it | bytes |\n|---|---|---|")
    for kind in KINDS:
        folders = [path for path in sorted(run.glob(f"iterations/*/{kind}")) if not path.is_symlink()]
        sizes = [sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in folders]
        print(f"| {kind} | {len(sizes)} | {sum(sizes) / max(len(sizes), 1):,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another assumption")
    parser.add_argument("--count", type=Path, metavar="RUN", help="count the bytes of a run on disk instead")
    arguments = parser.parse_args()
    if arguments.count:
        count(arguments.count)
        return
    cluster = Cluster()
    types = {f.name: type(getattr(cluster, f.name)) for f in fields(cluster)}
    given = dict(text.split("=", 1) for text in arguments.set)
    report(replace(cluster, **{name: types[name](float(value)) for name, value in given.items()}))


if __name__ == "__main__":
    main()
