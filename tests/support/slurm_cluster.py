"""A Slurm cluster on this one machine: a controller and two nodes, `n1` and `n2`, with four counted GPUs each.

Runs the daemons of Debian's packages on free ports in a folder of its own, as root, without a database. The nodes claim
more than the machine has and share its processors; their GPUs are device files that nothing opens, so that Slurm has
something to count. Times that cost minutes on a real cluster (how long a dead node is waited for, how long a job that
starts again is held back) are seconds here.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
PACKAGES = "slurmctld slurmd slurm-client munge"
NODES = ("n1", "n2")
GPUS = 4

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
KillWait=3
SlurmdTimeout=6
InactiveLimit=0
MinJobAge=20
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=2
"""


def missing() -> str:
    """Return why no cluster can be started here, or nothing where one can."""
    if os.geteuid() != 0:
        return "starting a Slurm cluster takes root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"Slurm is not installed ({', '.join(absent)}): apt-get install {PACKAGES}" if absent else ""


class Cluster:
    """A running cluster. :attr:`env` is what Slurm's commands need to find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle."""
        _write_files(self.folder)
        munge = self.folder / "munge"
        self._daemon(
            "munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        _wait(lambda: (munge / "socket").exists(), "munged", self.folder)
        self.start_controller("-c")
        for node in NODES:
            self.start_node(node)
        _wait(lambda: set(self.nodes().values()) == {"idle"}, f"idle nodes, not {self.nodes()}", self.folder)

    def _daemon(self, *command: str, name: str = "") -> None:
        with open(self.folder / f"{name or command[0]}.out", "ab") as output:
            self.daemons[name or command[0]] = subprocess.Popen(
                command, env=os.environ | self.env, stdout=output, stderr=output, start_new_session=True
            )

    def start_controller(self, *options: str) -> None:
        """Start the controller, which knows the jobs that it knew."""
        self._daemon("slurmctld", "-D", *options)

    def stop_controller(self) -> None:
        """End the controller; jobs go on."""
        daemon = self.daemons.pop("slurmctld")
        daemon.terminate()
        daemon.wait(timeout=60)

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self._daemon("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon without warning; what jobs run there goes on, unseen."""
        daemon = self.daemons.pop(node)
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()

    def call(self, *command: str) -> str:
        """Run one of Slurm's commands and return what it prints."""
        return subprocess.run(
            command, env=os.environ | self.env, check=True, capture_output=True, text=True, timeout=60
        ).stdout.strip()

    def nodes(self) -> dict[str, str]:
        """Return the state of each node, as `sinfo` calls it; nothing before the controller answers."""
        try:
            lines = self.call("sinfo", "--Node", "--noheader", "--partition=gpu", "--format=%N %t").splitlines()
        except subprocess.CalledProcessError:
            return {}
        return dict(line.split() for line in lines)

    def jobs(self) -> dict[str, str]:
        """Return the state of each job that has not ended."""
        lines = self.call("squeue", "--noheader", "--format=%A %T").splitlines()
        return dict(line.split() for line in lines)

    def stop(self) -> None:
        """End all jobs and daemons."""
        for job in self.jobs():
            self.call("scancel", "--signal=KILL", "--full", job)
            self.call("scancel", job)
        for name in [*NODES, "slurmctld", "munged"]:
            if name in self.daemons:
                self.daemons[name].terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _write_files(folder: Path) -> None:
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    munge = folder / "munge"
    munge.mkdir(mode=0o711)
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o600)
    for index in range(GPUS):
        # A device that counts as one and is harmless: /dev/null once more.
        os.mknod(folder / f"gpu{index}", 0o20666, os.makedev(1, 3))
    ports = _free_ports(1 + len(NODES))
    nodes = [
        f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=12000 Gres=gpu:{GPUS}"
        for node, port in zip(NODES, ports[1:], strict=True)
    ]
    configuration = CONFIGURATION.format(folder=folder, controller=ports[0], nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(configuration)
    (folder / "gres.conf").write_text(
        f"AutoDetect=off\nNodeName={','.join(NODES)} Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n"
    )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def _wait(condition, what: str, folder: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log")))
            raise TimeoutError(f"waited {seconds} s for {what}\n{logs}")
        time.sleep(0.2)
