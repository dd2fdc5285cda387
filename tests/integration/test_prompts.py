"""Which prompts are sampled: what is too long is left out as a function of the data alone, or stops before it costs."""

from pathlib import Path

import pytest

from earl.config import freeze
from earl.config.schema import Config
from earl.data import mixing
from earl.emu3 import sequence
from earl.files import tables
from earl.messages.errors import EarlError
from earl.stages import prompts
from tests.support.prompt_files import ROWS, VOCABULARY, config, write

LONG = (3, 7, 8, 21, 30)
"""Rows whose instruction is long."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "pairs.parquet", LONG)


def drawn(config: Config, iteration: int, wanted: range = range(16)) -> dict[int, str]:
    found = prompts.of_iteration(config, iteration, VOCABULARY, wanted)
    return {index: example.example_id for index, example in found.examples}


def test_what_is_too_long_is_left_out_and_counted(data: Path) -> None:
    whole = config(data)
    for iteration in (1, 2, 3):
        # By hand: the draws of the iteration in their order, without the long ones.
        order = [row for _, row in mixing.draws(mixing.mixture([ROWS], [], 42), 42, iteration)]
        kept = [row for row in order if row not in LONG][:16]
        passed = [row for row in order[: order.index(kept[-1])] if row in LONG]
        assert drawn(whole, iteration) == {index: f"e{row}" for index, row in enumerate(kept)}
        assert prompts.of_iteration(whole, iteration, VOCABULARY, range(16)).left_out == len(passed)


def test_it_is_the_same_for_any_shards(data: Path) -> None:
    whole = config(data)
    shards = [range(5), range(5, 6), range(6, 16)]
    parts = [prompts.of_iteration(whole, 2, VOCABULARY, shard) for shard in shards]
    assert [index for part in parts for index, _ in part.examples] == list(range(16))
    assert {i: e.example_id for part in parts for i, e in part.examples} == drawn(whole, 2)
    assert {part.left_out for part in parts} == {prompts.of_iteration(whole, 2, VOCABULARY, range(16)).left_out}


def test_where_nothing_is_too_long_draws_are_as_ever(data: Path) -> None:
    free = config(data, max_prompt_len=None)
    order = mixing.prompts(mixing.mixture([ROWS], [], 42), 42, 5, 16)
    assert list(drawn(free, 5).values()) == [f"e{row}" for _, row in order]


def test_stop_looks_at_all_prompts_before_anything_is_sampled(tmp_path: Path, data: Path) -> None:
    strict = config(data, long_prompts="stop")
    with pytest.raises(EarlError) as caught:
        drawn(strict, 1)
    message = str(caught.value)
    assert (
        "field train_paths_file: 5 of 40 prompts are too long; first dataset 'd', example 'e3': the prompt" in message
    )
    assert "long_prompts" in message
    # Also where iteration 1 does not draw it.
    order = [row for _, row in mixing.draws(mixing.mixture([ROWS], [], 42), 42, 1)]
    one = config(write(tmp_path / "one.parquet", (order[-1],)), long_prompts="stop")
    with pytest.raises(EarlError, match=f"1 of 40 prompts are too long; first dataset 'd', example 'e{order[-1]}'"):
        drawn(one, 1)
    assert len(drawn(config(write(tmp_path / "none.parquet", ()), long_prompts="stop"), 1)) == 16


def test_too_few_that_are_not_too_long(data: Path) -> None:
    with pytest.raises(EarlError, match=r"field train_paths_file: 40 of 40 different prompts are too long, so 16"):
        drawn(config(data, max_prompt_len=10), 1)


def test_an_image_that_no_completion_has_room_for(data: Path) -> None:
    # img, two rows of three and their ends, eof, eoi, eos: 1 + 2 * 4 + 3.
    assert len(drawn(config(data, max_response_tokens=12), 1)) == 16
    with pytest.raises(EarlError, match="an image of its size takes 12 tokens, but max_response_tokens is 11"):
        drawn(config(data, max_response_tokens=11), 1)
    assert len(drawn(config(data, max_response_tokens=11, emu3_use_logit_processor=False), 1)) == 16


def test_an_evaluation_leaves_none_out(data: Path) -> None:
    for fields, field in (({}, "val_paths_file"), ({"paths_file": [str(data)]}, "evaluations.e.paths_file")):
        one = config(data, evaluations={"e": {"prompts": None, **fields}})
        with pytest.raises(EarlError) as caught:
            prompts.of_evaluation(one, "e", VOCABULARY)
        assert f"evaluation 'e', field {field}: 5 of 40 prompts are too long, and an evaluation leaves none out" in str(
            caught.value
        )
        loose = one.model_copy(update={"max_prompt_len": None})
        assert len(prompts.of_evaluation(loose, "e", VOCABULARY).examples) == 40


def test_the_field_of_the_held_out_data_is_named(data: Path) -> None:
    one = config(data, max_prompt_len=None, evaluations={"e": {"prompts": 41}})
    with pytest.raises(EarlError, match="evaluation 'e', field val_paths_file: there are 40 different rows, but 41"):
        prompts.of_evaluation(one, "e", VOCABULARY)


def test_the_length_is_that_of_what_is_sampled(data: Path) -> None:
    whole = config(data, max_prompt_len=None)
    (_, example), *_ = prompts.of_iteration(whole, 1, VOCABULARY, range(16)).examples
    ids = sequence.prompt_ids(example.original_tokens, example.instruction, whole.assistant_prefill, VOCABULARY)
    exact = {"max_prompt_len": len(ids)}
    assert prompts.too_long(example, config(data, **exact), whole.assistant_prefill, VOCABULARY) is None
    # The shortest completion has 12 tokens; longer ones end where the context does.
    context = {"max_prompt_len": None, "model_context_size": len(ids) + 12, "max_response_tokens": 13}
    assert prompts.too_long(example, config(data, **context), whole.assistant_prefill, VOCABULARY) is None
    free = context | {"emu3_use_logit_processor": False, "model_context_size": len(ids) + 1}
    assert prompts.too_long(example, config(data, **free), whole.assistant_prefill, VOCABULARY) is None
    for fields, limit in (
        ({"max_prompt_len": len(ids) - 1}, f", but max_prompt_len is {len(ids) - 1}"),
        (
            context | {"model_context_size": len(ids) + 11},
            f" and its shortest completion 12, but model_context_size is {len(ids) + 11}",
        ),
        (
            free | {"model_context_size": len(ids)},
            f" and its shortest completion 1, but model_context_size is {len(ids)}",
        ),
    ):
        reason = prompts.too_long(example, config(data, **fields), whole.assistant_prefill, VOCABULARY)
        assert reason == f"the prompt has {len(ids)} tokens{limit}"


def test_a_prompt_of_the_papers_size_fits_a_context_of_3000(tmp_path: Path) -> None:
    """Two images of 32 x 32: about 1,074 tokens of prompt leave 1,926, where max_response_tokens is 2,048."""
    columns: dict[str, list] = {name: [None] for name in tables.TOKENISED.names}
    columns |= {"dataset": ["d"], "example_id": ["e"], "instruction": ["edit"]}
    columns["original_tokens"] = [{"height": 32, "width": 32, "ids": bytes(32 * 32)}]
    path = tmp_path / "one.parquet"
    tables.write_table(path, tables.TOKENISED, columns, {"dataset": "d"})
    fields = {"episodes_per_iteration": 2, "max_prompt_len": None, "max_response_tokens": 2048}
    assert (
        len(prompts.of_iteration(config(path, **fields, model_context_size=3000), 1, VOCABULARY, range(1)).examples)
        == 1
    )
    with pytest.raises(EarlError, match=r"1 of 1 different prompts are too long.* shortest completion 1060"):
        prompts.of_iteration(config(path, **fields, model_context_size=2100), 1, VOCABULARY, range(1))


def test_an_evaluation_has_its_own_prefill(data: Path) -> None:
    """Its length counts, and results under one name keep it."""
    fields = {"max_prompt_len": None, "evaluations": {"e": {"prompts": 8, "assistant_prefill": "edit " * 200}}}
    one = config(data, **fields, model_context_size=200, max_response_tokens=100)
    with pytest.raises(EarlError, match="8 of 8 prompts are too long"):
        prompts.of_evaluation(one, "e", VOCABULARY)
    assert len(prompts.of_iteration(one, 1, VOCABULARY, range(16)).examples) == 16
    assert freeze.sampling(one, "e")["assistant_prefill"] == "edit " * 200
    none = config(data, evaluations={"e": {"prompts": 8}})
    assert freeze.sampling(none, "e")["assistant_prefill"] == "<|image start|>"
