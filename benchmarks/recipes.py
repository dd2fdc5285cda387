"""The reference's recipe for the learner against ours, on the shapes world: held-out scores at the same episodes.

    python benchmarks/recipes.py --seeds 42 43 44 45 46

Arms differ in three things, and in nothing else (policy, prompts, episodes, learning rate, advantages divided by the
group's spread as in EARL):

* groups of equal rewards stay in the step, or are masked;
* the judge's readout is sampled, or expected;
* one optimizer step an iteration, or two, the second off-policy, with a clipped ratio to the sampler.

The world's judge is a program whose scores are exact. What a model judge would give is a *stand-in*: for an exact score
s an integer is drawn from Binomial(10, s / 10), whose mean is s, so that s itself is the expected readout
(`SampledReadout`). Held-out evaluations are scored exactly in all arms.

Resumable: what is on disk is not made again, and `--report` shows what there is. Both arms that matter most come first.
"""

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as pq

from benchmarks import learning
from earl import code_version
from earl.config import load
from earl.config.schema import Config
from earl.files import atomic
from earl.files.layout import Run
from earl.judges import Judgement, Verdict
from earl.judges.program import ProgramJudge
from earl.report import charts
from earl.run import state
from earl.stages import generate, score, train
from earl.statistics import intervals, rewards, seeds
from tests.support import bare_loop

log = logging.getLogger("recipes")


@dataclass(frozen=True)
class Arm:
    """What a recipe sets beside the experiment's own fields."""

    title: str
    sampled_readout: bool
    fields: Mapping[str, object] = field(default_factory=dict)


MASKING = {"zero_variance_groups": "mask"}
OFF_POLICY = {
    "optimizer_steps_per_iteration": 2,
    "importance_ratio": "behavior",
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.28,
}
ARMS = {
    "reference": Arm("the reference's recipe", True),
    "ours": Arm("ours: all three", False, {**MASKING, **OFF_POLICY}),
    "masking": Arm("reference + masking", True, MASKING),
    "expected": Arm("reference + expected readout", False),
    "off-policy": Arm("reference + off-policy step", True, OFF_POLICY),
}
FIRST = ("reference", "ours")
REFERENCE = "reference"
Found = dict[tuple[str, int], Run]
"""Finished runs by arm and seed."""


class SampledReadout:
    """What a sampled readout makes of exact scores: an integer 0..10 from Binomial(10, s / 10), of mean s.

    The standard deviation is sqrt(s (10 - s) / 10): 0 at both ends, 1.6 in the middle. Draws depend on the key and the
    place of the question alone. The exact scores stay in the column `raw`.
    """

    name = "program, sampled"
    model = None
    revision = None
    rubrics_digest = None

    def __init__(self, *key: int | str) -> None:
        self.key = key

    def score(self, judgements: Sequence[Judgement]) -> list[Verdict]:
        exact = ProgramJudge().score(judgements)
        return [self._drawn(verdict, place) for place, verdict in enumerate(exact)]

    def _drawn(self, verdict: Verdict, place: int) -> Verdict:
        if verdict.status != "ok":
            return verdict
        scores = {name: getattr(verdict, name) for name in (*rewards.SUB_SCORES, "ground_score")}
        generator = seeds.generator("sampled readout", *self.key, place)
        drawn = {name: float(generator.binomial(10, value / 10)) for name, value in scores.items()}
        return replace(verdict, raw=json.dumps(scores), **drawn)


def configure(experiment: str, overrides: dict, name: str, seed: int) -> Config:
    own = {"advantage": "mean_std", **ARMS[name].fields, "random_seed": seed, "run_name": f"recipes-{name}-{seed}"}
    return load.load(experiment, {**overrides, **own}).config


def run_arm(config: Config, arm: Arm, with_start: bool) -> None:
    """Train a run to its end, evaluating on the way; of the starting policy, only the first arm makes evaluations."""
    run = bare_loop.start(config)
    for index in range(config.num_iterations + 1):
        if index > state.newest_complete(run):
            run_iteration(config, run, index, arm)
        wanted = config.evaluations_at(index) if index or with_start else []
        if not all(run.evaluation(name, index).summary.is_file() for name in wanted):
            bare_loop.evaluate(config, run, index)


def run_iteration(config: Config, run: Run, index: int, arm: Arm) -> None:
    files, sampler = run.iteration(index), generate.Sampler.load(config, run.iteration(index - 1).policy)
    for shard in range(config.rollout_shards):
        generate.run(config, index, shard, sampler, files.rollouts(shard))
        judge = SampledReadout(config.random_seed, index, shard) if arm.sampled_readout else None
        score.run(config, files.rollouts(shard), files.scores(shard), judge)
    train.run(config, run.path, index)


def finished(configs: Mapping[tuple[str, int], Config]) -> Found:
    found = {}
    for key, config in configs.items():
        run = Run(Path(config.base_exp_dir) / config.run_name)
        if all(run.evaluation(name, config.num_iterations).summary.is_file() for name in config.evaluations):
            found[key] = run
    return found


# Figures


def held_out(found: Found, arm: str, seed: int, name: str, index: int) -> dict[str, dict]:
    """Episodes of an evaluation by example; the starting policy is the same in all arms."""
    return learning.rows(found[REFERENCE if index == 0 else arm, seed], name, index)


def by_prompt(rows: Sequence[Mapping[str, dict]], measure: str) -> dict:
    """Mean over seeds of a measure by prompt; a completion without an image has done nothing of the edit."""
    return intervals.mean_by_prompt(
        (example, row[measure] or 0.0) for one in rows for example, row in sorted(one.items())
    )


def own_seeds(found: Found, arm: str) -> list[int]:
    """Seeds in which both an arm and the reference are there."""
    return [seed for name, seed in sorted(found) if name == arm and (REFERENCE, seed) in found]


def training_rewards(run: Run, last: int) -> list[float]:
    """Exact mean reward of each iteration's episodes, whatever the learner was given in its place."""
    means = []
    for index in range(1, last + 1):
        found = []
        for path in sorted(run.iteration(index).scores(0).parent.glob("*.parquet")):
            for row in pq.read_table(path, columns=["status", "raw", *rewards.SUB_SCORES]).to_pylist():
                said = json.loads(row["raw"]) if row["status"] == "ok" else {}
                exact = said if "edit_success" in said else row
                found.append(rewards.viescore(exact) if row["status"] == "ok" else 0.0)
        means.append(fmean(found))
    return means


def difference(before: Mapping, after: Mapping) -> str:
    change = intervals.paired_bootstrap(before, after)
    return f"{change.mean:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"


def table(found: Found, name: str, last: int) -> str:
    """Return a Markdown table: a line an arm, after RL, against the SFT policy and against the reference."""
    against = [f"{title}, against the reference" for title in learning.MEASURES.values()]
    head = ["", "seeds", "reward, SFT -> RL", "difference", *against]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm, described in ARMS.items():
        if not (chosen := own_seeds(found, arm)):
            continue
        start, end, reference = (
            [held_out(found, which, seed, name, index) for seed in chosen]
            for which, index in ((arm, 0), (arm, last), (REFERENCE, last))
        )
        before, after = by_prompt(start, "reward"), by_prompt(end, "reward")
        means = f"{fmean(before.values()):.2f} -> {fmean(after.values()):.2f}"
        cells = [described.title, str(len(chosen)), means, difference(before, after)]
        for measure in learning.MEASURES:
            same = arm == REFERENCE
            cells.append("" if same else difference(by_prompt(reference, measure), by_prompt(end, measure)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seed_table(found: Found, name: str, last: int) -> str:
    """Return a Markdown table of the reward gained over the SFT policy, by seed."""
    every = sorted({seed for _, seed in found})
    lines = ["| reward gained, seed | " + " | ".join(map(str, every)) + " |", "|" + "---|" * (1 + len(every))]
    for arm, described in ARMS.items():
        cells = []
        for seed in every:
            if (arm, seed) not in found or (REFERENCE, seed) not in found:
                cells.append("")
                continue
            ends = [by_prompt([held_out(found, arm, seed, name, index)], "reward") for index in (0, last)]
            cells.append(f"{fmean(ends[1].values()) - fmean(ends[0].values()):+.2f}")
        if any(cells):
            lines.append(f"| {described.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def training_table(found: Found, last: int) -> str:
    """Return a Markdown table of what the learner met, means over iterations and seeds."""
    figures = {
        "zero_std_fraction": "groups of equal rewards",
        "kl": "KL to the SFT policy, last iteration",
        "entropy": "entropy, last iteration",
    }
    lines = ["| | " + " | ".join(figures.values()) + " |", "|" + "---|" * (1 + len(figures))]
    for arm, described in ARMS.items():
        metrics = [
            [json.loads(found[arm, seed].iteration(index).metrics.read_text()) for index in range(1, last + 1)]
            for seed in own_seeds(found, arm)
        ]
        if metrics:
            equal = fmean(row["zero_std_fraction"] for one in metrics for row in one)
            ends = [fmean(one[-1][key] for one in metrics) for key in ("kl", "entropy")]
            lines.append(f"| {described.title} | {equal:.0%} | " + " | ".join(f"{end:.3f}" for end in ends) + " |")
    return "\n".join(lines)


def curves(found: Found, config: Config) -> dict[str, list[charts.Line]]:
    """Mean reward over seeds by iteration: of each evaluation, and of the training episodes."""
    last, drawn = config.num_iterations, {}
    for name, evaluation in config.evaluations.items():
        indices = [index for index in range(last + 1) if name in config.evaluations_at(index)]
        drawn[f"Held-out reward, T = {evaluation.temperature:g}"] = [
            charts.line(
                described.title,
                [
                    (index, fmean(by_prompt([held_out(found, arm, s, name, index) for s in chosen], "reward").values()))
                    for index in indices
                ],
                place,
            )
            for place, (arm, described) in enumerate(ARMS.items())
            if (chosen := own_seeds(found, arm))
        ]
    drawn[f"Training reward, T = {config.temperature:g}"] = [
        charts.line(
            described.title,
            enumerate(map(fmean, zip(*(training_rewards(found[arm, s], last) for s in chosen), strict=True)), start=1),
            place,
        )
        for place, (arm, described) in enumerate(ARMS.items())
        if (chosen := own_seeds(found, arm))
    ]
    return drawn


COLOURS = ("#646b76", "#0d7468", "#c2681a", "#4a5fb0", "#95497f")
WIDTH, HEIGHT, GAP, HEAD, FOOT = 400, 260, 24, 34, 34


def picture(drawn: Mapping[str, Sequence[charts.Line]]) -> str:
    """Return one SVG file: the charts side by side, and what the colours mean."""
    width = len(drawn) * (WIDTH + GAP) + GAP
    height = HEAD + HEIGHT + FOOT
    colours = "".join(f".c{place}{{--c:{colour}}}" for place, colour in enumerate(COLOURS))
    style = (
        f"text{{font-family:sans-serif;fill:#20242b}}{colours}.grid{{stroke:#e4e1da}}.tick{{fill:#646b76;font-size:12px}}"
        ".line{stroke:var(--c);stroke-width:2;fill:none}.mark,.key{fill:var(--c)}"
    )
    parts = [f"<style>{style}</style>", f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for place, (title, lines) in enumerate(drawn.items()):
        left = GAP + place * (WIDTH + GAP)
        inner = charts.line_chart(title, lines, WIDTH, HEIGHT)
        parts.append(f'<text x="{left}" y="22" font-size="15" font-weight="600">{title}, by iteration</text>')
        parts.append(inner.replace("<svg ", f'<svg x="{left}" y="{HEAD}" width="{WIDTH}" height="{HEIGHT}" ', 1))
    left = GAP
    for line in next(iter(drawn.values())):
        parts.append(f'<rect class="key c{line.colour}" x="{left}" y="{height - 20}" width="16" height="4"/>')
        parts.append(f'<text x="{left + 22}" y="{height - 13}" font-size="13">{line.label}</text>')
        left += 50 + 7 * len(line.label)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f"{body}\n</svg>\n"
    )


def numbers(drawn: Mapping[str, Sequence[charts.Line]]) -> str:
    """Return the curves as Markdown tables, every fifth iteration."""
    tables = []
    for title, lines in drawn.items():
        shown = [place for place, x in enumerate(lines[0].x) if x % 5 == 0 or x == 1]
        text = [f"| {title}, iteration | " + " | ".join(f"{lines[0].x[place]:g}" for place in shown) + " |"]
        text.append("|" + "---|" * (1 + len(shown)))
        text += [f"| {line.label} | " + " | ".join(f"{line.y[place]:.2f}" for place in shown) + " |" for line in lines]
        tables.append("\n".join(text))
    return "\n\n".join(tables)


def report(found: Found, config: Config, out: Path) -> None:
    last = config.num_iterations
    print(f"{last} iterations of {config.episodes_per_iteration} episodes, code {code_version()}")
    for name, evaluation in config.evaluations.items():
        print(f"\n{name}, T = {evaluation.temperature:g}\n")
        print(table(found, name, last), seed_table(found, name, last), sep="\n\n")
    drawn = curves(found, config)
    print("", training_table(found, last), numbers(drawn), sep="\n\n")
    atomic.write_text(out, picture(drawn))
    print(f"\nCurves: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="config/demo.jsonnet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="`reference` is needed by all")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--report", action="store_true", help="show what is there; run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes.svg"), help="where the curves go")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    log.setLevel(logging.INFO)
    overrides = load.parse_overrides(arguments.set)
    rest = [name for name in arguments.arms if name not in FIRST]
    first = [name for name in FIRST if name in arguments.arms]
    order = [(name, seed) for names in (first, rest) for seed in arguments.seeds for name in names]
    configs = {key: configure(arguments.experiment, overrides, *key) for key in order}
    for (name, seed), config in configs.items():
        if not arguments.report:
            log.info("arm %s, seed %d", name, seed)
            run_arm(config, ARMS[name], with_start=name == REFERENCE)
    report(finished(configs), next(iter(configs.values())), arguments.out)


if __name__ == "__main__":
    main()
