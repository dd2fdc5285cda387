"""A stand-in for ``python -m earl``: takes the same commands and writes what they would, in milliseconds.

The content of an output is a function of the inputs' contents, so that equal histories give equal bytes. Only the
light commands (start, prune, verify) are the real ones. `iterate` does what the stages do one by one, in one process.

``STUB_LOG`` names a file that gets a line for each command, also for those that `iterate` stands for; and one that
begins with ``clash`` where another process is at work on the same command. ``STUB_DELAY`` seconds pass in each.
``STUB_FAIL`` is a text in the command at which it fails. ``STUB_HOLD`` names a file: a command with the text that the
file holds waits until it no longer has it.

Most commands are there in no time; so what takes long to import is imported where it is needed.
"""

import fcntl
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from earl.execution import processes
from earl.files import atomic, manifest
from earl.files.layout import Evaluation, Run

REAL = {"start", "prune", "verify", "rewind", "status"}
Options = dict[str, str]


def main() -> None:
    words = sys.argv[1:]
    if words[0] in REAL:
        log(" ".join(words))
        from earl import cli

        sys.exit(cli.main())
    processes.end_with_workflow()
    call(words)


def call(words: list[str]) -> None:
    text = " ".join(words)
    log(text)
    alone = note_clash(text) if os.environ.get("STUB_LOG") else None
    time.sleep(float(os.environ.get("STUB_DELAY", "0")))
    while is_held(text):
        time.sleep(0.1)
    if os.environ.get("STUB_FAIL") and os.environ["STUB_FAIL"] in text:
        sys.exit("this stage was told to fail")
    STAGES.get(words[0], write_one)(words[0], parsed(words))
    del alone


def parsed(words: list[str]) -> Options:
    """Return the options by name; one without a value has none."""
    return {
        word: next((value for value in words[place + 1 : place + 2] if not value.startswith("--")), "")
        for place, word in enumerate(words)
        if word.startswith("--")
    }


def log(text: str) -> None:
    if os.environ.get("STUB_LOG"):
        with open(os.environ["STUB_LOG"], "a") as stream:
            stream.write(text + "\n")


def is_held(command: str) -> bool:
    try:
        return Path(os.environ["STUB_HOLD"]).read_text() in command
    except (KeyError, FileNotFoundError):
        return False


def note_clash(command: str) -> IO[str]:
    """Return a lock of this very command's; say so in the log when another process holds it."""
    held = open(f"{os.environ['STUB_LOG']}.{digest(command)[:16]}", "w")  # noqa: SIM115
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log(f"clash {command}")
    return held


def write_one(command: str, options: Options) -> None:
    """Any stage of one output: its bytes are a digest of what went in."""
    words = ("--iteration", "--shard", "--evaluation", "--dataset", "--name")
    parts = [command, *(options.get(word, "") for word in words), options.get("--policy-digest", "")]
    for name in ("--policy", "--rollouts", "--raw", "--scores"):
        if name in options:
            path = Path(options[name])
            parts.append(manifest.digest_folder(path) if path.is_dir() else manifest.digest_file(path))
    out, text = Path(options["--out"]), digest(*filter(None, parts))
    if command in ("tokenise", "select", "sft", "shapes", "convert", "download", "data") and not out.suffix:
        write_folder(out, text)
    else:
        atomic.write_text(out, text)


def train(command: str, options: Options) -> None:
    from earl import code_version
    from earl.config.freeze import config_digest
    from earl.config.load import read

    run, index = Run(Path(options["--run"])), int(options["--iteration"])
    config = read(run.config)
    here = run.iteration(index)
    shards = range(config.rollout_files)
    # A segment has it in memory, and says so.
    before = options.get("--policy-digest") or manifest.digest_folder(run.iteration(index - 1).policy)
    inputs = {
        "policy": before,
        "rollouts": [manifest.digest_file(here.rollouts(shard)) for shard in shards],
        "scores": [manifest.digest_file(here.scores(shard)) for shard in shards],
    }
    inputs["reference"] = manifest.digest_folder(run.iteration(0).policy)
    text = digest(json.dumps(inputs), config.reward_final_reward)
    if options.get("--checkpoint") != "no":
        write_folder(here.policy, text)
        write_folder(here.trainer, text)
    atomic.write_text(here.episodes, text)
    metrics = {"inputs": inputs, "policy_digest": policy_digest(text)}
    metrics |= {"config_digest": config_digest(config), "code_version": code_version()}
    atomic.write_text(here.metrics, json.dumps(metrics))


def restore(command: str, options: Options) -> None:
    run, index = Run(Path(options["--run"])), int(options["--iteration"])
    write_checkpoint(run, index)


def write_checkpoint(run: Run, index: int) -> None:
    text = run.iteration(index).episodes.read_text()
    write_folder(run.iteration(index).policy, text)
    write_folder(run.iteration(index).trainer, text)


def evaluate(command: str, options: Options) -> None:
    out = Path(options["--out"])
    evaluation = Evaluation(out.parent, int(options["--iteration"]))
    run = Run(Path(options["--config"]).parent)
    policy = options.get("--policy-digest") or manifest.digest_folder(run.iteration(evaluation.index).policy)
    atomic.write_text(evaluation.table, digest(Path(options["--scores"]).read_text()))
    atomic.write_text(evaluation.summary, json.dumps({"policy_digest": policy}))


def iterate(command: str, options: Options) -> None:
    """Make what is missing, each by its own stage; the policy in memory is known by its digest."""
    from earl.config.load import read
    from earl.run import segments, state

    run, last = Run(Path(options["--run"])), int(options["--to"])
    config = read(run.config)
    index = min(state.newest_checkpoint(run), last)
    policy = manifest.digest_folder(run.iteration(index).policy)
    common = ["--config", run.config.as_posix()]
    while True:
        step, memory = f"{index:06d}", ["--policy-digest", policy]
        for name in config.evaluations_at(index):
            found = run.evaluation(name, index)
            if not found.summary.is_file():
                this = [*common, "--iteration", step]
                call(["generate", *this, "--evaluation", name, *memory, "--out", f"{found.rollouts}"])
                call(["score", *common, "--rollouts", f"{found.rollouts}", "--out", f"{found.scores}"])
                files = ["--rollouts", f"{found.rollouts}", "--scores", f"{found.scores}"]
                call(["evaluate", *this, "--name", name, *files, *memory, "--out", f"{found.table}"])
        if index == last:
            break
        index += 1
        here, step = run.iteration(index), f"{index:06d}"
        for shard in range(config.rollout_files):
            rollouts, scores = here.rollouts(shard), here.scores(shard)
            if not rollouts.is_file():
                words = ["--iteration", step, "--shard", f"{shard:04d}", *memory, "--out", f"{rollouts}"]
                call(["generate", *common, *words])
            if not scores.is_file():
                call(["score", *common, "--rollouts", f"{rollouts}", "--out", f"{scores}"])
        if not here.metrics.is_file():
            call(["train", *common, "--iteration", step, "--run", f"{run.path}", *memory, "--checkpoint", "no"])
        policy = json.loads(here.metrics.read_text())["policy_digest"]
        if segments.has_checkpoint(config, index, last):
            write_checkpoint(run, index)
            state.prune_before(run, state.Retention.of(config), index)
    atomic.write_text(run.segment(last), json.dumps({"last": last, "policy_digest": policy}))


def send(command: str, options: Options) -> None:
    atomic.write_text(options["--out"], "{}")


def report(command: str, options: Options) -> None:
    for name in ("--out", "--curves", "--evaluations"):
        atomic.write_text(options[name], "report\n")


def digest(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def write_folder(path: Path, text: str) -> None:
    with atomic.folder(path) as folder:
        (folder / "config.json").write_text(text)
        manifest.seal(folder)


def policy_digest(text: str) -> str:
    """Return the digest of the folder that `write_folder` makes."""
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder) / "policy", text)
        return manifest.digest_folder(Path(folder) / "policy")


STAGES = {
    "train": train,
    "restore": restore,
    "evaluate": evaluate,
    "iterate": iterate,
    "report": report,
    "track": send,
    "push": send,
}

if __name__ == "__main__":
    main()
