"""The reference's recipe for the learner, the demo's, and other ways to learn: held-out scores at the same episodes.

    PYTHONPATH=. python benchmarks/recipes.py --seeds 42 43 44 45 46

Every arm starts from the demo's SFT policy and differs from the reference's in what `ARMS` says, in nothing else
(prompts, episodes, learning rate). Three arms do no RL of their own: from the reference's run of their seed, two are
fine-tuned on its episodes, on the best of each group, or by DPO on the best and the worst, and one is the exponential
moving average (EMA) of its policies.

The world's judge is a program whose scores are exact. What a model judge would give is a *stand-in*: for an exact score
s an integer is drawn from Binomial(10, s / 10), whose mean is s, so that s itself is the expected readout
(`SampledReadout`). Held-out evaluations are scored exactly in all arms.

Intervals are over seeds and prompts, see `earl.statistics.intervals.over_seeds_and_prompts`; CPU seconds are those of
training, with sampling and scoring, without evaluations. Resumable: what is on disk is not made again, and `--report`
shows what there is. The arms that matter most come first.
"""

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow.parquet as pq
from safetensors.torch import save_file

from benchmarks import learning
from earl import code_version
from earl.config import load
from earl.config.schema import Config
from earl.emu3 import checkpoint
from earl.files import atomic, manifest, objects
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
    """What a recipe sets beside the reference's fields."""

    title: str
    sampled_readout: bool = True
    fields: Mapping[str, object] = field(default_factory=dict)
    fine_tuning: Mapping[str, object] | None = None
    """In place of RL, of a fine-tuning on the reference's episodes: what it sets beside the demo's own."""
    average: float | None = None
    """In place of RL, of an EMA of the reference's policies, one an iteration: its decay."""

    @property
    def does_rl(self) -> bool:
        return self.fine_tuning is None and self.average is None


REFERENCE_FIELDS = {"advantage": "mean_std", "temperature": 1.0, "kl_coeff": 0.0003}
OFF_POLICY = {
    "optimizer_steps_per_iteration": 2,
    "importance_ratio": "behavior",
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.28,
}
ARMS = {
    "reference": Arm("the reference's recipe"),
    "exact": Arm("the demo's: exact readout", False),
    "best-of-n": Arm("best-of-n", fine_tuning={"steps": 250}),
    "dpo": Arm("DPO", fine_tuning={"steps": 150, "objective": "dpo", "dpo_beta": 0.1, "learning_rate": 5e-5}),
    "ema": Arm("reference + EMA, decay 0.8", average=0.8),
    "undivided": Arm("the demo's + advantages not divided", False, {"advantage": "mean"}),
    "cooler": Arm("the demo's + T = 0.6, kl 0.025", False, {"temperature": 0.6, "kl_coeff": 0.025}),
    "masking": Arm("the demo's + masking", False, {"zero_variance_groups": "mask"}),
    "off-policy": Arm("the demo's + a second, off-policy step", False, OFF_POLICY),
}
FIRST = ("reference", "exact", "best-of-n", "dpo", "ema")
REFERENCE = "reference"
CPU_SECONDS = "cpu_seconds.json"
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
    arm = ARMS[name]
    own = {**REFERENCE_FIELDS, **arm.fields, "random_seed": seed, "run_name": f"recipes-{name}-{seed}"}
    config = load.load(experiment, overrides).config
    if arm.average is not None:
        own |= {"num_iterations": 0, "model_path": f"{config.base_exp_dir}/{own['run_name']}-policy"}
    if arm.fine_tuning is not None:
        (start,) = config.sft
        learns = {"base_model": config.model_path, "train_paths_file": ["stage:select/episodes"], "random_seed": seed}
        learns = config.sft[start].model_dump(exclude_unset=True) | learns | arm.fine_tuning
        own |= {
            "num_iterations": 0,
            "selections.episodes": {"run": str(reference_run(config, seed))},
            "sft.tuned": learns,
            "model_path": "stage:sft/tuned",
        }
    return load.load(experiment, {**overrides, **own}).config


def reference_run(config: Config, seed: int) -> Path:
    return Path(config.base_exp_dir) / f"recipes-{REFERENCE}-{seed}"


def run_arm(config: Config, arm: Arm, with_start: bool) -> None:
    """Train a run to its end, evaluating on the way; of the starting policy, only the first arm makes evaluations."""
    began = time.process_time()
    if arm.average is not None:
        source = Run(reference_run(config, config.random_seed))
        write_average(source, state.newest_complete(source), arm.average, Path(config.model_path))
    run = bare_loop.start(config)
    spent = 0.0 if arm.does_rl else time.process_time() - began
    for index in range(config.num_iterations + 1):
        if index > state.newest_complete(run):
            began = time.process_time()
            run_iteration(config, run, index, arm)
            spent += time.process_time() - began
        due = index > 0 or with_start or not arm.does_rl
        wanted = config.evaluations_at(index) if due else []
        if not all(run.evaluation(name, index).summary.is_file() for name in wanted):
            bare_loop.evaluate(config, run, index)
    seconds = run.path / CPU_SECONDS
    spent += objects.read(seconds)["seconds"] if seconds.is_file() else 0.0
    objects.write(seconds, {"seconds": spent})


def write_average(source: Run, last: int, decay: float, out: Path) -> None:
    """Write the EMA of a run's policies, from the starting one to that of iteration ``last``, as a policy folder."""
    folders = [source.iteration(index).policy for index in range(last + 1)]
    average = {name: weight for _, name, weight in checkpoint.weights(folders[0])}
    for folder in folders[1:]:
        for _, name, weight in checkpoint.weights(folder):
            average[name].lerp_(weight, 1 - decay)
    shutil.copytree(folders[0], out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(manifest.NAME))
    save_file(average, out / "model.safetensors", {"format": "pt"})


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


def held_out(found: Found, arm: str, of_seeds: Sequence[int], name: str, index: int, measure: str) -> np.ndarray:
    """Return a measure of an evaluation, [seeds, prompts]; the starting policy is the same in all arms.

    A completion without an image has done nothing of the edit.
    """
    at = index if ARMS[arm].does_rl else 0
    runs = [found[REFERENCE if index == 0 else arm, seed] for seed in of_seeds]
    rows = [learning.rows(run, name, at) for run in runs]
    return np.array([[one[example][measure] or 0.0 for example in sorted(rows[0])] for one in rows])


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


def text(interval: intervals.Interval, sign: str = "+") -> str:
    return f"{interval.mean:{sign}.2f} [{interval.low:{sign}.2f}, {interval.high:{sign}.2f}]"


def table(found: Found, name: str, last: int) -> str:
    """Return a Markdown table: a line an arm, after training, against the SFT policy and against the reference."""
    against = [f"{title}, against the reference" for title in learning.MEASURES.values()]
    head = ["", "seeds", "reward, SFT -> end", "gain", "gain by the reference's", *against, "CPU s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm, described in ARMS.items():
        if not (chosen := own_seeds(found, arm)):
            continue
        at = {
            (which, measure): held_out(found, which, chosen, name, last, measure)
            for which in (arm, REFERENCE)
            for measure in learning.MEASURES
        }
        start = held_out(found, arm, chosen, name, 0, "reward")
        gain, usual = at[arm, "reward"] - start, at[REFERENCE, "reward"] - start
        cells = [described.title, str(len(chosen)), f"{start.mean():.2f} -> {at[arm, 'reward'].mean():.2f}"]
        cells += [text(intervals.over_seeds_and_prompts(gain))]
        if arm == REFERENCE:
            cells += [""] * (1 + len(learning.MEASURES))
        else:
            cells.append(text(intervals.ratio(gain, usual), ""))
            cells += [
                text(intervals.over_seeds_and_prompts(at[arm, one] - at[REFERENCE, one])) for one in learning.MEASURES
            ]
        spent = [objects.read(found[arm, seed].path / CPU_SECONDS)["seconds"] for seed in chosen]
        lines.append("| " + " | ".join([*cells, f"{fmean(spent):.0f}"]) + " |")
    return "\n".join(lines)


def seed_table(found: Found, name: str, last: int) -> str:
    """Return a Markdown table of the reward gained over the SFT policy, by seed."""
    every = sorted({seed for _, seed in found})
    lines = ["| reward gained, seed | " + " | ".join(map(str, every)) + " |", "|" + "---|" * (1 + len(every))]
    for arm, described in ARMS.items():
        gains = {
            seed: np.subtract(*(held_out(found, arm, [seed], name, index, "reward").mean() for index in (last, 0)))
            for seed in own_seeds(found, arm)
        }
        if gains:
            cells = [f"{gains[seed]:+.2f}" if seed in gains else "" for seed in every]
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
    for arm, described in rl_arms(found).items():
        metrics = [
            [json.loads(found[arm, seed].iteration(index).metrics.read_text()) for index in range(1, last + 1)]
            for seed in own_seeds(found, arm)
        ]
        equal = fmean(row["zero_std_fraction"] for one in metrics for row in one)
        ends = [fmean(one[-1][key] for one in metrics) for key in ("kl", "entropy")]
        lines.append(f"| {described.title} | {equal:.0%} | " + " | ".join(f"{end:.3f}" for end in ends) + " |")
    return "\n".join(lines)


def rl_arms(found: Found) -> dict[str, Arm]:
    return {name: arm for name, arm in ARMS.items() if arm.does_rl and own_seeds(found, name)}


def curves(found: Found, config: Config) -> dict[str, list[charts.Line]]:
    """Mean reward over seeds by iteration of RL: of each evaluation, and of the training episodes."""
    last, arms, drawn = config.num_iterations, rl_arms(found), {}
    for name, evaluation in config.evaluations.items():
        indices = [index for index in range(last + 1) if name in config.evaluations_at(index)]
        drawn[f"Held-out reward, T = {evaluation.temperature:g}"] = [
            charts.line(
                arm.title,
                [(i, held_out(found, key, own_seeds(found, key), name, i, "reward").mean()) for i in indices],
                place,
            )
            for place, (key, arm) in enumerate(arms.items())
        ]
    drawn["Training reward"] = [
        charts.line(
            arm.title,
            enumerate(
                map(fmean, zip(*(training_rewards(found[key, s], last) for s in own_seeds(found, key)), strict=True)),
                start=1,
            ),
            place,
        )
        for place, (key, arm) in enumerate(arms.items())
    ]
    return drawn


COLOURS = ("#646b76", "#0d7468", "#c2681a", "#4a5fb0", "#95497f", "#a8324a", "#7a7a1e")
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
    report(finished(configs), configs[REFERENCE, arguments.seeds[0]], arguments.out)


if __name__ == "__main__":
    main()
