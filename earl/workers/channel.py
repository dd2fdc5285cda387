"""Messages between client and worker: JSON objects, each after its length in four bytes. Nothing is ever unpickled.

Before the first message each side proves to the other that it knows the pool's secret: it answers a random challenge
with an HMAC. What follows is neither encrypted nor signed; it holds command lines and log lines, no keys.
"""

import hmac
import json
import os
import socket
import struct
from typing import Any

Address = str
"""``unix:<path>``, or ``tcp:<host>:<port>``."""

MAX_BYTES = 2**20
"""Longest message. Command lines are short, and log lines are cut into parts."""
PATIENCE = 10.0
"""Seconds that the other side may take to prove itself and say what it wants."""
_NONCE_BYTES = 32


class ProtocolError(Exception):
    """The other side broke off, does not know the secret, or sent what is no message."""


class Channel:
    """One side of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection

    def send(self, message: dict[str, Any]) -> None:
        """Send one message.

        Raises:
            ProtocolError: the other side is gone.
        """
        data = json.dumps(message).encode()
        try:
            self.socket.sendall(struct.pack("!I", len(data)) + data)
        except OSError as error:
            raise ProtocolError(f"the connection broke off ({error})") from error

    def receive(self) -> dict[str, Any]:
        """Return the next message.

        Raises:
            ProtocolError: the other side is gone, or what came is no message.
        """
        (length,) = struct.unpack("!I", self._read(4))
        if length > MAX_BYTES:
            raise ProtocolError(f"a message of {length} bytes is longer than {MAX_BYTES}")
        try:
            message = json.loads(self._read(length))
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"a message is not JSON ({error})") from error
        if not isinstance(message, dict):
            raise ProtocolError(f"a message is a {type(message).__name__}, not an object")
        return message

    def _read(self, length: int) -> bytes:
        parts = []
        while length:
            try:
                part = self.socket.recv(min(length, 2**16))
            except OSError as error:
                raise ProtocolError(f"the connection broke off ({error})") from error
            if not part:
                raise ProtocolError("the other side closed the connection")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        self.socket.close()


def listen(address: Address) -> tuple[socket.socket, Address]:
    """Return a listening socket and its address; port 0 takes a free one."""
    if address.startswith("unix:"):
        listener = socket.socket(socket.AF_UNIX)
        path = address.removeprefix("unix:")
        if os.path.lexists(path):
            os.unlink(path)  # A worker that was killed left it; the caller holds the lock of its name.
        listener.bind(path)
    else:
        host, _, port = address.removeprefix("tcp:").rpartition(":")
        listener = socket.create_server((host, int(port)))
        address = f"tcp:{host}:{listener.getsockname()[1]}"
    listener.listen()
    return listener, address


def connect(address: Address, secret: bytes) -> Channel:
    """Return a channel to the worker at an address, after both sides have proved themselves.

    Raises:
        ProtocolError: nobody answers there, or not one who knows the secret.
    """
    try:
        if address.startswith("unix:"):
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(PATIENCE)
            connection.connect(address.removeprefix("unix:"))
        else:
            host, _, port = address.removeprefix("tcp:").rpartition(":")
            connection = _kept_alive(socket.create_connection((host, int(port)), timeout=PATIENCE))
    except (OSError, ValueError) as error:
        raise ProtocolError(f"no worker answers at {address} ({error})") from error
    return _proved(connection, secret, mine="client", other="worker")


def accept(connection: socket.socket, secret: bytes) -> Channel:
    """Return the channel of a connection that a worker has accepted, after both sides have proved themselves.

    Raises:
        ProtocolError: the other side does not know the secret.
    """
    connection.settimeout(PATIENCE)
    return _proved(_kept_alive(connection), secret, mine="worker", other="client")


def _kept_alive(connection: socket.socket) -> socket.socket:
    """Have the system notice within a minute that the machine at the other end is gone without a word."""
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


def _proved(connection: socket.socket, secret: bytes, mine: str, other: str) -> Channel:
    """The same on both sides: each sends a challenge, and answers the other's with its role mixed in.

    The role keeps an answer from being sent back as one's own. The client answers first, so a worker tells nothing to
    someone who cannot answer.
    """
    channel = Channel(connection)
    try:
        challenge = os.urandom(_NONCE_BYTES).hex()
        channel.send({"challenge": challenge})
        theirs = _text(channel.receive(), "challenge", 2 * _NONCE_BYTES)
        answer = {"answer": _answer(secret, mine, theirs)}
        if mine == "client":
            channel.send(answer)
        given = _text(channel.receive(), "answer", 64)
        if not hmac.compare_digest(given, _answer(secret, other, challenge)):
            raise ProtocolError(f"the {other} does not know the secret")
        if mine == "worker":
            channel.send(answer)
    except BaseException:
        connection.close()
        raise
    return channel


def _text(message: dict[str, Any], name: str, length: int) -> str:
    value = message.get(name)
    if not isinstance(value, str) or len(value) != length or not value.isascii():
        raise ProtocolError(f"the message has no {name}")
    return value


def _answer(secret: bytes, role: str, challenge: str) -> str:
    return hmac.new(secret, f"{role}:{challenge}".encode(), "sha256").hexdigest()
