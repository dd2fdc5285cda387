"""Tells a run folder that was moved from one that was copied: what follows a move must not follow a copy.

What was sent of a run is remembered in its folder, with the folder's path, device and inode. A rename keeps the inode;
a move to another file system keeps neither, but then the original is gone. A copy keeps the path alone, and the
original is still there, or was on the same device under another inode.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from earl import tracking
from earl.files.layout import Run

Place = Mapping[str, Any]


def here(run: Run) -> dict[str, Any]:
    """Return where a run folder is: path, device, inode."""
    status = run.path.stat()
    return {"path": str(run.path.resolve()), "device": status.st_dev, "inode": status.st_ino}


def is_copy(run: Run, recorded: Place | None, state: Path) -> bool:
    """Return whether a run folder is a copy of the one that was recorded in it.

    A copy on another machine, where the original is out of sight, counts as moved.

    Args:
        run: The run.
        recorded: What `here` returned when something was last sent; None: nobody recorded it.
        state: The file with the record, below the run folder.
    """
    if recorded is None:
        return False
    now = here(run)
    same_inode = (now["device"], now["inode"]) == (recorded["device"], recorded["inode"])
    if now["path"] == recorded["path"] or same_inode:
        return False
    original = Path(recorded["path"]) / state.relative_to(run.path)
    return now["device"] == recorded["device"] or tracking.read_state(original).get("folder") == recorded
