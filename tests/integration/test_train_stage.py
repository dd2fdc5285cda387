"""The train and restore stages on files: a tiny random policy and hand-written rollouts and scores."""

import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from earl.config import freeze
from earl.emu3 import checkpoint, grid, sequence
from earl.files import manifest, tables
from earl.files.layout import Run
from earl.learner import logprobs
from earl.messages.errors import EarlError
from earl.run import state
from earl.stages import restore, train
from tests.support.train_files import GROUPS, SAMPLES, SHAPE, made_of, train_iterations, write_inputs, write_scores


def test_shards_change_no_byte(new_run, vocabulary):
    found = []
    for shards in (1, 2, 4):
        config, run = new_run(f"shards{shards}", rollout_shards=shards)
        train_iterations(config, run, vocabulary, 2, shards)
        found.append(made_of(run, 2))
    assert found[0] == found[1] == found[2]


def test_rerun_gives_the_same_bytes_and_leaves_the_inputs(new_run, vocabulary):
    config, run = new_run()
    train_iterations(config, run, vocabulary, 2)
    before, start = made_of(run, 2), manifest.digest_folder(run.iteration(0).policy)
    metrics = run.iteration(2).metrics.read_bytes()
    shutil.rmtree(run.iteration(2).policy)
    train.run(config, run.path, 2)
    assert made_of(run, 2) == before
    assert run.iteration(2).metrics.read_bytes() == metrics
    assert manifest.digest_folder(run.iteration(0).policy) == start
    manifest.check(run.iteration(2).policy, deep=True)
    manifest.check(run.iteration(2).trainer, deep=True)


def test_files_of_more_shards_before_do_not_stay_beside_those_of_now(new_run, vocabulary):
    """Stopped before it trained, sampled and scored anew in one shard: the second's episodes are in the first."""
    config, run = new_run()
    write_inputs(run, 1, vocabulary, shards=2)
    write_inputs(run, 1, vocabulary)
    mine = run.iteration(1).path / "scores" / "mine.parquet"
    mine.write_text("not of the run")
    train.run(config, run.path, 1)
    assert [path.name for path in (run.iteration(1).path / "rollouts").iterdir()] == ["0000.parquet"]
    assert {path.name for path in mine.parent.iterdir()} == {"0000.parquet", "mine.parquet"}


REASONED = {
    "0-0": "the circle is at [0, 0, 4, 4]<|end thinking|>",
    "1-0": "it goes",
    "1-1": " <|end thinking|>",
}
"""What stands before the image: a thought, one that has no end, an empty one; of others, nothing."""


def test_episodes_and_metrics_by_hand(new_run, vocabulary):
    """Group 0: rewards 4 and 0 (no image). Group 1: equal. Group 2: one failed. Group 3: cut off, and 9."""
    viescores = {"0-0": 4, "1-0": 5, "1-1": 5, "2-0": 6, "3-1": 9}

    def edit(row):
        key = f"{int(row['example_id'])}-{row['sample_index']}"
        status = "ok" if key in viescores else "failed" if key == "2-1" else "no_image"
        score = viescores.get(key)
        names = ("edit_success", "overedit", "naturalness", "artifacts", "ground_score")
        row |= {"status": status, **dict.fromkeys(names, score)}
        if key == "3-0":
            row |= {"finish_reason": "length", "edited": None}
        row["completion_text"] = f"{REASONED.get(key, '')}<|image start|>2*3"
        if key == "3-1":
            row |= {"edit_success": 10, "artifacts": 10}

    config, run = new_run()
    write_inputs(run, 1, vocabulary, edit=edit)
    train.run(config, run.path, 1)
    rows = tables.read_table(run.iteration(1).episodes, tables.EPISODES).to_pylist()
    assert [row["reward"] for row in rows] == [4, 0, 5, 5, 6, None, 0, 9]
    assert [row["used"] for row in rows] == [True] * 5 + [False] + [True] * 2
    assert rows[5]["reason"] == "judgement failed"
    assert rows[5]["advantage"] is None
    expected = [2 / 2.0001, -2 / 2.0001, 0, 0, 0, -4.5 / 4.5001, 4.5 / 4.5001]
    assert [row["advantage"] for row in rows if row["used"]] == pytest.approx(expected)
    metrics = json.loads(run.iteration(1).metrics.read_text())
    assert metrics["reward_mean"] == pytest.approx(29 / 7)
    # Of 7 episodes: all but the one whose judgement failed, with 0 where there is no finished image.
    for name in ("viescore", "semantic_consistency", "perceptual_quality", "overedit", "naturalness", "ground_score"):
        assert metrics[f"{name}_mean"] == pytest.approx(29 / 7), name
    for name in ("edit_success", "artifacts"):
        assert metrics[f"{name}_mean"] == pytest.approx(30 / 7), name
    assert metrics["zero_std_fraction"] == 0.5
    assert metrics["failed_fraction"] == 1 / 8
    assert metrics["truncated_fraction"] == 1 / 8
    assert metrics["no_image_fraction"] == 1 / 8, "of those that were not cut off"
    assert metrics["reasoning_fraction"] == 2 / 8
    # H*W img, 2 rows of 3 visual tokens and eol, eof, eoi, eos; eol, eof, eoi and eos are forced.
    length = len(vocabulary.encode("2*3")) + 1 + 8 + 3
    assert metrics["completion_length_mean"] == length
    assert metrics["completion_tokens"] == 7 * length
    assert metrics["counted_tokens"] == 7 * (length - 5)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)  # the first policy is the reference
    assert list(metrics) == sorted(metrics)


def test_mismatch_with_the_sampler_is_reported(new_run, vocabulary, policy_folder):
    """Behaviour log-probs computed here, one sequence at a time, agree with the learner's; one shifted by 0.5 shows."""
    model = checkpoint.load_policy(policy_folder, torch.float32, "cpu")

    def edit(row):
        prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        allowed = torch.from_numpy(grid.allowed_masks(vocabulary))
        kinds = grid.kinds_of_completion(completion, SHAPE, vocabulary)
        logp = logits.masked_fill(~allowed[kinds.astype(int)], -torch.inf).log_softmax(-1)
        row["behavior_logprobs"] = logp[range(len(completion)), completion].tolist()
        if row["episode_id"].endswith("0002-01"):
            row["behavior_logprobs"][0] -= 0.5

    config, run = new_run()
    write_inputs(run, 1, vocabulary, edit=edit)
    metrics = train.run(config, run.path, 1)
    assert metrics["logprob_mismatch_max"] == pytest.approx(0.5, abs=1e-4)
    counted = metrics["counted_tokens"]
    assert metrics["logprob_mismatch_mean"] == pytest.approx(0.5 / counted, abs=1e-5)
    # One ratio of e^0.5 among ones: k3 of the sampler's log-probs, and Kish's formula.
    assert metrics["logprob_mismatch_kl"] == pytest.approx((math.exp(0.5) - 1.5) / counted, abs=1e-5)
    weight, square = counted - 1 + math.exp(0.5), counted - 1 + math.exp(1)
    assert metrics["effective_sample_size"] == pytest.approx(weight**2 / (counted * square), abs=1e-4)


def test_training_raises_the_probability_of_what_was_rewarded(new_run, vocabulary):
    """After the step, log-probs weighted by advantages are higher: the step went the way of the gradient."""

    def edit(row):
        good = 10 if row["sample_index"] == 0 else 1
        row |= dict.fromkeys(("edit_success", "overedit", "naturalness", "artifacts"), good)

    config, run = new_run(kl_coeff=0.0, learning_rate=1e-4)
    write_inputs(run, 1, vocabulary, edit=edit)
    metrics = train.run(config, run.path, 1)
    assert metrics["kl"] is None
    assert metrics["inputs"]["reference"] is None
    advantages = {row["episode_id"]: row["advantage"] for row in pq.read_table(run.iteration(1).episodes).to_pylist()}
    support = logprobs.split_vocab((vocabulary.first_visual, vocabulary.size))
    weighted = []
    for index in (0, 1):
        model = checkpoint.load_policy(run.iteration(index).policy, torch.float32, "cpu")
        total = 0.0
        for row in pq.read_table(run.iteration(1).rollouts(0)).to_pylist():
            ids = torch.tensor([row["prompt_token_ids"] + row["completion_token_ids"]])
            start = len(row["prompt_token_ids"])
            with torch.no_grad():
                logits = model(ids).logits[0, start - 1 : -1]
            logp, _ = logprobs.token_logprobs(logits, ids[0, start:], config.temperature, support)
            free = grid.kinds_of_completion(row["completion_token_ids"], SHAPE, vocabulary) < grid.FIRST_FORCED
            total += advantages[row["episode_id"]] * logp[torch.from_numpy(free)].sum().item()
        weighted.append(total)
    assert weighted[1] > weighted[0]


def _set(**changes):
    def edit(row):
        if row["episode_id"].endswith("0001-01"):
            row |= changes

    return edit


def test_no_step_is_done_where_sampler_and_learner_disagree(new_run, vocabulary):
    config, run = new_run(parity_tolerance=0.5)
    write_inputs(run, 1, vocabulary, edit=_set(behavior_logprobs=[-90.0] + [-1.0] * 14))
    message = r"parity_tolerance = 0\.5; no step was done(.|\n)*\n  000001-0001-01 +0 +-90\.0000 +-\d+\.\d{4}\n"
    with pytest.raises(EarlError, match=message):
        train.run(config, run.path, 1)
    assert sorted(path.name for path in run.iteration(1).path.iterdir()) == ["rollouts", "scores"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set(naturalness=float("nan")), r"scores/0000\.parquet.*'naturalness'.*nan"),
        (_set(overedit=11.0), r"scores/0000\.parquet.*'overedit'.*11"),
        (_set(edit_success=None), r"0001-01.*edit_success is missing"),
        (_set(behavior_logprobs=[-1.0]), r"0001-01.*'behavior_logprobs' has 1 values"),
        (_set(completion_token_ids=[]), r"0001-01.*'completion_token_ids' is empty"),
        (_set(prompt_token_ids=[1, 60000]), r"0001-01.*'prompt_token_ids' holds token id 60000"),
        (_set(episode_id="000001-0000-00"), r"000001-0001-01|doubled"),
    ],
)
def test_bad_rows_stop_before_anything_is_written(new_run, vocabulary, edit, message):
    config, run = new_run()
    write_inputs(run, 1, vocabulary, edit=edit)
    with pytest.raises(EarlError, match=message):
        train.run(config, run.path, 1)
    assert sorted(path.name for path in run.iteration(1).path.iterdir()) == ["rollouts", "scores"]


def test_too_many_failed_judgements_stop_with_the_figures(new_run, vocabulary):
    def edit(row):
        if row["sample_index"] == 0:
            row |= {"status": "failed", "raw": "there is no target image"}

    config, run = new_run()
    write_inputs(run, 1, vocabulary, edit=edit)
    told = r"4 of 8 episodes \(50\.0%\).*max_failed_fraction = 0\.25; of the first it says: there is no target image\."
    with pytest.raises(EarlError, match=told):
        train.run(config, run.path, 1)


def test_scores_of_other_rollouts_are_refused(new_run, vocabulary):
    config, run = new_run()
    write_inputs(run, 1, vocabulary)
    stored = run.iteration(1).scores(0).read_bytes()
    write_inputs(run, 1, vocabulary, edit=_set(behavior_logprobs=[-2.0] * 15))
    run.iteration(1).scores(0).write_bytes(stored)
    with pytest.raises(EarlError, match=r"scores/0000\.parquet: rollouts_digest"):
        train.run(config, run.path, 1)


def test_shards_scored_by_different_rubrics_are_refused(new_run, vocabulary):
    config, run = new_run(rollout_shards=2)
    write_inputs(run, 1, vocabulary, shards=2)
    columns = tables.read_table(run.iteration(1).scores(1), tables.SCORES).to_pydict()
    write_scores(run, 1, 1, columns, rubrics_digest="0" * 64)
    with pytest.raises(EarlError, match=r"scores/0000\.parquet, .*scores/0001\.parquet: .*different rubrics"):
        train.run(config, run.path, 1)


def test_rollouts_of_another_policy_are_refused(new_run, vocabulary):
    config, run = new_run()
    faster, other = new_run("other", learning_rate=10 * config.learning_rate)
    for settings, each in ((config, run), (faster, other)):
        train_iterations(settings, each, vocabulary, 1)
        write_inputs(each, 2, vocabulary)
    shutil.copy(other.iteration(2).rollouts(0), run.iteration(2).rollouts(0))
    with pytest.raises(EarlError, match=r"rollouts/0000\.parquet: policy_digest"):
        train.run(config, run.path, 2)


def test_a_missing_shard_is_named(new_run, vocabulary):
    config, run = new_run(rollout_shards=2)
    write_inputs(run, 1, vocabulary, shards=2)
    run.iteration(1).scores(1).unlink()
    with pytest.raises(EarlError, match=r"scores/0001\.parquet: does not exist"):
        train.run(config, run.path, 1)


def test_a_missing_or_foreign_trainer_is_an_error(new_run, vocabulary):
    config, run = new_run()
    train_iterations(config, run, vocabulary, 1)
    write_inputs(run, 2, vocabulary)
    trainer = run.iteration(1).trainer
    state = trainer / "state.json"
    original = state.read_text()
    state.write_text(original.replace(json.loads(original)["policy_digest"], "0" * 64))
    with pytest.raises(EarlError, match=r"trainer/state\.json: policy_digest"):
        train.run(config, run.path, 2)
    shutil.rmtree(trainer)
    with pytest.raises(EarlError, match=r"trainer/manifest\.json: is missing"):
        train.run(config, run.path, 2)


def test_the_optimizer_goes_on_where_it_was(new_run, vocabulary):
    config, run = new_run(kl_coeff=0.0)
    train_iterations(config, run, vocabulary, 2)
    with_state = made_of(run, 2)["policy"]
    assert json.loads((run.iteration(2).trainer / "state.json").read_text())["optimizer_steps"] == 2
    # The same gradient from the same policy, but with Adam's moments of nought.
    other_config, other = new_run("other", kl_coeff=0.0)
    shutil.copytree(run.iteration(1).policy, other.path / "start")
    other.iteration(0).policy.unlink()
    other.iteration(0).policy.symlink_to(other.path / "start")
    shutil.copytree(run.iteration(2).rollouts(0).parent, other.iteration(1).rollouts(0).parent)
    table = pq.read_table(run.iteration(2).rollouts(0))
    metadata = {**table.schema.metadata, b"iteration": b"1"}
    pq.write_table(table.replace_schema_metadata(metadata), other.iteration(1).rollouts(0))
    rows = pq.read_table(run.iteration(2).scores(0)).to_pydict()
    write_scores(other, 1, 0, rows)
    train.run(other_config, other.path, 1)
    assert made_of(other, 1)["policy"] != with_state


def test_the_rate_of_an_iteration_follows_its_schedule(new_run, vocabulary):
    """Warmed up to 2e-5 in two iterations, the first has half the rate and takes the step of a constant 1e-5."""
    schedule = {"learning_rate_schedule": "linear", "schedule_iterations": 4, "warmup_iterations": 2}
    config, run = new_run("falls", learning_rate=2e-5, final_learning_rate=1e-5, **schedule)
    train_iterations(config, run, vocabulary, 4)
    rates = [json.loads(run.iteration(index).metrics.read_text())["learning_rate"] for index in range(1, 5)]
    assert rates == pytest.approx([1e-5, 2e-5, 2e-5, 1.5e-5])
    constant, other = new_run("constant", learning_rate=1e-5)
    train_iterations(constant, other, vocabulary, 2)
    assert made_of(run, 1)["policy"] == made_of(other, 1)["policy"]
    assert made_of(run, 2)["policy"] != made_of(other, 2)["policy"]


def test_several_steps_an_iteration_are_counted_and_repeat_their_bytes(new_run, vocabulary):
    changes = {"optimizer_steps_per_iteration": 2, "importance_ratio": "behavior", "clip_ratio_high": 0.2}
    found = []
    for name in ("one", "two"):
        config, run = new_run(name, **changes)
        train_iterations(config, run, vocabulary, 2)
        found.append(made_of(run, 2))
    assert found[0] == found[1]
    metrics = json.loads(found[0]["metrics"])
    assert metrics["optimizer_steps"] == 4
    assert metrics["counted_tokens"] == 8 * (len(vocabulary.encode("2*3")) + 1 + 6)
    assert 0 <= metrics["clip_fraction_high"] <= 1
    assert metrics["corrected_fraction"] is None


def _equal_groups(*groups: int, status: str = "ok"):
    """An edit of rows: all episodes of some groups get the score 5, or none where their judgement failed."""

    def edit(row):
        if int(row["example_id"]) in groups:
            names = ("edit_success", "overedit", "naturalness", "artifacts")
            row |= {"status": status, **dict.fromkeys(names, 5.0 if status == "ok" else None)}

    return edit


def test_masked_groups_are_not_there_for_the_step(new_run, vocabulary):
    """The step is the one that is done where these episodes cannot be used for another reason; kept, it is another."""
    cases = {
        "mask": ("mask", _equal_groups(1)),
        "failed": ("keep", _equal_groups(1, status="failed")),
        "keep": ("keep", _equal_groups(1)),
    }
    found = {}
    for name, (choice, edit) in cases.items():
        config, run = new_run(name, zero_variance_groups=choice)
        write_inputs(run, 1, vocabulary, edit=edit)
        train.run(config, run.path, 1)
        found[name] = made_of(run, 1), json.loads(run.iteration(1).metrics.read_text())
    assert found["mask"][0]["policy"] == found["failed"][0]["policy"] != found["keep"][0]["policy"]
    assert [found[name][1]["zero_variance_episodes"] for name in cases] == [SAMPLES, 0, 0]
    assert found["mask"][1]["reward_mean"] == found["keep"][1]["reward_mean"]
    for name in ("loss", "kl", "counted_tokens", "completion_tokens"):
        assert found["mask"][1][name] == found["failed"][1][name]
    rows = tables.read_table(Run(run.path.with_name("mask")).iteration(1).episodes, tables.EPISODES).to_pylist()
    reasons = {row["group_id"]: row["reason"] for row in rows}
    assert list(reasons.values()) == [None, "the rewards of its group are all equal", None, None]
    assert all((row["advantage"] is None) == (not row["used"]) == (row["reason"] is not None) for row in rows)


def test_an_iteration_without_a_preference_takes_no_step(new_run, vocabulary):
    """First of the run or in its middle: policy, moments and counter are those from before, and the run goes on."""
    everything = _equal_groups(*range(GROUPS))
    config, run = new_run(zero_variance_groups="mask")
    for iteration in (1, 2, 3, 4):
        write_inputs(run, iteration, vocabulary, edit=everything if iteration in (1, 3) else lambda row: None)
        train.run(config, run.path, iteration)
    metrics = [json.loads(run.iteration(iteration).metrics.read_text()) for iteration in (1, 2, 3, 4)]
    assert [found["optimizer_steps"] for found in metrics] == [0, 1, 1, 2]
    assert [found["used_episodes"] > 0 for found in metrics] == [False, True, False, True]
    nothing = ("loss", "kl", "entropy", "gradient_norm", "logprob_mismatch_mean", "effective_sample_size")
    assert all(metrics[0][name] is None and metrics[1][name] is not None for name in nothing)
    assert metrics[0]["reward_mean"] == 5.0
    policies = [manifest.digest_folder(run.iteration(iteration).policy) for iteration in range(5)]
    assert policies[0] == policies[1] != policies[2] == policies[3] != policies[4]
    name = "optimizer-00001-of-00001.safetensors"
    moments = [(run.iteration(iteration).trainer / name).read_bytes() for iteration in (2, 3)]
    assert moments[0] == moments[1]
    drop(run, 3, 4)
    restore.run(run.path, 4)  # over the iteration without a step
    assert manifest.digest_folder(run.iteration(4).policy) == policies[4]


def test_what_it_took_stands_beside_the_metrics_not_in_them(new_run, vocabulary):
    config, run = new_run()
    metrics = [train_iterations(config, run, vocabulary, 1) or run.iteration(1).metrics.read_bytes() for _ in range(2)]
    assert metrics[0] == metrics[1]
    found = json.loads(run.iteration(1).performance.read_text())
    phases = ("read", "load", "forward", "reference", "backward", "step", "save")
    assert set(found["seconds"]) == set(phases)
    assert all(found["seconds"][phase] > 0 for phase in phases)
    rows = pq.read_table(run.iteration(1).rollouts(0)).to_pylist()
    assert found["tokens"] == sum(len(row["prompt_token_ids"]) + len(row["completion_token_ids"]) for row in rows)
    learning = sum(found["seconds"][phase] for phase in phases[2:6])
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / learning, rel=0.01)
    assert 50 * 2**20 < found["peak_memory_bytes"][0] < 50 * 2**30
    by_phase = found["peak_memory_bytes_by_phase"]
    assert set(by_phase) == set(phases)
    assert max(by_phase.values()) == found["peak_memory_bytes"][0]


def test_text_only_cycle_counts_text_alone(new_run, vocabulary):
    reasons = {"assistant_prefill": sequence.START_THINKING}
    config, run = new_run(train_text_tokens_only=True, text_only_cycle_steps=2, text_only_steps=1, **reasons)
    train_iterations(config, run, vocabulary, 2)
    first, second = (json.loads(run.iteration(i).metrics.read_text()) for i in (1, 2))
    text = len(vocabulary.encode("2*3")) + 1
    assert (first["counted"], first["counted_tokens"]) == ("text", 8 * text)
    assert (second["counted"], second["counted_tokens"]) == ("visual", 8 * 6)


def drop(run: Run, *iterations: int) -> None:
    for iteration in iterations:
        shutil.rmtree(run.iteration(iteration).policy)
        shutil.rmtree(run.iteration(iteration).trainer)


def test_restore_brings_a_dropped_policy_back_byte_for_byte(new_run, vocabulary):
    config, run = new_run()
    train_iterations(config, run, vocabulary, 4)
    expected = {i: made_of(run, i) for i in (1, 2, 3, 4)}
    drop(run, 1, 2, 3)
    restore.run(run.path, 1)  # from the starting policy
    assert made_of(run, 1) == expected[1]
    restore.run(run.path, 3)  # over two iterations
    assert made_of(run, 3) == expected[3]
    assert not run.iteration(2).policy.exists()
    assert not (run.path / "restore.partial").exists()
    train.run(config, run.path, 4)
    assert made_of(run, 4) == expected[4]


def test_restore_refuses_what_another_configuration_trained_before_it_trains(new_run, vocabulary, monkeypatch):
    config, run = new_run()
    train_iterations(config, run, vocabulary, 3)
    drop(run, 1, 2, 3)
    now = config.model_copy(update={"learning_rate": 1e-7})
    freeze.write(now, run.config, accept_changes=True)
    monkeypatch.setattr(train, "load", lambda *_: pytest.fail("trains"))
    complaint = (
        r"metrics\.json: iterations 1 to 2 were trained with another configuration than the present one.*"
        rf"accept_changes=true.*earl rewind --run {run.path} --iteration 1"
    )
    with pytest.raises(EarlError, match=complaint):
        restore.run(run.path, 2)
    path = run.iteration(1).metrics
    path.write_text(path.read_text().replace(freeze.config_digest(config), freeze.config_digest(now)))
    with pytest.raises(EarlError, match=r"000002/train/metrics\.json: iteration 2 was trained with another"):
        restore.run(run.path, 2)
    assert not (run.path / "restore.partial").exists()


def test_a_policy_that_is_not_the_one_on_record_is_not_trained(new_run, vocabulary):
    config, run = new_run()
    train_iterations(config, run, vocabulary, 2)
    state.start_record(run.iteration(0)).write_text(json.dumps({"policy_digest": "f" * 64}))
    with pytest.raises(EarlError, match=r"000000/policy: is policy .*start\.json says f{12}; link that one again"):
        train.run(config, run.path, 1)
    recorded = run.iteration(1).metrics.read_text()
    run.iteration(1).metrics.write_text(recorded.replace(json.loads(recorded)["policy_digest"], "f" * 64))
    files = made_of(run, 2)
    with pytest.raises(EarlError, match=r"000001/policy: is policy .*metrics\.json says f{12}; remove .*earl restore"):
        train.run(config, run.path, 2)
    assert made_of(run, 2) == files


def test_two_iterations_are_restored_at_once(new_run, vocabulary, monkeypatch):
    config, run = new_run()
    train_iterations(config, run, vocabulary, 2)
    expected = {i: made_of(run, i) for i in (1, 2)}
    drop(run, 1, 2)
    (run.path / "restore.partial" / "000001" / "left").mkdir(parents=True)

    def after_another(source, target):
        monkeypatch.setattr(restore, "_put_in_place", put)
        restore.run(run.path, 1)
        put(source, target)

    put = restore._put_in_place
    monkeypatch.setattr(restore, "_put_in_place", after_another)
    restore.run(run.path, 2)
    assert {i: made_of(run, i) for i in (1, 2)} == expected
    assert not (run.path / "restore.partial").exists()


def test_restore_names_what_differs(new_run, vocabulary):
    config, run = new_run()
    train_iterations(config, run, vocabulary, 2)
    drop(run, 2)
    recorded = run.iteration(2).metrics.read_text()
    digest = json.loads(recorded)["policy_digest"]
    run.iteration(2).metrics.write_text(recorded.replace(digest, "f" * 64))
    complaint = rf"another policy than the one on record\. Policy: {digest} now, f{{64}} then\. Ranks: same"
    with pytest.raises(EarlError, match=complaint):
        restore.run(run.path, 2)
    run.iteration(2).metrics.write_text(recorded)
    write_inputs(run, 2, vocabulary, edit=_set(overedit=0.0))
    with pytest.raises(EarlError, match=r"scores/0000\.parquet: its digest is"):
        restore.run(run.path, 2)
    assert not run.iteration(2).policy.exists()
    assert not (run.path / "restore.partial").exists()


def all_alike(row: dict) -> None:
    row |= dict.fromkeys(("edit_success", "overedit", "naturalness", "artifacts"), 5.0)


def unfinished(row: dict) -> None:
    row |= {"status": "no_image", "edited": None, "finish_reason": "length"}
    row |= dict.fromkeys(("edit_success", "overedit", "naturalness", "artifacts", "ground_score"))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda row: None, []),
        (all_alike, ["no group's rewards differ, so no episode has an advantage"]),
        (
            unfinished,
            ["no completion holds a finished image", "no group's rewards differ, so no episode has an advantage"],
        ),
    ],
)
def test_an_iteration_that_teaches_nothing_says_so(new_run, vocabulary, caplog, edit, expected):
    config, run = new_run()
    write_inputs(run, 1, vocabulary, edit=edit)
    found = train.run(config, run.path, 1)
    assert json.loads(run.iteration(1).metrics.read_text())["warnings"] == found["warnings"] == expected
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [f"train: iteration 1: {text}" for text in expected]


def test_prompts_that_were_left_out_are_counted(new_run, vocabulary):
    config, run = new_run()
    write_inputs(run, 1, vocabulary)
    assert train.run(config, run.path, 1)["left_out_prompts"] == 0
    table = pq.read_table(run.iteration(1).rollouts(0))
    metadata = table.schema.metadata | {b"left_out_prompts": b"3"}
    pq.write_table(table.replace_schema_metadata(metadata), run.iteration(1).rollouts(0))
    write_scores(run, 1, 0, pq.read_table(run.iteration(1).scores(0)).to_pydict())
    assert train.run(config, run.path, 1)["left_out_prompts"] == 3


def flip(path: Path) -> None:
    """Change the last byte of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["policy/model.safetensors", "trainer/optimizer-00001-of-00001.safetensors"])
def test_a_damaged_checkpoint_is_not_trained_and_comes_back_by_restore(new_run, vocabulary, file):
    config, run = new_run()
    train_iterations(config, run, vocabulary, 2)
    expected = made_of(run, 2)
    write_inputs(run, 3, vocabulary)
    flip(run.iteration(2).path / file)
    with pytest.raises(EarlError, match=rf"{file}: is damaged: .*earl restore"):
        train.run(config, run.path, 3)
    restore.run(run.path, 2)
    assert made_of(run, 2) == expected
    train.run(config, run.path, 3)


def test_restore_starts_before_a_checkpoint_that_is_damaged(new_run, vocabulary):
    config, run = new_run()
    train_iterations(config, run, vocabulary, 2)
    expected = made_of(run, 2)
    flip(run.iteration(1).policy / "model.safetensors")
    drop(run, 2)
    restore.run(run.path, 2)
    assert made_of(run, 2) == expected
