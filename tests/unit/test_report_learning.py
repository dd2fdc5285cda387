"""What a report says about learning, from numbers whose meaning is known."""

import pytest

from earl.files import tables
from earl.files.layout import Run
from earl.report import learning
from earl.report.contents import Comparison
from earl.statistics.intervals import Interval


def rows(start: float, end: float, count: int = 20, **more: float) -> list[dict]:
    """Iterations whose reward goes from start to end in a line, up and down by a tenth around it."""
    values = [start + (end - start) * i / (count - 1) + (0.1 if i % 2 else -0.1) for i in range(count)]
    return [{"iteration": i + 1, "reward_mean": value, **more} for i, value in enumerate(values)]


def held_out(mean: float, low: float, high: float) -> Comparison:
    return Comparison(5.0, 5.0 + mean, Interval(mean, low, high, 100), 100)


def test_a_trend_by_hand():
    values = [{"reward_mean": value} for value in (1.0, 3.0, None, 1.0, 3.0, 2.0, 4.0, 8.0, 4.0, 8.0, 6.0)]
    found = learning.trend(values, "reward_mean")
    # Five of ten at each end: means 2 and 6, variances 1 and 4, so the error is sqrt(5 / 5).
    assert (found.before, found.after, found.error) == (2.0, 6.0, 1.0)
    assert found.is_clear
    less = [*values[:6], *({"reward_mean": row["reward_mean"] - 1.75} for row in values[6:])]
    assert not learning.trend(less, "reward_mean").is_clear, "2.25 errors"
    assert learning.trend(values[:10], "reward_mean") is None
    longer = [{"reward_mean": value} for value in (*range(6), *[100.0] * 18, *range(6))]
    assert learning.trend(longer, "reward_mean").before == 2.5, "a fifth of thirty"


def test_memory_is_called_by_its_name():
    said = learning.sentences(rows(5, 7), held_out(0.1, -0.2, 0.4), 4.3)
    assert said == [
        "Held-out rewards show no clear change: +0.10 [-0.20, +0.40].",
        "Rewards of training prompts rise (+1.62), held-out ones less, if at all: each came 4.3 times; train on more "
        "of them.",
    ]
    [_, told] = learning.sentences(rows(5, 7), held_out(-0.1, -0.4, 0.2), 1.0)
    assert "held-out ones do not; training may fit" in told


def test_an_interval_that_holds_the_rise_of_training_rewards_is_no_sign_of_memory():
    [_, told] = learning.sentences(rows(5, 7), held_out(0.9, -0.1, 1.9), 4.3)
    assert told == (
        "Rewards of training prompts rise (+1.62), held-out ones perhaps as much: evaluate on more prompts to tell."
    )


@pytest.mark.parametrize(
    ("end", "said"), [(7, "rise (+1.62)"), (3, "fall (-1.54)"), (5, "show no clear change (+0.04)")]
)
def test_without_an_evaluation_training_rewards_are_told(end, said):
    [told] = learning.sentences(rows(5, end), None, 3.0)
    assert told == f"Rewards of training prompts {said}; no evaluation compares two policies."


def test_learning_and_falling():
    assert learning.sentences(rows(5, 7), held_out(2.0, 1.5, 2.5), 1.0) == [
        "Held-out rewards rise: +2.00 [+1.50, +2.50]."
    ]
    assert len(learning.sentences(rows(5, 7), held_out(2.0, 1.5, 2.5), 3.0)) == 2
    assert "fall" in learning.sentences(rows(5, 5), held_out(-2.0, -2.5, -1.5), None)[0]
    assert learning.sentences([], None, None) == []


def test_few_held_out_prompts_are_named():
    few = Comparison(5.0, 6.0, Interval(1.0, 0.5, 1.5, 9), 9)
    assert learning.sentences([], few, None) == [
        "Held-out rewards rise: +1.00 [+0.50, +1.50]. There are 9 prompts, too few for an interval to hold."
    ]


def test_noise_equal_rewards_and_a_collapse():
    noisy = rows(5, 5, zero_std_fraction=0.6)
    for index, row in enumerate(noisy):
        row["entropy"] = 1.0 if index < 10 else 0.1
        row["gradient_cosine"] = 0.5 if index % 2 else -0.42
    # A mean of 0.04, a standard deviation of 0.46 * sqrt(20 / 19), over the root of 20.
    said = learning.sentences(noisy, held_out(0.0, -1.0, 1.0), None)[1:]
    assert "a cosine of 0.04 ± 0.11 on average: no signal" in said[0]
    assert said[1].startswith("In 60% of the groups")
    collapse = "Entropy has fallen from 1 to 0.1 nats a token while rewards do not rise, a collapse; entropy_coeff"
    assert said[2].startswith(collapse)
    clear = rows(5, 5, zero_std_fraction=0.1, entropy=1.0)
    for index, row in enumerate(clear):
        row["gradient_cosine"] = 0.3 if index % 2 else 0.1
    [_, told] = learning.sentences(clear, held_out(0.0, -1.0, 1.0), None)
    assert "a cosine of 0.20 ± 0.02 on average: 20% of what a half has in squared norm is signal" in told
    assert len(learning.sentences(clear[:9], held_out(0.0, -1.0, 1.0), None)) == 1, "too few to tell"


@pytest.mark.parametrize(("end", "change"), [(5, held_out(2.0, 1.5, 2.5)), (7, held_out(0.1, -0.2, 0.4)), (7, None)])
def test_where_rewards_rise_steps_are_not_called_without_signal_and_no_collapse_is_seen(end, change):
    found = rows(5, end)
    for index, row in enumerate(found):
        row |= {"entropy": 1.0 if index < 10 else 0.32, "gradient_cosine": 0.5 if index % 2 else -0.42}
    said = " ".join(learning.sentences(found, change, 1.0))
    assert "signal" not in said
    assert "Entropy has fallen from 1 to 0.32 nats a token; entropy_coeff" in said


def test_where_nothing_is_known_of_rewards_steps_are_not_judged_by_them():
    """As in a replay, whose metrics have none."""
    found = [{"gradient_cosine": 0.5 if index % 2 else -0.42} for index in range(20)]
    assert learning.sentences(found, None, None) == []


def test_how_often_a_prompt_came_is_counted_over_shards_and_iterations(tmp_path):
    run = Run(tmp_path)
    assert learning.repeats(run, rows(1, 2, count=2)) is None
    prompts = {1: [["a", "a", "b"], ["c"]], 2: [["a", "b"]]}
    for iteration, shards in prompts.items():
        for shard, examples in enumerate(shards):
            path = run.iteration(iteration).rollouts(shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_rollouts(path, examples)
    # Five prompts in all, three different ones: a and b twice, c once.
    assert learning.repeats(run, rows(1, 2, count=2)) == pytest.approx(5 / 3)


def write_rollouts(path, examples):
    import pyarrow as pa

    def empty(kind):
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return []
        if pa.types.is_struct(kind):
            return {field.name: empty(field.type) for field in kind}
        if pa.types.is_string(kind):
            return ""
        return b"" if pa.types.is_binary(kind) else 0

    columns = {field.name: [empty(field.type) for _ in examples] for field in tables.ROLLOUTS}
    columns |= {"dataset": ["d"] * len(examples), "example_id": examples}
    columns["episode_id"] = [str(index) for index in range(len(examples))]
    tables.write_table(path, tables.ROLLOUTS, columns, {}, 10)


def test_a_replay_counts_the_prompts_of_its_source(tmp_path):
    source, run = Run(tmp_path / "source"), Run(tmp_path / "replayed")
    for iteration in (1, 2):
        path = source.iteration(iteration).rollouts(0)
        path.parent.mkdir(parents=True)
        write_rollouts(path, ["a", "b"])
    run.path.mkdir()
    (run.path / "replay.json").write_text('{"source": "../source", "iterations": [{}, {}]}')
    assert learning.repeats(run, rows(1, 2, count=2)) == 2.0
