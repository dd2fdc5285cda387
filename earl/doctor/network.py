"""By which network interface ranks on several nodes reach each other: that of gloo, and that of NCCL."""

import contextlib
import fcntl
import os
import re
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

_GET_ADDRESS = 0x8915
"""Linux's ioctl SIOCGIFADDR."""
_GLOBAL = "00"
"""Scope of an IPv6 address that other machines can reach."""
GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def check() -> tuple[bool | None, str]:
    """Say which interfaces are taken, and whether they can reach another node; the environment's have to be there."""
    there = interfaces()
    problems, taken = [], {}
    for library, variable, chosen in (("gloo", GLOO, _by_gloo), ("NCCL", NCCL, _by_nccl)):
        named = os.environ.get(variable)
        matching = there if not named else _named(named, there, library)
        if named and not matching:
            problems.append(f"{variable}={named} names none that has an address here")
        taken[library] = f"{variable}={named}" if named else chosen(there)
    shown = ", ".join(f"{name} {address}" for name, address in there.items())
    told = f"{shown or 'no interface has an address'}; gloo takes {taken['gloo']}, NCCL {taken['NCCL']}"
    if not _spans_nodes():
        return (False, f"{'; '.join(problems)}; {told}") if problems else (None, f"{told}; one node")
    own = _own_address()
    if not os.environ.get(GLOO) and _is_loopback(own):
        problems.append(
            f"this node's name, {socket.gethostname()}, has the address {own}, which other nodes cannot reach; "
            f"export {GLOO}={_towards_first(there)} on every node, and {NCCL} likewise"
        )
    return not problems, "; ".join([*problems, told])


def interfaces() -> dict[str, str]:
    """Return an address of each network interface that has one, IPv4 where there is one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
    with contextlib.suppress(OSError):  # a system without IPv6
        for line in Path("/proc/net/if_inet6").read_text(encoding="utf-8").splitlines():
            address, _, _, scope, _, name = line.split()
            if scope == _GLOBAL:
                found.setdefault(name, socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address)))
    return found


def _named(value: str, there: Mapping[str, str], library: str) -> list[str]:
    """Return the interfaces that a variable names: gloo takes whole names; NCCL beginnings, `=name`, and `^` for all
    others."""
    if library == "gloo":
        return [name for name in there if name in value.split(",")]
    excludes, words = value.startswith("^"), value.removeprefix("^")
    exact, names = words.startswith("="), words.removeprefix("=").split(",")
    return [name for name in there if any(name == one if exact else name.startswith(one) for one in names) != excludes]


def _by_gloo(there: Mapping[str, str]) -> str:
    own = _own_address()
    return next((name for name, address in there.items() if address == own), own or "the loopback")


def _by_nccl(there: Mapping[str, str]) -> str:
    """NCCL's order: InfiniBand, then any other than the loopback and those of containers, then these."""
    last = ("docker", "virbr", "lo")
    rank = {name: 0 if name.startswith("ib") else 2 if re.match("|".join(last), name) else 1 for name in there}
    return min(there, key=lambda name: rank[name], default="none")


def _own_address() -> str:
    """Return the address that this node's name stands for, by which gloo is reached where nothing else is said."""
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return ""


def _is_loopback(address: str) -> bool:
    return not address or address.startswith("127.") or address == "::1"


def _spans_nodes() -> bool:
    """Whether the ranks of this program are on several machines."""
    size = os.environ.get("WORLD_SIZE", "1")
    first = os.environ.get("MASTER_ADDR", "")
    return int(os.environ.get("LOCAL_WORLD_SIZE", size)) < int(size) and not _is_loopback(first)


def _towards_first(there: Mapping[str, str]) -> str:
    """Return the interface by which this node reaches the one of rank 0."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", "1"))))  # sends nothing
        except OSError:
            return "<interface>"
        source = probe.getsockname()[0]
    return next((name for name, address in there.items() if address == source), "<interface>")
