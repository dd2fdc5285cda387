"""What a section works with: its device, its time, and how it says what it finds."""

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from benchmarks.gpu import results
from benchmarks.gpu.results import DIFFERS, FAILED, MEASURED, OK, SKIPPED, Range, Result

if TYPE_CHECKING:
    import torch

CPU_THREADS = 2
"""As in the experiments (`cpu_threads`); one of a shrunk section, which shares its machine with others."""


class SkipSection(Exception):
    """Why a section, or the rest of it, cannot run here."""


class Stop(Exception):
    """Why no section can run here."""


@dataclass
class Context:
    """A section's device, its time, and how it says what it finds.

    Attributes:
        section: Its name.
        small: Whether everything is shrunk: on a CPU, to test the check itself.
        path: The results file; other files of a section go beside it.
        end: When its time is up, by `time.monotonic`.
    """

    section: str
    small: bool
    path: Path
    end: float = field(repr=False)

    @cached_property
    def device(self) -> "torch.device":
        """The device, with torch set up as in every stage."""
        from earl.execution import runtime

        # The configuration's own class needs packages that this check does without.
        device = runtime.prepare(SimpleNamespace(device=self.kind, cpu_threads=1 if self.small else CPU_THREADS))
        import torch

        torch.manual_seed(0)
        return torch.device(device.type, 0) if device.type == "cuda" else device

    @property
    def kind(self) -> str:
        return "cpu" if self.small else "cuda"

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def require(self, check: str, passed: bool, found: str, expected: str) -> None:
        """Record what must hold."""
        self._say(Result(self.section, check, expected, found, OK if passed else FAILED))

    def measure(self, check: str, value: float, unit: str, expected: Range | None = None, note: str = "") -> None:
        """Record a number; of a shrunk section it is compared with nothing."""
        found = f"{results.number(value)} {unit}".strip() + (f", {note}" if note else "")
        if expected is None or self.small:
            text, verdict = expected.text(unit) if expected else "", MEASURED
        else:
            text, verdict = expected.text(unit), OK if expected.holds(value) else DIFFERS
        self._say(Result(self.section, check, text, found, verdict, float(value)))

    def note(self, check: str, found: str) -> None:
        """Record what has no expectation."""
        self._say(Result(self.section, check, "", found, MEASURED))

    def skip(self, check: str, reason: str) -> None:
        """Record what was not done."""
        self._say(Result(self.section, check, "", reason, SKIPPED))

    @contextmanager
    def attempt(self, check: str) -> Iterator[None]:
        """Record a failure of the block as this check's, so that the section continues; memory is given back."""
        try:
            yield
        except SkipSection as reason:
            self.skip(check, str(reason))
        except ModuleNotFoundError as error:
            self.skip(check, str(lacking(error)))
        except Exception as error:
            traceback.print_exc()
            self.require(check, False, described(error), "runs")
        self.release()

    def release(self) -> None:
        """Give unused GPU memory back, and let the peak count from here."""
        gc.collect()  # split models refer to themselves
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float:
        """Return the most GB (1e9 bytes) of tensors on the GPU at once since `release`; 0 on a CPU."""
        if self.device.type == "cpu":
            return 0.0
        import torch

        return torch.cuda.max_memory_allocated(self.device) / 1e9

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], object], times: int = 3, warm: bool = True) -> float:
        """Return the seconds of a call, the mean of some, after one that is not counted."""
        if warm:
            function()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            function()
        self.synchronize()
        return (time.perf_counter() - start) / times

    def _say(self, result: Result) -> None:
        results.append(self.path, result)
        print(results.line(result), flush=True)


def described(error: BaseException) -> str:
    """Return an error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def lacking(error: ModuleNotFoundError) -> SkipSection:
    """Return why a check that met this error is skipped: a package is not installed.

    Raises:
        ModuleNotFoundError: it is one of the check's own.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "earl", "benchmarks"):
        raise error
    return SkipSection(f"needs {package}, which is not installed here")
