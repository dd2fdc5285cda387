"""Selecting completions of a run: which ones, that nothing of them changes, and what is refused."""

import json
import re
import shutil

import numpy as np
import pytest
from pydantic import ValidationError

from earl.config import freeze, paths
from earl.config.schema import Config
from earl.config.sections import Sft
from earl.data.tokenised import open_dataset
from earl.emu3 import sequence
from earl.files import manifest, tables
from earl.learner import sft as learner
from earl.messages.errors import EarlError
from earl.run import preflight, selections
from earl.stages import select
from earl.stages import sft as stage
from tests.support import sft_files, train_files

SCORES = ("edit_success", "overedit", "naturalness", "artifacts")


# Which ones


def group(*rewards):
    return [{"episode_id": f"{place:02d}", "reward": reward} for place, reward in enumerate(rewards)]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ((4.0, 9.0, 2.0), ("01", "02")),
        ((9.0, 2.0, 9.0, 2.0), ("00", "01")),  # of equal ones the first
        ((None, 5.0, None, 6.0), ("03", "01")),
        ((0.1, 0.1, 0.1), "whose rewards are all equal"),
        ((None, 5.0), "with fewer than two judged edits"),
        ((None, None), "with fewer than two judged edits"),
    ],
)
def test_the_best_and_the_worst_of_a_group(rewards, expected):
    for order in (1, -1):
        found = select.preferred(group(*rewards)[::order])
        assert (found if isinstance(found, str) else tuple(row["episode_id"] for row in found)) == expected


def test_the_best_one_must_have_the_minimum_reward():
    assert select.preferred(group(3.0, 7.0), 7.0)[0]["episode_id"] == "01"
    assert select.preferred(group(3.0, 7.0), 7.5) == "below minimum_reward"


# The stage


def scores(row, value):
    row.update(dict.fromkeys(SCORES, value))


def by_hand(row):
    """Group 0: 4 and 9. Group 1: both 5. Group 2: 8, and one that failed. Group 3: 8, and one that was cut off."""
    place, sample = int(row["example_id"]), row["sample_index"]
    scores(row, [(4, 9), (5, 5), (8, 8), (8, 8)][place][sample])
    if sample and place == 2:
        row.update(dict.fromkeys((*SCORES, "ground_score")), status="failed")
    if sample and place == 3:
        row["finish_reason"] = "length"


@pytest.fixture
def source(new_run, policy_folder, vocabulary):
    """Return a function that writes a run with a number of complete iterations."""

    def make(edit=by_hand, iterations=1):
        _, run = new_run("source")
        for index in range(1, iterations + 1):
            train_files.write_inputs(run, index, vocabulary, edit=edit)
            inputs = {"policy": manifest.digest_folder(policy_folder), "rollouts": [""], "scores": [""]}
            metrics = {"policy_digest": inputs["policy"], "inputs": inputs, "episodes": 8}
            run.iteration(index).metrics.parent.mkdir()
            run.iteration(index).metrics.write_text(json.dumps(metrics))
            run.iteration(index).policy.symlink_to(policy_folder)
        return run

    return make


@pytest.fixture
def config(tmp_path, policy_folder):
    """Return a function that gives a configuration with a selection `x` of a run, and fine-tunings on it."""

    def make(run, tunings=(), **fields):
        recipe = {"base_model": str(policy_folder), "train_paths_file": ["stage:select/x"], "steps": 6}
        recipe |= {"batch_size": 3, "learning_rate": 3e-3}
        values = sft_files.config(tmp_path, policy_folder, "").model_dump()
        values["sft"] = {name: recipe | more for name, more in dict(tunings).items()}
        return Config(**values | {"selections": {"x": {"run": str(run.path)} | fields}})

    return make


def rollouts(run, index=1):
    table = tables.read_table(run.iteration(index).rollouts(0), tables.ROLLOUTS)
    return {row["episode_id"]: row for row in table.to_pylist()}


def test_what_is_selected_by_hand(source, config, tmp_path, vocabulary):
    run = source()
    select.run(config(run), "x", tmp_path / "x")
    (example,) = (open_dataset(tmp_path / "x", vocabulary.num_visual)[i] for i in range(1))
    best, worst = (rollouts(run)[f"000001-0000-0{sample}"] for sample in (1, 0))
    assert (example.dataset, example.example_id, example.instruction) == ("made up", "0", best["instruction"])
    assert np.array_equal(example.original_tokens, sequence.parse_completion(best["prompt_token_ids"], vocabulary))
    assert np.array_equal(example.target_tokens, sequence.parse_completion(best["completion_token_ids"], vocabulary))
    opening = [vocabulary.boi]
    assert example.chosen.tolist() == opening + best["completion_token_ids"]
    assert example.rejected.tolist() == opening + worst["completion_token_ids"]
    assert json.loads((tmp_path / "x" / "summary.json").read_text()) == {
        "groups": 4,
        "kept": 1,
        "left_out": {"whose rewards are all equal": 1, "with fewer than two judged edits": 2},
    }
    metadata = tables.read_metadata(tmp_path / "x" / "data" / "000001.parquet")
    assert json.loads(metadata["rollouts_digests"]) == [manifest.digest_file(run.iteration(1).rollouts(0))]
    assert json.loads(metadata["scores_digests"]) == [manifest.digest_file(run.iteration(1).scores(0))]
    manifest.check(tmp_path / "x", deep=True)


def test_equal_inputs_give_equal_bytes_and_others_others(source, config, tmp_path, vocabulary):
    run = source()
    for name in ("one", "two"):
        select.run(config(run), "x", tmp_path / name)
    train_files.write_inputs(run, 1, vocabulary, edit=lambda row: scores(row, 9 - int(row["sample_index"])))
    select.run(config(run), "x", tmp_path / "other")
    digests = [manifest.digest_folder(tmp_path / name) for name in ("one", "two", "other")]
    assert digests[0] == digests[1] != digests[2]


def test_the_present_reward_decides_and_makes_another_folder(source, config, tmp_path, vocabulary):
    def ground(row):
        scores(row, 5)
        row["ground_score"] = 3 + row["sample_index"]

    given = config(source(ground))
    with pytest.raises(EarlError, match=r"field selections.x: no group .* is left; 4 whose rewards are all equal"):
        select.run(given, "x", tmp_path / "x")
    other = given.model_copy(update={"reward_final_reward": "ground_score"})
    select.run(other, "x", tmp_path / "x")
    assert len(open_dataset(tmp_path / "x")) == 4
    assert paths.selected_folder(given, "x") != paths.selected_folder(other, "x")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, [1, 2, 3]), ({"first_iteration": 2}, [2, 3]), ({"last_iteration": 1}, [1])],
)
def test_iterations_that_are_named(source, config, tmp_path, fields, expected):
    select.run(config(source(iterations=3), **fields), "x", tmp_path / "x")
    assert [int(path.stem) for path in sorted((tmp_path / "x" / "data").iterdir())] == expected


def test_what_a_run_lacks_is_named(source, config, tmp_path, vocabulary):
    run = source()
    with pytest.raises(EarlError, match=r"field selections.x.run: .*source has no iteration 2 yet"):
        select.run(config(run, first_iteration=2), "x", tmp_path / "x")
    with pytest.raises(EarlError, match=r"000002/train/metrics.json"):
        select.run(config(run, last_iteration=2), "x", tmp_path / "x")
    train_files.write_inputs(run, 1, vocabulary, edit=lambda row: row.update(edit_success=None))
    with pytest.raises(EarlError, match=r"000001/scores: episode 000001-0000-00: score edit_success is missing"):
        select.run(config(run), "x", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_of_a_replay_it_takes_the_rollouts_that_this_was_trained_on(source, new_run, config, tmp_path, policy_folder):
    run, (_, replay) = source(), new_run("replay")
    digest = manifest.digest_folder(policy_folder)
    recorded = {"policy": digest, "rollouts": [""], "scores": [""]}
    record = {"source": "../source", "iterations": [recorded]}
    (replay.path / "replay.json").write_text(json.dumps(record))
    inputs = {"policy": "another", "sampled_by": digest, "rollouts": [""], "scores": [""]}
    replay.iteration(1).metrics.parent.mkdir(parents=True)
    metrics = {"policy_digest": "", "inputs": inputs, "episodes": 8}
    replay.iteration(1).metrics.write_text(json.dumps(metrics))
    for each in (run, replay):
        select.run(config(each), "x", tmp_path / each.path.name / "x")
    assert len({manifest.digest_folder(tmp_path / each.path.name / "x") for each in (run, replay)}) == 1
    stored = run.iteration(1)
    assert selections.inputs(config(replay).selections["x"], []) == [
        replay.path.parent / "replay" / ".." / "source" / folder
        for folder in (stored.rollouts(0).parent.relative_to(run.path), stored.scores(0).parent.relative_to(run.path))
    ]


# What is learned


def reasoned(vocabulary):
    """Completions that begin with reasoning, in ids that the tokenizer would not give it: a letter each."""

    def edit(row):
        scores(row, 3 + row["sample_index"])
        image = [vocabulary.boi, *row["completion_token_ids"]]
        thought = [
            token for letter in f"  move {row['sample_index']}: it. " for token in vocabulary.encode_plain(letter)
        ]
        row["completion_token_ids"] = [*thought, *vocabulary.encode("<|end thinking|>"), *image]
        row["prompt_token_ids"] = [*row["prompt_token_ids"][:-1], *vocabulary.encode(sequence.START_THINKING)]
        row["behavior_logprobs"] = [-1.0] * len(row["completion_token_ids"])
        row["completion_text"] = sequence.completion_text(row["completion_token_ids"], vocabulary)

    return edit


@pytest.mark.parametrize("objective", [{}, {"objective": "dpo", "dpo_beta": 0.1}, {"reasoning": True}])
def test_a_sequence_is_what_was_sampled(source, config, seen, vocabulary, tmp_path, objective):
    run = source(reasoned(vocabulary))
    given = config(run, {"one": objective})
    select.run(given, "x", paths.resolve(given, "stage:select/x"))
    stage.run(given, "one", tmp_path / "out")
    opening = vocabulary.encode(sequence.START_THINKING)
    by_prompt = {tuple(row["prompt_token_ids"]): row["group_id"] for row in rollouts(run).values()}
    assert len(seen) == len(by_prompt) == 4
    for example in seen:
        name = by_prompt[(*example.prompt, *opening)]
        best, worst = (rollouts(run)[f"{name}-0{sample}"]["completion_token_ids"] for sample in (1, 0))
        assert example.completion.tolist() == opening + best
        if "dpo_beta" in objective:
            assert example.rejected.tolist() == opening + worst
        else:
            assert example.rejected is None
    (thought,) = open_dataset(paths.resolve(given, "stage:select/x"))[0].reasoning
    assert thought == ("reasoning", "  move 1: it. ")


def losses(folder, name="loss"):
    return json.loads((folder / "sft.json").read_text())[name]


@pytest.mark.slow
def test_both_objectives_learn(source, config, tmp_path, vocabulary):
    def every(row):
        scores(row, 3 + row["sample_index"])

    dpo = {"objective": "dpo", "dpo_beta": 0.1, "validation": {"paths_file": ["stage:select/x"], "examples": 2}}
    given = config(source(every), {"best": {}, "dpo": dpo})
    select.run(given, "x", paths.resolve(given, "stage:select/x"))
    for name in ("best", "dpo"):
        stage.run(given, name, tmp_path / name)
    assert losses(tmp_path / "best")[-1] < losses(tmp_path / "best")[0] - 0.5
    assert losses(tmp_path / "dpo")[0] == pytest.approx(np.log(2))
    assert losses(tmp_path / "dpo")[-1] < 0.5
    assert losses(tmp_path / "dpo", "margin")[0] == 0 < 0.5 < losses(tmp_path / "dpo", "margin")[-1]
    assert losses(tmp_path / "dpo", "accuracy")[-1] == 1
    assert losses(tmp_path / "dpo", "validation")["loss"][-1] < 0.5
    assert "margin" not in json.loads((tmp_path / "best" / "sft.json").read_text())


@pytest.mark.slow
def test_dpo_resumes_and_ends_in_the_same_bytes(source, config, tmp_path, monkeypatch):
    recipe = {"objective": "dpo", "dpo_beta": 0.1, "save_checkpoints_every_n_steps": 2}
    given = config(source(lambda row: scores(row, 3 + row["sample_index"])), {"dpo": recipe})
    select.run(given, "x", paths.resolve(given, "stage:select/x"))
    stage.run(given, "dpo", tmp_path / "undisturbed")
    steps, plain = [], learner.train_step

    def stop_at_the_fourth(*args):
        steps.append(args[4])
        if steps == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(learner, "train_step", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        stage.run(given, "dpo", tmp_path / "killed")
    stage.run(given, "dpo", tmp_path / "killed")
    assert steps[4:] == [2, 3, 4, 5]
    assert manifest.digest_folder(tmp_path / "killed") == manifest.digest_folder(tmp_path / "undisturbed")


def test_ids_of_another_tokenizer_are_refused(source, config, tmp_path, policy_folder):
    given = config(source(), {"one": {}})
    select.run(given, "x", paths.resolve(given, "stage:select/x"))
    other = tmp_path / "other"
    shutil.copytree(policy_folder, other)
    (other / "manifest.json").unlink(missing_ok=True)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text + "\n")
    tuning = given.sft["one"].model_copy(update={"base_model": str(other)})
    with pytest.raises(EarlError, match="its completions were sampled with another tokenizer"):
        stage.run(given.model_copy(update={"sft": {"one": tuning}}), "one", tmp_path / "out")


def test_dpo_on_what_is_no_pair_is_refused(make, tmp_path):
    with pytest.raises(EarlError, match=r"train_paths_file: simple: example 0: is no pair of completions"):
        stage.run(make(one={"objective": "dpo", "dpo_beta": 0.1}), "one", tmp_path / "out")


# The configuration


TUNING = {"base_model": "model", "train_paths_file": ["data"], "steps": 1}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"objective": "dpo"}, "dpo_beta is null, but objective `dpo` needs it"),
        ({"dpo_beta": 0.1}, "dpo_beta is 0.1, but objective `sft` has no use for it"),
        ({"objective": "dpo", "dpo_beta": 0.1, "reasoning": True}, "reasoning is set, but objective is `dpo`"),
        ({"objective": "dpo", "dpo_beta": 0.1, "instruction_loss_weight": 1.0}, "instruction_loss_weight is set"),
        ({"objective": "dpo", "dpo_beta": 0.1, "validation": {}}, "validation.paths_file is empty"),
    ],
)
def test_fields_of_a_fine_tuning_that_disagree(fields, named):
    with pytest.raises(ValidationError) as caught:
        Sft(**TUNING, **fields)
    (problem,) = caught.value.errors()
    assert named in f"{problem['ctx']['field']} {problem['msg']}"


@pytest.mark.parametrize(
    ("tuning", "named"),
    [
        ({"train_paths_file": ["stage:select/y"]}, r"train_paths_file\.0: is .*, but selections has only: x"),
        (
            {"train_paths_file": ["stage:tokenise/raw"], "objective": "dpo", "dpo_beta": 0.1},
            r"train_paths_file\.0: is .*, but objective is `dpo`, which needs pairs",
        ),
        ({"base_model": "stage:select/x"}, r"base_model: is .*, which is not one of: stage:sft/one"),
    ],
)
def test_references_to_what_cannot_be_learned_from(source, config, tuning, named):
    values = config(source(), {"one": {}}).model_dump()
    values["raw_datasets"] = {"raw": {"source": "shapes", "count": 1, "seed": 1}}
    values["sft"]["one"] |= tuning
    with pytest.raises(ValidationError) as caught:
        Config(**values)
    (problem,) = caught.value.errors()
    assert re.search(named, f"{problem['ctx']['field']}: {problem['msg']}")


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"train_paths_file": ["stage:select/x"], "judge": "program"}, "train_paths_file.0"),
        ({"train_paths_file": ["stage:select/x"], "reward_compute_ground_score": True}, "train_paths_file.0"),
        ({"val_paths_file": ["d", "stage:select/x"], "val_coefficients": [], "judge": "program"}, "val_paths_file.1"),
        (
            {"evaluations": {"e": {"prompts": 1, "paths_file": ["stage:select/x"]}}, "judge": "program"},
            "evaluations.e.",
        ),
        ({"train_paths_file": ["stage:select/x"]}, None),
    ],
)
def test_what_a_policy_has_sampled_is_no_target_for_a_judge_that_compares_with_it(source, config, fields, refused):
    base = config(source()).model_dump() | {"judge": "openai", "reward_function_api_base": "http://localhost:1"}
    if refused is None:
        Config(**base | fields)
        return
    with pytest.raises(ValidationError) as caught:
        Config(**base | fields)
    (problem,) = caught.value.errors()
    assert problem["ctx"]["field"].startswith(refused)
    assert "whose edits a policy has sampled, but the judge compares with them" in problem["msg"]


def planned(config, **fields):
    values = {"model_path": "stage:sft/one", "vision_tokenizer_path": "package:shapes/vision_tokenizer"}
    return config.model_copy(update=values | {"num_iterations": 0} | fields)


def test_a_run_that_cannot_be_selected_from_is_refused_in_the_plan(source, config):
    run, one = source(iterations=2), {"one": {}}
    preflight.check(planned(config(run, one)))
    preflight.check(planned(config(run, one, last_iteration=2)))

    def refused(given, message):
        with pytest.raises(EarlError, match=rf"field selections\.x\.{message}"):
            preflight.check(planned(given))

    refused(config(run, one, last_iteration=3), "last_iteration is 3, but .*source ends with 2; lower it")
    refused(config(run, one, first_iteration=3), "first_iteration is 3, but .*source ends with 2; lower it")
    for file in (run.iteration(1).scores(0), run.iteration(2).rollouts(0), run.iteration(1).metrics):
        aside = file.rename(file.with_suffix(".aside"))
        refused(config(run, one), rf"run is .*, but {file} is missing; make it again \(snakemake {file}\), or select")
        aside.rename(file)
    preflight.check(planned(config(run, one)))
    own = {"base_exp_dir": str(run.path.parent), "run_name": "source"}
    refused(config(run, one).model_copy(update=own), "run is .*, this very run")
    for index in (1, 2):
        run.iteration(index).metrics.unlink()
    refused(config(run, one), "run is .*, which has no complete iteration")


def test_what_is_made_needs_no_run_any_more(source, config):
    run = source()
    given = planned(config(run, {"one": {}}))
    select.run(given, "x", paths.resolve(given, "stage:select/x"))
    shutil.rmtree(run.path)
    preflight.check(given)


def test_the_command(source, config, tmp_path, earl):
    freeze.write(config(source()), tmp_path / "config.json")
    done = earl("select", "--config", tmp_path / "config.json", "--name", "x", "--out", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    assert len(open_dataset(tmp_path / "x")) == 1
    done = earl("select", "--config", tmp_path / "config.json", "--name", "y", "--out", tmp_path / "y")
    assert "selections has no entry 'y'; it has x" in done.stderr
