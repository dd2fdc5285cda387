"""What a Snakemake job's resources say as parameters of submitit, which writes them into the batch script."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from snakemake_interface_common.exceptions import WorkflowError

TIMEOUTS, WARN_SECONDS = 3, 60
"""Defaults: how often a job continues after its time limit, and how many seconds before it the job is warned."""

_TEXT = ("text without spaces", r"\S+")
_CONSTRAINT = ("features such as a100|h100", r".+")
_NUMBER = ("a whole number, 1 or more", r"0*[1-9]\d*")
_COUNT = ("a whole number", r"\d+")
_GPUS = ("a number of GPUs, or type:number", r"([^\s:,]+:)?\d+")
_EXCLUSIVE = ("true, false, user or mcs", r"(?i:true|false|1|0|user|mcs)")
_ANY = ("text", r"(?s:.*)")
KNOWN = {
    "nodes": _NUMBER,
    "tasks_per_node": _NUMBER,
    "cpus_per_task": _NUMBER,
    "mem_mb": _COUNT,
    "mem_mb_per_cpu": _COUNT,
    "runtime": _COUNT,
    "slurm_partition": _TEXT,
    "slurm_account": _TEXT,
    "qos": _TEXT,
    "constraint": _CONSTRAINT,
    "reservation": _TEXT,
    "gpu": _GPUS,
    "gres": _TEXT,
    "exclusive": _EXCLUSIVE,
    "slurm_extra": _ANY,
    "setup": _ANY,
    "timeouts": _COUNT,
    "warn_seconds": _COUNT,
}
"""The resources that are read, with what each should be, in words and as a pattern. Others are ignored."""


RESERVED = {"array", "clusters", "error", "job-name", "no-requeue", "open-mode", "output", "wrap"}
"""Options of sbatch that the executor sets, or without which it would not find its jobs."""


def check(rule: str, resources: Mapping[str, Any]) -> dict[str, str]:
    """Return the known resources of a job as text.

    Raises:
        WorkflowError: a value that cannot be right; names rule, resource and value.
    """
    found = {}
    for name, (what, pattern) in KNOWN.items():
        value = resources.get(name)
        if value is None:
            continue
        if not re.fullmatch(pattern, str(value)):
            raise WorkflowError(f"rule {rule}: resource {name}={value!r} should be {what}")
        found[name] = str(value)
    if "runtime" in found and 0 < int(found["runtime"]) * 60 <= warning(found):
        raise WorkflowError(
            f"rule {rule}: resource warn_seconds={warning(found)} is not below runtime={found['runtime']} minutes; "
            "the job would be stopped as soon as it started"
        )
    extra(rule, found)
    return found


def warning(found: Mapping[str, str]) -> int:
    """Return the seconds before the time limit at which a job is warned."""
    return int(found.get("warn_seconds", WARN_SECONDS))


def extra(rule: str, found: Mapping[str, str]) -> dict[str, str | bool]:
    """Return the options of `slurm_extra` by name; True for one without a value."""
    text = found.get("slurm_extra", "").strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    options: dict[str, str | bool] = {}
    name = ""
    for word in shlex.split(text):
        if word.startswith("--"):
            name, is_given, value = word[2:].partition("=")
            options[name] = value if is_given else True
        elif options.get(name) is True:
            options[name] = word
        else:
            raise WorkflowError(
                f"rule {rule}: resource slurm_extra={text!r} should be long options of sbatch, such as "
                f"--mail-type=END; not {word!r}"
            )
    if taken := RESERVED & options.keys():
        raise WorkflowError(
            f"rule {rule}: resource slurm_extra={text!r}: --{min(taken)} is the executor's own; leave it out"
        )
    return options


def parameters(rule: str, threads: int, resources: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of `submitit.SlurmExecutor` for a job, without its name.

    Raises:
        WorkflowError: see :func:`check`.
    """
    found = check(rule, resources)
    signalled = {"requeue": True, "signal": f"B:USR2@{warning(found)}"}
    if found.get("reservation"):
        signalled["reservation"] = found["reservation"]
    exclusive = found.get("exclusive", "").lower()
    wanted = {
        "nodes": int(found.get("nodes", 1)),
        "ntasks_per_node": int(found.get("tasks_per_node", 1)),
        "cpus_per_task": max(int(found.get("cpus_per_task", 1)), threads),
        "gpus_per_node": None if re.fullmatch(r"(.*:)?0+", found.get("gpu", "0")) else found["gpu"],
        "gres": found.get("gres"),
        "mem": f"{found['mem_mb']}M" if "mem_mb" in found and "mem_mb_per_cpu" not in found else None,
        "mem_per_cpu": f"{found['mem_mb_per_cpu']}M" if "mem_mb_per_cpu" in found else None,
        # 0: the partition's.
        "time": int(found.get("runtime", 0)),
        "partition": found.get("slurm_partition"),
        "account": found.get("slurm_account"),
        "constraint": found.get("constraint"),
        "qos": found.get("qos"),
        "exclusive": {"true": True, "1": True, "false": None, "0": None, "": None}.get(exclusive, exclusive),
        "setup": found["setup"].splitlines() if found.get("setup") else None,
        "signal_delay_s": warning(found),
        "stderr_to_stdout": True,
        # Python runs in the batch step, so that the command itself may start steps with srun.
        "use_srun": False,
        "additional_parameters": signalled | extra(rule, found),
    }
    return {name: value for name, value in wanted.items() if value is not None}
