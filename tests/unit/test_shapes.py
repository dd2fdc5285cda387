"""The shapes world: what an instruction says is what happened to the pixels, and everything follows from the seed."""

import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from earl.emu3 import sequence
from earl.emu3.checkpoint import load_policy, load_vision_tokenizer
from earl.emu3.vocabulary import ROLES, Vocabulary, visual_token
from earl.files import images, manifest, tables
from earl.messages.errors import EarlError
from earl.shapes import dataset, policy, world
from earl.statistics import seeds

ORDINAL = {word: index for index, word in enumerate(world.ORDINALS)}


def examples(task: str, count: int = 40) -> list[world.Edit]:
    return [world.edit(11, index, (task,)) for index in range(count)]


def find(scene: world.Scene, words: str) -> int:
    """The one cell that holds the named object."""
    cells = [cell for cell in scene.occupied() if world.name(scene.cells[cell]) == words]
    assert len(cells) == 1, f"{words!r} does not name one object"
    return cells[0]


def differing(edit: world.Edit) -> dict[int, tuple[int, int]]:
    pairs = enumerate(zip(edit.original.cells, edit.edited.cells, strict=True))
    return {cell: pair for cell, pair in pairs if pair[0] != pair[1]}


def match(pattern: str, edit: world.Edit) -> tuple[str, ...]:
    found = re.fullmatch(pattern, edit.instruction)
    assert found, f"{edit.instruction!r} is not of the form {pattern!r}"
    return found.groups()


def test_recolour_changes_one_colour_and_no_shape():
    for edit in examples("recolour"):
        words, colour = match(r"Change the colour of the (\w+ \w+) from \w+ to (\w+)\.", edit)
        cell = find(edit.original, words)
        assert set(differing(edit)) == {cell}
        assert world.name(edit.edited.cells[cell]) == f"{colour} {words.split()[1]}"


def test_remove_empties_the_named_cell():
    for edit in examples("remove"):
        (words,) = match(r"Remove the (\w+ \w+), so that its cell is empty\.", edit)
        cell = find(edit.original, words)
        assert differing(edit) == {cell: (edit.original.cells[cell], world.EMPTY)}
        assert edit.edited.occupied(), "an edit never empties the scene"


def test_add_fills_the_named_cell():
    for edit in examples("add"):
        words, row, column = match(r"Add a (\w+ \w+) in row (\w+) and in column (\w+)\.", edit)
        cell = 4 * ORDINAL[row] + ORDINAL[column]
        assert list(differing(edit)) == [cell]
        assert edit.original.cells[cell] == world.EMPTY
        assert find(edit.edited, words) == cell


def test_background_changes_nothing_else():
    for edit in examples("background"):
        (colour,) = match(r"Change the colour of the whole background from \w+ to (\w+)\.", edit)
        assert edit.edited.cells == edit.original.cells
        assert world.BACKGROUND_NAMES[edit.edited.background] == colour
        assert edit.edited.background != edit.original.background


def test_move_puts_the_object_beside_the_other():
    for edit in examples("move"):
        words, side, other = match(r"Move the (\w+ \w+) to the (left|right) of the (\w+ \w+)\.", edit)
        anchor, goal = find(edit.edited, other), find(edit.edited, words)
        assert goal - anchor == {"left": -1, "right": 1}[side]
        assert goal // 4 == anchor // 4, "left and right stay inside the row"
        assert set(differing(edit)) == {find(edit.original, words), goal}


def test_swap_exchanges_two_objects():
    for edit in examples("swap"):
        first, second = match(r"Let the (\w+ \w+) and the (\w+ \w+) swap their places\.", edit)
        assert find(edit.edited, first) == find(edit.original, second)
        assert find(edit.edited, second) == find(edit.original, first)
        assert len(differing(edit)) == 2


def test_count_makes_that_many_in_an_empty_row():
    for edit in examples("count"):
        row, number, words = match(r"Fill row (\w+) from the left with exactly (\w+) (\w+ \w+)s\.", edit)
        start = 4 * ORDINAL[row]
        assert edit.original.cells[start : start + 4] == (0, 0, 0, 0)
        assert list(differing(edit)) == list(range(start, start + ORDINAL[number] + 1))
        assert {world.name(new) for _, new in differing(edit).values()} == {words}


def test_every_scene_names_its_objects_once():
    for index in range(200):
        kinds = [kind for kind in world.edit(3, index).original.cells if kind]
        assert 2 <= len(kinds) <= 4
        assert len(set(kinds)) == len(kinds)


def test_boxes_in_the_reasoning_hold_the_objects():
    for edit in examples("add") + examples("swap"):
        pixels = world.render(edit.original)
        background = pixels[0, 0] if edit.original.cells[0] == world.EMPTY else pixels[-1, -1]
        boxes = re.findall(r"(\w+) \w+ \[(\d+), (\d+), (\d+), (\d+)\]", edit.reasoning["scene"])
        assert len(boxes) == len(edit.original.occupied())
        outside = np.ones(pixels.shape[:2], dtype=bool)
        for colour, *corners in boxes:
            x1, y1, x2, y2 = map(int, corners)
            outside[y1:y2, x1:x2] = False
            assert tuple(pixels[y1 + 8, x1 + 8]) == world.COLOURS[colour], "the middle shows the object"
        assert (pixels[outside] == background).all(), "what lies outside the boxes is background"


def test_shapes_differ_in_area():
    """A tokenizer of 8x8 pixels mixes up shapes of equal area, so no two may come near each other."""
    white, red = world.CELL_IMAGES[0, world.EMPTY].astype(float), [world.kind_of(0, shape) for shape in range(3)]
    areas = sorted(np.abs(world.CELL_IMAGES[0, kind] - white).sum() for kind in red)
    assert areas[1] / areas[0] > 1.2
    assert areas[2] / areas[1] > 1.2


def test_an_example_depends_on_seed_and_index_alone():
    forward = [world.edit(5, index) for index in range(20)]
    backward = [world.edit(5, index) for index in reversed(range(20))]
    assert forward == backward[::-1]
    assert [edit.task for edit in forward[:7]] == list(world.TASKS)
    assert world.edit(5, 0) != world.edit(6, 0)


def test_examples_are_the_same_on_every_machine():
    """Pinned: a change of the world changes every published number, so it must be meant."""
    edit = world.edit(0, 2)
    assert edit.instruction == "Add a cyan square in row four and in column one."
    digest = hashlib.sha256(world.render(edit.edited).tobytes()).hexdigest()
    assert digest[:16] == "567298c1e1ea1025"


def test_raw_pairs_read_back(tmp_path):
    path = tmp_path / "raw.parquet"
    dataset.write_raw(path, count=9, seed=4, tasks=("swap", "remove", "swap"))
    rows = tables.read_table(path, tables.RAW).to_pylist()
    assert [row["task"] for row in rows] == ["swap", "remove", "swap"] * 3
    assert len({row["example_id"] for row in rows}) == 9
    for index, row in enumerate(rows):
        edit = world.edit(4, index, ("swap", "remove", "swap"))
        assert row["instruction"] == edit.instruction
        assert json.loads(row["reasoning"]) == edit.reasoning
        assert (images.decode(row["original"]["bytes"], "original") == world.render(edit.original)).all()
        assert (images.decode(row["edited"]["bytes"], "edited") == world.render(edit.edited)).all()
    again = tmp_path / "again.parquet"
    dataset.write_raw(again, count=9, seed=4, tasks=("swap", "remove", "swap"))
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("count", "tasks", "words"), [(3, ("recolor",), "recolour"), (0, ("swap",), "count"), (3, (), "tasks")]
)
def test_raw_pairs_refuse_what_does_not_exist(tmp_path, count, tasks, words):
    with pytest.raises(EarlError, match=words):
        dataset.write_raw(tmp_path / "raw.parquet", count, 0, tasks)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "policy"
    policy.write_policy(folder, seed=7)
    return folder


def test_tokenizer_has_emu3s_names_and_visual_ids_last(policy_folder):
    vocabulary = Vocabulary.from_folder(policy_folder)
    assert vocabulary.num_visual == policy.CODES
    assert vocabulary.first_visual + policy.CODES == vocabulary.size
    assert 400 <= vocabulary.first_visual <= 500
    for index in (0, 17, 255):
        assert vocabulary.text.token_to_id(visual_token(index)) == vocabulary.first_visual + index
    specials = {vocabulary.text.token_to_id(name) for name in ROLES.values()}
    assert specials == set(range(vocabulary.first_visual - len(ROLES), vocabulary.first_visual))


@pytest.mark.parametrize("text", ["Make the red circle blue.", "", " a  b\n\t", "Größe 你好 🙂", "\x00\u200d", "8*8"])
def test_any_text_round_trips(policy_folder, text):
    vocabulary = Vocabulary.from_folder(policy_folder)
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert all(token < vocabulary.first_visual for token in vocabulary.encode(text))


def test_special_tokens_stay_whole_and_thinking_is_plain_text(policy_folder):
    vocabulary = Vocabulary.from_folder(policy_folder)
    assert vocabulary.encode("<|image start|>8*8<|image token|>")[0] == vocabulary.boi
    assert vocabulary.encode("<|image start|>8*8<|image token|>")[-1] == vocabulary.img
    assert vocabulary.decode([vocabulary.boi]) == "<|image start|>"
    lowest_special = min(vocabulary.text.token_to_id(name) for name in ROLES.values())
    thinking = vocabulary.encode(sequence.START_THINKING + sequence.END_THINKING)
    assert len(thinking) > 2
    assert max(thinking) < lowest_special


def test_sequences_with_reasoning_fit_the_context(policy_folder):
    vocabulary = Vocabulary.from_folder(policy_folder)
    grid = np.zeros((8, 8), dtype=int)
    for index in range(70):
        edit = world.edit(9, index)
        ids, prompt = sequence.sft_ids(grid, edit.instruction, grid, list(edit.reasoning.items()), vocabulary)
        assert prompt < len(ids) <= policy.MAX_LENGTH


@pytest.mark.slow
def test_policy_follows_from_its_seed_in_another_process(policy_folder, tmp_path):
    code = f"from earl.shapes import policy; policy.write_policy({str(tmp_path / 'same')!r}, seed=7)"
    subprocess.run([sys.executable, "-c", code], check=True)
    policy.write_policy(tmp_path / "other", seed=8)
    digests = [manifest.digest_folder(folder) for folder in (policy_folder, tmp_path / "same", tmp_path / "other")]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "other" / name).read_bytes() == (policy_folder / name).read_bytes()


def test_policy_folder_loads_in_transformers(policy_folder):
    import torch
    from transformers import AutoTokenizer

    model = load_policy(policy_folder, torch.float32, "cpu")
    assert 500_000 < sum(weight.numel() for weight in model.parameters()) < 4_000_000
    vocabulary, tokenizer = Vocabulary.from_folder(policy_folder), AutoTokenizer.from_pretrained(policy_folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (vocabulary.bos, vocabulary.eos)
    assert tokenizer.pad_token_id == vocabulary.pad
    text = "Swap the red circle and the blue square.<|image start|>8*8"
    assert tokenizer.encode(text, add_special_tokens=False) == vocabulary.encode(text)


def test_building_a_policy_leaves_the_global_generator_alone():
    import torch

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    policy.build_model(policy.build_tokenizer(), seed=1)
    assert torch.equal(torch.rand(2), expected)


def test_shipped_vision_tokenizer_keeps_what_matters():
    """Objects survive encoding and decoding, and an edit changes few tokens where the picture stays the same."""
    from earl.emu3 import vision

    model = load_vision_tokenizer(policy.VISION_TOKENIZER, "cpu")
    assert model.config.codebook_size == policy.CODES
    edits = [world.edit(seeds.seed("shipped vision tokenizer"), index) for index in range(42)]
    originals, edited = [world.render(e.original) for e in edits], [world.render(e.edited) for e in edits]
    before, after = (np.stack(vision.encode(model, pictures)) for pictures in (originals, edited))
    assert before.shape == (42, 8, 8)
    equal = (np.stack(originals) == np.stack(edited)).reshape(42, 8, 8, 8, 8, 3).all(axis=(2, 4, 5))
    assert (before == after)[equal].mean() > 0.7
    decoded = np.stack(vision.decode(model, list(before))).astype(float)
    error = ((decoded - np.stack(originals)) / 255) ** 2
    assert (-10 * np.log10(error.mean(axis=(1, 2, 3)))).mean() > 30


def test_every_instruction_has_as_many_tokens_as_every_other(policy_folder):
    """So a token's place in the edited image is always equally far from its place in the original."""
    vocabulary = Vocabulary.from_folder(policy_folder)
    lengths = {len(vocabulary.encode(world.edit(1, index).instruction)) for index in range(700)}
    assert lengths == {12}


def test_shipped_base_policy_belongs_to_this_world_and_edits_some_of_it():
    """Its tokenizer is the one that `build_tokenizer` makes, and it turns most backgrounds into the right colour."""
    import torch

    from earl.emu3 import vision
    from earl.engines import Request, SamplingParams
    from earl.engines.torch_engine import TorchEngine
    from earl.judges import Judgement
    from earl.judges.program import ProgramJudge

    tokenizer = json.loads((policy.BASE_POLICY / "tokenizer.json").read_text())
    assert tokenizer == json.loads(policy.build_tokenizer().to_str())
    manifest.check(policy.BASE_POLICY, deep=True)
    vocabulary = Vocabulary.from_folder(policy.BASE_POLICY)
    vision_tokenizer = load_vision_tokenizer(policy.VISION_TOKENIZER, "cpu")
    edits = [world.edit(seeds.seed("shipped base policy"), index, ("background",)) for index in range(16)]
    originals = [world.render(edit.original) for edit in edits]
    prompts = [
        sequence.prompt_ids(tokens, edit.instruction, "<|image start|>", vocabulary)
        for tokens, edit in zip(vision.encode(vision_tokenizer, originals), edits, strict=True)
    ]
    engine = TorchEngine(torch.device("cpu"), torch.float32, batch_size=16, context=320, constrained=True)
    engine.load(policy.BASE_POLICY)
    requests = [Request(prompt, (8, 8), [index]) for index, prompt in enumerate(prompts)]
    completions = [samples[0] for samples in engine.generate(requests, SamplingParams(temperature=0.0, max_tokens=96))]
    grids = [sequence.parse_completion(completion.token_ids, vocabulary) for completion in completions]
    pictures = vision.decode(vision_tokenizer, grids)
    verdicts = ProgramJudge().score(
        [
            Judgement(edit.instruction, original, picture, world.render(edit.edited))
            for edit, original, picture in zip(edits, originals, pictures, strict=True)
        ]
    )
    assert sum(verdict.edit_success for verdict in verdicts) / len(verdicts) > 8


# Mistakes, as data sets have them


def raw_rows(path, **fractions):
    dataset.write_raw(path, count=60, seed=3, **fractions)
    return tables.read_table(path, tables.RAW).to_pylist()


def cells_of(row, column):
    picture = images.decode(row[column]["bytes"], "").reshape(world.GRID, world.CELL, world.GRID, world.CELL, 3)
    return picture.transpose(0, 2, 1, 3, 4).reshape(world.GRID**2, -1)


def test_mistakes_are_in_the_edited_image_alone_and_in_the_rows_that_the_seed_says(tmp_path):
    clean = raw_rows(tmp_path / "clean.parquet")
    few, many = (
        raw_rows(tmp_path / f"{share}.parquet", unchanged_fraction=share, damaged_fraction=share)
        for share in (0.2, 0.4)
    )
    kinds = []
    for right, row in zip(clean, few, strict=True):
        assert {k: v for k, v in row.items() if k != "edited"} == {k: v for k, v in right.items() if k != "edited"}
        wrong = (cells_of(row, "edited") != cells_of(right, "edited")).any(axis=1)
        if row["edited"]["bytes"] == row["original"]["bytes"]:
            kinds.append("unchanged")
        elif wrong.any():
            kinds.append("damaged")
            untouched = (cells_of(right, "edited") == cells_of(right, "original")).all(axis=1)
            assert wrong.sum() == 1, "one object"
            assert untouched[wrong].all() or right["task"] == "background", "not the one that the edit is about"
        else:
            kinds.append("right")
    assert 5 <= kinds.count("unchanged") <= 20
    assert 5 <= kinds.count("damaged") <= 20
    assert all(
        row["edited"] == other["edited"] for row, other, kind in zip(few, many, kinds, strict=True) if kind != "right"
    ), "more mistakes are those of before and others"


def test_all_pairs_may_be_wrong(tmp_path):
    rows = raw_rows(tmp_path / "a.parquet", unchanged_fraction=1.0)
    assert all(row["edited"]["bytes"] == row["original"]["bytes"] for row in rows)
    scenes = [world.edit(5, index) for index in range(70)]
    rng = np.random.default_rng(0)
    for edit in scenes:
        wrong = world.damaged(rng, edit)
        cells = [a != b for a, b in zip(wrong.edited.cells, edit.edited.cells, strict=True)]
        alone = [a == b != world.EMPTY for a, b in zip(edit.original.cells, edit.edited.cells, strict=True)]
        assert sum(cells) == min(1, sum(alone))
        assert all(alone[cell] for cell, differs in enumerate(cells) if differs)
