"""What the package is called, what it is licensed under, and how people are told to install it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXTS = ("*.md", "*.py", "*.toml", "*.smk", "*.yaml", "*.jsonnet", "*.libsonnet", "Makefile", "Snakefile")


def texts() -> list[Path]:
    """Every text file under version control that people or programs read, but for this one."""
    listed = subprocess.run(["git", "ls-files", "--", *TEXTS, ":**/Makefile"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    files = [ROOT / name for name in listed.stdout.split() if (ROOT / name).is_file()]
    return [file for file in files if file != Path(__file__)]


def test_nobody_is_sent_to_the_strangers_package_of_our_name() -> None:
    """On the index `earl` is a tool for URLs: installing EARL's extras by that name would fetch it."""
    assert PROJECT["name"] != "earl"
    wrong = re.compile(r"\bearl\[|pip install (-\S+ )*['\"]?earl\b(?![-/.])")
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in texts()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if wrong.search(line)
    ]
    assert not found, "\n".join(found)


def test_extras_that_are_named_are_there() -> None:
    named = set()
    for file in texts():
        for extras in re.findall(r"pip install [^\n`]*?\.\[([\w,-]+)\]", file.read_text(encoding="utf-8")):
            named |= set(extras.split(","))
    assert {"vllm", "vllm-cpu", "tracking"} <= named
    assert named <= PROJECT["optional-dependencies"].keys()


def test_an_extra_that_takes_in_others_does_so_by_the_projects_name() -> None:
    (own,) = [line for line in PROJECT["optional-dependencies"]["test"] if line.startswith(PROJECT["name"])]
    extras = re.fullmatch(rf"{PROJECT['name']}\[([\w,-]+)\]", own)[1].split(",")
    assert set(extras) <= PROJECT["optional-dependencies"].keys()


def test_the_executor_needs_no_extra() -> None:
    """Snakemake imports every executor plugin that it finds: without what ours needs, not even the demo would start."""
    files = (ROOT / "snakemake_executor_plugin_submitit").glob("*.py")
    roots = {root for file in files for root in re.findall(r"^(?:from|import) (\w+)", file.read_text(), re.MULTILINE)}
    foreign = {root for root in roots - set(sys.stdlib_module_names) if not root.startswith("snakemake_")}
    assert foreign <= {re.match(r"[\w-]+", name)[0] for name in PROJECT["dependencies"]}


def test_the_command_and_the_plugins_keep_their_name() -> None:
    assert PROJECT["scripts"] == {"earl": "earl.__main__:main"}
    assert all(list(group) == ["earl"] for group in PROJECT["entry-points"].values())
    done = subprocess.run([sys.executable, "-m", "earl", "--help"], capture_output=True, text=True)
    assert done.returncode == 0


def test_the_licence_is_apache_and_said_so() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Apache-2.0" in (ROOT / "README.md").read_text()
