"""Which prompts a curriculum passes over: the ledger by hand, and the draws."""

from pathlib import Path

import pytest

from earl.config.sections import Curriculum
from earl.emu3 import sequence
from earl.files import tables
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.run import curriculum
from earl.run.curriculum import Ledger
from earl.stages import present, prompts
from tests.support.prompt_files import VOCABULARY, config, write

REST = {"rest_iterations": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "pairs.parquet", (3, 7))


def trained(run: Run, index: int, groups: dict[str, list[float | None]], **columns: list) -> None:
    """Write the episodes of an iteration: rewards by prompt, in groups of their order."""
    rows = [(number, name, reward) for number, (name, all_) in enumerate(groups.items()) for reward in all_]
    table = {
        "episode_id": [f"{index:06d}-{place:04d}" for place in range(len(rows))],
        "group_id": [f"{index:06d}-{number:04d}" for number, *_ in rows],
        "reward": [reward for *_, reward in rows],
        "advantage": [0.0] * len(rows),
        "used": [True] * len(rows),
        "reason": [None] * len(rows),
        "viescore": [None] * len(rows),
        "completion_tokens": [1] * len(rows),
        "prompt_digest": [name for _, name, _ in rows],
    }
    tables.write_table(run.iteration(index).episodes, tables.EPISODES, table | columns, {})


def resting(run: Run, iteration: int, data: Path, **fields: object) -> set[str]:
    return set(curriculum.ledger(config(data, curriculum=REST | fields), run, iteration).resting)


def test_the_last_group_of_a_prompt_decides_as_long_as_it_is_recent(tmp_path, data):
    run = Run(tmp_path / "run")
    trained(run, 1, {"solved": [10, 10], "mixed": [10, 0], "hopeless": [0, 0], "better": [0, 0]})
    trained(run, 2, {"better": [0, 5], "worse": [10, 10]})
    trained(run, 3, {"fresh": [1, 2]})
    assert resting(run, 1, data) == set()
    assert resting(run, 2, data) == {"solved", "hopeless", "better"}
    assert resting(run, 3, data) == {"solved", "hopeless", "worse"}
    assert resting(run, 4, data) == {"worse"}, "iteration 1 was more than two before"
    assert resting(run, 4, data, rest_iterations=3) == {"solved", "hopeless", "worse"}
    assert curriculum.ledger(config(data), run, 3) is None


def test_failed_judgements_say_nothing_of_a_prompt(tmp_path, data):
    run = Run(tmp_path / "run")
    trained(run, 1, {"one judged": [3, None], "none": [None, None], "two": [3, None, 3]})
    assert resting(run, 2, data) == {"two"}


def test_what_has_an_advantage_is_of_use_though_the_rewards_are_alike(tmp_path, data):
    """As with `advantage_components`; and what was not used has none, though its rewards differ."""
    run = Run(tmp_path / "run")
    trained(run, 1, {"components": [5, 5], "surplus": [0, 10]}, advantage=[1.0, -1.0, None, None])
    assert resting(run, 2, data) == set()


def test_a_prompt_that_was_drawn_by_two_names_rests_where_both_groups_were_of_no_use(tmp_path, data):
    run = Run(tmp_path / "run")
    names = ["a", "a", "a", "a", "b", "b", "b", "b"]
    trained(run, 1, {"1": [5, 5], "2": [0, 9], "3": [5, 5], "4": [1, 1]}, prompt_digest=names)
    assert resting(run, 2, data) == {"b"}


@pytest.mark.parametrize(
    ("band", "expected"),
    [
        ({}, {"alike"}),
        ({"minimum_mean_reward": 2}, {"alike", "hard"}),
        ({"maximum_mean_reward": 8.5}, {"alike", "easy"}),
        ({"minimum_mean_reward": 1.5, "maximum_mean_reward": 9}, {"alike"}),
    ],
)
def test_a_band_of_mean_rewards(tmp_path, data, band, expected):
    run = Run(tmp_path / "run")
    trained(run, 1, {"alike": [5, 5], "hard": [0, 3], "easy": [8, 10], "failed": [None, None]})
    assert resting(run, 2, data, **band) == expected


def test_a_band_without_room_is_refused():
    with pytest.raises(ValueError, match=r"minimum_mean_reward|is 8.*above maximum_mean_reward"):
        Curriculum(rest_iterations=1, minimum_mean_reward=8, maximum_mean_reward=2)


def test_an_iteration_that_is_not_there_is_named_also_by_the_plan(tmp_path, data):
    run = Run(tmp_path / "run")
    trained(run, 1, {"a": [1, 2]})
    trained(run, 3, {"a": [1, 2]})
    missing = r"000002/train/episodes\.parquet: is missing, .*earl rewind --run .*run --iteration 2"
    whole = config(data, curriculum=REST)
    with pytest.raises(EarlError, match=missing):
        curriculum.ledger(whole, run, 3)
    with pytest.raises(EarlError, match=missing):
        curriculum.check(whole, run, 4, 3)
    curriculum.check(config(data), run, 4, 3)
    trained(run, 4, {"a": [1, 2]})
    curriculum.check(whole, run, 5, 4)
    # What comes after a checkpoint is trained again; but where it gives the policy on record, its files stay.
    curriculum.check(whole, run, 2, 4)
    run.iteration(2).metrics.parent.mkdir(parents=True)
    run.iteration(2).metrics.write_text("{}")
    with pytest.raises(EarlError, match=missing):
        curriculum.check(whole, run, 2, 4)


def test_the_digest_is_that_of_the_set():
    one, same, other = (Ledger(frozenset(names)) for names in (["a", "b"], ["b", "a"], ["ab"]))
    assert one.digest == same.digest != other.digest


# Draws


def ledger_of(examples, whole) -> Ledger:
    ids = (sequence.prompt_ids(e.original_tokens, e.instruction, whole.assistant_prefill, VOCABULARY) for e in examples)
    return Ledger(frozenset(sequence.digest(prompt) for prompt in ids))


def names(drawn: prompts.Drawn) -> list[str]:
    return [example.example_id for _, example in drawn.examples]


def test_resting_prompts_make_way_for_the_next_draws_in_any_shards(data):
    whole = config(data, curriculum=REST)
    # All 38 that are not too long, in the order of the draws; 16 are wanted.
    plain = config(data, episodes_per_iteration=76)
    order = [example for _, example in prompts.of_iteration(plain, 2, VOCABULARY, range(38)).examples]
    ledger = ledger_of([order[i] for i in (0, 5, 6, 30)], whole)
    expected = [order[i].example_id for i in range(19) if i not in (0, 5, 6)]
    found = prompts.of_iteration(whole, 2, VOCABULARY, range(16), ledger)
    assert names(found) == expected
    assert found.passed_over == 3
    parts = [prompts.of_iteration(whole, 2, VOCABULARY, part, ledger) for part in (range(7), range(7, 16))]
    assert [index for part in parts for index, _ in part.examples] == list(range(16))
    assert [name for part in parts for name in names(part)] == expected
    assert {(part.passed_over, part.left_out) for part in parts} == {(3, found.left_out)}


def test_where_too_few_are_left_those_passed_over_come_back_in_their_order(data):
    whole, plain = config(data, curriculum=REST), config(data, episodes_per_iteration=76)
    order = [example for _, example in prompts.of_iteration(plain, 2, VOCABULARY, range(38)).examples]
    awake = (4, 9, 37)
    ledger = ledger_of([example for i, example in enumerate(order) if i not in awake], whole)
    found = prompts.of_iteration(whole, 2, VOCABULARY, range(16), ledger)
    back = [i for i in range(38) if i not in awake][:13]
    assert names(found) == [order[i].example_id for i in (*awake, *back)]
    assert found.passed_over == 35 - 13
    everything = prompts.of_iteration(whole, 2, VOCABULARY, range(16), ledger_of(order, whole))
    assert names(everything) == [example.example_id for example in order[:16]], "as if none rested"


def test_without_what_rests_a_curriculum_draws_as_ever(data):
    whole = config(data, curriculum=REST)
    assert names(prompts.of_iteration(whole, 3, VOCABULARY, range(16), Ledger(frozenset()))) == names(
        prompts.of_iteration(config(data), 3, VOCABULARY, range(16))
    )


def test_a_curriculum_without_its_ledger_samples_nothing(data):
    with pytest.raises(ValueError, match="ledger"):
        prompts.of_iteration(config(data, curriculum=REST), 2, VOCABULARY, range(16))


def test_rollouts_by_another_ledger_are_not_present(tmp_path, data, monkeypatch):
    whole = config(data, curriculum=REST)
    iteration, ledger = Run(tmp_path / "run").iteration(2), Ledger(frozenset(["a"]))
    columns: dict[str, list] = {name: [] for name in tables.ROLLOUTS.names}
    metadata = {"policy_digest": "p", tables.LEDGER: ledger.digest}
    tables.write_table(iteration.rollouts(0), tables.ROLLOUTS, columns, metadata)
    monkeypatch.setattr(present, "wanted", lambda *_: range(0))  # The groups of a file without rows.
    ledgers = (ledger, Ledger(frozenset()), None)
    found = [present.rollouts(whole, iteration, 0, "p", ledger=each) for each in ledgers]
    assert found == [True, False, False]
