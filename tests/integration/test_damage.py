"""Bytes that were damaged on disk, names and sizes unchanged, are found before they are used, by whoever reads them."""

import json
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from earl.data.grids import stored
from earl.data.tokenised import open_dataset
from earl.emu3 import checkpoint, published, saving
from earl.emu3.vocabulary import Vocabulary
from earl.execution import ranks
from earl.files import atomic, manifest, tables
from earl.learner import grpo, sharding, trainer_state
from earl.learner.trainer_state import TrainerState
from earl.messages.errors import EarlError

VISION = Path(checkpoint.__file__).parent.parent / "shapes" / "vision_tokenizer"


def damage(path: Path, length: int = 4096) -> None:
    """Invert bytes in the middle of a file, beyond any header."""
    length = min(length, path.stat().st_size // 2)
    with open(path, "r+b") as stream:
        stream.seek(-length, 2)
        middle = bytes(byte ^ 1 for byte in stream.read(length))
        stream.seek(-length, 2)
        stream.write(middle)


@pytest.fixture
def policy(policy_folder, tmp_path):
    """A sealed policy that a test may damage."""
    return Path(shutil.copytree(policy_folder, tmp_path / "policy"))


def refused(file: Path):
    return pytest.raises(EarlError, match=rf"{file}: is damaged: its content differs .*; make it again")


def in_torch_engine(folder):
    from earl.engines.torch_engine import TorchEngine

    TorchEngine(torch.device("cpu"), torch.float32, batch_size=8, context=512, constrained=True).load(folder)


READERS = {
    "torch engine": in_torch_engine,
    "learner": lambda folder: sharding.load(folder, ranks.alone(torch.device("cpu")), bfloat16=False),
    "vocabulary": Vocabulary.from_folder,
    "conversion": lambda folder: published.convert(folder, folder.with_name("converted")),
}


@pytest.mark.parametrize(
    ("reader", "file"),
    [
        ("torch engine", "model.safetensors"),
        ("torch engine", "tokenizer.json"),
        ("learner", "model.safetensors"),
        ("vocabulary", "tokenizer.json"),
        ("conversion", "model.safetensors"),
        ("conversion", "tokenizer.json"),
    ],
)
def test_a_damaged_policy_is_not_read(policy, reader, file):
    READERS[reader](policy)
    damage(policy / file)
    with refused(policy / file):
        READERS[reader](policy)


def test_a_digit_that_changed_in_the_configuration_is_found(policy):
    file = policy / "config.json"
    before = file.read_text()
    theta = json.loads(before)["text_config"]["rms_norm_eps"]
    file.write_text(before.replace(str(theta), str(theta).replace("1", "9", 1), 1))
    assert len(file.read_text()) == len(before)
    assert file.read_text() != before
    with refused(file):
        in_torch_engine(policy)


@pytest.mark.slow
def test_a_damaged_policy_is_not_read_by_vllm(policy, vllm_engine):
    vllm_engine.load(policy)
    damage(policy / "model.safetensors")
    vllm_engine._digest = None  # as in another process
    with refused(policy / "model.safetensors"):
        vllm_engine.load(policy)


def test_a_folder_that_nobody_sealed_loads_as_it_is(policy):
    (policy / manifest.NAME).unlink()
    damage(policy / "model.safetensors", 1)
    in_torch_engine(policy)


def test_a_damaged_tokenizer_is_not_copied_into_the_next_policy(policy, tmp_path):
    model = checkpoint.load_policy(policy, torch.float32, "cpu")
    damage(policy / "tokenizer_config.json")
    with refused(policy / "tokenizer_config.json"), atomic.folder(tmp_path / "next") as temporary:
        saving.save_policy(model, temporary, saving.companions(policy))
    assert not (tmp_path / "next").exists()


def test_a_damaged_vision_tokenizer_is_not_read(tmp_path):
    folder = Path(shutil.copytree(VISION, tmp_path / "vision"))
    manifest.seal(folder)
    checkpoint.load_vision_tokenizer(folder, "cpu")
    damage(next(folder.glob("*.safetensors")))
    with refused(next(folder.glob("*.safetensors"))):
        checkpoint.load_vision_tokenizer(folder, "cpu")


def small_learner():
    model = torch.nn.Linear(64, 64)
    optimizer = grpo.new_optimizer(model, 1e-3)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def trainer(tmp_path):
    model, optimizer = small_learner()
    with atomic.folder(tmp_path / "trainer") as temporary:
        state = TrainerState(3, 1, "p", "c", "v")
        trainer_state.save(temporary, model, optimizer, state, ranks.alone(torch.device("cpu")))
    return tmp_path / "trainer"


def load_trainer(folder):
    team = ranks.alone(torch.device("cpu"))
    trainer_state.load(folder, *small_learner(), team, iteration=3, policy_digest="p", config_digest="c")


def test_damaged_moments_are_not_read(trainer):
    load_trainer(trainer)
    file = trainer / "optimizer-00001-of-00001.safetensors"
    damage(file, 4)
    with pytest.raises(EarlError, match=rf"{file}: is damaged: its content differs .*earl restore"):
        load_trainer(trainer)


def test_a_counter_that_changed_in_the_trainer_state_is_found(trainer):
    file = trainer / "state.json"
    file.write_text(file.read_text().replace('"optimizer_steps": 1', '"optimizer_steps": 7'))
    with pytest.raises(EarlError, match=rf"{file}: is damaged: its content differs .*earl restore"):
        load_trainer(trainer)


def test_damage_is_told_in_place_of_what_it_made_a_reader_say(tmp_path):
    (tmp_path / "a").write_text("abc")
    manifest.seal(tmp_path)
    (tmp_path / "a").write_text("abd")
    with pytest.raises(EarlError, match="is damaged: its content differs"), manifest.reading(tmp_path):
        raise ValueError("no such thing")
    with manifest.reading(tmp_path, ["b"]):
        assert (tmp_path / "a").read_text() == "abd"
    with pytest.raises(ValueError, match="another"), manifest.reading(tmp_path, ["b"]):
        raise ValueError("another")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {}}}', "\xff"]
)
def test_a_damaged_manifest_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "a").write_text("abc")
    (tmp_path / manifest.NAME).write_bytes(content.encode("latin-1"))
    with pytest.raises(EarlError, match=rf"{tmp_path / manifest.NAME}: is damaged"):
        manifest.check(tmp_path)


@pytest.fixture
def tokenised(tmp_path):
    """A sealed folder with one tokenised shard."""
    grids = np.random.default_rng(0).integers(0, 256, (60, 8, 8))
    columns = {
        "dataset": ["d"] * 60,
        "example_id": [str(row) for row in range(60)],
        "task": [None] * 60,
        "instruction": [f"remove circle {row}" for row in range(60)],
        "reasoning": [None] * 60,
        "original_tokens": [stored(grid, 256) for grid in grids],
        "target_tokens": [stored(255 - grid, 256) for grid in grids],
        "original": [None] * 60,
        "target": [None] * 60,
    }
    with atomic.folder(tmp_path / "data") as temporary:
        metadata = {"dataset": "d", "codebook_size": "256"}
        tables.write_table(temporary / "0000.parquet", tables.TOKENISED, columns, metadata, rows_per_group=16)
        manifest.seal(temporary)
    return tmp_path / "data"


def examples(folder):
    dataset = open_dataset(folder)
    return [dataset.name] + [
        (one.example_id, one.instruction, one.original_tokens.tolist(), one.target_tokens.tolist())
        for one in (dataset[row] for row in range(len(dataset)))
    ]


def test_no_flipped_byte_of_a_tokenised_shard_changes_an_example_in_silence(tokenised):
    file = tokenised / "0000.parquet"
    content, expected = file.read_bytes(), examples(tokenised)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    silent, told = [], 0
    for place in [*range(4, footer, 97), *range(footer, len(content) - 8, 11)]:
        changed = bytearray(content)
        changed[place] ^= 0x10
        file.write_bytes(changed)
        try:
            if examples(tokenised) != expected:
                silent.append(place)
        except EarlError as error:
            told += str(file) in str(error)
        else:
            assert place < footer, "every byte of the footer counts"
    assert silent == []
    assert told > 300


def test_damaged_downloads_are_not_tokenised(tmp_path):
    """Foreign files rarely carry page checksums."""
    from earl.config import load
    from earl.shapes import dataset
    from earl.stages import tokenise

    demo = Path(__file__).parents[2] / "config" / "demo.jsonnet"
    config = load.load(demo, {"base_exp_dir": str(tmp_path), "run_name": "r"}).config
    raw = tmp_path / "download"
    raw.mkdir()
    dataset.write_raw(raw / "a.parquet", count=8, seed=1, tasks=("remove",))
    table = pq.read_table(raw / "a.parquet")
    pq.write_table(table, raw / "a.parquet", compression="none", use_dictionary=False, write_page_checksum=False)
    manifest.seal(raw)
    content = (raw / "a.parquet").read_bytes()
    assert content.count(b"circle") > 0
    (raw / "a.parquet").write_bytes(content.replace(b"circle", b"cyrcle"))
    with pytest.raises(EarlError, match=r"(content|footer) differs"):
        tokenise.run(config, "shapes_rl", raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_damaged_judge_is_not_asked(tmp_path, monkeypatch):
    vllm = pytest.importorskip("vllm")
    from earl.judges.vllm_model import VllmModel

    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(8192))
    manifest.seal(folder)
    monkeypatch.setattr(vllm, "LLM", lambda **options: MagicMock())
    VllmModel(str(folder))._load()
    damage(folder / "model.safetensors")
    judge = VllmModel(str(folder))
    for _ in range(2):  # the second time, too
        with refused(folder / "model.safetensors"):
            judge._load()
