"""Replay: another learner over stored rollouts and scores; what is off-policy in it is said and recorded."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from earl.files import manifest
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.report import curves
from earl.run import replays, state, verify
from earl.stages import replay, restore, train
from tests.support import bare_loop, forked


@pytest.fixture(scope="module")
def source(small_config):
    """A run of three iterations that samples for itself."""
    return bare_loop.run_all(small_config("source", num_iterations=3, evaluations={}))


@pytest.fixture
def beside(source, request):
    """Return a function that gives a folder beside the source, where its links hold; removed afterwards."""
    made = []

    def folder(name, copy=False):
        path = source.path.with_name(f"{request.node.originalname}-{name}")
        made.append(path)
        if copy:
            shutil.copytree(source.path, path, symlinks=True)
        return path

    yield folder
    for path in made:
        shutil.rmtree(path, ignore_errors=True)


def metrics(run, index):
    return json.loads(run.iteration(index).metrics.read_text())


def made_of(path, last):
    """Digests of everything that a replay leaves behind."""
    files = [Run(path).iteration(index) for index in range(1, last + 1)]
    kept = [path / name for name in ("config.json", "replay.json", "replay.html")]
    kept += [file for item in files for file in (item.metrics, item.episodes)]
    return [manifest.digest_file(file) for file in kept] + [
        manifest.digest_folder(folder) for folder in (files[-1].policy, files[-1].trainer)
    ]


def test_the_same_learner_gives_the_same_policies_and_stays_on_policy(source, beside):
    replayed = replay.run(source.path, beside("same"), {})
    assert replayed.off_policy == []
    for index in (1, 2, 3):
        found, expected = metrics(replayed.run, index), metrics(source, index)
        assert found["inputs"].pop("sampled_by") == expected["inputs"]["policy"]
        # The table's metadata names its run.
        assert found.pop("episodes_digest") != expected.pop("episodes_digest")
        assert found == expected
    assert manifest.digest_folder(replayed.run.iteration(3).policy) == manifest.digest_folder(
        source.iteration(3).policy
    )
    assert "every one trains the very policy" in replayed.notes()[0]


def test_another_learner_is_off_policy_from_the_second_iteration_on(source, beside):
    replayed = replay.run(source.path, beside("other"), {"learning_rate": 2e-3, "parity_tolerance": 1e-4})
    assert replayed.off_policy == [2, 3]
    first, second = metrics(replayed.run, 1), metrics(replayed.run, 2)
    assert first["loss"] == metrics(source, 1)["loss"]
    assert second["inputs"]["policy"] == first["policy_digest"] != second["inputs"]["sampled_by"]
    assert second["inputs"]["sampled_by"] == metrics(source, 1)["policy_digest"]
    assert second["logprob_mismatch_mean"] > 1e-4, "above the tolerance, and trained all the same"
    assert "Off-policy: 2 to 3." in replayed.notes()[0]
    assert "Nothing in the objective corrects for that" in replayed.notes()[0]


def test_what_full_weights_sampled_trains_an_adapter(source, beside):
    replayed = replay.run(source.path, beside("adapter"), {"lora.rank": 4, "learning_rate": 1e-3})
    assert replayed.off_policy == [2, 3]
    assert ("lora.rank", None, 4) in replay.changes(source, replayed.run)
    assert metrics(replayed.run, 1)["loss"] == pytest.approx(metrics(source, 1)["loss"], abs=1e-6)


def test_the_parity_gate_holds_where_the_policy_is_the_one_that_sampled(source, beside):
    with pytest.raises(EarlError, match="parity_tolerance = 1e-12; no step was done"):
        replay.run(source.path, beside("strict"), {"parity_tolerance": 1e-12})


def test_a_replay_that_was_stopped_goes_on_to_the_same_bytes(source, beside, monkeypatch):
    changes = {"learning_rate": 1e-3, "sampler_correction": "truncate", "sampler_correction_high": 2.0}
    whole, stopped = beside("whole") / "same-name", beside("stopped") / "same-name"
    replay.run(source.path, whole, changes)
    expected = made_of(whole, 3)
    replay.run(source.path, whole, changes)
    assert made_of(whole, 3) == expected, "a finished one stays as it is"

    real = train.step

    def killed_at_two(config, run, learner, *arguments, **options):
        if learner.iteration == 1:
            raise KeyboardInterrupt
        return real(config, run, learner, *arguments, **options)

    monkeypatch.setattr(train, "step", killed_at_two)
    with pytest.raises(KeyboardInterrupt):
        replay.run(source.path, stopped, changes)
    monkeypatch.setattr(train, "step", real)
    # As if it had been killed before it pruned.
    shutil.copytree((stopped / "iterations/000001/policy"), stopped / "iterations/000002/policy")
    replayed = replay.run(source.path, stopped, changes)
    assert made_of(stopped, 3) == expected
    assert sorted(stopped.glob("iterations/*/policy")) == [
        stopped / path.relative_to(whole) for path in sorted(whole.glob("iterations/*/policy"))
    ]
    assert "sampler_correction = truncate" in replayed.notes()[0]


def test_groups_of_equal_rewards_can_be_masked_afterwards(source, beside):
    """What leaves the step are the episodes of groups with one reward; what was earned stays as it was."""
    replayed = replay.run(source.path, beside("masked"), {"zero_variance_groups": "mask"})
    for index in (1, 2, 3):
        rows = pq.read_table(replayed.run.iteration(index).episodes).to_pylist()
        rewards = {}
        for row in rows:
            rewards.setdefault(row["group_id"], set()).add(row["reward"])
        assert all(row["used"] == (len(rewards[row["group_id"]]) > 1) for row in rows)
        found = metrics(replayed.run, index)
        assert found["zero_variance_episodes"] == sum(not row["used"] for row in rows)
        assert found["reward_mean"] == metrics(source, index)["reward_mean"]
    assert sum(metrics(replayed.run, index)["zero_variance_episodes"] for index in (1, 2, 3)) > 0


@pytest.mark.parametrize("field", ["temperature", "judge", "episodes_per_iteration", "raw_datasets.shapes_rl.count"])
def test_what_makes_rollouts_or_scores_cannot_change(source, beside, field):
    values = {"temperature": 0.5, "judge": "vllm", "episodes_per_iteration": 8, "raw_datasets.shapes_rl.count": 9}
    with pytest.raises(EarlError, match=rf"--set {field}: decides how rollouts or scores are made"):
        replay.run(source.path, beside("refused"), {field: values[field]})


def test_rollouts_that_have_changed_since_are_named(source, beside):
    changed = Run(beside("changed", copy=True))
    path = changed.iteration(2).scores(0)
    path.write_bytes(changed.iteration(3).scores(0).read_bytes())
    with pytest.raises(EarlError, match=r"000002/scores/0000\.parquet"):
        replay.run(changed.path, beside("replayed"), {})


def test_a_source_whose_policies_are_no_chain_is_refused(source, beside):
    broken = Run(beside("broken", copy=True))
    record = metrics(broken, 1) | {"policy_digest": "0" * 64}
    broken.iteration(1).metrics.write_text(json.dumps(record))
    with pytest.raises(EarlError, match=r"000002/train/metrics\.json: was trained from policy .* made 000000000000"):
        replay.run(broken.path, beside("replayed"), {})
    assert replay.run(broken.path, beside("first"), {"num_iterations": 1}).iterations == 1


def test_a_replay_stays_bound_to_what_it_is_of(source, beside):
    out = beside("bound")
    replay.run(source.path, out, {"num_iterations": 1})
    with pytest.raises(EarlError, match="another configuration"):
        replay.run(source.path, out, {"num_iterations": 1, "kl_coeff": 0.5})
    with pytest.raises(EarlError, match="is a replay of"):
        replay.run(out, beside("twice"), {})
    other = beside("other", copy=True)
    with pytest.raises(EarlError, match=r"replay\.json: is the replay of \.\./source"):
        replay.run(other, out, {"num_iterations": 1})
    with pytest.raises(EarlError, match="holds a run that is no replay"):
        replay.run(source.path, other, {})
    foreign = beside("foreign")
    foreign.mkdir(exist_ok=True)
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(EarlError, match="holds other files"):
        replay.run(source.path, foreign, {})


def test_a_replay_is_verified_and_restored_like_any_run(source, beside):
    replayed = replay.run(source.path, beside("kept"), {"kl_coeff": 0.1}).run
    digest = manifest.digest_folder(replayed.iteration(2).policy)
    assert verify.verify(replayed, deep=True).problems == []
    for folder in (replayed.iteration(2).policy, replayed.iteration(2).trainer):
        shutil.rmtree(folder)
    restore.run(replayed.path, 2)
    assert manifest.digest_folder(replayed.iteration(2).policy) == digest
    assert state.newest_complete(replayed) == 3


def test_past_its_end_a_replay_may_sample_for_itself(source, beside):
    replayed = replay.run(source.path, beside("short"), {"num_iterations": 2}).run
    assert replays.stored(replayed, 2, "p", shards=5).files.path.parent.parent.resolve() == source.path.resolve()
    own = replays.stored(replayed, 3, "p", shards=5)
    assert (own.files, own.shards, own.sampled_by, own.off_policy) == (replayed.iteration(3), 5, "p", False)


def test_curves_by_hand():
    def row(index, reward, kl, sampled_by="p"):
        return {
            "iteration": index,
            "reward_mean": reward,
            "kl": kl,
            "inputs": {"policy": "p", "sampled_by": sampled_by},
        }

    a = curves.Curves("first", [row(1, 2.0, 0.0), row(2, 3.0, 0.5)])
    b = curves.Curves("second", [row(1, 2.0, None), row(2, 3.0, 0.25, sampled_by="q")])
    assert curves.table([a, b]).splitlines() == [
        "A  first",
        "B  second",
        "           reward_mean         kl",
        "iteration  A         B    A     B",
        "        1  2         2    0     -",
        "        2  3         -  0.5  0.25",
    ]
    titles = [(each["title"], [len(line.x) for line in each["lines"]]) for each in curves.drawn([a, b], palette=6)]
    assert titles == [("Training reward", [2, 1]), ("KL to the reference", [2, 1])]


def test_what_only_the_sampler_knows_is_not_made_up(small_config):
    truncated = {"top_k": 5, "logprob_support": "sampled"}
    with pytest.raises(EarlError, match="replay with --set logprob_support=split_vocab"):
        replays.check_support(small_config("x", **truncated))
    replays.check_support(small_config("x", logprob_support="sampled"))
    replays.check_support(small_config("x", **truncated | {"logprob_support": "split_vocab"}))


def test_a_report_shows_no_rewards_of_other_policies():
    row = {"iteration": 2, "kl": 0.1, "reward_mean": 3.0, "overedit_mean": 2.0, "failed_fraction": 0.0}
    assert replays.own(row | {"inputs": {"policy": "p", "sampled_by": "p"}})["reward_mean"] == 3.0
    assert set(replays.own(row | {"inputs": {"policy": "p", "sampled_by": "q"}})) == {"iteration", "kl", "inputs"}


@pytest.mark.slow
def test_several_ranks_replay_too(source, beside, monkeypatch):
    monkeypatch.setenv("PYTHON_EXEC", str(forked.python("earl")))  # What torchrun starts ranks with.
    run = replay.run(source.path, beside("ranks"), {"num_iterations": 1, "train_processes": 2}).run
    assert metrics(run, 1)["ranks"] == 2
    assert metrics(run, 1)["loss"] == pytest.approx(metrics(source, 1)["loss"], abs=1e-5)
