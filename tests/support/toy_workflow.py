"""A toy workflow for the executor `submitit`: jobs that say when they begin and end, and end when they are told to."""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.support.forked import Forked
from tests.support.slurm_cluster import Cluster

ROOT = Path(__file__).parents[2]

WRITER = """
import fcntl, os, sys, time
log, out = sys.argv[1:3]
def say(*words):
    with open(log, "a") as stream:
        stream.write(" ".join(words) + "\\n")
held = open(out + ".held", "w")
try:
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    say("clash", out)
job, node = (os.environ.get(name, "-") for name in ("SLURM_JOB_ID", "SLURMD_NODENAME"))
say("begin", job, node, os.path.basename(out))
print("at work with GPUs", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
while not os.path.exists(log + ".hurry"):
    time.sleep(0.1)
with open(out + ".tmp", "w") as stream:
    stream.write("whole")
os.rename(out + ".tmp", out)
say("end", job, os.path.basename(out))
"""
"""Says in a log when it begins and ends, and works until it is told to hurry."""

RULES = f"""
rule write:
    output: "out/{{x}}"
    log: "logs/{{x}}.log"
    params: word=config.get("word", "")
    shell: "{sys.executable} writer.py $PWD/log {{output}} {{params.word}} > {{log}} 2>&1"

rule ranks:
    output: "ranks"
    shell:
        "srun --ntasks=4 --ntasks-per-node=2 --overlap bash -c "
        "'echo $SLURM_PROCID $SLURM_LOCALID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES' > {{output}}"

rule say:
    output: "said"
    params: word=config.get("word", "")
    shell: "printf %s {{params.word:q}} > {{output}}"

rule word:
    output: "word"
    shell: "echo $WORD > {{output}}"

rule fail:
    output: "fail"
    shell: "echo went wrong; exit 3"
"""


class Bench:
    """A folder with the toy workflow, and Snakemake to run it.

    Args:
        path: the folder.
        env: what the commands of a cluster need to find it.
        options: more options of Snakemake.
    """

    def __init__(self, path: Path, env: dict[str, str], *options: str) -> None:
        self.path, self.env, self.options, self.log = path, env, options, path / "log"
        (path / "Snakefile").write_text(RULES)
        (path / "writer.py").write_text(WRITER)

    def start(self, *targets: str, config: str = "", **resources: object) -> Forked:
        """Start a driver. Its output goes to a file, since processes that outlive it would hold a pipe open."""
        asked = {"slurm_partition": "gpu", "runtime": 5, "mem_mb": 200} | resources
        arguments = ["--executor", "submitit", "--jobs", "4", "--latency-wait", "2"]
        arguments += ["--seconds-between-status-checks", "1", "--submitit-seconds", "1"]
        arguments += ["--nolock", "--ignore-incomplete", *self.options]
        arguments += ["--default-resources", *(f"{name}={value}" for name, value in asked.items())]
        arguments += ["--config", f"word={config}"] if config else []
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        env = inherited | self.env | {"PYTHONPATH": str(ROOT)}
        with open(self.path / "driver.txt", "a") as output:
            return Forked("snakemake", [*arguments, "--", *(targets or ["out/a"])], self.path, env, output)

    def said(self) -> str:
        """Return what all drivers have said."""
        return (self.path / "driver.txt").read_text()

    def waits_for(self, text: str) -> None:
        wait_until(lambda: text in self.said(), self.said)

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def begun(self, times: int = 1) -> list[list[str]]:
        """Wait until writers have begun that often, and return job, node and output of each."""
        wait_until(lambda: sum(line.startswith("begin") for line in self.lines()) >= times, self.said)
        return [line.split()[1:] for line in self.lines() if line.startswith("begin")]

    def hurry(self) -> None:
        """Let writers end."""
        Path(f"{self.log}.hurry").touch()

    def ended(self, driver: Forked, status: int = 0) -> None:
        assert driver.wait(timeout=120) == status, self.said()

    def words(self) -> list[str]:
        return [line.split()[0] for line in self.lines()]

    def logs(self) -> str:
        """Return what the jobs have printed beside what went to the rules' logs."""
        return "".join(path.read_text() for path in self.path.glob(".snakemake/submitit/*/*.out"))

    def jobs(self) -> Mapping[str, str]:
        """Return the jobs that have not ended, each with its state."""
        raise NotImplementedError

    def idle(self) -> None:
        """Wait until no job is left."""
        wait_until(lambda: not self.jobs(), lambda: str(self.jobs()))


class LocalBench(Bench):
    """Jobs are processes of this machine."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, {}, "--submitit-cluster", "local")

    def jobs(self) -> dict[str, str]:
        """Return the processes whose working directory the folder is, with their command lines."""
        found = {}
        for each in Path("/proc").glob("[0-9]*"):
            try:
                if Path(os.readlink(each / "cwd")) == self.path:
                    found[each.name] = (each / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found


class SlurmBench(Bench):
    """Jobs are those of a cluster that no other test uses meanwhile."""

    def __init__(self, path: Path, cluster: Cluster) -> None:
        super().__init__(path, cluster.env)
        self.cluster = cluster

    def jobs(self) -> dict[str, str]:
        return self.cluster.jobs()


def wait_until(condition, said=lambda: "", seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited too long\n{said()}"
        time.sleep(0.1)


def kill(driver: Forked) -> None:
    driver.kill()
    driver.wait()
