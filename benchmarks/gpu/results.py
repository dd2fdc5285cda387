"""What a check found: one JSON line in a file that only grows, and the Markdown table of such lines.

Imports nothing that may be broken on the machine under test.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

OK, DIFFERS, FAILED, MEASURED, SKIPPED = "ok", "differs", "FAILED", "measured", "skipped"
"""Verdicts. A value that differs from what was expected is worth a look; what FAILED must be mended before a run."""


class Range(NamedTuple):
    """The values that are expected; None: no bound on that side."""

    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def text(self, unit: str) -> str:
        low, high = (None if bound is None else number(bound) for bound in self)
        if high is None:
            return "" if low is None else f"at least {low} {unit}".strip()
        return (f"at most {high} {unit}" if low is None else f"{low} to {high} {unit}").strip()


@dataclass(frozen=True)
class Result:
    """What one check found.

    Attributes:
        section, check: Names of the section and of the check within it.
        expected, found: Texts for a reader.
        verdict: One of the verdicts above.
        value: The number that was measured, in the unit that `found` names, or None.
    """

    section: str
    check: str
    expected: str
    found: str
    verdict: str
    value: float | None = None


def number(value: float) -> str:
    """Return a number with about three digits, without an exponent where it has a common size."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def append(path: Path, result: Result) -> None:
    """Add one line to the file and have the system write it, so that a crash right afterwards loses nothing."""
    line = json.dumps(asdict(result), ensure_ascii=False) + "\n"
    with open(path, "ab") as stream:
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())


class Reader:
    """Reads a results file to which lines are added."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0

    def new(self) -> list[Result]:
        """Return the results whose lines were completed since the last call, at the first all of them."""
        if not self.path.is_file():
            return []
        with open(self.path, "rb") as stream:
            stream.seek(self.position)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.position += len(whole)
        return [Result(**json.loads(line)) for line in whole.splitlines()]


def line(result: Result) -> str:
    """Return a result as a line for a terminal."""
    expected = f"   [{result.expected}]" if result.expected else ""
    return f"{result.verdict:<9} {result.section}: {result.check}: {result.found}{expected}"


def table(found: Iterable[Result]) -> str:
    """Return results as a Markdown table."""
    rows = ["| section | check | expected | found | verdict |", "|---|---|---|---|---|"]
    for result in found:
        cells = (result.section, result.check, result.expected, result.found, result.verdict)
        rows.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"
