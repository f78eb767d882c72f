"""What a notebook's kernel tells the process that supervises it: one line of JSON an event, over a socket.

Without a supervisor nothing is sent. Events: `step` (one begins), `done` and `seconds` (it has ended), `rest` (no step follows
for now), `stop` (a signal reached the kernel itself), `ready`.
"""

import json
import os
import socket
from typing import Any

_ends: dict[int, socket.socket] = {}  # by process: a forked worker has no part in it


def connect(number: int) -> socket.socket:
    """Take the socket with this file number, which the supervisor left open for this process."""
    end = socket.socket(fileno=number)
    end.set_inheritable(False)
    _ends[os.getpid()] = end
    return end


def is_supervised() -> bool:
    """Say whether a supervisor listens, who can start this notebook anew in a fresh process."""
    return os.getpid() in _ends


def tell(**event: Any) -> None:
    """Send an event; training never waits for the supervisor, and goes on without one."""
    end = _ends.get(os.getpid())
    if end is None:
        return
    try:
        end.send(json.dumps(event).encode() + b"\n", socket.MSG_DONTWAIT)
    except OSError:  # full, or the supervisor is gone, which the watching thread finds by itself
        return
