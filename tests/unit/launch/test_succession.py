"""Terms and who claims them: files, a real etcd, and two agents that both think it is their turn."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.succession import CutOff, Standing, settle
from tests.cluster.hosts import cannot_run
from tests.commands.watch import wait_until
from trainer.network import probe
from trainer.terms import EtcdTerms, FileTerms, Lease, Term, Terms, open_terms


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a real server."""
    program = shutil.which("etcd")
    if program is None:
        cannot_run("needs an etcd server (make cluster-tools)")
    port, folder = free_port(), tmp_path_factory.mktemp("etcd")
    here, peers = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
    command = [program, "--data-dir", str(folder), "--listen-client-urls", here, "--unsafe-no-fsync"]
    command += ["--advertise-client-urls", here, "--listen-peer-urls", peers]
    command += ["--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: probe("127.0.0.1", port) is None, "etcd")
        yield f"etcd://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["files", "etcd"])
def terms(request: pytest.FixtureRequest, tmp_path: Path) -> Terms:
    place = None if request.param == "files" else request.getfixturevalue("etcd")
    found = open_terms(place, tmp_path)
    assert isinstance(found, FileTerms if place is None else EtcdTerms)
    return found


def term(number: int, host: str = "a", port: int = 1) -> Term:
    return Term(number, host, "127.0.0.1", port)


def test_a_term_is_claimed_once_and_in_order(terms: Terms) -> None:
    assert terms.newest() is None and terms.last_beat() == ""
    assert terms.claim(term(1))
    assert not terms.claim(term(1, "b")), "taken"
    assert terms.newest() == term(1)
    assert terms.claim(term(2, "b"))
    assert not terms.claim(term(1)), "over"
    assert terms.newest() == term(2, "b")


def test_of_many_who_claim_at_once_one_gets_it(terms: Terms) -> None:
    ready, won = threading.Barrier(8), []

    def claim(host: str) -> None:
        ready.wait()
        if terms.claim(term(1, host)):
            won.append(host)

    threads = [threading.Thread(target=claim, args=[f"h{number}"]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and terms.newest() == term(1, won[0])


def test_a_leader_shows_its_beat_and_learns_that_it_leads_no_longer(terms: Terms) -> None:
    assert terms.claim(term(1))
    lease = Lease(terms, term(1), 60.0)
    first = terms.last_beat()
    wait_until(lambda: terms.last_beat() not in ("", first), "the beat")
    assert lease.lost(alone=True) is None
    assert terms.claim(term(2, "b"))
    wait_until(lambda: lease.lost(alone=False), "the newer term")
    assert lease.lost(alone=False) == "b has taken over the run (term 2)"
    lease.end()
    last = terms.last_beat()
    assert terms.last_beat() == last


def test_a_place_out_of_reach_counts_only_where_others_may_lead(tmp_path: Path) -> None:
    gone = EtcdTerms(f"http://127.0.0.1:{free_port()}", "run")
    lease = Lease(gone, term(1), 0.0)
    assert lease.lost(alone=False) is None
    wait_until(lambda: lease.lost(alone=True), "the end of its patience")
    lease.end()


def standing(leader: Term, position: int = 0) -> Standing:
    return Standing(Path("unused"), leader, position, {})


def test_the_first_in_line_takes_over_and_the_others_follow_it(terms: Terms) -> None:
    old = term(1, "old", free_port())  # nothing listens there
    assert terms.claim(old)
    found: dict[str, Term] = {}

    def run(host: str, position: int) -> None:
        found[host] = settle(standing(old, position), terms, term(0, host, position), 60.0, 60.0, False)

    threads = [threading.Thread(target=run, args=[host, at]) for at, host in enumerate(["b", "c"])]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"b": term(2, "b", 0), "c": term(2, "b", 0)}


def test_who_is_cut_off_from_a_leader_that_lives_does_not_take_over(terms: Terms) -> None:
    old = term(1, "old", free_port())  # refused, as by a firewall
    assert terms.claim(old)
    lease = Lease(terms, old, 60.0)
    with pytest.raises(CutOff):
        settle(standing(old), terms, term(0, "b"), silence=30.0, patience=4.0, abdicated=False)
    assert terms.newest() == old
    lease.end()


def test_a_leader_that_shows_no_beat_any_more_is_replaced(terms: Terms) -> None:
    with socket.create_server(("127.0.0.1", 0)) as suspended:  # accepts, and says nothing
        old = term(1, "old", suspended.getsockname()[1])
        assert terms.claim(old)
        began = time.monotonic()
        found = settle(standing(old), terms, term(0, "b"), silence=1.0, patience=60.0, abdicated=False)
        assert found == term(2, "b") and time.monotonic() - began > 1.0, "not at once: it may be slow"


def test_a_leader_whose_connection_broke_is_followed_again(terms: Terms) -> None:
    with socket.create_server(("127.0.0.1", 0)) as alive:
        old = term(1, "old", alive.getsockname()[1])
        assert terms.claim(old)
        lease = Lease(terms, old, 60.0)
        assert settle(standing(old), terms, term(0, "b"), 60.0, 60.0, False) == old
        lease.end()
