"""The judge of the shapes world: right edits high, half edits between, copies and nonsense near 0."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from earl.judges import Judgement, Verdict
from earl.judges.program import ProgramJudge
from earl.shapes import world

RED_CIRCLE, BLUE_CIRCLE = world.kind_of(0, 0), world.kind_of(2, 0)
GREEN_SQUARE, YELLOW_TRIANGLE = world.kind_of(1, 1), world.kind_of(3, 2)
WHITE, BLACK = 0, 2
SCENE = world.Scene(WHITE, (RED_CIRCLE, 0, 0, 0, 0, GREEN_SQUARE, 0, 0, 0, 0, YELLOW_TRIANGLE, 0, 0, 0, 0, 0))

TARGETS = {
    "recolour": SCENE.with_cells({0: BLUE_CIRCLE}),
    "remove": SCENE.with_cells({5: 0}),
    "add": SCENE.with_cells({3: BLUE_CIRCLE}),
    "background": world.Scene(BLACK, SCENE.cells),
    "move": SCENE.with_cells({0: 0, 4: RED_CIRCLE}),
    "swap": SCENE.with_cells({0: GREEN_SQUARE, 5: RED_CIRCLE}),
    "count": SCENE.with_cells({12: BLUE_CIRCLE, 13: BLUE_CIRCLE, 14: BLUE_CIRCLE}),
}
HALVES = {
    "move": SCENE.with_cells({4: RED_CIRCLE}),
    "swap": SCENE.with_cells({0: GREEN_SQUARE}),
    "count": SCENE.with_cells({12: BLUE_CIRCLE, 13: BLUE_CIRCLE}),
}


def judge(edited: np.ndarray, target: world.Scene, original: world.Scene = SCENE) -> Verdict:
    question = Judgement("words", world.render(original), edited, world.render(target))
    (verdict,) = ProgramJudge().score([question])
    assert verdict.status == "ok"
    return verdict


def viescore(verdict: Verdict) -> float:
    semantic = min(verdict.edit_success, verdict.overedit)
    return math.sqrt(semantic * min(verdict.naturalness, verdict.artifacts))


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def softened(scene: world.Scene) -> np.ndarray:
    """What a good image tokenizer does to a picture: errors of about 2 % of the range."""
    error = np.random.default_rng(1).normal(0, 5, (64, 64, 3))
    return np.clip(world.render(scene) + error, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("task", TARGETS)
def test_the_target_scores_full_marks(task):
    verdict = judge(world.render(TARGETS[task]), TARGETS[task])
    assert verdict.edit_success == verdict.overedit == verdict.ground_score == 10
    assert verdict.naturalness == verdict.artifacts == 10


@pytest.mark.parametrize("task", TARGETS)
def test_the_order_of_target_copy_and_nonsense(task):
    target = TARGETS[task]
    good, copy = viescore(judge(softened(target), target)), viescore(judge(softened(SCENE), target))
    assert good > 9.5
    assert copy == 0
    for background in world.BACKGROUNDS.values():
        assert viescore(judge(np.full((64, 64, 3), background, np.uint8), target)) == 0
    assert viescore(judge(noise(), target)) == 0


@pytest.mark.parametrize("task", HALVES)
def test_half_an_edit_lies_between_copy_and_target(task):
    verdict = judge(softened(HALVES[task]), TARGETS[task])
    assert 2 < viescore(verdict) < 9
    assert 2 < verdict.ground_score < 9


def test_part_of_a_background_pays_and_more_of_it_pays_more():
    target = TARGETS["background"]
    pixels, scores = world.render(SCENE), []
    for rows in (16, 32, 48, 64):
        mixed = pixels.copy()
        mixed[:rows] = world.render(target)[:rows]
        scores.append(viescore(judge(mixed, target)))
    assert scores[0] > 1
    assert scores == sorted(set(scores))
    assert scores[-1] == 10


def test_damage_lowers_overedit_and_leaves_success_alone():
    target = TARGETS["recolour"]
    damaged = target.with_cells({10: 0})
    more = damaged.with_cells({5: 0, 15: BLUE_CIRCLE})
    scores = [judge(world.render(scene), target) for scene in (target, damaged, more)]
    assert [verdict.edit_success for verdict in scores] == [10, 10, 10]
    assert scores[0].overedit > scores[1].overedit > scores[2].overedit
    assert scores[0].ground_score > scores[1].ground_score > scores[2].ground_score
    # One object is gone: 6 of the 8 cells at which overedit reaches 0.
    assert viescore(scores[1]) == pytest.approx((2.5 * 10) ** 0.5)


def test_an_object_costs_more_than_an_empty_cell():
    target = TARGETS["recolour"]
    lost = judge(world.render(target.with_cells({10: 0})), target)
    spurious = judge(world.render(target.with_cells({15: YELLOW_TRIANGLE})), target)
    assert lost.overedit < spurious.overedit < 10


def test_removing_two_at_a_guess_pays_no_more_than_removing_one():
    """Of n objects one is meant: a guess at one earns 10 / n on average, a guess at two has twice the chance."""
    target = TARGETS["remove"]
    one = viescore(judge(world.render(target), target))
    two = viescore(judge(world.render(target.with_cells({10: 0})), target))
    assert one == 10
    assert 0 < two <= one / 2


def test_the_wrong_colour_is_no_success():
    green = SCENE.with_cells({0: world.kind_of(1, 0)})
    assert judge(world.render(green), TARGETS["recolour"]).edit_success < 3


def test_artifacts_are_seen_without_the_original():
    broken = world.render(TARGETS["remove"]).copy()
    broken[:, 32:] = noise()[:, 32:]
    verdict = judge(broken, TARGETS["remove"])
    assert verdict.artifacts == 0
    elsewhere = judge(broken, TARGETS["swap"])
    assert (elsewhere.artifacts, elsewhere.naturalness) == (verdict.artifacts, verdict.naturalness)


def test_two_backgrounds_are_not_natural():
    pixels = world.render(SCENE)
    pixels = np.where(np.arange(64)[:, None, None] < 24, world.render(TARGETS["background"]), pixels)
    assert 0 < judge(pixels, TARGETS["remove"]).naturalness < judge(world.render(SCENE), TARGETS["remove"]).naturalness


def test_scores_do_not_depend_on_company_and_stay_in_range():
    rng = np.random.default_rng(2)
    questions = []
    for index in range(35):
        edit = world.edit(1, index)
        target = world.render(edit.edited)
        mixed = np.where(rng.random((64, 64, 1)) < rng.random(), target, noise(index))
        questions.append(Judgement(edit.instruction, world.render(edit.original), mixed, target, edit.task))
    together = ProgramJudge().score(questions)
    alone = [ProgramJudge().score([question])[0] for question in questions]
    for one, other in zip(together, alone, strict=True):
        for column in ("edit_success", "overedit", "naturalness", "artifacts", "ground_score"):
            assert 0 <= getattr(one, column) <= 10
            assert getattr(one, column) == pytest.approx(getattr(other, column), abs=0.02)
    assert json.loads(together[0].raw).keys() >= {"edit_done", "damaged_cells"}


def test_what_it_cannot_judge_fails_by_name_and_the_rest_is_judged():
    pixels, target = world.render(SCENE), world.render(TARGETS["swap"])
    questions = [
        Judgement("words", pixels, target, None),
        Judgement("words", pixels, target, target),
        Judgement("words", pixels, target[:32], target),
    ]
    no_target, judged, small = ProgramJudge().score(questions)
    assert (no_target.status, judged.status, small.status) == ("failed", "ok", "failed")
    assert "target" in no_target.raw
    assert "edited" in small.raw
    assert "[32, 64, 3]" in small.raw
    assert no_target.edit_success is None
    assert small.ground_score is None
    assert judged.edit_success == 10
    assert ProgramJudge().score([]) == []


def test_it_needs_no_torch():
    code = "import sys, earl.judges.program; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
