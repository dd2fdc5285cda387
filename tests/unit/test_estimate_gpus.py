"""GPUs by the names that profiles and command lines have for them."""

from pathlib import Path

import pytest

from earl.estimate import gpus
from earl.messages.errors import EarlError
from tests.support.programs import program

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
    with pytest.raises(EarlError, match=r"--gpu h1000: .* did you mean h100\?"):
        gpus.gpu("h1000")
    for spelled in ("a100_40gb", "NVIDIA A100-SXM4-80GB", "A100-PCIE-40GB"):
        assert gpus.of_type(spelled).flops == gpus.gpu("a100").flops


@pytest.mark.parametrize("text", ["h100:many", "0", "h100:0", "a100:", ":80", "", "-5", "1e9"])
def test_what_is_no_gpu_is_refused(text: str) -> None:
    with pytest.raises(EarlError, match=r"--gpu .*(type:GB or GB, such as h100, a100:40 or 24|say its memory in GB)"):
        gpus.gpu(text)


def test_a_number_of_gpus_is_not_taken_for_their_memory() -> None:
    with pytest.raises(EarlError, match=r"--gpu h100:8: the number is the GB of one GPU.*give h100 alone"):
        gpus.gpu("h100:8")


@pytest.mark.parametrize(
    ("name", "whole", "sevenths"),
    [("a100_3g.20gb", "a100", 3), ("H100 1g.10gb", "h100", 1), ("MIG 7g.80gb", "a100", 7)],
)
def test_a_mig_device_computes_on_its_part_of_the_gpu(name: str, whole: str, sevenths: int) -> None:
    part, gpu = gpus.of_type(name), gpus.gpu(whole)
    assert (part.flops, part.bandwidth) == pytest.approx((gpu.flops * sevenths / 7, gpu.bandwidth * sevenths / 7))
    assert part.is_part
    assert not gpu.is_part


def test_what_a_job_asks_for() -> None:
    found = gpus.asked({"gpu": "h100:8", "nodes": 2})
    assert (found.gpu.name, found.count, found.nodes) == ("h100", 8, 2)
    assert gpus.asked({"gpu": 4}) == gpus.Asked(None, 4)
    assert gpus.asked({"gpu": "4", "gpu_memory_gb": 24}).gpu.memory == int(0.99 * 24 * GIB)
    assert gpus.asked({"gpu": "mystery:2"}) == gpus.Asked(None, 2)
    assert gpus.asked({}) == gpus.Asked(None, None)


@pytest.mark.parametrize(
    ("resource", "value", "fitting"),
    [
        ("gpu", "h100", "type:number, such as h100:8"), ("gpu", "8xh100", "type:number"), ("gpu", -1, "type:number"),
        ("gpu_memory_gb", "40GB", "a number of GB, such as 80"), ("gpu_memory_gb", 0, "such as 80"),
        ("nodes", "two", "a whole number, 1 or more"), ("nodes", 0, "1 or more"),
    ],
)  # fmt: skip
def test_what_no_job_can_ask_for_is_refused(resource: str, value: object, fitting: str) -> None:
    with pytest.raises(EarlError, match=f"resource {resource}={value!r} of a profile should be .*{fitting}"):
        gpus.asked({resource: value})


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


LISTED = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a)
  MIG 1g.10gb     Device  0: (UUID: MIG-1)
  MIG 2g.20gb     Device  1: (UUID: MIG-2)
"""
WHOLE = "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-b)\nGPU 2: NVIDIA L4 (UUID: GPU-c)\n"
SIZES = "GPU-a, 81559, NVIDIA H100 80GB HBM3\nGPU-b, 81559, NVIDIA H100 80GB HBM3\nGPU-c, 23034, NVIDIA L4\n"


@pytest.mark.parametrize(
    ("listed", "visible", "gibibytes", "count"),
    [
        (WHOLE, None, 23034 / 1024, 2),
        (WHOLE, "1", 81559 / 1024, 1),
        (WHOLE, "GPU-b", 81559 / 1024, 1),
        (LISTED + WHOLE, None, 23034 / 1024, 2),  # whole ones are taken first, and alone where several are needed
        (LISTED, None, 10, 1),
        (LISTED, "MIG-2", 20, 1),
    ],
)
def test_the_gpus_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, visible: str | None, gibibytes: float, count: int
) -> None:
    program(tmp_path, "nvidia-smi", f"case $1 in --list-gpus) printf '{listed}';; *) printf '{SIZES}';; esac")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = gpus.here()
    assert found.gpu.memory == int(0.99 * gibibytes * GIB)
    assert (found.count, found.nodes) == (count, 1)


def test_a_machine_without_gpus_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", "exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (gpus.here().gpu, gpus.here().count) == (None, None)


def test_what_a_profile_leaves_open_is_as_the_machine_has_it() -> None:
    h100, a100 = gpus.gpu("h100"), gpus.gpu("a100")
    machine = gpus.Asked(a100, 2, 1, "this machine has")
    assert gpus.Asked(None, None).or_of(machine) == machine
    assert gpus.Asked(h100, 8, 2).or_of(machine) == gpus.Asked(h100, 8, 2)
    assert gpus.Asked(None, 8).or_of(machine) == gpus.Asked(a100, 8)
    assert gpus.Asked(h100, None).or_of(gpus.Asked(None, None)) == gpus.Asked(h100, None)
