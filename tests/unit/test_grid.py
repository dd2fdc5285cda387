"""The grid constraint and the grammar of sequences, against the specification written out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earl.emu3 import grid, sequence
from earl.emu3.grid import EOF, EOI, EOL, EOS, TEXT, VISUAL
from earl.messages.errors import EarlError


def test_kinds_of_a_2_by_3_grid_are_those_of_the_specification():
    k = np.arange(-2, 13)
    expected = [TEXT, TEXT, *([VISUAL] * 3 + [EOL]) * 2, EOF, EOI, EOS, EOS, EOS]
    assert grid.kind_at(k, 2, 3).tolist() == expected


def test_arrays_and_tensors_with_mixed_grids_agree():
    k = np.arange(-3, 40)[:, None]
    height, width = np.array([1, 2, 5]), np.array([4, 1, 3])
    from_tensor = grid.kind_at(torch.from_numpy(k), torch.from_numpy(height), torch.from_numpy(width))
    assert from_tensor.tolist() == grid.kind_at(k, height, width).tolist()
    for column in range(3):
        alone = grid.kind_at(k[:, 0], height[column], width[column])
        assert from_tensor[:, column].tolist() == alone.tolist()


def test_each_kind_allows_what_its_name_says(vocabulary):
    masks = grid.allowed_masks(vocabulary)
    assert np.flatnonzero(masks[TEXT]).tolist() == list(range(vocabulary.first_visual))
    assert np.flatnonzero(masks[VISUAL]).tolist() == list(range(vocabulary.first_visual, vocabulary.size))
    forced = [np.flatnonzero(masks[kind]).tolist() for kind in (EOL, EOF, EOI, EOS)]
    assert forced == [[vocabulary.eol], [vocabulary.eof], [vocabulary.eoi], [vocabulary.eos]]


def test_an_image_is_written_as_the_grammar_says(vocabulary):
    v = vocabulary
    tokens = np.array([[0, 5], [255, 1]])
    visual = (tokens + v.first_visual).tolist()
    size = v.encode("2*2")
    written = [v.boi, *size, v.img, *visual[0], v.eol, *visual[1], v.eol, v.eof, v.eoi]
    assert sequence.image_ids(tokens, v) == written
    prompt = sequence.prompt_ids(tokens, "remove it", "<|image start|>", v)
    assert prompt == [v.bos, *written, *v.encode("remove it"), v.boi]
    ids, prompt_length = sequence.sft_ids(tokens, "remove it", tokens, None, v)
    assert ids == [*prompt[:-1], *written, v.eos]
    assert prompt_length == len(prompt) - 1


def test_reasoning_stands_between_its_markers_and_is_cut(vocabulary):
    tokens = np.zeros((1, 1), int)
    ids, start = sequence.sft_ids(tokens, "x", tokens, [("plan", "y" * 3000)], vocabulary)
    text = sequence.completion_text(ids[start:], vocabulary)
    assert text.startswith(" Let's think step by step. <|start thinking|> plan: yyy")
    assert len(text.split("<|start thinking|> ")[1].split("<|end thinking|>")[0]) == 1750
    assert "<|end thinking|><|image start|>1*1" in text


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6).flatmap(
        lambda width: st.lists(st.lists(st.integers(0, 255), min_size=width, max_size=width), min_size=1, max_size=6)
    ),
    st.text(max_size=60),
)
def test_what_is_written_is_read_back(vocabulary, rows, text):
    tokens = np.array(rows)
    ids, start = sequence.sft_ids(tokens, text, tokens, None, vocabulary)
    assert np.array_equal(sequence.parse_completion(ids[start:], vocabulary), tokens)
    assert sequence.grid_of_prompt(ids[:start], vocabulary) == tokens.shape
    kinds = grid.kinds_of_completion(ids[start:], tokens.shape, vocabulary)
    masks = grid.allowed_masks(vocabulary)
    assert masks[kinds, ids[start:]].all()


def test_an_instruction_cannot_smuggle_in_special_tokens(vocabulary):
    ids = sequence.prompt_ids(np.zeros((1, 1), int), "<|image token|><|extra_204|>", "", vocabulary)
    assert ids.count(vocabulary.img) == 1
    assert vocabulary.eos not in ids
    assert vocabulary.decode(ids).endswith("<|image token|><|extra_204|>")


@pytest.mark.parametrize(
    "damage",
    [
        lambda ids, v: ids[:-3],  # cut before eof
        lambda ids, v: [i for i in ids if i != v.img],
        lambda ids, v: [v.eol if i == ids[6] else i for i in ids],
        lambda ids, v: [i for n, i in enumerate(ids) if n != ids.index(v.eol)],
    ],
)
def test_a_broken_image_does_not_parse(vocabulary, damage):
    ids = sequence.image_ids(np.arange(9).reshape(3, 3), vocabulary)
    assert sequence.parse_completion(ids, vocabulary) is not None
    assert sequence.parse_completion(damage(ids, vocabulary), vocabulary) is None


def test_a_token_outside_the_codebook_is_refused(vocabulary):
    with pytest.raises(EarlError, match=r"image token 256 lies outside the codebook's 0\.\.255"):
        sequence.image_ids(np.array([[3, 256]]), vocabulary)
