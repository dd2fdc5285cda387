"""Settings of a workflow: what was typed counts, not what YAML makes of it; what nothing reads is refused."""

import pytest
from snakemake.cli import parse_config

from earl.messages.errors import EarlError
from earl.workflow import settings


def read(*arguments: str, **file: object) -> settings.Settings:
    """Read settings as Snakemake hands them over: a configuration file, and arguments that it has made YAML of."""
    return settings.read(file | parse_config(arguments), arguments)


def overrides(*arguments: str) -> dict[str, object]:
    return dict(read("experiment=a.jsonnet", *arguments).set)


def refusal(*arguments: str) -> str:
    with pytest.raises(EarlError) as caught:
        read("experiment=a.jsonnet", *arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("temperature=0.5", {"temperature": 0.5}),
        ("temperature=0.5,kl_coeff=0", {"temperature": 0.5, "kl_coeff": 0}),
        ("run_name=007", {"run_name": "007"}),
        ("run_name=1e3", {"run_name": "1e3"}),
        ("compile=false", {"compile": False}),
        # Snakemake makes a mapping of it, and a comment of what follows ` #`.
        ("assistant_prefill=a: b # c", {"assistant_prefill": "a: b # c"}),
        ("assistant_prefill= two  spaces ", {"assistant_prefill": " two  spaces"}),
        ('train_paths_file=["a","b"]', {"train_paths_file": ["a", "b"]}),
        ('evaluations={"e":{"prompts":4}}', {"evaluations": {"e": {"prompts": 4}}}),
        ('["temperature=0.5","assistant_prefill=a,b=c"]', {"temperature": 0.5, "assistant_prefill": "a,b=c"}),
        ("reward_function_api_base=http://judge:4877", {"reward_function_api_base": "http://judge:4877"}),
        ("", {}),
    ],
)
def test_set_is_read_as_it_was_typed(typed, expected):
    assert overrides(f"set={typed}") == expected


def test_set_may_be_given_several_times():
    assert overrides("set=temperature=0.5", "set=kl_coeff=0,temperature=1") == {"temperature": 1, "kl_coeff": 0}


@pytest.mark.parametrize("typed", ["false", '["a","b"]', "temperature", "=1"])
def test_what_sets_no_field_is_refused(typed):
    assert "is not of the form field=value" in refusal(f"set={typed}")


def test_a_configuration_file_may_give_lists_and_mappings():
    found = read(experiment=["a.jsonnet", "b.jsonnet"], set={"temperature": 0.5, "sft.s.steps": 3}, accept_changes=True)
    assert (found.experiment, dict(found.set)) == (["a.jsonnet", "b.jsonnet"], {"temperature": 0.5, "sft.s.steps": 3})
    assert (found.accept_changes, found.granularity) == (True, "segment")
    assert dict(read(experiment="a.jsonnet", set="kl_coeff=0").set) == {"kl_coeff": 0}


def test_the_command_line_takes_the_place_of_the_file():
    found = read("experiment=b.jsonnet", "granularity=stage", experiment="a.jsonnet", granularity="segment")
    assert (found.experiment, found.granularity) == (["b.jsonnet"], "stage")


def test_several_experiments():
    assert read("experiment=a.jsonnet,b.jsonnet").experiment == ["a.jsonnet", "b.jsonnet"]
    assert read("experiment=a.jsonnet", "experiment=b.jsonnet").experiment == ["a.jsonnet", "b.jsonnet"]


@pytest.mark.parametrize(("typed", "expected"), [("true", True), ("True", True), ("false", False), ("False", False)])
def test_changes_are_accepted_only_where_it_is_true(typed, expected):
    assert read("experiment=a.jsonnet", f"accept_changes={typed}").accept_changes is expected


def test_what_a_setting_cannot_be_is_refused():
    assert "accept_changes=perhaps: " in refusal("accept_changes=perhaps")
    assert "granularity=iteration: Input should be 'segment' or 'stage'" in refusal("granularity=iteration")


def test_a_setting_that_nothing_reads_is_refused_with_what_was_meant():
    assert "--config temperature=...: is not a setting; set the field by set=temperature=..." in refusal(
        "temperature=1"
    )
    assert "--config sett=...: is not a setting; did you mean set?" in refusal("sett=temperature=1")
    assert "--config granularty=...: is not a setting; did you mean granularity?" in refusal("granularty=stage")
    assert "is not a setting; there are experiment, set, granularity, " in refusal("iteration=3")


def test_an_experiment_has_to_be_named():
    for arguments in ((), ("experiment=",)):
        with pytest.raises(EarlError, match="No experiment was named"):
            read(*arguments)
