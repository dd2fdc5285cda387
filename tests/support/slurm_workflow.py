"""The workflow through the Slurm profile, on nodes as small as those of the tests' cluster."""

import json
import os
import sys
from pathlib import Path

from earl.execution import processes
from earl.workers import pool
from tests.support.demo import SHORT
from tests.support.slurm_cluster import Cluster

ROOT = Path(__file__).parents[2]
RESOURCES = ["launcher=slurm", "slurm_partition=gpu", "cpus_per_task=1", "mem_mb=500", "disk_mb=0", "runtime=5"]
LARGE = ("generate", "score", "train", "sft", "evaluate_generate", "evaluate_score", "window")


def sized(granularity: str, *resources: str) -> list[str]:
    """Return options that make what the profile asks for small; ``resources`` are set besides, as <rule>:<name>=<n>."""
    options = ["--default-resources", *RESOURCES, f"granularity={granularity}"]
    options += ["--set-resources", *(f"{rule}:mem_mb=500" for rule in LARGE), "window:cpus_per_task=2", "window:gpu=2"]
    return [*options, "generate:gpu=1", *resources, "--latency-wait", "2"]


def demo(base: Path, cluster: Cluster, options: list[str], **fields: object) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of the small demo through the Slurm profile; runs lie in ``base``."""
    changed = SHORT | {"base_exp_dir": str(base)} | fields
    overrides = json.dumps([f"{name}={json.dumps(value)}" for name, value in changed.items()])
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/slurm", *options]
    command += ["--config", "experiment=config/demo.jsonnet", f"set={overrides}"]
    unwanted = (processes.WATCHED, pool.VARIABLE)
    env = {name: value for name, value in os.environ.items() if name not in unwanted} | cluster.env
    return command, env | {"PYTHONPATH": str(ROOT)}
