"""A worker without an agent: it leaves when a peer has failed, when the store is gone, and when it is stuck."""

from __future__ import annotations

import subprocess
import sys

import torch.distributed as dist

from tests.command import REPO
from trainer.watchdog import Watchdog

WORKER = """
import sys, threading, time
import torch.distributed as dist
from trainer.liveness import Pulse
from trainer.watchdog import Watchdog
store = dist.PrefixStore("launch", dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False))
pulse = Pulse()
pulse.watchers.append(Watchdog(store, 1).look)
pulse.start()
if "stuck" in sys.argv:
    pulse.expect(600.0, 0.5, 2.0)
    for step in range(20):
        pulse.enter("compute", step + 1)
print("here", flush=True)
time.sleep(600)
"""


def start(port: int, *args: str) -> subprocess.Popen[str]:
    """A worker that waits for ever; returns once its watchdog looks."""
    command = [sys.executable, "-c", WORKER, str(port), *args]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    return process


def test_a_worker_leaves_with_a_failed_peer_or_alone() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    waiting = start(store.port)
    stuck = start(store.port, "stuck")
    output, _ = stuck.communicate(timeout=600)
    assert stuck.returncode == 1
    assert "does not get on: over its deadline at step 20, compute" in output
    assert 'File "<string>"' in output, "its stack"
    output, _ = waiting.communicate(timeout=600)
    assert waiting.returncode == 1
    assert "rank 1 leaves: rank 1 on" in output and "does not get on" in output


def test_what_was_said_for_all_is_not_said_again() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    waiting = start(store.port)
    Watchdog(dist.PrefixStore("launch", store), 0).tell("a mistake in the config", is_said=True)
    output, _ = waiting.communicate(timeout=600)
    assert (waiting.returncode, output) == (1, "")


def test_a_worker_leaves_with_the_host_of_the_store() -> None:
    host = subprocess.Popen([sys.executable, "-c", HOST], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    waiting = start(int(host.stdout.readline()))
    host.kill()
    host.wait()
    output, _ = waiting.communicate(timeout=600)
    assert waiting.returncode == 1 and "the process that hosts the store has ended" in output


HOST = """
import time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""
