"""Programs that stand in for others on the path."""

from pathlib import Path


def program(folder: Path, name: str, text: str) -> None:
    """Write a shell script that stands in for one of Slurm's commands."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
