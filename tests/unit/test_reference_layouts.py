"""Where the `.pth` files of a `tokenized_datalist.json` are found, and what may be missing in them."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from earl.config import load
from earl.config.schema import Config
from earl.data import convert
from earl.data.reference import ReferenceDataset
from earl.data.tokenised import open_dataset
from earl.messages.errors import EarlError
from earl.run import preflight

GRID = np.arange(6).reshape(2, 3)
EXAMPLE = {"original_image": GRID, "edited_image": GRID, "instruction": "remove the cat"}


def write(folder: Path, names: list[str], files: list[str], prefix: str = "/elsewhere", **fields: Any) -> Path:
    """Write `<folder>/list/tokenized_datalist.json` with these names, and examples at these paths below the folder."""
    listing = folder / "list" / "tokenized_datalist.json"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text(json.dumps({"prefix": prefix, "path_list": names}))
    for number, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(EXAMPLE | {"instruction": f"edit {number}"} | fields, folder / file)
    return listing


def linked(listing: Path) -> Path:
    """Link `list` into `feature`, as the reference's set-up does; return the list's path by way of the link."""
    feature = listing.parent.parent / "feature"
    feature.mkdir(exist_ok=True)
    (feature / "list").symlink_to("../list")
    return feature / "list" / listing.name


LAYOUTS = {
    "A": (["0.pth", "1.pth"], ["feature/0.pth", "feature/1.pth"]),
    "B": (["feature/0.pth", "feature/1.pth"], ["feature/0.pth", "feature/1.pth"]),
    "C": (["0.pth", "1.pth"], ["0.pth", "1.pth"]),
}


class TestLayouts:
    @pytest.mark.parametrize("through_link", [False, True])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_files_are_found(self, layout: str, through_link: bool, tmp_path: Path) -> None:
        folder = tmp_path / "omniedit" / "train"
        listing = write(folder, *LAYOUTS[layout])
        dataset = open_dataset(linked(listing) if through_link else listing, 6)
        assert dataset.name == "omniedit/train"
        assert [dataset[row].instruction for row in (0, 1)] == ["edit 0", "edit 1"]
        # Reference files may lack edit_id, which is the file's name in the list.
        assert [dataset[row].example_id for row in (0, 1)] == ["0", "1"]

    @pytest.mark.parametrize("relative", [False, True])
    def test_by_prefix(self, relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        prefix = "data/feature" if relative else str(tmp_path / "data" / "feature")
        listing = write(tmp_path / "lists", ["0.pth"], ["../data/feature/0.pth"], prefix)
        assert open_dataset(listing)[0].instruction == "edit 0"

    def test_files_beside_the_list_come_before_those_of_the_prefix(self, tmp_path: Path) -> None:
        listing = write(tmp_path / "copy", ["0.pth"], ["../made/0.pth"], str(tmp_path / "made"))
        write(tmp_path / "copy", ["0.pth"], ["feature/0.pth"], str(tmp_path / "made"), instruction="copied")
        assert open_dataset(listing)[0].instruction == "copied"

    def test_an_empty_feature_folder_does_not_hide_layout_c(self, tmp_path: Path) -> None:
        listing = write(tmp_path, *LAYOUTS["C"])
        (tmp_path / "feature").mkdir()
        assert open_dataset(listing)[1].instruction == "edit 1"

    def test_two_folders_that_hold_the_files_are_refused(self, tmp_path: Path) -> None:
        listing = write(tmp_path, ["0.pth"], ["feature/0.pth", "0.pth"])
        with pytest.raises(EarlError, match=rf"{tmp_path} and {tmp_path}/feature both hold files of this list"):
            ReferenceDataset(listing)

    def test_one_folder_by_two_names_is_no_ambiguity(self, tmp_path: Path) -> None:
        listing = write(tmp_path, ["0.pth"], ["0.pth"])
        (tmp_path / "feature").symlink_to(".")
        assert open_dataset(listing)[0].instruction == "edit 0"

    def test_a_miss_says_where_was_looked(self, tmp_path: Path) -> None:
        listing = write(tmp_path / "train", ["0.pth", "1.pth"], [])
        with pytest.raises(EarlError) as error:
            ReferenceDataset(listing)
        message = str(error.value)
        assert message.startswith(f"{listing}: none of the files that it lists is there")
        for place in (tmp_path / "train", tmp_path / "train" / "feature", "/elsewhere"):
            assert f"{place}" in message
        assert "0.pth" in message

    def test_a_single_missing_file_is_that_rows_matter(self, tmp_path: Path) -> None:
        listing = write(tmp_path, ["0.pth", "1.pth", "2.pth"], ["feature/0.pth", "feature/1.pth"])
        dataset = ReferenceDataset(listing)
        assert dataset[1].instruction == "edit 1"
        with pytest.raises(EarlError, match=r"feature/2\.pth: does not exist"):
            dataset[2]

    def test_it_is_decided_once_and_few_files_are_looked_at(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = [f"{number}.pth" for number in range(5000)]
        listing = write(tmp_path, names, [])
        (tmp_path / "feature").mkdir()
        for name in names:
            (tmp_path / "feature" / name).touch()
        asked: list[str] = []
        stat = os.stat

        def counted(path: Any, *args: Any, **options: Any) -> os.stat_result:
            asked.append(str(path))
            return stat(path, *args, **options)

        monkeypatch.setattr(os, "stat", counted)
        dataset = ReferenceDataset(listing)
        looked_at = len(asked)
        assert looked_at < 500
        assert dataset.file(4321) == tmp_path / "feature" / "4321.pth"
        assert len(asked) == looked_at


class TestContents:
    @pytest.mark.parametrize("cot", ["", "The cat sits [1, 2, 3, 4].", {}, None, {"a": None}])
    def test_no_reasoning(self, cot: Any, tmp_path: Path) -> None:
        """None, not an empty list: training on reasoning refuses such an example, and learns no empty thought."""
        listing = write(tmp_path, ["0.pth"], ["feature/0.pth"], CoT=cot)
        assert open_dataset(listing)[0].reasoning is None
        convert.run(listing, tmp_path / "out", 6, None, 0.0)
        assert open_dataset(tmp_path / "out")[0].reasoning is None

    def test_reasoning_keeps_keys_order_and_text(self, tmp_path: Path) -> None:
        cot = {"thinking": " first ", "count": 3, "share": 0.5, "nothing": None}
        listing = write(tmp_path, ["0.pth"], ["feature/0.pth"], CoT=cot)
        assert open_dataset(listing)[0].reasoning == [("thinking", " first "), ("count", "3"), ("share", "0.5")]

    @pytest.mark.parametrize(
        ("given", "expected"),
        [(17, "17"), ("17.pth", "17.pth"), (torch.tensor(5), "5"), (np.int64(6), "6"), (None, "0")],
    )
    def test_edit_id(self, given: Any, expected: str, tmp_path: Path) -> None:
        listing = write(tmp_path, ["0.pth"], ["feature/0.pth"], edit_id=given)
        assert open_dataset(listing)[0].example_id == expected

    def test_an_id_with_several_values_is_named(self, tmp_path: Path) -> None:
        listing = write(tmp_path, ["0.pth"], ["feature/0.pth"], edit_id=torch.tensor([1, 2]))
        with pytest.raises(EarlError, match=r"0\.pth: field 'edit_id' is a list where a text or a whole number is"):
            open_dataset(listing)[0]

    @pytest.mark.parametrize("name", ["original_image", "edited_image", "instruction"])
    def test_the_three_fields_are_needed(self, name: str, tmp_path: Path) -> None:
        listing = write(tmp_path, ["0.pth"], [])
        (tmp_path / "feature").mkdir()
        torch.save({k: v for k, v in EXAMPLE.items() if k != name}, tmp_path / "feature" / "0.pth")
        with pytest.raises(EarlError, match=rf"0\.pth: field '{name}' is missing"):
            open_dataset(listing)[0]


def config(**fields: Any) -> Config:
    base = {
        "run_name": "a", "base_exp_dir": "runs", "val_paths_file": [], "evaluations": {},
        "model_path": "package:shapes/base_policy", "vision_tokenizer_path": "package:shapes/vision_tokenizer",
        "reward_function_api_base": "http://judge:1", "episodes_per_iteration": 2, "generations_per_sample": 2,
        "engine_batch_size": 2,
    }  # fmt: skip
    return load.changed(Config.model_validate(base | {"train_paths_file": ["stage:fetch/omniedit"]}), fields)


class TestThePlan:
    def test_a_list_without_files_stops_the_plan(self, tmp_path: Path) -> None:
        listing = write(tmp_path, ["0.pth"], [])
        with pytest.raises(
            EarlError, match=r"field train_paths_file cannot be drawn from: .*none of the files that it lists is there"
        ):
            preflight.check(config(train_paths_file=[str(listing)]), here=False)

    def test_a_list_that_is_not_there_names_the_one_that_is(self, tmp_path: Path) -> None:
        listing = write(tmp_path, *LAYOUTS["A"])
        wanted = tmp_path / "feature" / "list" / listing.name
        with pytest.raises(EarlError, match=rf"train_paths_file names what is not there: {wanted}; there is {listing}"):
            preflight.check(config(train_paths_file=[str(wanted)]), here=False)

    def test_every_list_that_the_run_reads_is_looked_at(self, tmp_path: Path) -> None:
        sound, broken = write(tmp_path / "a", *LAYOUTS["B"]), write(tmp_path / "b", ["0.pth"], [])
        held_out = {"x": {"prompts": 1, "paths_file": [str(broken)]}}
        tuning = {"x": {"base_model": "package:shapes/base_policy", "train_paths_file": [str(broken)], "steps": 1}}
        preflight.check(config(train_paths_file=[str(sound)]), here=False)
        with pytest.raises(EarlError, match=r"evaluations\.x\.paths_file cannot be drawn from: "):
            preflight.check(config(train_paths_file=[str(sound)], evaluations=held_out), here=False)
        with pytest.raises(EarlError, match=r"val_paths_file cannot be drawn from: "):
            preflight.check(config(evaluations={"x": {"prompts": 1}}, val_paths_file=[str(broken)]), here=False)
        with pytest.raises(EarlError, match=r"sft\.x\.train_paths_file cannot be drawn from: "):
            preflight.check(config(train_paths_file=[str(sound)], sft=tuning, model_path="stage:sft/x"), here=False)
        # A fine-tuning that is not made reads nothing.
        preflight.check(config(train_paths_file=[str(sound)], sft=tuning), here=False)
