"""Published data sets come from the hub, are checked, laid out where experiments look, and converted."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from earl.config import jsonnet_values, load, paths
from earl.config.schema import Config
from earl.data import archives, catalogue, fetch, hub_files
from earl.data.raw import RawSource
from earl.data.reference import ReferenceDataset
from earl.data.tokenised import open_dataset
from earl.files import hub_names, images, manifest
from earl.messages.errors import EarlError
from earl.run import preflight
from tests.support.data_hub import DataHub
from tests.support.demo import ROOT
from tests.support.workplace import Workplace

VALIDATION = "mair-lab/omniedit-got-tokenized-256"
PICTURE = images.encode(np.full((16, 16, 3), 7, np.uint8))


def tar(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


def examples(root: str, count: int = 3, layout: str = "A", **changes: Any) -> dict[str, bytes]:
    """Files of a reference data set below a folder, in one of its layouts."""
    names = {"A": "{}.pth", "B": "feature/{}.pth", "C": "{}.pth"}[layout]
    where = {"A": "feature/{}.pth", "B": "feature/{}.pth", "C": "{}.pth"}[layout]
    listing = {"prefix": "/elsewhere", "path_list": [names.format(number) for number in range(count)]}
    files = {f"{root}/list/tokenized_datalist.json": json.dumps(listing).encode()}
    for number in range(count):
        example = {"original_image": np.full((2, 3), number), "edited_image": np.full((2, 3), number)}
        stored = io.BytesIO()
        torch.save(example | {"instruction": f"{root} {number}"} | changes, stored)
        files[f"{root}/{where.format(number)}"] = stored.getvalue()
    return files


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DataHub]:
    with DataHub() as started:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", started.url)
        template = f"{started.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield started


@pytest.fixture
def validation(server: DataHub) -> DataHub:
    server.files[VALIDATION] = {
        "README.md": b"# data",
        "validation_22march_256.tar.gz": tar(examples("validation_22march_256")),
        "train_22march_256.tar.gz": tar(examples("train_22march_256")),
    }
    return server


def named(*names: str) -> list[catalogue.Entry]:
    return catalogue.named(names)


class TestTokenised:
    def test_laid_out_converted_and_recorded(self, validation: DataHub, tmp_path: Path) -> None:
        validation.licence = "mit"
        fetch.fetch(named("validation"), tmp_path / "data")
        place = tmp_path / "data" / "validation_22march_256"
        # What the reference's configurations name, and what the ten experiments read.
        before = ReferenceDataset(place / "feature" / "list" / "tokenized_datalist.json")
        after = open_dataset(place / "tokenised", 32768)
        assert [after[row].instruction for row in range(3)] == [before[row].instruction for row in range(3)]
        assert after.name == "validation", "whatever folder it is fetched to"
        assert (place / "feature" / "list").readlink() == Path("../list")
        record = json.loads((place / "fetched.json").read_text())
        assert (record["repository"], record["licence"]) == (VALIDATION, "mit")
        assert record["commit"] == validation.commit(VALIDATION)
        [file] = record["files"]
        content = validation.files[VALIDATION]["validation_22march_256.tar.gz"]
        assert file["name"] == "validation_22march_256.tar.gz"
        assert file["size"] == len(content)
        assert file["sha256"] == validation.info(VALIDATION)["siblings"][1]["lfs"]["sha256"]
        assert validation.downloads() == ["validation_22march_256.tar.gz"]
        assert sorted(one.name for one in (tmp_path / "data").iterdir()) == ["validation_22march_256"]

    def test_nothing_is_fetched_twice(self, validation: DataHub, tmp_path: Path) -> None:
        fetch.fetch(named("validation"), tmp_path)
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        validation.calls.clear()
        fetch.fetch(named("validation"), tmp_path)
        assert validation.calls == []
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files

    def test_a_download_that_broke_off_continues(
        self, validation: DataHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        noise = np.random.default_rng(0).bytes(300_000)
        files = examples("validation_22march_256") | {"validation_22march_256/noise": noise}
        validation.files[VALIDATION]["validation_22march_256.tar.gz"] = tar(files)
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
        validation.break_after = 100_000
        try:
            fetch.fetch(named("validation"), tmp_path / "data")
        except EarlError:
            assert not (tmp_path / "data" / "validation_22march_256").exists()
            fetch.fetch(named("validation"), tmp_path / "data")
        ranges = validation.downloads()
        assert ranges[0] == "validation_22march_256.tar.gz"
        assert ranges[1].startswith("validation_22march_256.tar.gz bytes=")
        assert not ranges[1].endswith("bytes=0-"), "it did not begin anew"
        assert len(open_dataset(tmp_path / "data" / "validation_22march_256" / "tokenised")) == 3

    def test_other_bytes_than_the_hub_says(self, validation: DataHub, tmp_path: Path) -> None:
        validation.wrong = "validation_22march_256.tar.gz"
        with pytest.raises(EarlError, match=r"validation_22march_256\.tar\.gz has the checksum .*fetch it again"):
            fetch.fetch(named("validation"), tmp_path / "data")
        assert not (tmp_path / "data" / "validation_22march_256").exists()
        validation.wrong = ""
        fetch.fetch(named("validation"), tmp_path / "data")
        assert len(validation.downloads()) == 2

    def test_an_archive_that_leads_out_is_not_kept(self, validation: DataHub, tmp_path: Path) -> None:
        bad = examples("validation_22march_256") | {"../../escaped": b"x"}
        validation.files[VALIDATION]["validation_22march_256.tar.gz"] = tar(bad)
        with pytest.raises(EarlError, match="a name that leads out of it"):
            fetch.fetch(named("validation"), tmp_path / "data")
        assert list((tmp_path / "data").iterdir()) == []
        assert not (tmp_path / "escaped").exists()

    @pytest.mark.parametrize("layout", ["A", "B", "C"])
    @pytest.mark.parametrize("root", ["omniedit/train", "earl-datasets/omniedit/train", "train"])
    def test_what_an_archive_calls_its_folders(self, root: str, layout: str, server: DataHub, tmp_path: Path) -> None:
        held_out = examples(root.replace("train", "validation"), 1, layout)
        server.files["mair-lab/earl-datasets"] = {"omniedit.tar.gz": tar(examples(root, 3, layout) | held_out)}
        fetch.fetch(named("omniedit"), tmp_path)
        place = tmp_path / "earl-datasets" / "omniedit" / "train"
        assert len(ReferenceDataset(place / "list" / "tokenized_datalist.json")) == 3
        assert len(open_dataset(place / "tokenised")) == 3

    def test_an_archive_of_another_data_set_is_not_taken_for_it(self, server: DataHub, tmp_path: Path) -> None:
        """All of them have a folder `train`; no file of this name, so that whatever archive there is is looked into."""
        server.files["mair-lab/earl-datasets"] = {"all.tar.gz": tar(examples("all/magic_brush/train"))}
        with pytest.raises(EarlError, match=r"omniedit: .* should hold earl-datasets/omniedit/train, but has .*magic"):
            fetch.fetch(named("omniedit"), tmp_path)
        fetch.fetch(named("magic_brush"), tmp_path)
        assert len(open_dataset(tmp_path / "earl-datasets" / "magic_brush" / "train" / "tokenised")) == 3

    def test_one_archive_that_is_found_by_several_patterns_is_unpacked_once(
        self, server: DataHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        complex_edits = named("complex")
        files: dict[str, bytes] = {}
        for number, one in enumerate(complex_edits):
            files |= examples(one.place, number + 1)
        server.files["mair-lab/earl-datasets"] = {"earl.tar.gz": tar(files)}
        unpacked = []
        unpack = archives.unpack
        monkeypatch.setattr(archives, "unpack", lambda *paths: (unpacked.append(paths), unpack(*paths)))
        fetch.fetch(complex_edits, tmp_path)
        assert [len(open_dataset(tmp_path / one.place / "tokenised")) for one in complex_edits] == [1, 2, 3, 4, 5, 6]
        assert len(unpacked) == 1

    def test_an_archive_without_a_folder_of_its_own(self, validation: DataHub, tmp_path: Path) -> None:
        files = {name.removeprefix("x/"): content for name, content in examples("x").items()}
        validation.files[VALIDATION]["validation_22march_256.tar.gz"] = tar(files)
        fetch.fetch(named("validation"), tmp_path)
        assert len(open_dataset(tmp_path / "validation_22march_256" / "tokenised")) == 3

    def test_files_that_are_in_no_archive(self, server: DataHub, tmp_path: Path) -> None:
        server.files["mair-lab/earl-datasets"] = examples("omniedit/train")
        fetch.fetch(named("omniedit"), tmp_path)
        assert len(open_dataset(tmp_path / "earl-datasets" / "omniedit" / "train" / "tokenised")) == 3

    def test_data_sets_of_one_archive_are_unpacked_together(self, server: DataHub, tmp_path: Path) -> None:
        files: dict[str, bytes] = {}
        for number, one in enumerate(named("rl_100k")):
            files |= examples(one.place, number + 1)
        server.files["rabiulawal/emu3_tokenized_rl_100k"] = {"emu3_tokenized_rl_100k.tar.gz": tar(files)}
        fetch.fetch(named("rl_100k"), tmp_path)
        sizes = [len(open_dataset(tmp_path / one.place / "tokenised")) for one in named("rl_100k")]
        assert sizes == [1, 2, 3, 4, 5, 6, 7]
        assert len(server.downloads()) == 1

    def test_a_file_that_cannot_be_converted(self, validation: DataHub, tmp_path: Path) -> None:
        files = examples("validation_22march_256", edited_image=np.array([[1, 40000]]))
        validation.files[VALIDATION]["validation_22march_256.tar.gz"] = tar(files)
        with pytest.raises(EarlError, match=r"token id 40000 must lie in 0\.\.32767"):
            fetch.fetch(named("validation"), tmp_path)
        # The archive is laid out; with a higher limit it is not downloaded again.
        validation.calls.clear()
        with pytest.raises(EarlError, match="no row is left"):
            fetch.fetch(named("validation"), tmp_path, max_rejected_fraction=1.0)
        assert validation.calls == []

    def test_archives_may_go(self, validation: DataHub, tmp_path: Path) -> None:
        fetch.fetch(named("validation"), tmp_path, keep_archives=False)
        place = tmp_path / "validation_22march_256"
        assert sorted(one.name for one in place.iterdir()) == ["fetched.json", "tokenised"]
        fetch.fetch(named("validation"), tmp_path, keep_archives=False)
        assert len(validation.downloads()) == 1

    def test_someone_elses_folder_is_left_alone(self, validation: DataHub, tmp_path: Path) -> None:
        place = tmp_path / "validation_22march_256"
        for name, content in examples("validation_22march_256").items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        with pytest.raises(EarlError, match=rf"{place}: is there already, .* `earl convert data {place}/list/"):
            fetch.fetch(named("validation"), tmp_path)
        assert validation.downloads() == []


class TestErrors:
    def test_a_repository_or_file_that_is_not_there(self, server: DataHub, tmp_path: Path) -> None:
        with pytest.raises(EarlError, match=rf"validation: {VALIDATION} did not come from the hub"):
            fetch.fetch(named("validation"), tmp_path)
        server.files[VALIDATION] = {"other.tar.gz": b"x"}
        with pytest.raises(EarlError, match=r"has no file validation_22march_256\.tar\.gz; it has other\.tar\.gz"):
            fetch.fetch(named("validation"), tmp_path)

    def test_a_gated_one_says_how_to_log_in(self, validation: DataHub, tmp_path: Path) -> None:
        validation.gated = True
        with pytest.raises(
            EarlError, match=r"the token \(`hf auth whoami`\), and whether its page has terms to accept"
        ):
            fetch.fetch(named("validation"), tmp_path)

    def test_a_hub_that_does_not_answer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(EarlError, match=r"validation: .* did not come from the hub"):
            fetch.fetch(named("validation"), tmp_path)

    def test_an_archive_of_other_data(self, validation: DataHub, tmp_path: Path) -> None:
        validation.files[VALIDATION]["validation_22march_256.tar.gz"] = tar(examples("a") | examples("b"))
        with pytest.raises(EarlError, match=r"should hold validation_22march_256, but has .*/a, .*/b"):
            fetch.fetch(named("validation"), tmp_path)


class TestOthers:
    @pytest.mark.parametrize("suffix", ["parquet", "arrow"])
    def test_the_download_stage_takes_parquet_or_arrow(self, suffix: str, server: DataHub, tmp_path: Path) -> None:
        names = ("train/data-0.parquet", "train/data-1.arrow", "dev/data-0.arrow", "dev/data-1.parquet")
        server.files["mair-lab/vismin"] = {name: name.encode() for name in names}
        wanted = hub_names.data_files(f"hf://datasets/mair-lab/vismin/*.{suffix}")
        hub_files.download(wanted, tmp_path / "out")
        found = {one.name: one.read_text() for one in (tmp_path / "out").iterdir() if one.name != "manifest.json"}
        assert found == {name.replace("/", "--"): name for name in names if name.endswith(suffix)}

    def test_pairs_are_files_with_a_record(self, server: DataHub, tmp_path: Path) -> None:
        made = io.BytesIO()
        columns = {"source_img": [PICTURE], "target_img": [PICTURE], "instruction": ["add"]}
        pq.write_table(pa.table(columns), made)
        files = {"data/train-0.parquet": made.getvalue(), "data/dev-0.parquet": b"not wanted"}
        server.files["osunlp/MagicBrush"] = files
        fetch.fetch(named("raw_magic_brush"), tmp_path)
        place = tmp_path / "raw" / "magic_brush"
        assert sorted(one.name for one in place.iterdir()) == ["data--train-0.parquet", "fetched.json", "manifest.json"]
        manifest.check(place, deep=True)
        columns = {"instruction": "instruction", "original": "source_img", "edited": "target_img"}
        assert len(RawSource(place, columns)) == 1

    def test_imgedit_becomes_a_table_of_prompts(self, server: DataHub, tmp_path: Path) -> None:
        listed = {
            "1082": {"id": "animal/1.jpg", "prompt": "Smooth the shell.", "edit_type": "adjust"},
            "673": {"id": "style/2.jpg", "prompt": "As a woodcut.", "edit_type": "style"},
        }
        folder = "Benchmark/singleturn"
        files = {f"{folder}/{one['id']}": PICTURE for one in listed.values()}
        files[f"{folder}/singleturn.json"] = json.dumps(listed).encode()
        server.files["sysuyy/ImgEdit"] = {"Benchmark.tar": tar(files, "w"), "Singleturn/x.tar": b"large"}
        fetch.fetch(named("imgedit"), tmp_path)
        presets = jsonnet_values.evaluate(ROOT / "config" / "data" / "benchmarks.libsonnet", {}).value
        preset = presets["imgedit"]["imgedit"]
        source = RawSource(tmp_path / "imgedit", preset["columns"])
        [rows] = source.read(source.windows(10)[0], 10)
        found = [(row.example_id, row.task, row.instruction, row.original) for row in rows]
        assert found == [
            ("1082", "adjust", "Smooth the shell.", PICTURE), ("673", "style", "As a woodcut.", PICTURE),
        ]  # fmt: skip
        files.pop(f"{folder}/style/2.jpg")
        server.files["sysuyy/ImgEdit"]["Benchmark.tar"] = tar(files, "w")
        with pytest.raises(EarlError, match=r"the picture of '673', style/2\.jpg, is not there"):
            fetch.fetch(named("imgedit"), tmp_path / "again")


class TestCatalogue:
    def test_pairs_are_those_of_the_presets(self) -> None:
        """A path stands in a preset and in the catalogue; both mean the same files."""
        pairs = jsonnet_values.evaluate(ROOT / "config" / "data" / "columns.libsonnet", {}).value
        parts = jsonnet_values.evaluate(ROOT / "config" / "data" / "benchmarks.libsonnet", {}).value
        wanted = {preset["path"] for preset in pairs.values() if "path" in preset}
        wanted |= {preset["path"] for part in parts.values() for preset in part.values() if "path" in preset}
        listed = [one for one in catalogue.entries().values() if one.kind == "pairs"]
        found = {f"hf://datasets/{one.repository}/{one.files[0]}" for one in listed}
        vismin = "hf://datasets/mair-lab/escher-vismin-dev/data/train/"
        assert found - wanted == {f"{vismin}[cr]*-00001.parquet"}
        assert wanted - found == {f"{vismin}counting-00001.parquet", f"{vismin}relation-00001.parquet"}
        assert all(hub_names.data_files(path) for path in found)

    def test_everything_that_the_ten_read_is_in_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("DATA_DIR", "BASE_EXP_DIR", "RUN_NAME", "REWARD_FUNCTION_API_BASE"):
            monkeypatch.setenv(f"APP__{name}", "/data" if name == "DATA_DIR" else "x")
        read = set()
        for name in ("sft_s__rl_s", "sft_sc2stage__rl_sc"):
            config = load.load(ROOT / "config" / f"{name}.jsonnet").config
            read |= set(paths.prompt_paths(config))
            read |= {one for tuning in config.sft.values() for one in tuning.train_paths_file}
        assert read == {f"/data/{one.place}/tokenised" for one in named("experiments")}
        assert len(read) == 8

    def test_groups_and_names(self) -> None:
        assert [one.name for one in named("simple", "omniedit", "validation")] == ["omniedit", "validation"]
        with pytest.raises(EarlError, match="omni: is no data set of the catalogue; `earl data list`"):
            named("omni")


def cli(*words: str, server: DataHub | None = None, cache: Path | None = None) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if server:
        env |= {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-m", "earl", "data", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)


class TestCommand:
    def test_list_names_size_licence_and_users(self) -> None:
        done = cli("list")
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0].split() == ["name", "size", "licence", "from", "used", "by"]
        assert len([line for line in lines[1:] if "  " in line]) == len(catalogue.entries())
        [vismin] = [line for line in lines if line.startswith("raw_vismin ")]
        assert "cc-by-sa-4.0" in vismin
        assert "columns.libsonnet" in vismin
        assert any(line.startswith("experiments: validation, omniedit") for line in lines)

    def test_list_online_says_what_the_hub_has(self, validation: DataHub, tmp_path: Path) -> None:
        done = cli("list", "validation", "omniedit", "--online", server=validation, cache=tmp_path)
        assert f"validation: {VALIDATION}: 1 files, 0.00 GB, licence: not stated" in done.stdout
        assert "omniedit: mair-lab/earl-datasets did not come from the hub" in done.stdout

    @pytest.mark.slow
    def test_fetch_to_a_folder(self, validation: DataHub, tmp_path: Path) -> None:
        done = cli("fetch", "validation", "--to", str(tmp_path / "data"), server=validation, cache=tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        assert "validation: downloading validation_22march_256.tar.gz, " in done.stderr
        assert "convert validation: 3 of 3 rows kept" in done.stderr
        assert len(open_dataset(tmp_path / "data" / "validation_22march_256" / "tokenised")) == 3

    @pytest.mark.slow
    def test_out_is_tokenised_parquet_alone(self, validation: DataHub, tmp_path: Path) -> None:
        out = tmp_path / "out" / "validation-0"
        done = cli("fetch", "validation", "--out", str(out), server=validation, cache=tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        manifest.check(out, deep=True)
        assert len(open_dataset(out)) == 3
        assert [one.name for one in out.parent.iterdir()] == [out.name]

    @pytest.mark.parametrize(
        ("words", "part"),
        [
            (["validation"], "give either --to"),
            (["validation", "omniedit", "--out", "x"], "--out is for a single data set"),
            (["raw_vismin", "--out", "x"], "raw_vismin: is not tokenised"),
            (["omni", "--to", "x"], "omni: is no data set"),
        ],
    )
    def test_mistakes(self, words: list[str], part: str) -> None:
        done = cli("fetch", *words)
        assert done.returncode == 2
        assert part in done.stderr
        assert "Traceback" not in done.stderr


def config(**fields: Any) -> Config:
    base = {
        "run_name": "a", "base_exp_dir": "runs", "val_paths_file": [], "evaluations": {},
        "model_path": "package:shapes/base_policy", "vision_tokenizer_path": "package:shapes/vision_tokenizer",
        "reward_function_api_base": "http://judge:1", "episodes_per_iteration": 2, "generations_per_sample": 2,
        "engine_batch_size": 2, "train_paths_file": ["stage:fetch/omniedit"],
    }  # fmt: skip
    return load.changed(Config.model_validate(base), fields)


ASKED = {"judge": "openai", "reward_function_api_base": "http://judge:1"}


class TestStage:
    def test_it_is_shared_and_depends_on_the_catalogue(self) -> None:
        made = config()
        [(output, stage)] = paths.shared_stages(made).items()
        assert (stage.stage, stage.name, stage.inputs) == ("fetch", "omniedit", ())
        assert output == paths.resolve(made, "stage:fetch/omniedit")
        assert output.parent == Path("runs/shared/fetched")
        assert paths.resolve(config(run_name="b", temperature=0.5), "stage:fetch/omniedit") == output
        assert paths.resolve(made, "stage:fetch/vismin") != output

    def test_a_fine_tuning_reads_it(self) -> None:
        tuning = {"base_model": "package:shapes/base_policy", "train_paths_file": ["stage:fetch/ss2"], "steps": 1}
        made = paths.shared_stages(config(sft={"x": tuning}, model_path="stage:sft/x"))
        assert [stage.stage for stage in made.values()] == ["fetch", "fetch", "sft"]

    @pytest.mark.parametrize("name", ["omni", "raw_vismin", "", "experiments"])
    def test_a_name_that_is_not_in_the_catalogue(self, name: str) -> None:
        with pytest.raises(EarlError, match=rf"train_paths_file\.0 is `stage:fetch/{name}`, .*: validation, omni"):
            config(train_paths_file=[f"stage:fetch/{name}"])

    def test_the_ten_may_have_the_pipeline_fetch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("BASE_EXP_DIR", "RUN_NAME", "REWARD_FUNCTION_API_BASE"):
            monkeypatch.setenv(f"APP__{name}", "x")
        monkeypatch.delenv("APP__DATA_DIR", raising=False)
        parts = [ROOT / "config" / part for part in ("sft_s__rl_sc.jsonnet", "data/fetched.libsonnet")]
        (tmp_path / "a.jsonnet").write_text(" + ".join(f"(import '{part}')" for part in parts))
        made = paths.shared_stages(load.load(tmp_path / "a.jsonnet").config)
        fetched = {stage.name for stage in made.values() if stage.stage == "fetch"}
        assert fetched == {one.name for one in named("experiments")}

    @pytest.mark.slow
    def test_a_run_fetches_once_for_all_that_read_it(self, workplace: Workplace) -> None:
        fields = {"train_paths_file": ["stage:fetch/omniedit", "stage:fetch/ss2"], "num_iterations": 1, **ASKED}
        both = [workplace.experiment(name, **fields, kl_coeff=kl) for name, kl in (("a", 0.1), ("b", 0.2))]
        workplace.run(",".join(both))
        fetched = [words for words in map(str.split, workplace.stages()) if words[0] == "data"]
        assert sorted(words[2] for words in fetched) == ["omniedit", "ss2"]
        assert all(words[1] == "fetch" and "/shared/fetched/" in words[4] for words in fetched)
        assert "Nothing to be done" in workplace.run(both[0])

    def test_what_is_not_there_says_how_to_get_it(self, tmp_path: Path) -> None:
        wanted = tmp_path / "earl-datasets" / "omniedit" / "train" / "tokenised"
        made = config(train_paths_file=[str(wanted)])
        with pytest.raises(
            EarlError, match=rf"paths_file names .*: {wanted}; .*`earl data fetch omniedit --to {tmp_path}`"
        ):
            preflight.check(made, here=False)
        listing = wanted.parent / "list" / "tokenized_datalist.json"
        listing.parent.mkdir(parents=True)
        listing.write_text("{}")
        with pytest.raises(EarlError, match=rf"`earl convert data {listing} --out {wanted}`"):
            preflight.check(made, here=False)
        with pytest.raises(
            EarlError, match=r"names what is not there: .*x\.parquet; name a tokenised data set that is"
        ):
            preflight.check(config(train_paths_file=["x.parquet"]), here=False)
        preflight.check(config(), here=False)
