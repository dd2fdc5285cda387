"""Fields whose effect lies beyond a run's last iteration: no mistake, since a run may be continued, but told."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from earl.config.schema import Config


def unreached(config: "Config") -> Iterator[tuple[str, str]]:
    """Yield a field's dotted name and what it will not do by the end of the run."""
    rest = config.curriculum and config.curriculum.rest_iterations
    refresh = config.reference_refresh_iterations
    # Field, value, how many iterations more it takes until it has its effect, what it does not do before.
    needed = [
        ("warmup_iterations", config.warmup_iterations, 0, "the learning rate does not reach its peak"),
        ("schedule_iterations", config.schedule_iterations, 0, "the learning rate does not reach its final value"),
        ("reference_refresh_iterations", refresh, 1, "the reference stays the starting policy"),
        ("curriculum.rest_iterations", rest, 2, "no prompt that rests comes back before the others are used up"),
    ]
    last = config.num_iterations
    for field, value, more, effect in needed if last else ():
        if value and value + more > last:
            yield field, f"is {value}, but num_iterations is {last}: {effect}"


def without_rate(config: "Config") -> Iterator[tuple[str, str]]:
    """Yield what is wrong where iterations come after the learning rate has fallen to 0."""
    last, end = config.num_iterations, config.schedule_iterations
    if end is not None and last > end and not config.final_learning_rate:
        yield (
            "num_iterations",
            f"is {last}, but the learning rate is 0 from iteration {end + 1} on (schedule_iterations, "
            "final_learning_rate), where nothing is learned; lower it, or raise one of these two",
        )
