"""A run as a bare loop over the stage functions, in one process: what the workflow's jobs do, over the same files.

The oracle of byte-equality tests, and what benchmarks measure the workflow and segments against. Each policy is loaded
from its folder anew, as a stage would; `run_in_memory` keeps models as a segment does.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from earl.config import freeze, load, paths
from earl.config.schema import Config
from earl.execution import ranks, runtime
from earl.files import hub_names
from earl.files.layout import Run
from earl.run import curriculum, preflight, segments, state

if TYPE_CHECKING:
    from earl.judges import Judge
    from earl.stages.generate import Sampler


def make_shared(config: Config) -> None:
    """Make the data and models that runs share, as far as they are missing."""
    from earl.data import catalogue, fetch, hub_files
    from earl.emu3 import published
    from earl.shapes import dataset, policy, world
    from earl.stages import select, sft, tokenise

    for output, stage in paths.shared_stages(config).items():
        if output.exists():
            continue
        match stage.stage:
            case "raw":
                raw = config.raw_datasets[stage.name]
                mistakes = (raw.unchanged_fraction, raw.damaged_fraction)
                dataset.write_raw(output, raw.count, raw.seed, raw.tasks or world.TASKS, *mistakes)
            case "policy":
                policy.write_policy(output, seed=paths.SHAPES_POLICY_SEED)
            case "download":
                hub_files.download(hub_names.data_files(stage.name), output)
            case "fetch":
                fetch.make(catalogue.entries()[stage.name], output)
            case "convert":
                published.make(stage.conversion, output)
            case "tokenise":
                tokenise.run(config, stage.name, paths.raw_file(config, stage.name), output)
            case "select":
                select.run(config, stage.name, output)
            case "sft":
                sft.run(config, stage.name, output)


def run_iteration(config: Config, run: Run, index: int) -> None:
    """Generate, score and train iteration ``index``."""
    from earl.stages import generate, train

    sample(config, run, index, generate.Sampler.load(config, run.iteration(index - 1).policy))
    train.run(config, run.path, index)


def sample(config: Config, run: Run, index: int, sampler: "Sampler", judge: "Judge | None" = None) -> None:
    """Generate and score iteration ``index``."""
    from earl.stages import generate, rounds, score

    files, ledger = run.iteration(index), curriculum.ledger(config, run, index)
    for shard in range(config.rollout_files):
        earlier = rounds.earlier(config, files, shard // config.rollout_shards, sampler.policy_digest)
        generate.run(config, index, shard, sampler, files.rollouts(shard), earlier, ledger)
        score.run(config, files.rollouts(shard), files.scores(shard), judge)


def evaluate(config: Config, run: Run, index: int) -> None:
    """Make the evaluations of the policy of iteration ``index`` that are due."""
    from earl.stages import evaluate, generate, score

    names = config.evaluations_at(index)
    sampler = generate.Sampler.load(config, run.iteration(index).policy) if names else None
    for name in names:
        files = run.evaluation(name, index)
        generate.run_evaluation(config, name, index, sampler, files.rollouts)
        score.run(config, files.rollouts, files.scores)
        evaluate.run(config, name, index, files.rollouts, files.scores, files.table)


def start(config: Config) -> Run:
    """Make what comes before the first iteration, and return the run's files."""
    run = Run(Path(config.base_exp_dir) / config.run_name)
    preflight.check(config)
    freeze.write(config, run.config)
    make_shared(config)
    state.start(run, paths.policy_folder(config, config.model_path))
    return run


def run_all(config: Config) -> Run:
    """Run an experiment from raw data to the last evaluation and return its files."""
    run = start(config)
    for index in range(config.num_iterations + 1):
        if index:
            run_iteration(config, run, index)
        evaluate(config, run, index)
    return run


def run_in_memory(config: Config) -> Run:
    """Run the iterations of an experiment without evaluations, with models that stay in memory; return its files."""
    from earl import judges
    from earl.stages import generate, train

    run, team, judge = start(config), ranks.alone(runtime.prepare(config)), judges.get(config)
    learner = train.load(config, run, 0, team)
    sampler = generate.Sampler.load(config, run.iteration(0).policy)
    for index in range(1, config.num_iterations + 1):
        sample(config, run, index, sampler, judge)
        train.step(config, run, learner, team, checkpoint=segments.has_checkpoint(config, index, config.num_iterations))
        sampler.update(learner.weights(runtime.dtype(config.dtype)), learner.policy_digest)
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--in-memory", action="store_true", help="keep the models in memory; no evaluations")
    arguments = parser.parse_args()
    loop = run_in_memory if arguments.in_memory else run_all
    print(loop(load.load(arguments.experiment, load.parse_overrides(arguments.set)).config).path)
