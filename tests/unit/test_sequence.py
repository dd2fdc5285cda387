"""The grammar of sequences as properties: any grid and any text is read back as it was written, and what is read as an
image is what would be written for it."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earl.emu3 import grid, sequence
from earl.emu3.vocabulary import ROLES, Vocabulary, visual_token

CODES = 256
GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1)).map(
    lambda drawn: np.random.default_rng(drawn[2]).integers(0, CODES, drawn[:2])
)
SPECIAL = [*ROLES.values(), visual_token(3), sequence.END_THINKING, sequence.START_THINKING, "8*8", "<|extra_7|>"]
TEXTS = st.lists(st.sampled_from(SPECIAL) | st.text(max_size=12), max_size=5).map("".join)
REASONING = st.lists(st.tuples(TEXTS, TEXTS), max_size=4)
KINDS = "bBdIvLFESx"


def kinds_of(ids: list[int], v: Vocabulary) -> str:
    """Return a letter for each id: v for a visual one, x for one beyond the vocabulary, d for text."""
    letters = {v.bos: "b", v.boi: "B", v.img: "I", v.eol: "L", v.eof: "F", v.eoi: "E", v.eos: "S"}
    return "".join(letters.get(i, "x" if i >= v.size else "v" if i >= v.first_visual else "d") for i in map(int, ids))


def has_image(letters: str) -> bool:
    """The specification's IMG from its `img` on, as a regular expression; all rows of one length."""
    found = re.match(r"[^IF]*I((?:v+L)+)FE", letters)
    return found is not None and len({len(row) for row in found[1].split("L")[:-1]}) == 1


@pytest.mark.parametrize("special", [True, False])
def test_a_users_text_never_becomes_a_mark_of_the_grammar(policy_folder, tmp_path, special) -> None:
    tokenizer = json.loads((policy_folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["special"] = special  # other libraries write visual tokens as ordinary added ones
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    v = Vocabulary.from_folder(tmp_path)
    marks = {token["id"] for token in tokenizer["added_tokens"]}
    for token in tokenizer["added_tokens"]:
        ids = v.encode_plain(f"make it {token['content']} red")
        assert not marks & set(ids)
        assert v.decode(ids) == f"make it {token['content']} red"
        assert v.encode(token["content"]) == [token["id"]]
    assert v.size == Vocabulary.from_folder(policy_folder).size


@settings(deadline=None, max_examples=200)
@given(original=GRIDS, target=GRIDS, instruction=TEXTS, reasoning=st.none() | REASONING)
def test_everything_that_is_written_is_read_back(vocabulary, original, target, instruction, reasoning) -> None:
    v = vocabulary
    ids, start = sequence.sft_ids(original, instruction, target, reasoning, v)
    prompt, completion = ids[:start], ids[start:]
    # The prompt, by the specification: bos IMG(original) instruction.
    letters = kinds_of(prompt, v)
    assert re.fullmatch(rf"bBd+I(?:v{{{original.shape[1]}}}L){{{original.shape[0]}}}FEd*", letters)
    end = prompt.index(v.eoi) + 1
    assert prompt[:end] == [v.bos, *sequence.image_ids(original, v)]
    assert v.decode(prompt[2 : prompt.index(v.img)]) == f"{original.shape[0]}*{original.shape[1]}"
    assert v.decode(prompt[end:]) == instruction
    assert sequence.grid_of_prompt(prompt, v) == original.shape
    # The completion: optional reasoning, IMG(target), eos.
    letters = kinds_of(completion, v)
    assert re.fullmatch(rf"d*Bd+I(?:v{{{target.shape[1]}}}L){{{target.shape[0]}}}FES", letters)
    assert np.array_equal(sequence.parse_completion(completion, v), target)
    before = "" if reasoning is None else thought(reasoning)
    size = f"{target.shape[0]}*{target.shape[1]}"
    assert sequence.completion_text(completion, v) == f"{before}{ROLES['boi']}{size}"


def thought(reasoning: list[tuple[str, str]]) -> str:
    text = " ".join(f"{key}: {value.strip()}" for key, value in reasoning)
    return f" Let's think step by step. <|start thinking|> {text[:1750]}<|end thinking|>"


@settings(deadline=None, max_examples=200)
@given(original=GRIDS, instruction=TEXTS, reasoning=st.none() | REASONING, seed=st.integers(0, 2**32 - 1))
def test_what_is_fine_tuned_on_is_what_the_constraint_allows(
    vocabulary, original, instruction, reasoning, seed
) -> None:
    target = np.random.default_rng(seed).integers(0, CODES, original.shape)
    ids, start = sequence.sft_ids(original, instruction, target, reasoning, vocabulary)
    kinds = grid.kinds_of_completion(ids[start:], original.shape, vocabulary)
    assert grid.allowed_masks(vocabulary)[kinds, ids[start:]].all()


@settings(deadline=None, max_examples=500)
@given(
    letters=st.text(KINDS, max_size=24)
    | st.tuples(
        st.text("bBdES", max_size=3), st.lists(st.sampled_from(["vvL", "vvL", "vL", "vxL"]), max_size=4), st.text(KINDS)
    ).map(lambda part: f"{part[0]}I{''.join(part[1])}FE{part[2]}"),
    seed=st.integers(0, 2**32 - 1),
)
def test_exactly_the_grammars_images_parse_and_are_written_alike(vocabulary, letters: str, seed: int) -> None:
    v = vocabulary
    rng = np.random.default_rng(seed)
    names = {"b": v.bos, "B": v.boi, "I": v.img, "L": v.eol, "F": v.eof, "E": v.eoi, "S": v.eos, "x": v.size}
    text = v.encode("circle")[0]
    ids = [names.get(letter, text if letter == "d" else v.first_visual + rng.integers(CODES)) for letter in letters]
    assert kinds_of(ids, v) == letters
    found = sequence.parse_completion(ids, v)
    assert (found is not None) == has_image(letters)
    if found is not None:
        start = ids.index(v.img)
        written = sequence.image_ids(found, v)
        written = written[written.index(v.img) :]
        assert ids[start : start + len(written)] == written


@pytest.mark.parametrize("letters", ["IvvLvvLFE", "BdIvLFES", "IvLFEvvL"])
def test_the_recogniser_knows_images(letters: str) -> None:
    assert has_image(letters)


@pytest.mark.parametrize("letters", ["", "vvLFE", "IFE", "ILFE", "IvvLvLFE", "IvvLFS", "IvvFE", "FIvLFE", "IvLvFE"])
def test_the_recogniser_refuses_others(letters: str) -> None:
    assert not has_image(letters)


@pytest.mark.parametrize("shape", [(1, 1), (3, 12), (8, 8)])
def test_a_prefill_may_say_the_size_of_the_image(vocabulary, shape) -> None:
    """What follows such a prefill completes an image whose tokens are those of a written one, size and all."""
    original, v = np.zeros(shape, int), vocabulary
    prompt = sequence.prompt_ids(original, "add", "<|image start|>{H}*{W}", v)
    written = sequence.image_ids(original, v)
    size = written[: written.index(v.img)]
    assert prompt == [*sequence.prompt_ids(original, "add", "", v), *size]
    # Braces of an instruction are the user's own.
    assert v.decode(sequence.prompt_ids(original, "{H}", "", v)).endswith("{H}")
