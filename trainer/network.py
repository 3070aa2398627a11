"""Finding another host, and saying which one cannot be found."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil

from parallel.errors import ConfigError

if TYPE_CHECKING:
    import torch.distributed as dist

UNREACHABLE_SECONDS = 20.0
"""How long a host without a name or a route is asked again: names of fresh pods take a moment."""
_ATTEMPT_SECONDS = 5.0
_RETRY_SECONDS = 0.2
_HANDSHAKE_SECONDS = 10.0


def connect(
    host: str,
    port: int,
    patience_seconds: float,
    field: str,
    waiting: Callable[[str], None] = lambda why: None,
) -> dist.TCPStore:
    """A client of the store at ``host:port``.

    Args:
        patience_seconds: how long a host that is there but refuses may take to open the port.
        field: what the user calls the host, for errors.
        waiting: told, at most once a reason, what is being waited for.

    Raises:
        ConfigError: the host has no name or no route, nobody opened the port in time, or what answers is
            no store. The message names the host.
    """
    began, told = time.monotonic(), ""
    while True:
        why, limit = probe(host, port), patience_seconds
        if why is None:
            return _client(host, port, field)
        if not why.startswith("refused"):
            limit = min(patience_seconds, UNREACHABLE_SECONDS)
        if why != told and time.monotonic() - began > 2.0:
            told = why
            waiting(f"{host}:{port}: {why}; asking again for up to {limit:.0f} s")
        if time.monotonic() - began > limit:
            raise ConfigError(
                field,
                host,
                f"seen from {socket.gethostname()}, {host}:{port} cannot be reached: {why}",
                "start the first node's process, or correct the host, the port or the firewall",
            )
        time.sleep(_RETRY_SECONDS)


def probe(host: str, port: int, seconds: float = _ATTEMPT_SECONDS) -> str | None:
    """Why ``host:port`` cannot be connected to in this time; None if it can."""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except socket.gaierror:
        return "no host has this name"
    except ConnectionRefusedError:
        return "refused: nothing listens at this port yet"
    except TimeoutError:
        return "no answer (a firewall, or a host that is down)"
    except OSError as error:
        return str(error.strerror or error)
    return None


def _client(host: str, port: int, field: str) -> dist.TCPStore:
    import torch.distributed as dist

    made: list[dist.TCPStore] = []

    def make() -> None:
        with suppress(RuntimeError):
            patience = timedelta(seconds=_HANDSHAKE_SECONDS)
            made.append(dist.TCPStore(host, port, is_master=False, timeout=patience, wait_for_workers=False))

    # torch's own timeout does not cover a listener that accepts and then says nothing.
    thread = threading.Thread(target=make, name="muster-handshake", daemon=True)
    thread.start()
    thread.join(_HANDSHAKE_SECONDS)
    if not made:
        raise ConfigError(
            field,
            host,
            f"something else than the first node's store listens at {host}:{port}",
            "another port, the same on every node",
        )
    return made[0]


def serve(host: str, port: int, field: str) -> dist.TCPStore:
    """A store that other hosts find at ``host:port``.

    Raises:
        ConfigError: the port is taken; the message names this host and, where it may be known, the process.
    """
    # Asked for before the store is: its own message comes with a C++ stack.
    try:
        with socket.socket(socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            probe.listen(1)
        import torch.distributed as dist

        return dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno != errno.EADDRINUSE:
            raise
        if not isinstance(error, OSError) and "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            field,
            port,
            f"on {socket.gethostname()} this port is in use{_holder(port)}",
            f"{field}={port + 1}, the same on every node",
        ) from None


def _holder(port: int) -> str:
    """`` by process 123 (name)``, where the system tells."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return ""


def is_local(host: str) -> bool:
    """Whether a name or an address is this host's own. False for what does not resolve."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)  # the kernel binds to addresses of its own only
            except OSError:
                continue
            return True
    return False


def address_towards(host: str) -> str | None:
    """The address that this host shows to ``host``; None if it cannot be told."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as peer:
            peer.connect(address)  # UDP: nothing is sent
            return str(peer.getsockname()[0])
    except OSError:
        return None


def interface_towards(host: str) -> str | None:
    """The network interface whose address this host shows to ``host``; None if it cannot be told."""
    mine = address_towards(host)
    if mine is None:
        return None
    if mine.startswith("127.") or mine == "::1":
        return "lo"
    # A host that talks to its own address is routed over the loopback, and yet shows that address.
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == mine for entry in addresses):
            return name
    return None


def socket_interface(host: str) -> dict[str, str]:
    """Gloo looks up the host's name to choose an address, which on many hosts is the loopback's. This names the
    interface that leads to ``host`` instead. Empty where the user has chosen, or it cannot be told."""
    interface = None if "GLOO_SOCKET_IFNAME" in os.environ else interface_towards(host)
    return {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}
