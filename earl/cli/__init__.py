"""The command line: parses arguments, calls the stage, prints errors for people.

Stages are imported when they are called, so that ``--help`` answers at once.
"""

import atexit
import errno
import os
import sys
from collections.abc import Sequence

import typer

from earl.cli import config, convert, data, export, judge, node, plan, run, shapes, stages
from earl.execution import processes
from earl.messages import console
from earl.messages.errors import EarlError

app = typer.Typer(
    help="Reinforcement learning for autoregressive image editing, one stage a command.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(config.app, name="config")
app.command("import-config")(config.import_config)
app.add_typer(convert.app, name="convert")
app.add_typer(data.app, name="data")
app.add_typer(judge.app, name="judge")
app.add_typer(shapes.app, name="shapes")
for group in (stages, run, plan, export, node):
    app.add_typer(group.app)

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of the system that a user can mend, wherever they appear."""


def call(arguments: Sequence[str]) -> int:
    """Run a command and return its exit status; mistakes that a user can mend end in one line and status 2."""
    try:
        app(list(arguments), prog_name="earl")
    except EarlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; free space or check permissions, then try again", file=sys.stderr)
        return 2
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def main() -> None:
    """Run the command line in this process.

    What libraries have registered for the end of the process still runs, and its threads are waited for. Taking Python
    itself down after that would cost a process with torch and transformers more than half a second, and is left out.
    """
    status: int | None = None

    def end() -> None:
        if status is not None:
            processes.end_at_once(status)

    atexit.register(end)  # the first to be registered is the last to be called
    console.set_up()
    processes.name_user()
    processes.end_with_workflow()
    if "LOCAL_RANK" in os.environ:
        processes.end_with(os.getppid())  # torchrun ends ranks, unless it is killed itself
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files may be no UTF-8
    status = call(sys.argv[1:])
    if "LOCAL_RANK" in os.environ:
        processes.end_at_once(status)
    sys.exit(status)
