# Settings that a profile can leave, and what stands before a rule's command. No rules here.


def profile_setting(name, default):
    """Return a setting of --config, or of the profile's default-resources, where a profile can leave it."""
    resource = (workflow.resource_settings.default_resources or {}).get(name)
    return config.get(name, getattr(resource, "raw", None) or default)


def launched(stage):
    """Return the function for a rule's parameter `earl`: the executor has decided where the rule runs."""
    return lambda wildcards, output, threads, resources: EARL


def launcher(job, folder, output, threads, resources):
    return ""


def refuse_other_writers(folder):
    pass
