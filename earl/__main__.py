"""``python -m earl``."""

from earl.cli import main

main()
