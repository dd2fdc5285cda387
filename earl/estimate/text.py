"""An estimate as people read it: a page of text, or a row of a Markdown table."""

from collections.abc import Iterator, Sequence

from earl.estimate.loads import Load
from earl.estimate.rates import described
from earl.estimate.run import SPEEDLESS, Estimate, Stage

PARTS = (
    "weights",
    "moments",
    "gradients",
    "reference",
    "activations",
    "engine",
    "cache",
    "logits",
    "judge",
    "vision",
    "overhead",
)
"""Parts of a GPU's memory, in the order in which they are shown."""


def page(found: Estimate, price: float | None = None) -> str:
    """Return an estimate as text.

    Args:
        price: of a GPU for an hour, in whatever currency.
    """
    return "\n".join(line.rstrip() for line in _lines(found, price))


def _lines(found: Estimate, price: float | None) -> Iterator[str]:
    how = "by segment" if found.by_segment else "by stage"
    yield f"{found.run_name}: {found.iterations} iterations {how}"
    yield ""
    yield from _table([("stage", "ranks", "GPUs", "at most", "of", "while"), *_stage_rows(found.stages)])
    yield ""
    loads = _distinct([load for stage in found.stages for load in stage.loads])
    if loads:
        parts = [part for part in PARTS if any(load.parts.get(part) for load in loads)]
        rows = [(load.what, *(_gb(load.parts.get(part, 0)) for part in parts), _gb(load.bytes)) for load in loads]
        yield from _table([("GB of a GPU", *parts, "sum"), *rows])
        yield ""
    elif any(stage.gpus for stage in found.stages):
        yield "What a GPU holds: not known here; --profile or --gpu say which GPUs there are"
        yield f"Seconds are those of {SPEEDLESS.text}"
        yield ""
    yield from _table(list(_rest(found, price)))
    yield ""
    assumed = described(found.rates).items()
    yield f"assumed (--assume name=value): {', '.join(f'{name}={value:g}' for name, value in assumed)}"
    yield from (f"note: {note}" for note in found.notes)
    yield from (f"DOES NOT FIT: {problem}" for problem in found.problems)


def _stage_rows(stages: Sequence[Stage]) -> Iterator[tuple[str, ...]]:
    for stage in stages:
        held: tuple[str, ...] = ("?", "?", "") if stage.gpus else ("", "", "")
        if stage.loads and stage.gpu:
            fullest = max(stage.loads, key=lambda load: load.bytes)
            held = (f"{_gb(fullest.bytes)} GB", stage.gpu.text, fullest.what)
        yield (stage.rule, str(stage.ranks), str(stage.gpus), *held)


def _distinct(loads: Sequence[Load]) -> list[Load]:
    return [load for index, load in enumerate(loads) if load not in loads[:index]]


def _rest(found: Estimate, price: float | None) -> Iterator[tuple[str, str]]:
    disk, work = found.disk, found.work
    yield (
        "checkpoint",
        f"{_bytes(disk.checkpoint)} each: {disk.checkpoints} at the end, {disk.most_checkpoints} at most",
    )
    yield (
        "disk",
        f"{_bytes(disk.iteration)} an iteration beside checkpoints; {_bytes(disk.at_end)} at the end, "
        f"{_bytes(disk.needed)} at most; {_bytes(disk.written)} of checkpoints are written",
    )
    if not found.iterations:
        return
    yield (
        "iteration",
        f"{work.generated:,} tokens sampled, {work.trained:,} through the learner ({work.flops / 1e15:.1f} PFLOP), "
        f"{work.questions} questions to the judge",
    )
    if not found.seconds:
        yield "seconds", "not known on a CPU until there are iterations"
        return
    measured = f"measured in {found.measured} iterations" if found.measured else "assumed"
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in found.seconds.items() if seconds >= 0.05)
    yield "seconds", f"{sum(found.seconds.values()):.1f} an iteration: {phases} ({measured})"
    counted = "without evaluations, which take all prompts" if found.evaluated is None else "with evaluations"
    left = found.hours * max(0, found.iterations - found.done) / found.iterations
    shown = f", {left:.1f} of them left: {found.done} of {found.iterations} are complete" if found.done else ""
    yield "run", f"{found.hours:.1f} hours of iterations{shown}"
    yield "", f"{found.gpu_hours:,.0f} GPU-hours, {found.questions:,} questions to the judge, {counted}"
    if price is not None:
        yield "cost", f"{price * found.gpu_hours:,.0f} at {price:g} for a GPU and hour"


COLUMNS = (
    "experiment",
    "GPUs",
    "a GPU holds at most",
    "checkpoint",
    "disk at most",
    "seconds an iteration",
    "GPU-hours",
    "questions",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def row(found: Estimate) -> str:
    """Return an estimate as a row of the Markdown table under `HEADER`."""
    most = max((load.bytes for stage in found.stages for load in stage.loads), default=0)
    gpus = max((stage.gpus for stage in found.stages), default=0)
    fits = f"{_gb(most)} GB" + (" (does not fit)" if found.problems else "")
    cells = (
        f"`{found.run_name}`",
        str(gpus),
        fits,
        _bytes(found.disk.checkpoint),
        _bytes(found.disk.needed),
        f"{sum(found.seconds.values()):.0f}",
        f"{found.gpu_hours:,.0f}",
        f"{found.questions:,}",
    )
    return f"| {' | '.join(cells)} |"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for each in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(each, widths, strict=True))


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f}"


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
