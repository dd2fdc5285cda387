"""``python -m earl`` and ``earl``."""

import os


def main() -> None:
    # OpenMP reads this when torch is imported. Threads that spin while they wait starve each other on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from earl import cli

    cli.main()


if __name__ == "__main__":
    main()
