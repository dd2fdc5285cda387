"""Put the base model of the demo where the package ships it: fine-tuned by the pipeline, stored in bfloat16.

    python -m snakemake --until sft --config experiment=config/shapes_base.jsonnet
    python scripts/ship_shapes_base_policy.py

The first command takes about 25 minutes on one core and can be killed and started again.
"""

import argparse
from pathlib import Path

import torch

from earl.config import load, paths
from earl.emu3 import checkpoint, saving
from earl.files import atomic
from earl.shapes import policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experiment", type=Path, default=Path("config/shapes_base.jsonnet"))
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--out", type=Path, default=policy.BASE_POLICY)
    arguments = parser.parse_args()
    config = load.load(arguments.experiment, load.parse_overrides(arguments.set)).config
    tuned = paths.policy_folder(config, config.model_path)
    model = checkpoint.load_policy(tuned, torch.bfloat16, "cpu")
    with atomic.folder(arguments.out) as folder:
        saving.save_policy(model, folder, saving.companions(tuned))
    print(f"{tuned} -> {arguments.out}")


if __name__ == "__main__":
    main()
