"""GPUs by the names that profiles and command lines have for them."""

from pathlib import Path

import pytest

from earl.estimate import gpus
from earl.messages.errors import EarlError

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "gibibytes"),
    [("h100", 80), ("H100", 80), ("a100", 80), ("a100:40", 40), ("24", 24), ("thing:12", 12), ("h200", 141)],
)
def test_a_text_says_how_much_memory(text: str, gibibytes: float) -> None:
    assert gpus.gpu(text).memory == int(0.99 * gibibytes * GIB)


@pytest.mark.parametrize(
    ("kind", "gibibytes"),
    [
        ("nvidia_h100_80gb_hbm3", 80), ("NVIDIA A100-SXM4-40GB", 40), ("a100_3g.20gb", 20), ("l40s", 45), ("l4", 22),
        ("rtx6000", 45),
    ],
)  # fmt: skip
def test_types_as_slurm_and_drivers_call_them(kind: str, gibibytes: float) -> None:
    assert gpus.of_type(kind).memory == int(0.99 * gibibytes * GIB)


def test_what_memory_an_unknown_type_has_has_to_be_said() -> None:
    assert gpus.of_type("mi300x") is None
    with pytest.raises(EarlError, match=r"--gpu h101: .* did you mean h100\?"):
        gpus.gpu("h101")
    with pytest.raises(EarlError, match="type:GB"):
        gpus.gpu("h100:many")


def test_what_a_job_asks_for() -> None:
    found = gpus.asked({"gpu": "h100:8", "nodes": 2})
    assert (found.gpu.name, found.count, found.nodes) == ("h100", 8, 2)
    assert gpus.asked({"gpu": 4}) == gpus.Asked(None, 4)
    assert gpus.asked({"gpu": "4", "gpu_memory_gb": 24}).gpu.memory == int(0.99 * 24 * GIB)
    assert gpus.asked({"gpu": "mystery:2"}) == gpus.Asked(None, 2)
    assert gpus.asked({}) == gpus.Asked(None, None)


@pytest.mark.parametrize(
    "text",
    [
        "default-resources: {gpu_memory_gb: 40}\nset-resources: {iterate: {gpu: 'h100:8', nodes: 2}}\n",
        "default-resources: [gpu_memory_gb=40]\nset-resources: ['iterate:gpu=h100:8', 'iterate:nodes=2']\n",
    ],
)
def test_profiles_as_mappings_and_as_lists(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    resources = gpus.of_profiles(str(tmp_path))
    assert gpus.asked(resources("iterate")).gpu.memory == int(0.99 * 40 * GIB)
    assert (gpus.asked(resources("iterate")).count, gpus.asked(resources("iterate")).nodes) == (8, 2)
    assert gpus.asked(resources("train")).gpu.memory == int(0.99 * 40 * GIB)
    assert gpus.asked(resources("train")).count is None


def test_the_later_profile_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, size in (("default", 40), ("mine", 80)):
        folder = tmp_path / "profiles" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"default-resources: {{gpu_memory_gb: {size}}}\n")
    assert gpus.of_profiles("default", "mine")("train") == {"gpu_memory_gb": 80}


def test_a_profile_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(EarlError, match=r"--profile nowhere: .*profiles/nowhere"):
        gpus.of_profiles("nowhere")
    (tmp_path / "config.yaml").write_text("default-resources: [a: b: c")
    with pytest.raises(EarlError, match=r"config\.yaml: cannot be read"):
        gpus.of_profiles(str(tmp_path))


def test_the_smallest_gpu_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho '81559, NVIDIA H100 80GB HBM3'\necho '24576, NVIDIA L4'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpus.here().memory == int(0.99 * 24 * GIB)
    driver.write_text("#!/bin/sh\nexit 9\n")
    assert gpus.here() is None
