"""Frames between the memory of two nodes: JSON with a length and a checksum, and raw bytes after it. No pickle."""

from __future__ import annotations

import json
import socket
from typing import Any

import xxhash

_PREFIX = b"muster-peer-1\n"
_LIMIT = 1 << 20


class WireError(OSError):
    """What came is not what was sent."""


def send_frame(link: socket.socket, body: dict[str, Any]) -> None:
    """One message. Raises OSError."""
    text = json.dumps(body).encode()
    link.sendall(_PREFIX + len(text).to_bytes(4, "little") + xxhash.xxh3_64_digest(text) + text)


def receive_frame(link: socket.socket) -> dict[str, Any]:
    """The next message.

    Raises:
        OSError: the link broke (WireError: what came is not a frame, or not whole).
    """
    head = bytearray(len(_PREFIX) + 12)
    receive_into(link, memoryview(head))
    length = int.from_bytes(head[-12:-8], "little")
    if not head.startswith(_PREFIX) or length > _LIMIT:
        raise WireError("no frame of this protocol")
    text = bytearray(length)
    receive_into(link, memoryview(text))
    if xxhash.xxh3_64_digest(text) != head[-8:]:
        raise WireError("a frame was changed on its way")
    body = json.loads(text)
    if not isinstance(body, dict):
        raise WireError("a frame that is no object")
    return body


def receive_into(link: socket.socket, room: memoryview) -> None:
    """Fill ``room``. Raises OSError if the other side ends before."""
    while room:
        count = link.recv_into(room)
        if not count:
            raise WireError("the other side has ended")
        room = room[count:]
