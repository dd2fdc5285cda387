"""A stand-in for ``python -m earl``: takes the same commands and writes what they would, in milliseconds.

The content of an output is a function of the inputs' contents, so that equal histories give equal bytes. Only the
light commands (start, prune, verify) are the real ones. ``STUB_DELAY`` seconds pass in each stage, ``STUB_LOG`` names
a file that gets a line for each command, and one that begins with ``clash`` where another process is at work on the
same command. ``STUB_FAIL`` is a text in the command at which it fails. ``STUB_HOLD`` names a file: a command with the
text that the file holds waits until it no longer has it.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import IO

from earl.execution import processes
from earl.files import atomic, manifest
from earl.run.layout import Evaluation, Run

REAL = {"start", "prune", "verify", "rewind", "status"}


def main() -> None:
    command, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2], strict=False))
    if os.environ.get("STUB_LOG"):
        with open(os.environ["STUB_LOG"], "a") as log:
            log.write(" ".join(sys.argv[1:]) + "\n")
    if command in REAL:
        from earl import cli

        sys.exit(cli.main())
    processes.end_with_workflow()
    alone = note_clash() if os.environ.get("STUB_LOG") else None
    time.sleep(float(os.environ.get("STUB_DELAY", "0")))
    while is_held(" ".join(sys.argv[1:])):
        time.sleep(0.1)
    if os.environ.get("STUB_FAIL") and os.environ["STUB_FAIL"] in " ".join(sys.argv[1:]):
        sys.exit("this stage was told to fail")
    STAGES.get(command, write_one)(command, options)
    del alone


def is_held(command: str) -> bool:
    try:
        return Path(os.environ["STUB_HOLD"]).read_text() in command
    except (KeyError, FileNotFoundError):
        return False


def note_clash() -> IO[str]:
    """Return a lock of this very command's; say so in the log when another process holds it."""
    held = open(f"{os.environ['STUB_LOG']}.{digest(*sys.argv[1:])[:16]}", "w")  # noqa: SIM115
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with open(os.environ["STUB_LOG"], "a") as log:
            log.write("clash " + " ".join(sys.argv[1:]) + "\n")
    return held


def write_one(command: str, options: dict[str, str]) -> None:
    """Any stage of one output: its bytes are a digest of what went in."""
    words = ("--iteration", "--shard", "--evaluation", "--dataset", "--name")
    parts = [command, *(options.get(word, "") for word in words)]
    for name in ("--policy", "--rollouts", "--raw", "--scores"):
        if name in options:
            path = Path(options[name])
            parts.append(manifest.digest_folder(path) if path.is_dir() else manifest.digest_file(path))
    # `shapes raw` and `shapes policy` are two words, which shifts the pairs.
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    text = digest(*parts)
    if command in ("tokenise", "sft", "shapes", "convert", "download", "data"):
        if out.suffix:
            atomic.write_text(out, text)
        else:
            write_folder(out, text)
    else:
        atomic.write_text(out, text)


def train(command: str, options: dict[str, str]) -> None:
    from earl import code_version
    from earl.config.freeze import config_digest
    from earl.config.load import read

    run, index = Run(Path(options["--run"])), int(options["--iteration"])
    config = json.loads(run.config.read_text())
    here, before = run.iteration(index), run.iteration(index - 1)
    shards = range(config["rollout_shards"])
    inputs = {
        "policy": manifest.digest_folder(before.policy),
        "trainer": manifest.digest_folder(before.trainer) if index > 1 else None,
        "rollouts": [manifest.digest_file(here.rollouts(shard)) for shard in shards],
        "scores": [manifest.digest_file(here.scores(shard)) for shard in shards],
    }
    text = digest(json.dumps(inputs), config["reward_final_reward"])
    write_folder(here.policy, text)
    write_folder(here.trainer, text)
    atomic.write_text(here.episodes, text)
    metrics = {"inputs": inputs, "policy_digest": manifest.digest_folder(here.policy)}
    metrics |= {"config_digest": config_digest(read(run.config)), "code_version": code_version()}
    atomic.write_text(here.metrics, json.dumps(metrics))


def restore(command: str, options: dict[str, str]) -> None:
    index = int(options["--iteration"])
    run = Run(Path(options["--run"]))
    inputs = json.loads(run.iteration(index).metrics.read_text())["inputs"]
    config = json.loads(run.config.read_text())
    text = digest(json.dumps(inputs), config["reward_final_reward"])
    write_folder(run.iteration(index).policy, text)
    write_folder(run.iteration(index).trainer, text)


def evaluate(command: str, options: dict[str, str]) -> None:
    out = Path(options["--out"])
    evaluation = Evaluation(out.parent, int(options["--iteration"]))
    atomic.write_text(evaluation.table, digest(Path(options["--scores"]).read_text()))
    run = Run(Path(options["--config"]).parent)
    policy = manifest.digest_folder(run.iteration(evaluation.index).policy)
    atomic.write_text(evaluation.summary, json.dumps({"policy_digest": policy}))


def send(command: str, options: dict[str, str]) -> None:
    # An option without a value, --best-effort, shifts the pairs.
    atomic.write_text(sys.argv[sys.argv.index("--out") + 1], "{}")


def report(command: str, options: dict[str, str]) -> None:
    atomic.write_text(options["--out"], "report\n")


def digest(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def write_folder(path: Path, text: str) -> None:
    with atomic.folder(path) as folder:
        (folder / "config.json").write_text(text)
        manifest.seal(folder)


STAGES = {"train": train, "restore": restore, "evaluate": evaluate, "report": report, "track": send, "push": send}

if __name__ == "__main__":
    main()
