"""Tokenised data without pictures, whose prompts are drawn, and a configuration that draws from it."""

from pathlib import Path

from earl.config.schema import Config
from earl.emu3.vocabulary import Vocabulary
from earl.files import tables
from tests.support.demo import ROOT
from tests.support.workplace import EXPERIMENT

VOCABULARY = Vocabulary.from_folder(ROOT / "earl" / "shapes" / "base_policy")
ROWS = 40


def write(path: Path, long: tuple[int, ...]) -> Path:
    columns: dict[str, list] = {name: [None] * ROWS for name in tables.TOKENISED.names}
    columns |= {"dataset": ["d"] * ROWS, "example_id": [f"e{row}" for row in range(ROWS)]}
    columns["instruction"] = ["edit " * (60 if row in long else 1) + str(row) for row in range(ROWS)]
    columns["original_tokens"] = [{"height": 2, "width": 3, "ids": bytes(6)}] * ROWS
    tables.write_table(path, tables.TOKENISED, columns, {"dataset": "d"}, rows_per_group=4)
    return path


def config(data: Path, **fields: object) -> Config:
    values = {"train_paths_file": [str(data)], "val_paths_file": [str(data)], "max_prompt_len": 40}
    values |= {"episodes_per_iteration": 32, "generations_per_sample": 2, "engine_batch_size": 2}
    return Config(**(EXPERIMENT | values | {"assistant_prefill": "<|image start|>"} | fields))
