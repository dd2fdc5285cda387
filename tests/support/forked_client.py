"""`python -m <module> ...`, forked where a socket of that name is beside this program; anything else by Python itself.

Exit status or signal, output, environment and folder are the forked program's own; see tests/support/forked.py.
"""

import json
import os
import signal
import socket
import sys


def main(arguments: list[str]) -> None:
    option, module, *others = arguments[1:] if arguments[0] == "-u" else arguments
    address = os.path.join(os.path.dirname(os.path.abspath(__file__)), module)
    if option != "-m" or not os.path.exists(address):
        os.execv(sys.executable, [sys.executable, *arguments])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        request = {"args": [module, *others], "cwd": os.getcwd(), "env": dict(os.environ)}
        socket.send_fds(server, [json.dumps(request).encode()], [1, 2])
        pid = int(server.recv(99))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        status = int(server.recv(99))
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
