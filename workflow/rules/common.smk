# What the rules share: the plan of each run, and functions from wildcards to files. No rules here.

import argparse
import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

from earl import tracking
from earl.messages import names
from earl.run import plan, state
from earl.execution import processes
from earl.config import freeze, load, paths, places
from earl.config.schema import Config
from earl.messages.errors import EarlError
from earl.run.layout import Run

# Settings of --config; the workflow itself sets the last one.
SETTINGS = (
    "experiment",
    "set",
    "iteration",
    "accept_changes",
    "granularity",
    "launcher",
    "earl_command",
    "window",
)


def settings_list(value):
    """Return a setting of --config as a list of texts: a list stays, a text is split at its commas."""
    return (
        list(value)
        if isinstance(value, (list, tuple))
        else [v for v in str(value).split(",") if v]
    )


def is_news(record):
    """Return whether a line of Snakemake's is worth showing to someone who asked for few of them."""
    return not record.getMessage().startswith(("Select jobs to execute", "Execute "))


def flag(name):
    """Return whether a setting of --config is on. Snakemake leaves `false` a text, which Python takes for true."""
    value = str(config.get(name, False)).lower()
    if value not in ("true", "false"):
        raise WorkflowError(f"{name}={config[name]}: is neither true nor false")
    return value == "true"


def stages_run_here():
    """Return whether stages run in the environment of this workflow, so that it can say what they will miss."""
    elsewhere = profile_setting("launcher", "local") != "local"
    deployed = workflow.deployment_settings.deployment_method
    return not (elsewhere or deployed or "earl_command" in config)


def refuse_unknown_settings():
    """Stop at a setting of --config that nothing reads: a misspelt one, or a field that belongs into set=."""
    for name in config:
        if name not in SETTINGS:
            is_field = name.split(".")[0] in Config.model_fields
            remedy = (
                f"to set the field, write set={name}=..."
                if is_field
                else names.hint(name, SETTINGS, "")
            )
            raise WorkflowError(f"--config {name}=...: is not a setting; {remedy}")


def make_plans():
    """Return what is to be done, by run folder; stop where a run's configuration differs, or it is sure to fail."""
    refuse_unknown_settings()
    if "experiment" not in config:
        raise WorkflowError(
            "No experiment was named. Say which one, or a list with commas between: "
            "--config experiment=config/demo.jsonnet"
        )
    window_of, last = None, None
    if "window" in config:
        window_of, last = str(config["window"]).rsplit(":", 1)
    single = config.get("iteration")
    if not isinstance(single, int | None):
        raise WorkflowError(f"iteration={single}: is no number of an iteration")
    plans = []
    try:
        overrides = load.parse_overrides(config.get("set", []), load.WORKFLOW)
        experiments = [
            load.load(experiment, overrides, load.WORKFLOW)
            for experiment in settings_list(config["experiment"])
        ]
        for loaded in plan.spelled_alike(experiments):
            run = Run(Path(loaded.config.base_exp_dir) / loaded.config.run_name)
            if window_of in (None, run.path.as_posix()):
                if not ACCEPT_CHANGES:
                    freeze.check(loaded.config, run.config, load.WORKFLOW)
                freeze.check_evaluations(loaded.config, run)
                plans.append(plan.plan(loaded.config, last and int(last), single))
                if "window" not in config and workflow.is_main_process:
                    check_plan(plans[-1], loaded)
        return plan.choose(plans)
    except EarlError as error:
        raise WorkflowError(str(error)) from None


def check_plan(item, loaded):
    """Stop where what is left of a run is sure to fail; say what it will only miss."""
    started = state.start_record(item.run.iteration(0)).is_file()
    if not started or item.iterations or item.evaluations:
        places.check(loaded.config, loaded.origin, started, stages_run_here())
    tracking.check_hub(loaded.config)
    missing = tracking.missing(loaded.config)
    if missing:
        print(f"{item.key}: {missing}", file=sys.stderr)


def open_runs():
    """Take what is to be written for this workflow alone, and write each configuration where the stages read it."""
    try:
        if not take_shared():
            # Planned before it was there: plan again, as called.
            os.execv(sys.executable, sys.orig_argv)
        for item in PLANS.values():
            LOCKS.append(processes.lock(state.lock_file(item.run)))
            refuse_other_writers(item.run.path)
            freeze.write(item.config, item.run.config, accept_changes=ACCEPT_CHANGES)
    except EarlError as error:
        raise WorkflowError(str(error)) from None


def take_shared():
    """Lock the shared outputs that are missing; return whether all still were, when no other workflow made one more.

    In one order for all workflows, so that no two wait for each other.
    """
    missing = [path for path in sorted(SHARED) if not os.path.exists(stands_for(path))]
    for path in missing:
        made = partial(os.path.exists, stands_for(path))
        held = processes.lock_unless(made, path.parent / f".{path.name}.lock", path)
        LOCKS.append(held)
        if held:
            refuse_other_writers(path.parent.parent)
    return not any(os.path.exists(stands_for(path)) for path in missing)


def make_shared():
    """Return the stages that runs share, each with the plan of one run that needs it, by output."""
    return {
        output: (stage, item)
        for item in PLANS.values()
        for output, stage in paths.shared_stages(item.config).items()
    }


def shared_names():
    """Return the names of all shared outputs: the last part of their path, without a suffix."""
    return [output.name.removesuffix(".parquet") for output in SHARED]


def shared_output(w, kind):
    path = Path(w.shared) / kind / w.name
    return path if path in SHARED else path.with_name(f"{path.name}.parquet")


def shared_stage(w, kind):
    return SHARED[shared_output(w, kind)][0]


def user_of(w, kind):
    """Return the plan of a run that needs a shared output; any one will do, they agree in what it depends on."""
    return SHARED[shared_output(w, kind)][1]


def stands_for(path):
    """Return the file that is there once ``path`` is complete: a sealed folder's manifest, or the file itself."""
    made_here = path in SHARED and SHARED[path][0].stage != "raw"
    return (path / "manifest.json" if made_here else path).as_posix()


def made_from(w, kind):
    return [stands_for(path) for path in shared_stage(w, kind).inputs]


def shapes_options(w):
    """Return the options that say which pairs of the shapes world a raw file holds."""
    raw = user_of(w, "raw").config.raw_datasets[shared_stage(w, "raw").name]
    tasks = f" --tasks {','.join(raw.tasks)}" if raw.tasks else ""
    return f"--count {raw.count} --seed {raw.seed}{tasks}"


def vision_tokenizer_to_start(w):
    """As `vision_tokenizer`, for a run that has not started: its windows, beside those of others, then find it made.

    One that has started does not start anew where it is made again; what samples still waits for it.
    """
    started = state.start_record(PLANS[w.run].run.iteration(0)).is_file()
    return [] if started else vision_tokenizer(w)


def published(w):
    """Return the published checkpoint to convert, with the options of the command that does it."""
    wanted = shared_stage(w, "convert").conversion
    words = [wanted.source]
    for name in ("revision", "tokenizer"):
        if getattr(wanted, name):
            words += [f"--{name}", getattr(wanted, name)]
    return shlex.join([*words, *(["--vision"] if wanted.vision else [])])


def sft_threads(w):
    """Return the processor cores of a fine-tuning: those of all its ranks on a machine."""
    config = user_of(w, "sft").config
    return config.cpu_threads * config.train_processes


def raw_pairs(w):
    """Return the raw file that is tokenised, or the user's folder or pattern of files."""
    config = user_of(w, "tokenised").config
    return paths.raw_file(config, shared_stage(w, "tokenised").name).as_posix()


def datasets(run, references):
    """Return the files that stand for tokenised data sets."""
    return [
        stands_for(paths.resolve(PLANS[run].config, reference))
        for reference in references
    ]


def starting_policy(w):
    return paths.policy_folder(PLANS[w.run].config, PLANS[w.run].config.model_path)


def vision_tokenizer(w):
    """Return the file that stands for a vision tokenizer that the pipeline makes; one of the user's is no input."""
    folder = paths.vision_tokenizer_folder(PLANS[w.run].config)
    return stands_for(folder) if folder in SHARED else []


def judge_gpus(w):
    """Return how many GPUs a stage that asks the judge needs: none where it asks a server or a program."""
    settings = PLANS[w.run].config
    loads_model = settings.judge == "vllm" and settings.device != "cpu"
    return settings.judge_tensor_parallel_size if loads_model else 0


def judge_check(w):
    """Return the report on the judge that a run needs before it starts, if its configuration asks for one."""
    item = PLANS[w.run]
    return item.run.judge_check.as_posix() if item.config.judge_gate else []


def iteration(w):
    return PLANS[w.run].run.iteration(int(w.step))


def previous(w):
    return PLANS[w.run].run.iteration(int(w.step) - 1)


def checkpoint_files(item):
    """Return the files that stand for a whole checkpoint of an iteration: the manifests, which are written last."""
    if item.index == 0:
        return {"policy": state.start_record(item).as_posix()}
    return {
        name: f"{item.path.as_posix()}/{name}/manifest.json"
        for name in ("policy", "trainer")
    }


def given(item, name, w):
    """Return the file that stands for a checkpoint's ``policy`` or ``trainer``, as a rule's input.

    Where one iteration is planned again there is none: a checkpoint that has been dropped is restored by the command
    that needs it. As an input that is made anew, it would make all rollouts anew that ever came from it.
    """
    single = PLANS[w.run].single is not None
    return checkpoint_files(item).get(name, []) if not single or item.index == 0 else []


def policy(w):
    return given(iteration(w), "policy", w)


def previous_policy(w):
    return given(previous(w), "policy", w)


def previous_trainer(w):
    return given(previous(w), "trainer", w)


def restore(which):
    """Return the function for the commands, to go before a stage's own, that bring back a dropped checkpoint.

    ``which`` gives the iteration: this one or the one before. The checkpoint gets the age of what was recorded with
    it: what was made from it since is not out of date.
    """

    def commands(wildcards, output, threads, resources):
        item = which(wildcards)
        if PLANS[wildcards.run].single is None or state.has_checkpoint(item):
            return ""
        files = list(checkpoint_files(item).values())
        job = f"restore-{item.index:06d}"
        launch = launcher(job, wildcards.run, files, threads, resources)
        return (
            f"{launch}{EARL} restore --run {wildcards.run} --iteration {item.index}"
            f" && touch -r {item.metrics} {' '.join(files)} && "
        )

    return commands


def shards(kind):
    """Return the input function for all shards of an iteration: its ``rollouts`` or its ``scores``."""
    return lambda w: [
        f"{w.run}/iterations/{w.step}/{kind}/{shard:04d}.parquet"
        for shard in range(PLANS[w.run].config.rollout_shards)
    ]


def evaluation_files(run, indices):
    """Return the summaries of the planned evaluations of these iterations."""
    planned = PLANS[run].evaluations
    return [
        PLANS[run].run.evaluation(name, i).summary.as_posix()
        for i in indices
        for name in planned.get(i, [])
    ]


def evaluations_before_pruning(w):
    """Return the evaluations of the policies that are dropped when iteration ``step`` is complete."""
    return evaluation_files(w.run, PLANS[w.run].retention.dropped_by(int(w.step)))


def last_iteration(item):
    """Return the files of the last planned iteration that stand for it."""
    last = item.run.iteration(item.stop)
    done = [last.metrics.as_posix()] if item.stop else []
    return [*checkpoint_files(last).values(), *done]


def finished_files(run):
    """Return the files that are there once a run's part of this plan is done; windows make their evaluations."""
    item = PLANS[run]
    evaluations = [] if CHAIN else evaluation_files(run, item.evaluations)
    return [*last_iteration(item), *evaluations]


def finished(w):
    return finished_files(w.run)


def targets():
    """Return what this plan is for.

    Reports alone would not do: one that is newer than all it is made from counts as up to date, though iterations
    have been asked for since that are not there yet.
    """
    files = []
    for run, item in PLANS.items():
        files += finished_files(run)
        if WHOLE:
            files.append(item.run.report.as_posix())
        files += [
            (tracking.folder(item.run) / f"{kind}-{index:06d}.json").as_posix()
            # Inside a segment a compute node would have to send.
            for kind, index in item.sends(WHOLE, CHAIN or IN_SEGMENT)
        ]
    return files


def is_last_send(w):
    return WHOLE and int(w.step) == PLANS[w.run].stop


def sent_after(w):
    """Return what a send waits for: its iteration, or for the last one, all there is of the run."""
    if is_last_send(w):
        return [*finished(w), PLANS[w.run].run.report.as_posix()]
    return iteration(w).metrics.as_posix()


def best_effort(w):
    return "" if is_last_send(w) else "--best-effort"


def before_window(w):
    """Return the files of the iteration that a window starts from, and all data that it reads.

    Data are shared: what a window made by itself, the window of another run could be making at the same time.
    """
    item = PLANS[w.run]
    first = next(window[0] for window in item.windows if window[-1] == int(w.step))
    before = checkpoint_files(item.run.iteration(first - 1)).values()
    return [*before, *datasets(w.run, paths.prompt_paths(item.config))]


def window_cores():
    """Return the cores that a window plans with: all of them here, where the windows of runs follow one another.

    Where stages are jobs elsewhere, cores only bound how many there are at once. Then the windows of all runs go side
    by side and share that bound, as far as each can still hold the largest stage of a run.
    """
    if profile_setting("launcher", "local") != "slurm":
        return workflow.cores
    configs = [item.config for item in PLANS.values() if item.windows]
    largest = max(one.cpu_threads * one.train_processes for one in configs)
    return min(workflow.cores, max(largest, workflow.cores // len(configs)))


def window_launcher(w, output, threads, resources):
    """Return the words that have a whole window run as one job, where windows are segments.

    A window is named after its place, not its end: where a run has been given more iterations meanwhile, it still is
    the job that works on these.
    """
    if not SEGMENTS:
        return ""
    place = (int(w.step) - 1) // PLANS[w.run].config.window_length
    return launcher(f"window-{place:06d}", w.run, output, 1, resources)


def window_command(w, resources):
    """Return the command that plans and runs one window: this Snakemake again, with the same settings."""
    settings = {**config, "window": f"{w.run}:{int(w.step)}"}
    cores, gpus = window_cores(), []
    if SEGMENTS:
        settings["granularity"] = "segment"
        cores = resources.get("cpus_per_task", 1)
        gpus = ["--resources", f"gpu={resources.gpu}"] if resources.get("gpu") else []
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        workflow.main_snakefile,
        "--cores",
        cores,
    ]
    command += [
        "--nolock",
        "--rerun-incomplete",
        "--rerun-triggers",
        "mtime",
        "--scheduler",
        "greedy",
    ]
    command += [*passed_on(sys.argv[1:]), *gpus]
    command += [
        "--config",
        *(f"{key}={json.dumps(value)}" for key, value in settings.items()),
    ]
    return shlex.join(map(str, command))


def passed_on(arguments):
    """Return those options of this Snakemake call that the Snakemake of a window is to be given too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--profile", "--workflow-profile"):
        parser.add_argument(option)
    for option in (
        "--resources",
        "--set-resources",
        "--set-threads",
        "--default-resources",
        "--quiet",
    ):
        parser.add_argument(option, nargs="*")
    for option in ("--keep-going", "--verbose", "--printshellcmds"):
        parser.add_argument(option, action="store_true")
    given = []
    for name, value in vars(parser.parse_known_args(arguments)[0]).items():
        if value is not None and value is not False:
            given.append(f"--{name.replace('_', '-')}")
            given += (
                value if isinstance(value, list) else [] if value is True else [value]
            )
    return given
