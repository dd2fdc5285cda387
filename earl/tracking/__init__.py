"""Shows a run elsewhere: its figures and episodes on Weights & Biases, its policies on the Hugging Face hub.

Both are sent from the files of the run by a process of their own, on a machine that reaches the internet; training
knows nothing of it. Sending again is harmless: what is there already is not sent twice.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from earl.execution import processes
from earl.files import objects
from earl.files.layout import Run
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from earl.config.schema import Config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """What a call of `earl track` or `earl push` did: iterations sent by this call, and where to look at them."""

    iterations: list[int]
    where: str

    def text(self) -> str:
        """Return it as a line for a terminal."""
        if not self.iterations:
            return f"nothing new for {self.where}"
        return f"sent iterations {', '.join(map(str, self.iterations))} to {self.where}"


def missing(config: "Config") -> str | None:
    """Return what a run will not be able to send at its end, and the remedy; None where nothing is missing.

    Training does not need it, and what is installed later is sent by starting the workflow again.
    """
    try:
        check_wandb(config)
    except EarlError as error:
        return f"{error}. Until then the run trains all the same, but its last step, which sends, fails"
    return None


def check_wandb(config: "Config") -> None:
    """Raise an EarlError where `wandb_mode` asks for wandb, but it is not installed."""
    if config.wandb_mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise EarlError(
            f"wandb_mode is `{config.wandb_mode}`, but wandb is not installed; "
            "in EARL's folder, pip install -e '.[tracking]', or set wandb_mode to `disabled`"
        )


def check_hub(config: "Config") -> None:
    """Raise an EarlError where `push_to_hub` is true, but there is no token."""
    if not config.push_to_hub:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        raise EarlError(
            "push_to_hub is true, but there is no token of the Hugging Face hub; "
            "call `hf auth login`, set HF_TOKEN, or set push_to_hub to false"
        )


def attempt(send: Callable[[], Sent], best_effort: bool, out: Path | None) -> None:
    """Send, and say what came of it.

    Args:
        send: what is to be done.
        best_effort: warn where it fails, instead of failing: training need not stop for it.
        out: also gets the outcome, as JSON; where sending fails otherwise, it is not written.

    Raises:
        EarlError: of ``send``, unless ``best_effort``.
    """
    try:
        sent = send()
    except EarlError as error:
        if not best_effort:
            raise
        log.warning("warning: %s\nThe run goes on; what is missing is sent with what comes next.", error)
        record = {"problem": str(error)}
    else:
        log.info(sent.text())
        record = {"iterations": sent.iterations, "where": sent.where}
    if out is not None:
        objects.write(out, record)


def lock(run: Run, what: str) -> IO[str]:
    """Return the lock of the one process that may send ``what`` of a run; it ends with the process.

    Raises:
        EarlError: when another one is sending.
    """
    return processes.lock(folder(run) / f".{what}.lock", patience=5.0)


def folder(run: Run) -> Path:
    """Return the folder where a run keeps what was sent."""
    return run.path / "tracking"


def read_state(path: Path) -> dict[str, Any]:
    """Return what a file of ours says, or an empty dict where there is none; EarlError where it is damaged."""
    return objects.read(path, "restore the file from a copy, or delete it") if path.is_file() else {}
