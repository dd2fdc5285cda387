"""Does RL teach edits? The demo over several seeds: held-out scores of the SFT policy and of the final one.

    python benchmarks/learning.py --seeds 42 43 44

Each seed runs the demo's RL (prompts, sampling) from the same SFT policy, in this process. Differences are paired by
held-out prompt, over which seeds are averaged; the intervals are 95% bootstrap intervals, see
`earl.statistics.intervals`.
"""

import argparse
import logging
import sys
from statistics import fmean

import pyarrow.parquet as pq

from earl import code_version
from earl.config import load
from earl.files.layout import Run
from earl.run import state
from earl.statistics import intervals
from tests.support import bare_loop

MEASURES = {"reward": "reward", "edit_success": "edit success", "overedit": "overedit"}


def run_seed(experiment: str, seed: int, overrides: dict) -> Run:
    """Run RL with one seed; evaluate the first and the last policy. What is on disk already is not made again."""
    config = load.load(experiment, {**overrides, "random_seed": seed, "run_name": f"learning-{seed}"}).config
    run = bare_loop.start(config)
    for index in range(state.newest_complete(run) + 1, config.num_iterations + 1):
        bare_loop.run_iteration(config, run, index)
    for index in (0, config.num_iterations):
        if not all(run.evaluation(name, index).summary.is_file() for name in config.evaluations):
            bare_loop.evaluate(config, run, index)
    return run


def rows(run: Run, name: str, index: int) -> dict[str, dict]:
    """Return the episodes of an evaluation with one sample a prompt, by example."""
    columns = ["example_id", "task", *MEASURES]
    table = pq.read_table(run.evaluation(name, index).table, columns=columns)
    return {row["example_id"]: row for row in table.to_pylist()}


def pairs(run: Run, name: str, last: int) -> list[tuple[dict, dict]]:
    """Return the episodes before and after RL on equal prompts."""
    before, after = rows(run, name, 0), rows(run, name, last)
    return [(before[key], after[key]) for key in sorted(before)]


def table(found: dict[str, list[tuple[dict, dict]]]) -> str:
    """Return a Markdown table: a line for each part, each measure before, after, and the difference."""
    lines = ["| | episodes | " + " | ".join(f"{title}, SFT -> RL | difference" for title in MEASURES.values()) + " |"]
    lines.append("|" + "---|" * (2 + 2 * len(MEASURES)))
    for part, both in found.items():
        cells = [part, str(len(both))]
        for measure in MEASURES:
            # A completion without an image has no sub-scores; nothing of the edit was done then.
            before, after = (
                intervals.mean_by_prompt((row["example_id"], row[measure] or 0.0) for row in side)
                for side in zip(*both, strict=True)
            )
            change = intervals.paired_bootstrap(before, after)
            cells.append(f"{fmean(before.values()):.2f} -> {fmean(after.values()):.2f}")
            cells.append(f"{change.mean:+.2f} [{change.low:+.2f}, {change.high:+.2f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="config/demo.jsonnet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    overrides = load.parse_overrides(arguments.set)
    found = {seed: run_seed(arguments.experiment, seed, overrides) for seed in arguments.seeds}
    config = load.read(next(iter(found.values())).config)
    print(f"{config.num_iterations} iterations of {config.episodes_per_iteration} episodes, code {code_version()}")
    for name, evaluation in config.evaluations.items():
        by_seed = {f"seed {seed}": pairs(run, name, config.num_iterations) for seed, run in found.items()}
        everything = [pair for both in by_seed.values() for pair in both]
        tasks = sorted({before["task"] for before, _ in everything})
        by_task = {task: [pair for pair in everything if pair[0]["task"] == task] for task in tasks}
        print(f"\n{name}, T = {evaluation.temperature:g}\n")
        print(table({"all": everything, **by_seed, **by_task}))


if __name__ == "__main__":
    main()
