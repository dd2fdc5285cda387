"""The recipe of a fine-tuning: schedule, optimizer, reasoning keys, held-out loss, and which checkpoints stay."""

import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import get_scheduler

from earl.config import paths
from earl.config.schema import Config
from earl.emu3 import checkpoint
from earl.execution import ranks
from earl.files import manifest, tables
from earl.learner import grpo, sft
from earl.learner.schedule import Schedule
from earl.learner.settings import AdamW
from earl.messages.errors import EarlError
from earl.stages import sft as stage
from tests.support.sft_files import SETTINGS, plain_cross_entropy

PUBLISHED = {
    "learning_rate": 1e-4,
    "final_learning_rate": 1e-5,
    "warmup_steps": 30,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "max_gradient_norm": 5.0,
}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Peak 8, final 2; up in 2 steps, then over 4: 0, 1/4, 1/2 and 3/4 of the way.
        ("constant", [4, 8, 8, 8, 8, 8]),
        ("linear", [4, 8, 8, 6.5, 5, 3.5]),
        ("cosine", [4, 8, 8, 5 + 3 * math.sqrt(0.5), 5, 5 - 3 * math.sqrt(0.5)]),
    ],
)
def test_rates_by_hand(schedule, expected):
    settings = replace(SETTINGS, schedule=schedule, steps=6, warmup_steps=2, learning_rate=8, final_learning_rate=2)
    assert [sft.learning_rate(step, settings) for step in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Peak 8, final 2; up in 1 step, at the peak for 2, then down over 3: 0, 1/3 and 2/3 of the way.
        ("linear", [8, 8, 8, 8, 6, 4]),
        ("cosine", [8, 8, 8, 8, 6.5, 3.5]),
    ],
)
def test_rates_that_fall_late_by_hand(schedule, expected):
    settings = replace(SETTINGS, schedule=schedule, steps=6, warmup_steps=1, learning_rate=8, final_learning_rate=2)
    rates = [sft.learning_rate(step, replace(settings, decay_steps=3)) for step in range(6)]
    assert rates == pytest.approx(expected)


def test_a_schedule_stays_at_its_end():
    rate = Schedule(8.0, 4, 2.0, "linear").rate
    assert [rate(step) for step in range(7)] == pytest.approx([8, 6.5, 5, 3.5, 2, 2, 2])
    assert [Schedule(8.0).rate(step) for step in (0, 10**6)] == [8, 8]
    assert [Schedule(8.0, 4, warmup=4, shape="cosine").rate(step) for step in range(5)] == [2, 4, 6, 8, 0]


def test_the_published_schedule_is_that_of_transformers():
    """Its warm-up begins at 0, ours one step further on, so that the first step is not for nothing."""
    steps, settings = 200, replace(SETTINGS, steps=200, warmup_steps=30, learning_rate=1e-4, final_learning_rate=1e-5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = get_scheduler("cosine_with_min_lr", optimizer, 30, steps, scheduler_specific_kwargs={"min_lr": 1e-5})
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = [sft.learning_rate(step, settings) for step in range(steps)]
    assert ours[30:] == pytest.approx(rates[30:])
    assert ours[:29] == pytest.approx(rates[1:30])
    assert rates[0] == 0


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.tensor([[2.0]]))
        self.norm = torch.nn.Parameter(torch.tensor([2.0]))


def test_two_steps_of_adamw_by_hand():
    """Betas 0.5 and 0.75, eps 1, rate 0.1, decay 0.5, gradients 4 and 2.

    First step: mean 2 and mean square 4 are 4 and 16 once corrected, so it is 0.1 * 4 / (4 + 1). Second: a mean of
    0.5 * 2 + 0.5 * 2 = 2 is divided by 1 - 0.5^2, a mean square of 0.75 * 4 + 0.25 * 4 = 4 by 1 - 0.75^2. Before each,
    the matrix is multiplied by 1 - 0.1 * 0.5.
    """
    model = Small()
    optimizer = grpo.new_optimizer(model, 0.1, AdamW((0.5, 0.75), 1.0, 0.5))
    matrix, norm = 2.0, 2.0
    for gradient, moved in ((4.0, 0.08), (2.0, 0.1 * (2 / 0.75) / (math.sqrt(4 / 0.4375) + 1))):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        matrix, norm = matrix * 0.95 - moved, norm - moved
        assert model.matrix.item() == pytest.approx(matrix, rel=1e-6)
        assert model.norm.item() == pytest.approx(norm, rel=1e-6)


def test_norms_alone_do_not_decay(policy_folder):
    policy = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    optimizer = grpo.new_optimizer(policy, 0.1, AdamW(weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in policy.named_parameters():
        factor = 1.0 if name.endswith("norm.weight") else 0.95
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.parametrize(("bound", "moved"), [(2.5, 0.5), (10.0, 1.0), (None, 1.0)])
def test_gradients_are_clipped_to_the_norm_of_the_recipe(bound, moved):
    """A gradient of norm 5: 3 and 4."""
    model = Small()
    model.matrix.grad, model.norm.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    totals = grpo.Totals(loss=1.0, tokens=1)
    norm = grpo.optimizer_step(model, torch.optim.SGD(model.parameters(), lr=1.0), totals, bound)
    assert norm == pytest.approx(5.0)
    assert [2 - model.matrix.item(), 2 - model.norm.item()] == pytest.approx([3 * moved, 4 * moved], rel=1e-5)


def weights_of(folder: Path) -> torch.Tensor:
    policy = checkpoint.load_policy(folder, torch.float32, "cpu")
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def curve_of(folder: Path) -> dict:
    return json.loads((folder / "sft.json").read_text())


@pytest.mark.slow
def test_every_field_of_the_recipe_reaches_the_weights(make, tmp_path):
    plain = {"steps": 4, "warmup_steps": 0, "max_gradient_norm": 0.5}
    stage.run(make(one=plain), "one", tmp_path / "plain")
    expected = weights_of(tmp_path / "plain")
    changes = {
        "final_learning_rate": 1e-3,
        "schedule": "linear",
        "weight_decay": 0.5,
        "adam_beta1": 0.5,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-3,
        "max_gradient_norm": 0.1,
    }
    for name, value in changes.items():
        stage.run(make(one=plain | {name: value, "adam_epsilon": changes["adam_epsilon"]}), "one", tmp_path / name)
    # Adam does not see a gradient's size but for its epsilon, so bounds are compared beside a large one.
    beside = weights_of(tmp_path / "adam_epsilon")
    assert not torch.equal(beside, expected)
    for name in changes.keys() - {"adam_epsilon"}:
        assert not torch.equal(weights_of(tmp_path / name), beside), name


def test_the_curve_says_loss_norm_and_rate_of_every_step(make, tmp_path):
    stage.run(make(one={"steps": 5, "schedule": "constant"}), "one", tmp_path / "out")
    curve = curve_of(tmp_path / "out")
    assert curve["learning_rate"] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3, 3e-3])
    assert len(curve["loss"]) == len(curve["gradient_norm"]) == 5
    assert min(curve["gradient_norm"]) > 0
    assert "validation" not in curve


def test_a_recipe_that_contradicts_itself_is_refused(make):
    for fields, field, remedy in (
        ({"schedule": "constant", "final_learning_rate": 1e-4}, "final_learning_rate", "leave it out"),
        ({"final_learning_rate": 1.0}, "final_learning_rate", "above learning_rate"),
        ({"steps": 3, "warmup_steps": 4}, "warmup_steps", "3 steps, .* lower it"),
        ({"schedule": "constant", "decay_steps": 4}, "decay_steps", "leave it out"),
        ({"steps": 16, "warmup_steps": 3, "decay_steps": 14}, "decay_steps", "lower it to 13"),
        ({"reasoning_keys": ["box"]}, "reasoning_keys", "reasoning is false"),
        ({"reasoning_fraction": 0.5}, "reasoning_fraction", "reasoning is false"),
        ({"reasoning": True, "reasoning_keys": ["a", "a"]}, "reasoning_keys", "twice"),
    ):
        with pytest.raises(ValidationError, match=remedy) as found:
            make(one=fields)
        assert field in str(found.value.errors()[0]["ctx"])


def test_held_out_data_are_needed_where_the_run_starts_from_it(make):
    config = make(one={"validation": {}}, other={}).model_dump()
    with pytest.raises(ValidationError, match=r"sft\.one\.validation takes examples of it"):
        Config(**config | {"model_path": "stage:sft/one"})
    Config(**config | {"model_path": "stage:sft/other"})
    Config(**config | {"model_path": "stage:sft/one", "val_paths_file": ["held"]})


# Reasoning keys


@pytest.fixture
def thoughtful(data):
    """Return a function that writes a data set whose examples have this reasoning, and returns its folder."""

    def write(name: str, *pairs: tuple[str, str]) -> str:
        folder = Path(data(name))
        table = tables.read_table(folder / "0000.parquet", tables.TOKENISED)
        reasoning = [{"key": key, "value": value} for key, value in pairs]
        columns = table.to_pydict() | {"reasoning": [reasoning] * len(table)}
        tables.write_table(folder / "0000.parquet", tables.TOKENISED, columns, {})
        manifest.seal(folder)
        return str(folder)

    return write


def thoughts(found, vocabulary) -> set[str]:
    texts = {vocabulary.decode(example.completion) for example in found}
    return {text.partition("<|start thinking|> ")[2].partition("<|end thinking|>")[0] for text in texts}


def test_chosen_keys_are_trained_on_in_their_order(make, thoughtful, seen, vocabulary, tmp_path):
    folder = thoughtful("pairs", ("plan", " move it\n"), ("box", "[1, 2]"), ("scene", "a cat"))
    tuning = {"train_paths_file": [folder], "reasoning": True}
    stage.run(make(one=tuning | {"reasoning_keys": ["scene", "plan"]}), "one", tmp_path / "two")
    assert thoughts(seen, vocabulary) == {"scene: a cat plan: move it"}
    seen.clear()
    stage.run(make(one=tuning), "one", tmp_path / "all")
    assert thoughts(seen, vocabulary) == {"plan: move it box: [1, 2] scene: a cat"}


def test_a_key_that_is_missing_is_left_out_and_said_once(
    make,
    thoughtful,
    seen,
    vocabulary,
    tmp_path,
    caplog,
):
    folders = [thoughtful("full", ("plan", "move"), ("box", "[1]")), thoughtful("part", ("plan", "turn"))]
    tuning = {"train_paths_file": folders, "coefficients": [1.0, 1.0], "reasoning": True}
    with caplog.at_level(logging.WARNING):
        stage.run(make(one=tuning | {"reasoning_keys": ["plan", "box"]}), "one", tmp_path / "out")
    assert thoughts(seen, vocabulary) == {"plan: move box: [1]", "plan: turn"}
    said = [record.getMessage() for record in caplog.records if "reasoning" in record.getMessage()]
    assert len(said) == 1
    assert "part: example" in said[0]
    assert "'box'" in said[0]


def test_an_example_with_none_of_the_keys_is_named(make, thoughtful, tmp_path):
    tuning = {"train_paths_file": [thoughtful("pairs", ("plan", "move"))], "reasoning": True}
    with pytest.raises(EarlError, match=r"pairs: example \d+: .* none of the reasoning_keys \(box\); it has: plan"):
        stage.run(make(one=tuning | {"reasoning_keys": ["box"]}), "one", tmp_path / "out")


# Held-out loss


def test_validation_loss_is_plain_cross_entropy_and_changes_no_weights(
    make,
    data,
    policy_folder,
    vocabulary,
    tmp_path,
):
    held_out = {"paths_file": [data("held"), data("out", rows=2)], "examples": 8, "every_n_steps": 3}
    stage.run(make(one={"steps": 7}), "one", tmp_path / "without")
    config = make(one={"steps": 7, "validation": held_out})
    stage.run(config, "one", tmp_path / "with")
    assert torch.equal(weights_of(tmp_path / "with"), weights_of(tmp_path / "without"))
    found = curve_of(tmp_path / "with")["validation"]
    assert found["step"] == [3, 6, 7]
    examples, _ = stage._held_out(config, "one", vocabulary, ranks.alone(torch.device("cpu")))
    prompts = [vocabulary.decode(example.prompt).rpartition("<|image end|>")[2] for example in examples]
    assert len(set(prompts)) == 6, "four of the ten, and both of the two"
    assert sum(prompt.startswith("held") for prompt in prompts) == 4
    expected, _ = plain_cross_entropy(examples, tmp_path / "with")
    assert found["loss"][-1] == pytest.approx(expected, rel=1e-5)


def test_held_out_examples_that_are_too_long_give_their_places_to_the_next_ones(make, data, seen, vocabulary, tmp_path):
    held_out = {"paths_file": [data("held", long=(0, 5, 6))], "examples": 10}
    config = make(s={"validation": held_out}).model_copy(update={"model_context_size": 64})
    team = ranks.alone(torch.device("cpu"))
    examples, left_out = stage._held_out(config, "s", vocabulary, team)
    assert (len(examples), left_out) == (7, 3)
    assert max(map(len, examples)) <= 64
    few = make(s={"validation": held_out | {"examples": 4}}).model_copy(update={"model_context_size": 64})
    first, _ = stage._held_out(few, "s", vocabulary, team)
    assert [list(example.completion) for example in first] == [list(example.completion) for example in examples[:4]]
    stage.run(config, "s", tmp_path / "s")
    curve = curve_of(tmp_path / "s")
    assert (curve["left_out_examples"], curve["left_out_validation_examples"]) == (0, 3)
    wanted = r"field sft\.s\.validation\.paths_file: 3 of 10 examples are too long; first held: example [056]: "
    with pytest.raises(EarlError, match=wanted):
        stage.run(config.model_copy(update={"long_prompts": "stop"}), "s", tmp_path / "strict")


def test_held_out_examples_that_cannot_be_learned_from_are_found_before_the_first_step(
    make, data, monkeypatch, tmp_path
):
    monkeypatch.setattr(sft, "fine_tune", lambda *_: pytest.fail("the fine-tuning has begun"))
    silent = {"paths_file": [data("silent", reasoned=False)]}
    config = make(s={"reasoning": True, "validation": silent}, none={"validation": {}})
    wanted = r"field sft\.s\.validation\.paths_file: silent: example \d+: column 'reasoning' is empty"
    with pytest.raises(EarlError, match=wanted):
        stage.run(config, "s", tmp_path / "s")
    with pytest.raises(EarlError, match="field val_paths_file: there is no data set to validate on"):
        stage.run(config, "none", tmp_path / "none")


def test_what_it_is_validated_on_is_an_input_of_the_stage(make, tmp_path):
    config = make(one={"validation": {"paths_file": [str(tmp_path / "held")], "examples": 2}})
    start = {"model_path": "stage:sft/one", "vision_tokenizer_path": "package:shapes/vision_tokenizer"}
    (shared,) = paths.shared_stages(config.model_copy(update=start)).values()
    assert tmp_path / "held" in shared.inputs


# Checkpoints


@pytest.mark.slow
def test_policies_of_every_nth_step_stay_and_load(make, tmp_path):
    recipe = {"schedule": "constant", "learning_rate": 1e-3, "validation": None}
    stage.run(make(one=recipe | {"steps": 7, "keep_checkpoints_every_n_steps": 2}), "one", tmp_path / "out")
    kept = sorted((tmp_path / "out.checkpoints").iterdir())
    assert [folder.name for folder in kept] == ["step-000002", "step-000004", "step-000006"]
    stage.run(make(one=recipe | {"steps": 4}), "one", tmp_path / "four")
    assert torch.equal(weights_of(kept[1]), weights_of(tmp_path / "four"))
    manifest.check(kept[1], deep=True)


@pytest.mark.slow
def test_it_resumes_from_the_steps_that_are_named(make, data, tmp_path, monkeypatch):
    recipe = {"steps": 11, "keep_checkpoints_every_n_steps": 5}
    recipe["validation"] = {"paths_file": [data("held")], "examples": 3, "every_n_steps": 2}
    saving = recipe | {"save_checkpoints_every_n_steps": 3}
    stage.run(make(one=recipe), "one", tmp_path / "undisturbed")
    steps = []
    plain = sft.train_step

    def until_the_eighth(*args):
        if args[4] == 7 and len(steps) < 8:
            raise KeyboardInterrupt
        steps.append(args[4])
        return plain(*args)

    monkeypatch.setattr(sft, "train_step", until_the_eighth)
    with pytest.raises(KeyboardInterrupt):
        stage.run(make(one=saving), "one", tmp_path / "out")
    assert [folder.name for folder in (tmp_path / "out.partial").iterdir()] == ["step-000006"]
    steps.extend([0] * 8)
    stage.run(make(one=saving), "one", tmp_path / "out")
    assert steps[-5:] == [6, 7, 8, 9, 10]
    for folder in ("", ".checkpoints/step-000005", ".checkpoints/step-000010"):
        digests = [manifest.digest_folder(tmp_path / f"{name}{folder}") for name in ("out", "undisturbed")]
        assert digests[0] == digests[1], folder


def damage(folder: Path) -> None:
    """Change one bit of the last weight of a folder, which stays a valid file."""
    file = max(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def test_damaged_checkpoints_are_named(make, tmp_path, monkeypatch):
    recipe = {"steps": 3, "keep_checkpoints_every_n_steps": 1, "save_checkpoints_every_n_steps": 1}
    plain = sft.train_step

    def until_the_third(*args):
        if args[4] == 2:
            raise KeyboardInterrupt
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "train_step", until_the_third)
        with pytest.raises(KeyboardInterrupt):
            stage.run(make(one=recipe), "one", tmp_path / "out")
    damage(tmp_path / "out.partial" / "step-000002")
    with pytest.raises(EarlError, match=r"step-000002/.* is damaged: .*; remove .*out\.partial to begin anew"):
        stage.run(make(one=recipe), "one", tmp_path / "out")
    kept = tmp_path / "out.checkpoints" / "step-000001"
    damage(kept)
    with pytest.raises(EarlError, match=r"step-000001/.* is damaged: its content differs"):
        stage.run(make(one=recipe | {"base_model": str(kept)}), "one", tmp_path / "next")


def test_how_often_it_saves_makes_no_other_model(make):
    often = make(one={"save_checkpoints_every_n_steps": 1})
    assert paths.sft_folder(often, "one") == paths.sft_folder(make(one={}), "one")
    kept = make(one={"keep_checkpoints_every_n_steps": 1})
    assert paths.sft_folder(kept, "one") != paths.sft_folder(make(one={}), "one")


def test_the_published_recipe_is_accepted(make):
    tuning = make(one=PUBLISHED | {"steps": 11_600}).sft["one"]
    assert {name: getattr(tuning, name) for name in PUBLISHED} == PUBLISHED
    assert np.isclose(sft.learning_rate(29, replace(SETTINGS, warmup_steps=30, learning_rate=1e-4)), 1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.2])
def test_a_sequence_whose_instruction_counts(make, data, vocabulary, weight):
    held_out = {"paths_file": [data("held")], "examples": 4}
    config = make(s={"instruction_loss_weight": weight, "validation": held_out}, plain={"validation": held_out})
    team = ranks.alone(torch.device("cpu"))
    examples, plain = (stage._held_out(config, name, vocabulary, team)[0] for name in ("s", "plain"))
    assert len(examples) == 4
    for example, other in zip(examples, plain, strict=True):
        words = vocabulary.decode(example.completion[: example.instruction_tokens])
        assert re.fullmatch(r"\w+ \d+" if weight else "", words)
        sequences = (np.concatenate([one.prompt, one.completion]) for one in (example, other))
        assert np.array_equal(*sequences)
        assert example.answer_tokens == len(other.completion)


def test_some_examples_reason_and_others_do_not(make, data, vocabulary):
    held_out, team = {"paths_file": [data("held", rows=60)], "examples": 60}, ranks.alone(torch.device("cpu"))
    shares = {"never": {}, "some": {"reasoning": True, "reasoning_fraction": 0.3}, "always": {"reasoning": True}}
    config = make(**{name: fields | {"validation": held_out} for name, fields in shares.items()})
    never, some, always = (stage._held_out(config, name, vocabulary, team)[0] for name in shares)
    chosen = [len(mixed) == len(reasoned) for mixed, reasoned in zip(some, always, strict=True)]
    assert 8 <= sum(chosen) <= 28
    for mixed, plain, reasoned, reasons in zip(some, never, always, chosen, strict=True):
        assert np.array_equal(mixed.completion, (reasoned if reasons else plain).completion)
        assert len(plain) < len(reasoned)
