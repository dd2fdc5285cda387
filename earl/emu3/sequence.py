"""The grammar of sequences, both directions.

::

    IMG(t)     = boi  "{H}*{W}"  img  row_1 eol ... row_H eol  eof eoi       t: int[H, W], codebook indices
    prompt     = bos  IMG(original)  instruction  prefill
    completion = what follows the prefill, up to eos
    SFT        = bos  IMG(original)  instruction  [reasoning]  IMG(edited)  eos
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from earl.emu3.vocabulary import Vocabulary
from earl.messages.errors import EarlError

START_THINKING = " Let's think step by step. <|start thinking|>"
END_THINKING = "<|end thinking|>"
MAX_REASONING_CHARACTERS = 1750
# What stands before the image of a policy that does not reason.
_SIZE_ALONE = re.compile(r"\s*(<\|image start\|>)?\s*[\d*]*\s*")


def image_ids(tokens: np.ndarray, vocabulary: Vocabulary) -> list[int]:
    """Return IMG(t) for codebook indices ``tokens``, int [H, W].

    Raises:
        EarlError: when an index lies outside the codebook.
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise EarlError(f"image tokens must be a grid [H, W] with at least one row and column, not {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= vocabulary.num_visual:
        raise EarlError(
            f"image token {tokens.max() if tokens.max() >= vocabulary.num_visual else tokens.min()} lies outside the "
            f"codebook's 0..{vocabulary.num_visual - 1}; the data were tokenised with another vision tokenizer"
        )
    height, width = tokens.shape
    rows = np.concatenate([tokens + vocabulary.first_visual, np.full((height, 1), vocabulary.eol)], axis=1)
    return [
        vocabulary.boi,
        *vocabulary.encode(f"{height}*{width}"),
        vocabulary.img,
        *rows.ravel().tolist(),
        vocabulary.eof,
        vocabulary.eoi,
    ]


def prompt_ids(original_tokens: np.ndarray, instruction: str, prefill: str, vocabulary: Vocabulary) -> list[int]:
    """Return the prompt's ids; ``prefill`` is `<|image start|>` or the opening of forced reasoning.

    In it, ``{H}`` and ``{W}`` stand for the size of the original: `<|image start|>{H}*{W}` says that of the edit.
    """
    image = image_ids(original_tokens, vocabulary)
    height, width = np.shape(original_tokens)
    return [
        vocabulary.bos,
        *image,
        *vocabulary.encode_plain(instruction),
        *vocabulary.encode(prefill.replace("{H}", str(height)).replace("{W}", str(width))),
    ]


def digest(ids: Sequence[int]) -> str:
    """Return the SHA-256, in hexadecimal, of ids, such as those of a prompt: the same ones have the same."""
    return hashlib.sha256(np.asarray(ids, dtype="<u4").tobytes()).hexdigest()


def reasoning_text(reasoning: Sequence[tuple[str, str]]) -> str:
    """Return ``key: value`` pairs in one line, values without the white space around them, cut at 1750 characters."""
    return " ".join(f"{key}: {value.strip()}" for key, value in reasoning)[:MAX_REASONING_CHARACTERS]


def sft_ids(
    original_tokens: np.ndarray,
    instruction: str,
    target_tokens: np.ndarray,
    reasoning: Sequence[tuple[str, str]] | None,
    vocabulary: Vocabulary,
) -> tuple[list[int], int]:
    """Return an SFT sequence and how many of its first ids are prompt, which the loss leaves out."""
    prompt = prompt_ids(original_tokens, instruction, "", vocabulary)
    thought = []
    if reasoning is not None:
        thought = [*vocabulary.encode(START_THINKING), *_thought_ids(f" {reasoning_text(reasoning)}", vocabulary)]
    return [*prompt, *thought, *image_ids(target_tokens, vocabulary), vocabulary.eos], len(prompt)


def _thought_ids(text: str, vocabulary: Vocabulary) -> list[int]:
    """Return the ids of a thought and its end.

    They are one string, as in the reference: to Emu3's tokenizer the end is ordinary text, and a full stop before it is
    one token with its first character. What looks like a special token in the thought stays ordinary text.
    """
    if vocabulary.text.token_to_id(END_THINKING) is None:
        return vocabulary.encode_plain(text + END_THINKING)
    return [*vocabulary.encode_plain(text), *vocabulary.encode(END_THINKING)]


def grid_of_prompt(token_ids: Sequence[int], vocabulary: Vocabulary) -> tuple[int, int]:
    """Return (H, W) of the original image in a prompt.

    Raises:
        EarlError: when the prompt holds no well-formed image.
    """
    ids = np.asarray(token_ids)
    starts, ends = np.flatnonzero(ids == vocabulary.img), np.flatnonzero(ids == vocabulary.eof)
    if len(starts) and len(ends) and ends[0] > starts[0]:
        body = ids[starts[0] + 1 : ends[0]]
        height = int((body == vocabulary.eol).sum())
        if height and len(body) % height == 0:
            return height, len(body) // height - 1
    raise EarlError("the prompt holds no image of the form img, rows that end in eol, eof")


def parse_completion(token_ids: Sequence[int], vocabulary: Vocabulary) -> np.ndarray | None:
    """Return the completion's image as codebook indices, int64 [H, W], or None where there is no whole image.

    The completion must hold ``img``, H rows of equally many visual ids that each end in eol, then eof, eoi.
    """
    ids = np.asarray(token_ids)
    starts, ends = np.flatnonzero(ids == vocabulary.img), np.flatnonzero(ids == vocabulary.eof)
    if not len(starts) or not len(ends) or ends[0] < starts[0]:
        return None
    if ends[0] + 1 >= len(ids) or ids[ends[0] + 1] != vocabulary.eoi:
        return None
    body = ids[starts[0] + 1 : ends[0]]
    height = int((body == vocabulary.eol).sum())
    if not height or len(body) % height or len(body) == height:
        return None
    rows = body.reshape(height, -1)
    visual, line_ends = rows[:, :-1], rows[:, -1]
    # A model may have more ids than its tokenizer; those are no image either.
    is_visual = (visual >= vocabulary.first_visual) & (visual < vocabulary.size)
    if (line_ends != vocabulary.eol).any() or not is_visual.all():
        return None
    return visual - vocabulary.first_visual


def completion_text(token_ids: Sequence[int], vocabulary: Vocabulary) -> str:
    """Return the free text of a completion: what comes before the image's first visual token."""
    ids = list(token_ids)
    stop = ids.index(vocabulary.img) if vocabulary.img in ids else len(ids)
    return vocabulary.decode([token for token in ids[:stop] if token < vocabulary.first_visual])


def reasoning_of(text: str) -> str:
    """Return the reasoning in a completion's text, as of `completion_text`; "" where there is none.

    Reasoning that did not come to its end is reasoning too.
    """
    thought, end, _ = text.partition(END_THINKING)
    return "" if not thought.strip() or (not end and _SIZE_ALONE.fullmatch(thought)) else thought
