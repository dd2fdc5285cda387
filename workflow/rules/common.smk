# From wildcards to the functions of earl.workflow. No rules here.

import re


def alternation(values):
    """Return the regular expression that matches exactly these values."""
    return "|".join(map(re.escape, values)) or r"(?!)"


def stages_run_here(settings):
    """Return whether stages run in the environment of this workflow, so that it can say what they will miss."""
    elsewhere = workflow.resource_settings.nodes is not None
    deployed = workflow.deployment_settings.deployment_method
    return not (elsewhere or deployed or "earl_command" in config)


def forced():
    """Return what the command line has made again: known when input functions are called, not before."""
    asked = workflow.dag_settings
    names = {*asked.forcerun, *(asked.targets if asked.forcetargets else ())}
    return files.Forced(asked.forceall, frozenset(map(str, names)))


def plan(w):
    return PLANS[w.run]


def settings_of(w):
    """Return the configuration of a run."""
    return PLANS[w.run].config


def iteration(w):
    return PLANS[w.run].run.iteration(int(w.step))


def previous(w):
    return PLANS[w.run].run.iteration(int(w.step) - 1)


def needed(found):
    return ancient(found.files) if found.is_old else found.files


def policy_before(w):
    """Return what stands for the policy that a shard of rollouts is sampled from."""
    files.check_stage(plan(w), int(w.step))
    rollouts = iteration(w).rollouts(int(w.shard)).as_posix()
    return needed(
        files.sampled_from(plan(w), int(w.step) - 1, "generate", [rollouts], forced())
    )


def checkpoint_before(w):
    """Return what stands for the checkpoint that an iteration trains on from."""
    files.check_stage(plan(w), int(w.step))
    made = [iteration(w).metrics.as_posix(), iteration(w).episodes.as_posix()]
    return needed(files.trained_from(plan(w), int(w.step) - 1, "train", made, forced()))


def policy(w):
    """Return what stands for the policy that is evaluated."""
    files.check_stage(plan(w), int(w.step))
    made = plan(w).run.evaluation(w.evaluation, int(w.step)).rollouts.as_posix()
    return needed(
        files.sampled_from(plan(w), int(w.step), "evaluate_generate", [made], forced())
    )


def evaluation_prompts(w):
    data = paths.evaluation_data(settings_of(w), w.evaluation)
    return SHARED.data(settings_of(w), data.references)


def prompts(w):
    return SHARED.data(settings_of(w), settings_of(w).train_paths_file)


def all_prompts(w):
    return SHARED.data(settings_of(w), paths.prompt_paths(settings_of(w)))


def vision_tokenizer(w):
    return ancient(SHARED.vision_tokenizer(settings_of(w)))


def nothing_once_restorable(w):
    """Return no input: what a checkpoint is restored from is on disk."""
    files.restored(plan(w), int(w.step))
    return []


def sent_after(w):
    return files.sent_after(plan(w), int(w.step))


def best_effort(w):
    """A send during the run may fail: the next one makes up for it."""
    return "" if int(w.step) == plan(w).last else "--best-effort"
