"""A configuration that names published checkpoints: each is downloaded and converted once, by a stage of the plan."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from earl.config import load, paths
from earl.config.schema import Config
from earl.data.raw import RawSource
from earl.emu3 import checkpoint
from earl.emu3.published import Conversion
from earl.files import manifest, tables
from earl.messages.errors import EarlError
from earl.run import preflight, verify
from earl.shapes import dataset
from tests.support import bare_loop, emu3_files
from tests.support.forked import Forked, environment
from tests.support.workplace import Workplace, write_tokenised

ROOT = Path(__file__).parents[2]
TEXTS = ["change the red circle", "8*8", "make the background green", "remove the blue square"]
POLICY, TOKENIZER, VISION = "mair-lab/sft-simple", "BAAI/Emu3-Gen", "BAAI/Emu3-VisionTokenizer"
EXPERIMENT = {
    "run_name": "a",
    "base_exp_dir": "runs",
    "raw_datasets": {"pairs": {"source": "shapes", "count": 8, "seed": 1}},
    "train_paths_file": ["stage:tokenise/pairs"],
    "val_paths_file": [],
    "model_path": POLICY,
    "tokenizer_path": TOKENIZER,
    "vision_tokenizer_path": VISION,
    "image_area": 64 * 64,
    "assistant_prefill": "<|image start|>",
    "num_iterations": 1,
    "episodes_per_iteration": 4,
    "generations_per_sample": 2,
    "max_response_tokens": 160,
    "model_context_size": 512,
    "engine": "torch",
    "engine_batch_size": 4,
    "judge": "program",
    "device": "cpu",
    "dtype": "float32",
    "cpu_threads": 1,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, where no name on the hub is a folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def place(here: Path) -> Workplace:
    return Workplace(here)


def config(**fields: object) -> Config:
    return Config(**(EXPERIMENT | fields))


def conversions(made_by: Config) -> dict[str, Conversion]:
    return {stage.name: stage.conversion for stage in paths.shared_stages(made_by).values() if stage.conversion}


def publish(hub: Path, name: str, source: Path, revision: str = "main") -> None:
    """Lay a folder out as a repository that has been downloaded into the cache of huggingface_hub."""
    repository = hub / f"models--{name.replace('/', '--')}"
    commit = f"{len(list(repository.glob('snapshots/*'))):040d}"
    shutil.copytree(source, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a tokenizer and a vision tokenizer in the published formats; the tokenizer's has no weights."""
    folder = tmp_path_factory.mktemp("published")
    codes = emu3_files.write_vision_vq(folder / "vision")["config"]["codebook_size"]
    ranks = emu3_files.ranks_of(TEXTS, 300)
    emu3_files.write_policy(folder / "policy", len(ranks), codes)
    emu3_files.write_vocabulary(folder / "tokenizer", ranks, codes)
    for name, source in {POLICY: "policy", TOKENIZER: "tokenizer", VISION: "vision"}.items():
        publish(folder / "hub", name, folder / source)
    return folder / "hub"


class TestWhatIsMade:
    def test_each_name_once_with_what_its_field_is_for(self, here: Path) -> None:
        found = conversions(config(model_revision="v1"))
        assert found == {
            VISION: Conversion(VISION, vision=True),
            POLICY: Conversion(POLICY, revision="v1", tokenizer=TOKENIZER),
        }

    def test_a_fine_tuning_starts_from_one(self, here: Path) -> None:
        tuning = {"base_model": "BAAI/Emu3-Stage1", "train_paths_file": ["stage:tokenise/pairs"], "steps": 1}
        tuned = config(model_path="stage:sft/s", sft={"s": tuning}, model_revision="v1")
        base = paths.policy_folder(tuned, "BAAI/Emu3-Stage1")
        stages = paths.shared_stages(tuned)
        assert list(stages).index(base) < list(stages).index(paths.sft_folder(tuned, "s"))
        assert base in stages[paths.sft_folder(tuned, "s")].inputs
        # The revision is that of `model_path`, which names no repository here.
        assert stages[base].conversion == Conversion("BAAI/Emu3-Stage1", tokenizer=TOKENIZER)

    def test_one_repository_may_be_both(self, here: Path) -> None:
        both = config(model_path="some/Emu3-hf", vision_tokenizer_path="some/Emu3-hf", tokenizer_path="some/Emu3-hf")
        made = {stage.output: stage.conversion for stage in paths.shared_stages(both).values() if stage.conversion}
        assert made == {
            paths.policy_folder(both, "some/Emu3-hf"): Conversion("some/Emu3-hf"),
            paths.vision_tokenizer_folder(both): Conversion("some/Emu3-hf", vision=True),
        }

    def test_the_folder_depends_on_what_is_converted_and_on_nothing_else(self, here: Path) -> None:
        def folders(**fields: object) -> set[Path]:
            return {stage.output for stage in paths.shared_stages(config(**fields)).values() if stage.conversion}

        first = folders()
        assert {path.name.rsplit("-", 1)[0] for path in first} == {"mair-lab--sft-simple", "BAAI--Emu3-VisionTokenizer"}
        assert folders(run_name="b", kl_coeff=0.5, image_area=1024) == first
        assert len(folders(model_revision="v1") - first) == 1
        assert len(folders(tokenizer_path="some/tokenizer") - first) == 1

    def test_a_folder_of_that_name_is_taken_as_it_is(self, here: Path) -> None:
        for name in (POLICY, VISION):
            (here / name).mkdir(parents=True)
        assert conversions(config()) == {}
        assert paths.policy_folder(config(), POLICY) == Path(POLICY)
        assert paths.vision_tokenizer_folder(config()) == Path(VISION)

    def test_a_tokenizer_that_the_pipeline_makes_comes_first(self, here: Path) -> None:
        own = config(tokenizer_path="stage:shapes-policy")
        stages = paths.shared_stages(own)
        folder, output = paths.shapes_policy_folder(own), paths.policy_folder(own, POLICY)
        assert list(stages).index(folder) < list(stages).index(output)
        assert stages[output].inputs == (folder,)
        assert stages[output].conversion == Conversion(POLICY, tokenizer=str(folder))

    def test_data_is_never_taken_for_a_name(self, here: Path) -> None:
        assert paths.resolve(config(), "data/train") == Path("data/train")


class TestFoldersThatAreMissing:
    @pytest.mark.parametrize("value", ["/no/model", "./no/model", "model", "a/b/c", "package:no"])
    @pytest.mark.parametrize("field", ["model_path", "tokenizer_path", "vision_tokenizer_path"])
    def test_field_and_path_are_named(self, here: Path, field: str, value: str) -> None:
        with pytest.raises(
            EarlError, match=rf"\n  field {field} is '{value}', but there is no folder /.*<owner>/<name>"
        ):
            preflight.check(config(**{field: value}))

    def test_of_a_fine_tuning_until_it_is_made(self, here: Path) -> None:
        tuning = {"base_model": "/no/model", "train_paths_file": ["stage:tokenise/pairs"], "steps": 1}
        tuned = config(model_path="stage:sft/s", sft={"s": tuning, "unused": tuning | {"base_model": "/nor/this"}})
        with pytest.raises(EarlError, match=r"field sft\.s\.base_model is '/no/model'"):
            preflight.check(tuned)
        made = paths.sft_folder(tuned, "s")
        made.mkdir(parents=True)
        manifest.seal(made)
        preflight.check(tuned)

    def test_of_a_tokenizer_only_where_something_is_converted(self, here: Path) -> None:
        preflight.check(config(model_path="package:shapes/base_policy", tokenizer_path="/no/model"))

    def test_nothing_is_planned(self, place: Workplace) -> None:
        output = place.run(place.experiment("a", model_path="models/a/b"), "-n", fails=True)
        wanted = f"field model_path (in a.jsonnet) is 'models/a/b', but there is no folder {place.path}/models/a/b"
        assert wanted in output
        assert "MissingInputException" not in output


class TestThePlan:
    def test_a_papers_experiment_converts_what_it_names(self, place: Workplace) -> None:
        data = place.path / "data"
        for name in ("earl-datasets/omniedit/train", "validation_22march_256"):
            write_tokenised(data / name / "tokenised", name, 16)
        variables = {"DATA_DIR": data, "BASE_EXP_DIR": "runs", "RUN_NAME": "trial"}
        variables |= {"REWARD_FUNCTION_API_BASE": "http://judge:4877"}
        env = {f"APP__{name}": str(value) for name, value in variables.items()}
        started = place.start(str(ROOT / "config" / "sft_s__rl_s.jsonnet"), "-n", "-p", env=env)
        output, _ = started.communicate(timeout=180)
        assert started.returncode == 0, output
        commands = [
            line.split("convert model ")[1].split(" --out")[0]
            for line in output.splitlines()
            if "earl convert model" in line
        ]
        assert sorted(commands) == [
            "BAAI/Emu3-VisionTokenizer --vision",
            "mair-lab/sft-simple --tokenizer BAAI/Emu3-Gen",
        ]

    @pytest.mark.slow
    def test_runs_share_it_and_only_what_was_removed_is_made_again(self, place: Workplace) -> None:
        fields = {"model_path": POLICY, "vision_tokenizer_path": VISION, "num_iterations": 1}
        both = [place.experiment(name, **fields, kl_coeff=kl) for name, kl in (("a", 0.1), ("b", 0.2))]
        place.run(",".join(both))
        kinds = place.kinds()
        made = ("convert", "start", "generate", "score", "train")
        assert {kind: kinds.count(kind) for kind in made} == dict.fromkeys(made, 2)
        assert kinds[0] == "convert"  # on one core the first run starts before the other conversion
        policies = [place.folder(name).iteration(0).policy.resolve() for name in "ab"]
        assert policies[0] == policies[1]
        assert policies[0].name.startswith("mair-lab--sft-simple-")
        [folder] = (place.path / "runs" / "shared" / "convert").glob("BAAI--*")
        shutil.rmtree(folder)
        place.run(both[0], set="num_iterations=2")
        assert [kind for kind in place.kinds() if kind in made] == ["convert", "generate", "score", "train"]


@pytest.mark.slow
def test_from_published_checkpoints_to_rl(hub: Path, here: Path) -> None:
    """The workflow downloads and converts, by processes of its own; the rest is done here."""
    (here / "a.jsonnet").write_text(json.dumps(EXPERIMENT))
    asked = ["--snakefile", ROOT / "workflow" / "Snakefile", "--until", "fetch", "--config", "experiment=a.jsonnet"]
    started = Forked("snakemake", asked, here, environment(HF_HUB_CACHE=hub, HF_HUB_OFFLINE=1))
    output, _ = started.communicate(timeout=500)
    assert started.returncode == 0, output

    made_by = load.load(here / "a.jsonnet").config
    run = bare_loop.run_all(made_by)
    policy, vision = paths.policy_folder(made_by, POLICY), paths.vision_tokenizer_folder(made_by)
    assert run.iteration(0).policy.resolve() == policy.resolve()
    assert checkpoint.check_policy(policy).num_visual == 64
    assert checkpoint.load_vision_tokenizer(vision, "cpu").config.codebook_size == 64
    tokenised = paths.tokenised_folder(made_by, "pairs")
    metadata = tables.read_metadata(next(tokenised.glob("data/*.parquet")))
    assert metadata["vision_tokenizer_digest"] == manifest.digest_folder(vision)
    assert verify.verify(run).problems == []


def test_in_one_process_too(hub: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        [snapshot] = (hub / f"models--{name.replace('/', '--')}" / "snapshots").iterdir()
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    bare_loop.make_shared(config(model_revision="v1"))
    # Of the repository that gives the tokenizer no weights are downloaded.
    assert sorted(asked) == [(TOKENIZER, None, False), (VISION, None, True), (POLICY, "v1", True)]
    asked.clear()
    bare_loop.make_shared(config(model_revision="v1", run_name="b"))
    assert asked == []


URL = "hf://datasets/osunlp/pairs@v1/data/train-*.parquet"


@pytest.fixture
def data_hub(tmp_path: Path) -> Path:
    """Pairs in a repository of two folders, laid out as downloaded; three files, of which two are wanted."""
    source = tmp_path / "source"
    for seed, name in enumerate(("data/train-0", "data/train-1", "data/validation-0")):
        dataset.write_raw(source / f"{name}.parquet", count=3, seed=seed)
    repository = tmp_path / "hub" / "datasets--osunlp--pairs"
    shutil.copytree(source, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("0" * 40)
    return tmp_path / "hub"


def from_hub(**fields: object) -> Config:
    return config(raw_datasets={"pairs": {"source": "parquet", "path": URL, **fields}})


class TestDataSets:
    def test_files_are_downloaded_once_for_all_that_read_them(self, here: Path) -> None:
        made, other = from_hub(), from_hub(columns={"task": None}, keep_images=False)
        [stage] = [one for one in paths.shared_stages(made).values() if one.stage == "download"]
        assert stage.name == URL
        assert stage.output == paths.raw_file(made, "pairs") == paths.raw_file(other, "pairs")
        assert paths.tokenised_folder(made, "pairs") != paths.tokenised_folder(other, "pairs")
        tokenise = paths.shared_stages(made)[paths.tokenised_folder(made, "pairs")]
        assert stage.output in tokenise.inputs

    @pytest.mark.slow
    def test_a_run_downloads_once_and_then_tokenises(self, place: Workplace) -> None:
        pairs = {"source": "parquet", "path": URL}
        fields = {"train_paths_file": ["stage:tokenise/a", "stage:tokenise/b"], "num_iterations": 1}
        place.run(place.experiment("a", **fields, raw_datasets={"a": pairs, "b": pairs | {"keep_images": False}}))
        shared = [words for words in map(str.split, place.stages()) if words[0] in ("download", "tokenise")]
        assert [words[0] for words in shared] == ["download", "tokenise", "tokenise"]
        assert shared[0][1] == URL
        out = shared[0][3]
        assert [words[words.index("--raw") + 1] for words in shared[1:]] == [out, out]

    @pytest.mark.parametrize(
        "path", ["hf://datasets/osunlp/pairs", "hf://osunlp/pairs/a.parquet", "hf://datasets/a/b/c.csv"]
    )
    def test_what_names_no_files_is_refused_by_field(self, here: Path, path: str) -> None:
        pairs = {"source": "parquet", "path": path}
        (here / "a.jsonnet").write_text(json.dumps(EXPERIMENT | {"raw_datasets": {"pairs": pairs}}))
        with pytest.raises(EarlError, match=r"raw_datasets\.pairs\.path.*hf://datasets/<owner>/<name>/"):
            load.load(here / "a.jsonnet")

    def test_the_files_that_the_pattern_means_and_no_others(self, data_hub: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"

        def download(url: str) -> subprocess.CompletedProcess:
            env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(data_hub), "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-m", "earl", "download", url, "--out", str(out)]
            return subprocess.run(command, env=env, capture_output=True, text=True)

        done = download(URL)
        assert done.returncode == 0, done.stderr
        assert sorted(file.name for file in out.glob("*.parquet")) == ["data--train-0.parquet", "data--train-1.parquet"]
        manifest.check(out, deep=True)
        source = RawSource(out)
        assert len(source) == 6
        for url, message in (
            (URL.replace("train", "test"), "has no such file"),
            (URL.replace("pairs", "others"), "could not be downloaded"),
            ("data/train.parquet", "is no name on the hub"),
        ):
            failed = download(url)
            assert failed.returncode == 2
            assert message in failed.stderr
