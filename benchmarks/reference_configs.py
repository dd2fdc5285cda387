"""Do the reference's own configurations run here? Each is imported and runs two iterations.

    python benchmarks/reference_configs.py --reference EARL/rl/configs --folder runs/reference

``--reference`` is the folder of configurations in a checkout of mair-lab/EARL. Pairs of the shapes world stand in for
its data sets, at the very paths that the files name, in the reference's own form and in the three layouts that its
archives come in. Replaced are the models, the paths and the sizes (see `SMALL`); everything else is as imported: vLLM
samples in bfloat16, and a vLLM server with a tiny Qwen2.5-VL judges.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from earl.config import from_reference
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.shapes import world
from scripts import write_tiny_judge

SMALL = {
    "model_path": "package:shapes/base_policy",
    "tokenizer_path": "package:shapes/base_policy",
    "vision_tokenizer_path": "package:shapes/vision_tokenizer",
    "image_area": 64 * 64,
    "num_iterations": 2,
    "episodes_per_iteration": 8,
    "generations_per_sample": 4,
    "per_device_batch_size": 4,
    "max_response_tokens": 128,
    "model_context_size": 320,
    "judge_max_tokens": 128,
    "judge_reasoning_length": 16,
}
LAYOUTS = "ABC"
EXAMPLES = 12


def write_archive(listing: Path, layout: str, seed: int) -> None:
    """Write pairs of the shapes world as the reference's archive: a listing and a ``.pth`` file each.

    Args:
        listing: the ``tokenized_datalist.json`` to write.
        layout: A, files in ``feature/``, named alone; B, the same, named with their folder; C, files beside ``list/``.
        seed: of the pairs.
    """
    import torch

    import earl
    from earl.emu3 import checkpoint, vision

    root = listing.parent.parent
    root = root.parent if root.name == "feature" else root
    tokenizer = checkpoint.load_vision_tokenizer(Path(earl.__file__).parent / "shapes" / "vision_tokenizer", "cpu")
    edits = [world.edit(seed, index, world.TASKS) for index in range(EXAMPLES)]
    grids = vision.encode(tokenizer, [world.render(scene) for edit in edits for scene in (edit.original, edit.edited)])
    folder = root if layout == "C" else root / "feature"
    folder.mkdir(parents=True, exist_ok=True)
    for index, edit in enumerate(edits):
        example = {
            "edit_id": f"{seed}-{index}",
            "original_image": grids[2 * index].astype(np.int32),
            "edited_image": grids[2 * index + 1].astype(np.int32),
            "instruction": edit.instruction,
            "CoT": dict(edit.reasoning),
        }
        torch.save(example, folder / f"{index}.pth")
    names = [f"feature/{index}.pth" if layout == "B" else f"{index}.pth" for index in range(EXAMPLES)]
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text(json.dumps({"prefix": "/where/they/were/made", "path_list": names}))


@contextlib.contextmanager
def judge_server(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Serve a tiny judge; yield its model folder and the file with its address."""
    model, address = folder / "judge", folder / "judge.address"
    write_tiny_judge.write_judge(str(model), 0)
    command = [sys.executable, "-m", "earl", "judge", "serve", "--model", model, "--port", "0", "--host-file", address]
    with (folder / "judge.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield model, address
        finally:
            server.terminate()
            server.wait()


def run(config: Path, folder: Path, judge: Path, environment: dict[str, str]) -> float:
    """Run an imported configuration through the workflow; return the seconds it took."""
    replaced = SMALL | {"run_name": config.stem, "reward_function_api_model_name": str(judge)}
    overrides = ",".join(f"{name}={value}" for name, value in replaced.items())
    command = [sys.executable, "-m", "snakemake", "--quiet", "all"]
    command += ["--config", f"experiment={config}", f"set={overrides}"]
    start = time.monotonic()
    with (folder / f"{config.stem}.log").open("w") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    return time.monotonic() - start


def outcome(run: Run) -> list[str]:
    """Return cells: iterations, episodes, images that were finished, and judgements that failed."""
    iterations = sorted(path.parent.parent for path in run.path.glob("iterations/*/train/metrics.json"))
    episodes = [row for i in iterations for row in pq.read_table(i / "rollouts").to_pylist()]
    scores = [row for i in iterations for row in pq.read_table(i / "scores").to_pylist()]
    images = sum(row["edited"] is not None and row["finish_reason"] == "stop" for row in episodes)
    failed = sum(row["status"] == "failed" for row in scores)
    return [str(cell) for cell in (len(iterations), len(episodes), images, failed)]


def listings(lines: Sequence[from_reference.Line], variables: dict[str, str]) -> list[Path]:
    """Return the data sets that an imported configuration names, its variables filled in."""
    values = from_reference.values(lines)
    paths = [*values["train_paths_file"], *values["val_paths_file"]]
    for name, value in variables.items():
        paths = [path.replace(name, value) for path in paths]
    return [Path(path) for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, help="rl/configs of a checkout of mair-lab/EARL")
    parser.add_argument("--folder", type=Path, required=True, help="where data, configurations and runs go")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"APP__DATA_DIR": str(folder / "data"), "APP__BASE_EXP_DIR": str(folder / "runs")}
    made: dict[Path, str] = {}
    columns = ("configuration", "fields taken, changed, added, left out", "layouts", "iterations", "episodes", "images")
    print(f"| {' | '.join([*columns, 'failed judgements', 's'])} |\n|{'---|' * (len(columns) + 2)}")
    with judge_server(folder) as (judge, address):
        environment = dict(os.environ) | variables | {from_reference.API_VARIABLE: str(address)}
        for source in sorted(arguments.reference.glob("sft_*__rl_*.jsonnet")):
            try:
                lines = from_reference.read(source)
            except EarlError as error:
                print(f"| {source.stem} | {str(error).split(': ', 1)[1]} | | | | | | |", flush=True)
                continue
            fates = [line.fate for line in lines]
            for listing in listings(lines, variables):
                if listing not in made:
                    made[listing] = LAYOUTS[len(made) % len(LAYOUTS)]
                    write_archive(listing, made[listing], seed=len(made))
            config = folder / f"{source.stem}.jsonnet"
            config.write_text(from_reference.jsonnet(lines, source.name))
            seconds = run(config, folder, judge, environment)
            cells = [
                ", ".join(str(fates.count(fate)) for fate in ("taken", "changed", "added", "left out")),
                "".join(sorted({made[listing] for listing in listings(lines, variables)})),
                *outcome(Run(folder / "runs" / config.stem)),
                f"{seconds:.0f}",
            ]
            print(f"| {source.stem} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
