"""`python -m benchmarks.gpu`: check this machine's GPU, and print a table of what was expected and what was found."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu import results, supervisor
from benchmarks.gpu.results import FAILED, Result
from benchmarks.gpu.supervisor import Section

SECTIONS = (
    Section("environment", "benchmarks.gpu.environment:run", 120),
    Section("requirements", "benchmarks.gpu.requirements:run", 90),
    Section("tiny", "benchmarks.gpu.tiny:run", 90),
    Section("constraint", "benchmarks.gpu.constraint:run", 60),
    Section("vision", "benchmarks.gpu.vision:run", 75),
    Section("parity", "benchmarks.gpu.parity:run", 75),
    Section("learner.packed", "benchmarks.gpu.learner:packed", 90),
    Section("learner.padded", "benchmarks.gpu.learner:padded", 90),
    Section("handoff", "benchmarks.gpu.handoff:run", 90),
    Section("decode", "benchmarks.gpu.decode:run", 75),
    Section("learner.lora", "benchmarks.gpu.learner:lora", 75),
    Section("learner.activations_kept", "benchmarks.gpu.learner:activations_kept", 75),
    Section("learner.flash", "benchmarks.gpu.learner:flash", 75),
    Section("vllm", "benchmarks.gpu.vllm_rollouts:run", 180),
)
"""In order of risk: what is most likely to be wrong, and cheapest to find, first."""
MINUTES = 10.0
"""What all of them may take together."""


def main(arguments: list[str] | None = None) -> int:
    """Run the sections, print results as they come and the table at the end; return 1 if a check failed."""
    names = ", ".join(section.name for section in SECTIONS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=f"{__doc__} Sections: {names}.")
    parser.add_argument("--only", help="sections to run, separated by commas; `learner` stands for all that begin so")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="time for all of them; the last ones may get none"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: shrunk, to test the check itself"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu-check"), help="folder for results.jsonl, table.md and logs"
    )
    options = parser.parse_args(arguments)
    # A slow machine is given more time for each section, too, if it is given more for all.
    patience = max(1.0, options.minutes / MINUTES)
    sections = [replace(section, seconds=patience * section.seconds) for section in chosen(options.only, parser)]
    found: list[Result] = []
    try:
        for result in supervisor.run(sections, options.device, options.out, 60 * options.minutes):
            print(results.line(result), flush=True)
            found.append(result)
    finally:
        table = results.table(found)
        if found:
            (options.out / "table.md").write_text(table, encoding="utf-8")
            print(f"\n{table}\n{options.out / 'table.md'}")
    return int(any(result.verdict == FAILED for result in found))


def chosen(only: str | None, parser: argparse.ArgumentParser) -> list[Section]:
    """Return the sections that `--only` names, in their own order."""
    if only is None:
        return list(SECTIONS)
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    for name in wanted:
        if not any(_is_named(section, name) for section in SECTIONS):
            parser.error(f"--only: there is no section {name!r}; there are {', '.join(s.name for s in SECTIONS)}")
    return [section for section in SECTIONS if any(_is_named(section, name) for name in wanted)]


def _is_named(section: Section, name: str) -> bool:
    return section.name == name or section.name.startswith(f"{name}.")


if __name__ == "__main__":
    sys.exit(main())
