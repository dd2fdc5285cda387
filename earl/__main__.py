"""``python -m earl`` and ``earl``: hands a command to a resident worker where there is one, else runs it here."""

import os
import sys

from earl.messages.errors import EarlError
from earl.workers import client


def main() -> None:
    # OpenMP reads this when torch is imported. Threads that spin while they wait starve each other on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        status = client.run(sys.argv[1:])
    except EarlError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    if status is None:
        from earl import cli

        cli.main()
    sys.exit(status)


if __name__ == "__main__":
    main()
