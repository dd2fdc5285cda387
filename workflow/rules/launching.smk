# Where stages run: what the profile says about each rule becomes the words before its command, and workers are opened
# for those that run here. No rules here.

from earl.launchers import job as jobs
from earl.launchers import record
from earl.workers import opening, pool

BY_ITERATION = {
    "generate",
    "score",
    "train",
    "restore",
    "evaluate_generate",
    "evaluate_score",
}


def profile_setting(name, default):
    """Return a setting of --config, or of the profile's default-resources, where a profile can leave it."""
    resource = (workflow.resource_settings.default_resources or {}).get(name)
    return config.get(name, getattr(resource, "raw", None) or default)


def launched(stage):
    """Return the function for a rule's parameter `earl`: the command, with what has it run where the profile says.

    The resource `launcher` chooses; without one, and where a stage wants neither a GPU for itself nor several ranks,
    the command runs as it stands. Inside a segment everything runs in the allocation that the segment has.
    """

    def command(wildcards, output, threads, resources):
        known = dict(wildcards.items())
        folder = known.pop("run", None) or known.pop("shared")
        job = "-".join([stage, *known.values()])
        return f"{launcher(job, folder, output, threads, resources)}{EARL}"

    return command


def launcher(job, folder, output, threads, resources):
    """Return the words that go before a command to have it run where the profile says; see `launched`.

    ``folder`` is that of the run or of what runs share, ``job`` a name that is the command's alone in there.
    """
    name = "local" if IN_SEGMENT else resources.get("launcher", "local")
    if name == "slurm" and WORKERS == ["submitit"]:
        name = "workers"
    wanted = {
        name: resources.get(name)
        for name in jobs.Resources.names()
        if name in resources.keys()
    }
    wanted["cpus_per_task"] = max(threads, wanted.get("cpus_per_task", 1))
    if (
        name == "local"
        and not wanted.get("gpu")
        and wanted.get("tasks_per_node", 1) == 1
    ):
        return ""
    words = [sys.executable, "-m", "earl", "launch", "--launcher", name, "--name", job]
    words += ["--folder", f"{folder}/logs/jobs/{job}"]
    for file in output:
        words += ["--output", file]
    for key, value in wanted.items():
        words += ["--resource", f"{key}={value}"]
    return shlex.join(map(str, [*words, "--"])) + " "


def refuse_other_writers(folder):
    """Stop where jobs of an earlier workflow go on that this one would not find again, but write beside."""
    finds_jobs = profile_setting("launcher", "local") == "slurm"
    as_windows = SEGMENTS and CHAIN
    for job in record.running(folder / "logs" / "jobs"):
        stage = job.name.split("-")[0]
        if (
            not finds_jobs
            or (stage == "window" or stage in BY_ITERATION)
            and ((stage == "window") != as_windows)
        ):
            raise EarlError(
                f"{folder}: Slurm job {job.job_id} ({job.name}) of an earlier workflow still runs; go on with the same "
                "profile and granularity, or wait for it, or scancel it"
            )


def workers_setting():
    """Return the setting ``workers`` that the experiments of this plan agree in."""
    found = sorted({item.config.workers for item in PLANS.values()})
    if len(found) > 1:
        raise WorkflowError(
            f"workers is {' and '.join(found)} in experiments of one call: their stages share workers or have none; "
            "run them in calls of their own, or set one of them for all: --config set=workers=local"
        )
    if "submitit" in found and profile_setting("launcher", "local") != "slurm":
        raise WorkflowError(
            "workers is 'submitit', workers that are Slurm jobs, but stages run on this machine; take a profile that "
            "has stages run as Slurm jobs (--profile profiles/slurm), or set workers=local"
        )
    return found


def workers_beside(item):
    """Return the folder for workers that are Slurm jobs: the runs' nodes share its file system."""
    return str(Path(item.config.base_exp_dir) / ".workers")


def open_workers():
    """Let stages that are started from here on run in workers, unless a workflow around this one has seen to that.

    A pool of processes belongs to one machine: stages that are jobs on others start cold with `local`. In a segment
    all stages share one allocation, and `submitit` is the same as `local` there.
    """
    if WORKERS == ["none"] or pool.from_environment(starts=None):
        return
    idle_seconds = max(item.config.worker_idle_seconds for item in PLANS.values())
    if IN_SEGMENT or profile_setting("launcher", "local") != "slurm":
        opening.open_pool(idle_seconds)
    elif WORKERS == ["submitit"] and not SEGMENTS:
        try:
            opening.open_pool(
                idle_seconds, beside=workers_beside(next(iter(PLANS.values())))
            )
        except EarlError as error:
            raise WorkflowError(str(error)) from None
