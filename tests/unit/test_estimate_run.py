"""Plans: what fits and what does not, with figures worked out by hand. The simulation is replaced by arithmetic."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from earl.config import load
from earl.config.schema import Config
from earl.emu3.models import Emu3TextConfig
from earl.estimate import cases, disk, fit, gpus, loads, memory, models, rates, run, text
from earl.estimate.cases import Bytes, Case
from earl.estimate.gpus import Asked
from earl.messages.errors import EarlError
from earl.workflow import opening
from earl.workflow.settings import Settings

ROOT = Path(__file__).parents[2]
H100 = gpus.gpu("h100")
WEIGHTS = 8_492_011_520
LAYER = 218_112_000
"""Weights of a layer: 4096 x (4096 x 2 + 1024 x 2) of attention, 3 x 4096 x 14336 of the MLP, two norms."""


def arithmetic(asked: list) -> list[Bytes]:
    """16 bytes a weight shared out over ranks, and a GB an episode of the micro-batch, ten without checkpointing."""
    found = []
    for case in asked:
        if not isinstance(case, Case):
            found.append(Bytes({"weights": 10**9}, {"decode": 2 * 10**9}))
            continue
        layers = json.loads(case.text)["num_hidden_layers"]
        weights = WEIGHTS + (layers - 32) * LAYER
        part = 4 * weights // case.ranks
        rest = {"weights": part, "moments": 2 * part, "reference": part * (case.reference and not case.offload)}
        if case.lora:
            rest, part = {"weights": 2 * weights // case.ranks, "moments": 10**9, "reference": 0}, 5 * 10**8
        moving = case.episodes * 10**9 * (1 if case.checkpointing else 10)
        found.append(Bytes(rest, {"backward": sum(rest.values()) + part + moving}))
    return found


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (cases, memory):
        monkeypatch.setattr(module, "simulate", arithmetic)
    for name in ("DATA_DIR", "BASE_EXP_DIR", "REWARD_FUNCTION_API_BASE"):
        monkeypatch.setenv(f"APP__{name}", "http://judge" if name.endswith("BASE") and "API" in name else "here")
    monkeypatch.delenv("APP__RUN_NAME", raising=False)


def experiment(**changes: object) -> Config:
    return load.load(ROOT / "config" / "sft_s__rl_s.jsonnet", {"run_name": "a", "packing": "none"} | changes).config


def everywhere(gpu: gpus.Gpu | None, count: int | None = None):
    return lambda rule: Asked(gpu, count)


def test_layers_of_the_published_policy() -> None:
    config = Emu3TextConfig()
    assert memory.weights_of(config) == WEIGHTS
    config.num_hidden_layers = 31
    assert WEIGHTS - memory.weights_of(config) == LAYER


def test_one_rank_cannot_hold_the_published_policy() -> None:
    """On 1 rank 5 x 34 GB and 8 for activations; on 4 ranks 42.5 and 8, beside an engine asleep, and overhead."""
    config = experiment(train_processes=1)
    [problem] = fit.check(config, False, lambda rule: Asked(H100 if rule == "train" else None, None))
    assert (problem.rule, problem.field) == ("train", "train_processes")
    assert problem.text.startswith("= 1: a rank that trains needs 185.6 GB")  # 169.8 + 8, 1.5, 15% of 34 + 8
    assert problem.text.endswith("fits with lora.rank 64 or train_processes 3")
    wanted = loads.of(config.model_copy(update={"train_processes": 3}), "train", H100)
    assert (
        wanted[0].bytes
        <= H100.memory
        < loads.of(config.model_copy(update={"train_processes": 2}), "train", H100)[0].bytes
    )


def test_what_saves_memory_on_the_same_gpus_is_named() -> None:
    config = experiment(train_processes=4, gradient_checkpointing=False)
    problems = fit.problems(config, "train", Asked(H100, None))
    assert problems[0].text.endswith("fits with gradient_checkpointing true")  # 80 GB are too many for any ranks


def test_what_an_adapter_cannot_save_in_a_fine_tuning_is_not_proposed() -> None:
    config = experiment(make_sft_models=True, train_processes=1)
    [problem] = fit.problems(config, "sft", Asked(H100, None))
    assert problem.text.endswith("fits with train_processes 2")  # 68 + 8 GB, no reference


def test_what_fits_has_no_problem() -> None:
    assert fit.check(experiment(), True, everywhere(H100)) == []
    assert fit.check(experiment(), False, everywhere(H100)) == []


def test_nothing_is_asked_where_no_gpu_is_used_or_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(asked: list) -> list[Bytes]:
        assert not asked

    monkeypatch.setattr(cases, "simulate", never)
    monkeypatch.setattr(memory, "simulate", never)
    assert fit.check(experiment(device="cpu", train_processes=1), True, everywhere(H100)) == []
    assert fit.check(experiment(train_processes=1), True, everywhere(None)) == []


def test_a_segment_adds_up_what_its_ranks_hold_at_a_time() -> None:
    config = experiment(train_processes=8, rollout_shards=8)
    sampling, training = loads.of(config, "iterate", H100)
    part = 4 * WEIGHTS // 8
    share = int(0.3 * H100.memory)
    moment = loads.UPDATE + 6 * 184_622 * 4096  # more than the GB of a batch of images
    assert sampling.bytes == pytest.approx(4 * part + share + 10**9 + moment, abs=100)
    learner = memory.learner(config, models.text(config), 8, 1100, 1065)
    assert training.bytes == learner.needed + memory.ASLEEP + 10**9


def test_too_large_a_share_for_the_engine_beside_the_learner() -> None:
    """The learner keeps 34 GB, images and updates take 7: 0.5 of 85 GB is left; weights and a context take 0.25."""
    [problem] = fit.problems(experiment(vllm_gpu_memory_utilization=0.8), "iterate", Asked(H100, None))
    assert problem.field == "vllm_gpu_memory_utilization"
    assert "0.25 to 0.50 fits" in problem.text


def test_a_share_that_leaves_no_room_for_a_sequence() -> None:
    [problem] = fit.problems(experiment(vllm_gpu_memory_utilization=0.2), "generate", Asked(H100, None))
    assert "fewer than one sequence" in problem.text
    assert "0.25 to 0.95 fits" in problem.text
    small = fit.problems(experiment(), "generate", Asked(gpus.gpu("16"), None))
    assert "no share fits; raise vllm_tensor_parallel_size" in small[0].text


def test_a_batch_of_the_torch_engine() -> None:
    config = experiment(engine="torch", engine_batch_size=256, rollout_shards=1)
    [problem] = fit.problems(config, "generate", Asked(H100, None))
    assert problem.field == "engine_batch_size"
    fitting = int(problem.text.rpartition("; ")[2].split()[0])
    assert fitting % 8 == 0
    assert fit.problems(config.model_copy(update={"engine_batch_size": fitting}), "generate", Asked(H100, None)) == []
    more = config.model_copy(update={"engine_batch_size": fitting + 8})
    assert fit.problems(more, "generate", Asked(H100, None)) != []


def test_a_judge_on_too_few_gpus() -> None:
    config = experiment(judge="vllm", judge_tensor_parallel_size=1)
    [problem] = fit.problems(config, "score", Asked(H100, None))
    assert problem.field == "judge_tensor_parallel_size"
    assert problem.text.endswith("; 4 fits")  # 146.8 GB of weights: 73.4 on each of two leave none of 76.5 for a cache
    few = {"judge_tensor_parallel_size": 4, "judge_gpu_memory_utilization": 0.2}  # 17 GB of 36.7, a context and a cache
    [problem] = fit.problems(config.model_copy(update=few), "score", Asked(H100, None))
    assert problem.text.endswith("; judge_gpu_memory_utilization 0.50 or 16 GPUs fits")
    assert fit.problems(config.model_copy(update={"judge_tensor_parallel_size": 4}), "score", Asked(H100, None)) == []


def test_a_profile_with_too_few_gpus_for_the_ranks() -> None:
    config = experiment(train_processes=8, rollout_shards=8)
    [problem] = fit.problems(config, "iterate", Asked(None, 4))
    assert str(problem) == (
        "iterate: train_processes = 8: makes a job of 8 GPUs, but the profile asks for 4; set gpu to 8, or leave it out"
    )
    assert fit.problems(config, "iterate", Asked(None, 4, nodes=2)) == []
    [problem] = fit.problems(config, "iterate", Asked(None, 2, nodes=2))
    assert problem.text.endswith("the profile asks for 2 nodes with 2 each; set gpu to 4, or leave it out")


def test_a_machine_with_too_few_gpus_for_the_ranks() -> None:
    [problem] = fit.problems(experiment(), "iterate", Asked(None, 1, 1, "this machine has"))
    told = "= 4: makes a job of 4 GPUs, but this machine has 1; lower train_processes, or run where there are 4"
    assert (problem.field, problem.text) == ("train_processes", told)
    assert fit.problems(experiment(device="cpu"), "iterate", Asked(None, 1, 1, "this machine has")) == []


def test_ranks_cannot_share_out_mig_devices() -> None:
    """CUDA shows a process one of them; on 4 nodes the 4 ranks have one each."""
    part = gpus.gpu("h100_7g.80gb")
    [problem] = fit.problems(experiment(), "iterate", Asked(part, 4))
    assert (problem.field, problem.text) == (
        "train_processes",
        "= 4: makes a job of 4 GPUs, but a process can use one MIG device alone (h100_7g.80gb); lower train_processes, "
        "or use whole GPUs",
    )
    assert fit.problems(experiment(), "iterate", Asked(part, 1, nodes=4)) == []


def test_a_shard_that_exceeds_the_cache_is_noted() -> None:
    [note] = fit.notes(experiment(rollout_shards=1), "iterate", H100)
    assert "153,920 tokens" in note  # 16 x 1,100 + 128 x 1,065
    assert fit.notes(experiment(rollout_shards=8), "iterate", H100) == []


def test_a_judge_of_unknown_size_is_told() -> None:
    config = experiment(judge="vllm", reward_function_api_model_name="me/mystery")
    assert "iterate: what the judge me/mystery takes of a GPU is not known and left out" in fit.notes(
        config, "iterate", H100
    )
    assert fit.notes(config, "generate", H100) == []


def test_images_that_a_sequence_has_no_room_for_are_told() -> None:
    """1024 x 1024 pixels: 128 x 128 tokens, 128 ends of rows, 9 more; a prompt has 35 besides."""
    [note] = models.notes(experiment(image_area=1024 * 1024))
    assert note.startswith("image_area = 1048576: an image takes 16521 tokens")
    assert note.endswith("room for prompt and image takes 33077 and 16521")
    assert models.notes(experiment()) == []


def test_all_is_refused_with_field_and_file() -> None:
    config = experiment(train_processes=1)
    found = fit.problems(config, "train", Asked(H100, None))
    with pytest.raises(EarlError, match=r"train: field train_processes \(in base\) = 1: .*\n.*check_memory=false"):
        fit.refuse(config, found, lambda field: "base")
    fit.refuse(config, [])


def test_lengths() -> None:
    """32 x 32 visual tokens, 32 ends of rows, 9 marks; with reasoning a completion may become as long as it may."""
    assert models.lengths(experiment()) == models.Lengths(1100, 1065, 1065)
    thinking = experiment(assistant_prefill=" Let's think step by step. <|start thinking|>")
    assert models.lengths(thinking) == models.Lengths(1100, 1465, 2048)


def test_checkpoints_are_counted_as_retention_keeps_them() -> None:
    """Every tenth is kept; by stage the one before the newest stays, too, and one is being written."""
    fields = {
        "num_iterations": 40,
        "save_checkpoints_every_n_iterations": 10,
        "keep_checkpoints_every_n_iterations": 10,
    }
    by_stage = disk.checkpoints(experiment(**fields), False)
    assert by_stage == (5, 6, 40)  # 10, 20, 30, 39 and 40; 38 goes when 40 is there
    segments = {"segment_length": 20, "segment_checkpoint_every_n_iterations": 5}
    assert disk.checkpoints(experiment(**fields | segments), True) == (4, 5, 8)
    assert disk.checkpoints(experiment(num_iterations=0), True) == (0, 0, 0)


def test_a_checkpoint_has_weights_and_moments() -> None:
    shape = Emu3TextConfig()
    assert disk.checkpoint_bytes(experiment(), shape) == 12 * WEIGHTS
    assert disk.checkpoint_bytes(experiment(policy_dtype="bfloat16"), shape) == 14 * WEIGHTS


def test_too_little_room_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    config, looked_at = experiment(num_iterations=100, base_exp_dir="not/yet"), []
    taken = disk.of(config, Emu3TextConfig(), True)

    def usage(place: Path) -> SimpleNamespace:
        looked_at.append(place)
        return SimpleNamespace(free=taken.needed - 1)

    monkeypatch.setattr(disk.shutil, "disk_usage", usage)
    assert "keep_checkpoints_every_n_iterations" in disk.notes(config, taken)[0]
    assert looked_at == [Path.cwd()]
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda place: SimpleNamespace(free=taken.needed))
    assert disk.notes(config, taken) == []
    (Path("not/yet/a")).mkdir(parents=True)
    Path("not/yet/a/policy").write_bytes(b"x")
    monkeypatch.setattr(disk.shutil, "disk_usage", usage)
    assert disk.notes(config, taken) == [], "a byte of what the run takes is there"


def test_work_of_an_iteration() -> None:
    shape = Emu3TextConfig()
    padded, packed = (rates.work(experiment(packing=packing), shape) for packing in ("none", "groups"))
    assert padded.generated == 128 * 1065
    assert padded.trained == 128 * (1100 + 1065)
    assert packed.trained == 16 * 1100 + 128 * 1065
    halves = rates.work(experiment(packing="groups", per_device_batch_size=4), shape)
    assert halves.trained == 32 * 1100 + 128 * 1065  # a prompt in each of two micro-batches
    # Two a weight of 32 layers and the last norm, in five passes: forward, backward, again, and the reference.
    assert padded.flops == padded.trained * 2 * (32 * LAYER + 4096) * 5
    assert padded.questions == 256


def test_an_adapter_is_small_and_its_base_has_no_gradient() -> None:
    """Rank 64 of all linear layers: 64 x (4 x 8192 - 2 x 3072 of the two with 1024 outputs + 3 x 18432) a layer."""
    shape, config = Emu3TextConfig(), experiment(lora={"rank": 64})
    trained = 32 * 64 * (4 * 8192 - 2 * 3072 + 3 * 18432)
    assert disk.checkpoint_bytes(config, shape) == 12 * trained
    full, adapted = (rates.work(one, shape).flops for one in (experiment(), config))
    assert adapted / full == pytest.approx(4 / 5)
    [sampling, training] = loads.of(config, "iterate", H100)
    assert sampling.parts["engine"] == 2 * (WEIGHTS + trained)
    assert training.parts["weights"] == pytest.approx(2 * WEIGHTS / 4, abs=10)


def test_assumptions_are_set_by_name() -> None:
    assert rates.assumed(["judge_questions_per_second=20"]).judge_questions_per_second == 20
    with pytest.raises(EarlError, match="did you mean disk_bytes_per_second"):
        rates.assumed(["disk_byte_per_second=1"])
    for wrong in ("start_seconds=0", "start_seconds=soon", "start_seconds"):
        with pytest.raises(EarlError, match="a number above 0"):
            rates.assumed([wrong])


def test_hours_follow_from_seconds_and_gpus_held() -> None:
    config = experiment(num_iterations=1000)
    [found] = run.make([config], True, everywhere(H100))
    [stage] = found.stages
    assert (stage.rule, stage.ranks, stage.gpus) == ("iterate", 4, 4)
    assert found.gpu_hours == pytest.approx(4 * found.hours)
    assert found.seconds["score"] == pytest.approx(25.6)  # 256 questions, 10 a second
    [faster] = run.make([config], True, everywhere(H100), rates.assumed(["judge_questions_per_second=20"]))
    assert found.hours - faster.hours == pytest.approx(1000 * 12.8 / 3600)
    assert run.to_json(found, 2.0)["cost"] == pytest.approx(2 * found.gpu_hours)


def test_what_segments_took_replaces_what_is_assumed() -> None:
    """6 iterations in two segments; one that trained nothing anew says nothing."""
    config = experiment(num_iterations=600, base_exp_dir="runs")
    folder = Path("runs/a/segments")
    folder.mkdir(parents=True)
    for last, trained, generate in ((4, [1, 2, 3, 4], 40.0), (6, [5, 6], 32.0), (8, [], 99.0)):
        record = {"trained": trained, "seconds_by_rank": [{"generate": generate, "train": 6.0}, {"generate": 9.0}]}
        (folder / f"{last:06d}.json").write_text(json.dumps(record))
    [found] = run.make([config], True, everywhere(H100))
    assert found.measured == 6
    assert found.seconds == {"generate": 12.0, "train": 2.0}
    assert found.gpu_hours == pytest.approx(600 * 14 * 4 / 3600)
    assert "measured in 6 iterations" in text.page(found)
    assert "are complete" not in text.page(found)
    assert "2.3 hours of iterations, 1.2 of them left: 300 of 600 are complete" in text.page(replace(found, done=300))


def test_what_stages_took_replaces_what_is_assumed() -> None:
    config = experiment(num_iterations=10, base_exp_dir="runs", rollout_shards=2)
    for rule, seconds in (("generate", (10, 20)), ("score", (4, 6)), ("train", (30,))):
        folder = Path("runs/a/benchmarks") / rule
        folder.mkdir(parents=True)
        for index, taken in enumerate(seconds):
            (folder / f"000001-{index:04d}.tsv").write_text(f"s\th:m:s\n{taken}\t0:00:10\n")
    [found] = run.make([config], False, everywhere(H100))
    assert (found.seconds, found.measured) == ({"generate": 15.0, "score": 5.0, "train": 30.0}, 1)
    hours = {stage.rule: stage.gpu_hours for stage in found.stages}
    # Two shards of one GPU; four ranks that train.
    assert hours == {"generate": pytest.approx(10 * 2 * 15 / 3600), "train": pytest.approx(10 * 30 * 4 / 3600)}


def test_what_the_learner_took_of_a_gpu_stands_beside_the_estimate() -> None:
    """5 x 8.5 GB on each of four ranks, and 8 for activations."""
    config = experiment(base_exp_dir="runs", train_processes=4)
    folder = Path("runs/a/iterations/000003/train")
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    taken = {"device": "NVIDIA H100", "ranks": 4, "peak_memory_bytes": [49 * 10**9, 51 * 10**9]}
    for changes, told in (({}, True), ({"device": "cpu"}, False), ({"ranks": 8}, False)):
        (folder / "performance.json").write_text(json.dumps(taken | changes))
        [found] = run.make([config], True, everywhere(H100))
        note = "in iteration 3 the learner's tensors took 51.0 GB of a NVIDIA H100; 50.5 GB by the estimate"
        assert (note in found.notes) == told


def test_fine_tunings_that_are_to_be_made_are_planned() -> None:
    config = experiment(make_sft_models=True, num_iterations=0)
    assert loads.rules(config, True) == ["sft", "generate"]
    [load_] = loads.of(config, "sft", H100)
    assert load_.what == "sft.s"
    assert load_.parts["reference"] == 0
    [found] = run.make([config], True, everywhere(H100))
    # 11,600 steps of 64 sequences of 1,100 + 1,065 tokens, four passes; 40% of 989 TFLOP/s.
    flops = 11_600 * 64 * 2165 * 2 * (32 * LAYER + 4096) * 4
    assert found.stages[0].gpu_hours == pytest.approx(flops / (0.4 * 989e12) / 3600)
    assert found.disk.shared >= 28 * WEIGHTS  # the model, and a checkpoint with its successor


class TestCommand:
    def test_text_and_status(self, earl) -> None:
        done = earl("plan", "--config", ROOT / "config/sft_s__rl_s.jsonnet", "--gpu", "h100", "--price-per-gpu-hour", 2)
        assert done.returncode == 0, done.stderr
        for words in ("sft_s__rl_s: 2000 iterations by segment", "iterate", "training", "GPU-hours", "at 2 for a GPU"):
            assert words in done.stdout
        one = ("--set", "train_processes=1")
        done = earl("plan", "--config", ROOT / "config/sft_s__rl_s.jsonnet", "--gpu", "h100", *one)
        assert done.returncode == 1
        assert "DOES NOT FIT: iterate: train_processes = 1" in done.stdout

    def test_json(self, earl) -> None:
        done = earl("plan", "--config", ROOT / "config/sft_s__rl_s.jsonnet", "--gpu", "h100", "--json")
        found = json.loads(done.stdout)
        assert found["run_name"] == "sft_s__rl_s"
        assert [stage["rule"] for stage in found["stages"]] == ["iterate"]
        assert found["problems"] == []

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["--set", "model_path=/nope"], "field model_path is '/nope', but there is no folder /nope; name a folder"),
            (
                ["--set", "vision_tokenizer_path=/nope"],
                "field vision_tokenizer_path is '/nope', but there is no folder",
            ),
            (["--set", "vllm_tensor_parallel_size=2"], "set it to 1, or run by stage (granularity=stage)"),
            (
                ["--set", "lora=64"],
                "field lora (in --set) is 64: input should be an object of its fields, such as {rank",
            ),
            (["--gpu", "0"], "--gpu '0': give a type, type:GB or GB, such as h100, a100:40 or 24"),
            (["--table", "--json"], "--json and --table: give one of the two"),
        ],
    )
    def test_what_has_no_estimate_is_refused(self, earl, words, complaint) -> None:
        done = earl("plan", "--config", ROOT / "config/sft_s__rl_s.jsonnet", "--gpu", "h100", *words)
        assert done.returncode == 2
        assert complaint in done.stderr
        assert done.stdout == ""

    def test_the_profile_says_which_gpus(self, earl) -> None:
        Path("config.yaml").write_text("set-resources: {iterate: {gpu: 'a100_40gb:4'}}\n")
        done = earl("plan", "--config", ROOT / "config/sft_s__rl_s.jsonnet", "--profile", ".")
        assert done.returncode == 1
        assert "a100_40gb (43 GB)" in done.stdout

    def test_a_plan_without_known_gpus_says_what_to_give(self, earl, monkeypatch) -> None:
        monkeypatch.setenv("PATH", "")
        done = earl("plan", "--config", ROOT / "config/sft_s__rl_s.jsonnet")
        assert done.returncode == 0
        assert "--profile or --gpu say which GPUs there are" in done.stdout
        assert "Seconds are those of a100 (85 GB)" in done.stdout
        known = earl("plan", "--config", ROOT / "config/sft_s__rl_s.jsonnet", "--gpu", "a100")
        [seconds] = [line for line in done.stdout.splitlines() if line.startswith("seconds")]
        assert seconds in known.stdout

    def test_of_a_cpu_nothing_is_assumed(self, earl) -> None:
        done = earl("plan", "--config", ROOT / "config/demo.jsonnet", "--gpu", "h100", "--set", "base_exp_dir=none")
        assert done.returncode == 0, done.stderr
        assert "not known on a CPU" in done.stdout
        assert "GB of a GPU" not in done.stdout
        assert earl("plan", "--config", ROOT / "config/demo.jsonnet", "--granularity", "stage").returncode == 0

    def test_several_experiments_are_rows_of_a_table(self, earl) -> None:
        files = [ROOT / "config" / f"sft_s__rl_{data}.jsonnet" for data in ("s", "c")]
        done = earl("plan", "--gpu", "h100", "--table", *(word for file in files for word in ("--config", file)))
        assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]] == [
            "`sft_s__rl_s`",
            "`sft_s__rl_c`",
        ]


class TestWorkflow:
    """The plan of the workflow refuses what does not fit."""

    @pytest.fixture(autouse=True)
    def sound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What else is looked at has tests of its own."""
        monkeypatch.setattr(opening.preflight, "check", lambda *arguments: None)

    def plans(self, resources, here: bool = False, **settings: object):
        fields = {"train_processes": 1, "run_name": "a", "base_exp_dir": "runs"}
        wanted = Settings(experiment=[str(ROOT / "config/sft_s__rl_s.jsonnet")], set=fields, **settings)
        return opening.make_plans(wanted, stages_run_here=here, resources=resources)

    def test_more_gpus_than_this_machine_has_are_refused_where_stages_run_on_it(self, monkeypatch) -> None:
        monkeypatch.setattr(gpus, "here", lambda: Asked(None, 1, 1, "this machine has"))
        judged = {"judge": "vllm", "judge_tensor_parallel_size": 4, "run_name": "a", "base_exp_dir": "runs"}
        wanted = Settings(experiment=[str(ROOT / "config/sft_s__rl_s.jsonnet")], set=judged | {"train_processes": 1})
        with pytest.raises(EarlError, match="makes a job of 5 GPUs, but this machine has 1; lower train_processes"):
            opening.make_plans(wanted, stages_run_here=True, resources=lambda rule: {})
        assert opening.make_plans(wanted, stages_run_here=False, resources=lambda rule: {})
        assert self.plans(lambda rule: {}, here=True)

    def test_what_does_not_fit_is_refused_with_its_file(self) -> None:
        with pytest.raises(EarlError, match=r"iterate: field train_processes \(in set=\) = 1"):
            self.plans(lambda rule: {"gpu": "h100:8"})

    def test_unless_it_is_not_to_be_checked_or_not_known(self) -> None:
        assert self.plans(lambda rule: {"gpu": "h100:8"}, check_memory=False)
        assert self.plans(lambda rule: {"gpu": 8})

    def test_a_simulation_that_fails_is_told_and_stops_nothing(self, monkeypatch, capsys) -> None:
        def fails(asked: list) -> list[Bytes]:
            raise cases.NotSimulated("another torch")

        monkeypatch.setattr(cases, "simulate", fails)
        assert self.plans(lambda rule: {"gpu": "h100:8"})
        assert "was not checked: another torch" in capsys.readouterr().err


def test_dynamic_sampling_is_counted_with_all_of_its_rounds() -> None:
    """16 prompts at first and 8 in each of 2 rounds; 10 of these 32 groups are trained on."""
    sampling = {"usable_groups": 10, "max_rounds": 2, "prompts_per_round": 8}
    config = experiment(zero_variance_groups="mask", dynamic_sampling=sampling)
    plain, policy = experiment(), models.text(experiment())
    most, usual = rates.work(config, policy), rates.work(plain, policy)
    assert (most.generated, most.read, most.questions) == (2 * usual.generated, 2 * usual.read, 2 * usual.questions)
    assert most.trained == usual.trained * 10 / 16
    assert disk.of(config, policy, True).iteration == 2 * disk.of(plain, policy, True).iteration
    # Each round decodes for as long as its longest completion takes: all 128 samples, or 64, at once.
    seconds = [rates.sample_seconds(each, policy, 1, H100, rates.Rates()) for each in (config, plain)]
    assert seconds[1] < seconds[0] < 3 * seconds[1]
    assert rates.score_seconds(config, rates.Rates()) == 2 * rates.score_seconds(plain, rates.Rates())
    [found] = run.make([config], True, everywhere(None))
    assert found.questions == 2000 * 2 * 128 * 2
    assert "iterations that sample all 3 rounds, 256 episodes, and train on 10 groups" in " ".join(found.notes)
