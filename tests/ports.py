"""Ports of loopback for the servers of tests."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

# Outgoing connections, and servers that ask for any port, get theirs from this range of the system. Such a port may be
# somebody else's before the server that a test means to start listens on it.
_ANY = Path("/proc/sys/net/ipv4/ip_local_port_range")
# Ray gives workers ports up to 19999.
_FIRST = 20_000

_kept: list[socket.socket] = []


def free_port() -> int:
    """A port that nobody uses and that no other call gets, in any process of this machine, while this process lives."""
    ports = range(_FIRST, int(_ANY.read_text().split()[0]))
    for port in (secrets.choice(ports) for _ in ports):
        if _is_unused(port) and _keep(port):
            return port
    raise RuntimeError(f"all ports from {ports.start} to {ports.stop - 1} are used")


def _is_unused(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _keep(port: int) -> bool:
    """Take the port's name among Unix sockets: only one process can, and the system frees it when that one ends."""
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0port-of-a-test-{port}")
    except OSError:
        name.close()
        return False
    _kept.append(name)
    return True
