"""Each distinct picture is decoded once and encoded once, however many rows, samples, rubrics and passes show it."""

import json
from collections import Counter

import numpy as np
import pytest

from earl.files import images, tables
from earl.judges import Judgement, known_order, rubric
from earl.judges.chat import Pass, Question, Reply
from earl.judges.model_judge import ModelJudge, Settings
from earl.stages import score
from tests.support import judge_files

EXAMPLES, EDITS = 3, 4
NUMBERS = ("edit_success", "overedit", "naturalness", "artifacts", "ground_score")


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often pictures were encoded and decoded."""
    found: Counter = Counter()

    def counted(name, function):
        def call(*arguments):
            found[name] += 1
            return function(*arguments)

        return call

    for name in ("encode", "decode", "resize"):
        monkeypatch.setattr(images, name, counted(name, getattr(images, name)))
    return found


class Model:
    """Gives every picture the same scores."""

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def ask(self, questions, take):
        self.asked += questions
        for index, question in enumerate(questions):
            scores = {name: 5 for name in question.schema["properties"] if name in NUMBERS}
            take(index, Reply([Pass(json.dumps(scores), "stop")]))


def judge(**settings) -> tuple[ModelJudge, Model]:
    model = Model()
    folder = rubric.Path(rubric.__file__).parent / "rubrics"
    rubrics = [rubric.load(path) for path in sorted(folder.glob("*.jsonnet"))]
    assert {name for one in rubrics for name in one.images} == {"original", "target", "edited"}
    return ModelJudge("fake", model, rubrics, Settings("m", None, **settings)), model


def urls_of(model: Model) -> list[str]:
    parts = [part for question in model.asked for part in question.messages[0]["content"]]
    return [part["image_url"]["url"] for part in parts if "image_url" in part]


def distinct(rows: list[dict], *columns: str) -> int:
    return len({row[column]["bytes"] for row in rows for column in columns if row[column] is not None})


def test_a_shard_of_scores(tmp_path, calls):
    """Four edits of each example share original and target, and three rubrics show six pictures of every edit."""
    path = tmp_path / "rollouts.parquet"
    rows = judge_files.write_rollouts(path, EXAMPLES, {"episode_id": "p-again"})
    asked = [row for row in rows if row["edited"] is not None]
    assert len(asked) == EXAMPLES * EDITS + 1
    calls.clear()
    by_model, model = judge()
    score.run(judge_files.config(tmp_path, "m"), path, tmp_path / "scores.parquet", by_model)
    statuses = tables.read_table(tmp_path / "scores.parquet", tables.MODEL_SCORES)["status"].to_pylist()
    assert statuses.count("ok") == len(asked)
    pictures = distinct(asked, "original", "target", "edited")
    # A copy of the source and a perfect edit are among the edits of each example: two pictures more are none.
    assert pictures < EXAMPLES * (EDITS + 2)
    assert calls == {"decode": pictures, "encode": pictures}
    urls = urls_of(model)
    assert len(urls) > 2 * pictures, "most are shown more than once"
    assert len(set(map(id, urls))) == len(set(urls)) == pictures, "and lie in memory once"


def test_pairs_for_the_judge_check(tmp_path, calls):
    ranked = known_order.of_shapes(2, seed=5)
    known_order.write(tmp_path / "pairs.parquet", ranked)
    calls.clear()
    found = known_order.read(tmp_path / "pairs.parquet")
    pictures = {getattr(one.judgement, name).tobytes() for one in found for name in ("original", "target", "edited")}
    assert (len(found), calls) == (len(ranked), {"decode": len(pictures)})


def test_pictures_are_resized_once(calls):
    by_model, _ = judge(image_size=4)
    original, other = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8, 3), np.uint8)
    asked = [Judgement("make it red", original.copy(), edited, original.copy()) for edited in (original, other, other)]
    by_model.score(asked)
    assert calls == {"resize": 2, "encode": 2}


def test_pictures_of_the_same_bytes_but_another_shape_are_two(calls):
    by_model, model = judge()
    pixels = np.arange(24, dtype=np.uint8)
    by_model.score([Judgement("x", pixels.reshape(2, 4, 3), pixels.reshape(4, 2, 3), pixels.reshape(1, 8, 3))])
    assert calls == {"encode": 3}
    assert len(set(urls_of(model))) == 3
