"""Which prompts an iteration or an evaluation samples, and what becomes of those that are too long.

What is left out is a function of the data and the configuration alone: whoever draws an iteration's prompts, for
whichever shard, passes over the same ones and takes the next draws in their place.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from earl.config import paths
from earl.data import mixing
from earl.data.example import Dataset
from earl.data.mixing import Row
from earl.data.tokenised import Example, open_dataset
from earl.emu3 import grid, sequence
from earl.emu3.vocabulary import Vocabulary
from earl.messages.errors import EarlError
from earl.run.curriculum import Ledger

if TYPE_CHECKING:
    from earl.config.schema import Config

log = logging.getLogger(__name__)

_REMEDY = "raise the limit, or take such examples out of the data"
_STOP = f"{_REMEDY}, or set long_prompts, which is `stop`, to `leave_out`"


@dataclass(frozen=True)
class Drawn:
    """Prompts to sample."""

    examples: list[tuple[int, Example]]
    """Index of each prompt within the iteration, and its example."""
    left_out: int = 0
    """Prompts that were passed over since they are too long, of all that were drawn: an iteration's up to the round."""
    passed_over: int = 0
    """Those that were passed over since they rest."""


def of_iteration(
    config: "Config", iteration: int, vocabulary: Vocabulary, wanted: range, ledger: Ledger | None = None
) -> Drawn:
    """Draw the prompts of an iteration up to the round of those whose index is ``wanted``, and read these.

    Args:
        ledger: What rests in the iteration, where the configuration has a curriculum.

    Raises:
        EarlError: a data set is missing or damaged; there are too few prompts, or too few that are not too long; one is
            too long and `long_prompts` is `stop`.
    """
    if (ledger is None) != (config.curriculum is None):
        raise ValueError("a ledger belongs to a curriculum")
    data = paths.training_data(config)
    count = next(one.stop for one in map(config.prompts_of_round, range(config.rounds)) if wanted.stop <= one.stop)
    with data.named():
        datasets = _open(config, data, vocabulary)
        mixture = mixing.mixture([len(dataset) for dataset in datasets], data.coefficients, config.random_seed)
        mixing.check_rows(mixture.distinct, count)
        # Shards look at all prompts of the iteration, but at the images of their own alone.
        texts = datasets if len(wanted) == count else _open(config, data, vocabulary, images=False)
        if config.long_prompts == "stop" and iteration == 1 and wanted.start == 0:
            _check_all(config, texts, mixture, vocabulary)
        kept, left_out, resting = [], [], []
        draws = mixing.draws(mixture, config.random_seed, iteration)
        if ledger is not None and ledger.resting:
            draws = _resting_last(draws, partial(_rests, config, vocabulary, ledger, texts), resting)
        for dataset, row in draws:
            example = texts[dataset][row]
            reason = too_long(example, config, config.assistant_prefill, vocabulary)
            if reason is None:
                index = len(kept)
                kept.append(example if texts is datasets or index not in wanted else datasets[dataset][row])
            elif config.long_prompts == "stop":
                raise EarlError(f"{_name(example)}: {reason}; {_STOP}")
            else:
                left_out.append(f"{_name(example)}: {reason}")
            if len(kept) == count:
                break
        if left_out:
            log.warning(
                "generate: iteration %d leaves out %d prompts that are too long, first %s",
                *(iteration, len(left_out), left_out[0]),
            )
        if len(kept) < count:
            raise EarlError(
                f"{len(left_out)} of {mixture.distinct} different prompts are too long, so {count} cannot be drawn; "
                f"first {left_out[0]}; {_REMEDY}"
            )
    return Drawn([(index, kept[index]) for index in wanted], len(left_out), len(resting))


def _resting_last(draws: Iterator[Row], rests: Callable[[Row], bool], passed_over: list[Row]) -> Iterator[Row]:
    """Yield the draws that do not rest, then those that do; ``passed_over`` holds those that have been left behind."""
    for draw in draws:
        if rests(draw):
            passed_over.append(draw)
        else:
            yield draw
    while passed_over:
        yield passed_over.pop(0)


def _rests(config: "Config", vocabulary: Vocabulary, ledger: Ledger, datasets: Sequence[Dataset], draw: Row) -> bool:
    example = datasets[draw[0]][draw[1]]
    ids = sequence.prompt_ids(example.original_tokens, example.instruction, config.assistant_prefill, vocabulary)
    return sequence.digest(ids) in ledger.resting


def of_evaluation(config: "Config", name: str, vocabulary: Vocabulary) -> Drawn:
    """Draw and read the prompts of an evaluation. None is left out: its results would not say what they are of.

    Raises:
        EarlError: there is no such evaluation; a data set is missing or damaged; there are too few prompts, or some are
            too long, or different ones have one name.
    """
    if name not in config.evaluations:
        raise EarlError(
            f"evaluation {name!r} is not configured; evaluations holds {', '.join(config.evaluations) or 'none'}"
        )
    data = paths.evaluation_data(config, name)
    with data.named(f"evaluation {name!r}, "):
        datasets = _open(config, data, vocabulary)
        mixture = mixing.mixture([len(dataset) for dataset in datasets], data.coefficients, config.random_seed)
        wanted = config.evaluations[name].prompts
        count = mixture.distinct if wanted is None else wanted
        drawn = mixing.prompts(mixture, config.random_seed, 0, count)
        examples = [datasets[dataset][row] for dataset, row in drawn]
        _check_names(examples)
        prefill = config.prefill(name)
        reasons = [(example, too_long(example, config, prefill, vocabulary)) for example in examples]
        if found := [f"{_name(example)}: {reason}" for example, reason in reasons if reason]:
            raise EarlError(
                f"{len(found)} of {count} prompts are too long, and an evaluation leaves none out; first {found[0]}; "
                f"{_REMEDY}"
            )
    return Drawn(list(enumerate(examples)))


def too_long(example: Example, config: "Config", prefill: str, vocabulary: Vocabulary) -> str | None:
    """Return why a prompt cannot be answered within the configured lengths, or None.

    Room for the shortest completion is enough: one that would be longer ends where the context does
    (`earl.engines.room`).
    """
    prompt = len(sequence.prompt_ids(example.original_tokens, example.instruction, prefill, vocabulary))
    if config.max_prompt_len is not None and prompt > config.max_prompt_len:
        return f"the prompt has {prompt} tokens, but max_prompt_len is {config.max_prompt_len}"
    constrained = config.emu3_use_logit_processor
    completion = grid.shortest_completion(example.original_tokens.shape) if constrained else 1
    if completion > config.max_response_tokens:
        limit = config.max_response_tokens
        return f"an image of its size takes {completion} tokens, but max_response_tokens is {limit}"
    if prompt + completion > config.model_context_size:
        return (
            f"the prompt has {prompt} tokens and its shortest completion {completion}, but model_context_size is "
            f"{config.model_context_size}"
        )
    return None


def _check_all(config: "Config", datasets: list[Dataset], mixture: mixing.Mixture, vocabulary: Vocabulary) -> None:
    """Look at every prompt that may ever be drawn, so that a run which is to stop does so before it has begun."""
    found, first = 0, ""
    for dataset, row in mixture.rows():
        example = datasets[dataset][row]
        if reason := too_long(example, config, config.assistant_prefill, vocabulary):
            found, first = found + 1, first or f"{_name(example)}: {reason}"
    if found:
        raise EarlError(f"{found} of {mixture.distinct} prompts are too long; first {first}; {_STOP}")


def _open(config: "Config", data: paths.Mixed, vocabulary: Vocabulary, images: bool = True) -> list[Dataset]:
    found = [paths.resolve(config, reference) for reference in data.references]
    return [open_dataset(path, vocabulary.num_visual, images) for path in found]


def _name(example: Example) -> str:
    return f"dataset {example.dataset!r}, example {example.example_id!r}"


def _check_names(examples: Sequence[Example]) -> None:
    """Refuse different prompts of one name: an evaluation tells its prompts apart by it, also across policies."""
    seen: dict[tuple[str, str], Example] = {}
    for example in examples:
        first = seen.setdefault((example.dataset, example.example_id), example)
        same_image = np.array_equal(first.original_tokens, example.original_tokens)
        if first.instruction != example.instruction or not same_image:
            raise EarlError(
                f"two prompts of dataset {example.dataset!r} have the example_id {example.example_id!r}; name a column "
                "that tells them apart in raw_datasets.<name>.columns, or example_id: null to number the rows, and "
                "tokenise the data again"
            )
