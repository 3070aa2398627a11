"""The memory tier in real runs: a killed rank costs no step, and what was given up does not come back."""

from __future__ import annotations

from tests.command import CALM, Workplace
from tests.commands.plugins import entry
from tests.commands.watch import assert_nothing_left
from trainer.checkpoint.lease import memory_folder


def faults(workplace: Workplace, what: str = "Faults", **kwargs: object) -> str:
    """The override that plugs them in."""
    marks = str(workplace.path / "marks")
    return f"callbacks=[{entry(f'tests.chaos.tier_plugins:{what}', folder=marks, **kwargs)}]"


def found(workplace: Workplace) -> list[tuple[str, int]]:
    """Tier and step of every state that the run went on from, in order."""
    events = workplace.records("events.jsonl")
    return [(event["tier"], event["step"]) for event in events if event["event"] in ("resume", "rollback")]


def test_no_step_is_lost_while_the_memory_is_there(workplace: Workplace, calm: Workplace) -> None:
    """A kill costs nothing; a damaged slot costs the one before; a rollback's future is not found again."""
    mount = workplace.path / "memory"
    mount.mkdir()
    workplace.train(
        *CALM,
        "checkpoint.every=0",
        "checkpoint.memory_every=1",
        f"checkpoint.memory_dir={mount}",
        faults(workplace, kill=[[4, 1]], damage=[[6, 1]], restore=[[9, 7]]),
    )
    assert found(workplace) == [("memory", 4), ("memory", 5), ("memory", 7), ("memory", 7)]
    assert [event["lost_steps"] for event in workplace.events("restart")] == [0, 1, 0]
    (alarm,) = workplace.events("alarm")
    assert alarm["kind"] == "corrupt_snapshot" and "rank-00001.slot-" in alarm["message"]
    assert workplace.digest() == calm.digest()
    assert workplace.losses() == calm.losses()
    assert not memory_folder(str(mount), workplace.run_dir).exists(), "a finished run gives its memory back"
    assert_nothing_left(workplace)


def test_updates_are_done_again_to_the_bit(workplace: Workplace, calm: Workplace) -> None:
    """4 is 1 and three updates; 6 is 5 and an update, where the one of 7 was damaged; 8 is 7 and an update."""
    workplace.train(
        *CALM,
        "checkpoint.every=0",
        "checkpoint.memory_every=1",
        faults(workplace, "Kills", kill=[[4, 1], [8, 0]], damage=[[7, 1]]),
    )
    assert found(workplace) == [("memory", 4), ("memory", 6), ("memory", 8)]
    assert [event["lost_steps"] for event in workplace.events("restart")] == [0, 1, 0]
    (alarm,) = workplace.events("alarm")
    assert alarm["kind"] == "corrupt_snapshot" and "rank-00001.log-" in alarm["message"]
    assert workplace.digest() == calm.digest()
    assert workplace.losses() == calm.losses()
    assert_nothing_left(workplace)
