# What rules share. No rules here.

import re


def alternation(values):
    """Return the regular expression that matches exactly these values."""
    return "|".join(map(re.escape, values)) or r"(?!)"


def said():
    """Return what configuration files and --config say, and what a profile can only say by its default-resources."""
    chosen = (workflow.resource_settings.default_resources or {}).get("granularity")
    return ({"granularity": chosen.raw} if chosen else {}) | config


def stages_run_here():
    """Return whether stages run in the environment of this workflow, so that it can say what they will miss."""
    elsewhere = workflow.resource_settings.nodes is not None
    deployed = workflow.deployment_settings.deployment_method
    return not (elsewhere or deployed or "earl_command" in config)


def resources_of(rule):
    """Return the resources that profile and command line set for the jobs of a rule, by name."""
    said = workflow.resource_settings
    found = {**(said.default_resources or {}), **said.overwrite_resources.get(rule, {})}
    return {name: getattr(value, "raw", value) for name, value in found.items()}


def forced():
    """Return the rules and files that the command line has made again, None for all; known after this file is read."""
    asked = workflow.dag_settings
    named = {*asked.forcerun, *(asked.targets if asked.forcetargets else ())}
    return None if asked.forceall else named


def force(rule):
    """Have all jobs of a rule in the plan run, as --forcerun does; for input functions."""
    workflow.dag.forcerules.add(workflow.get_rule(rule))


def config_of(w):
    return PLANS[w.run].config
