"""The cut of Llama 3's interruptions that CI has time for: 20 of 419, each category among them."""

from __future__ import annotations

import json

from tests.command import CALM, MUSTER, SMALL, Workplace
from tests.commands.watch import assert_nothing_left


def test_twenty_interruptions_change_no_bit(workplace: Workplace) -> None:
    run = [*CALM, "train.steps=88", "checkpoint.every=3", "cluster=llama3", "chaos.faults=20"]
    # Faults are 4 steps apart: no deadline is learned in between, and a hang is waited for as a collective is.
    run += ["resilience.collective_timeout_seconds=20", "checkpoint.memory_every=1"]
    workplace.run(MUSTER, "chaos", *SMALL, f"data.path={workplace.path / 'corpus'}", *run)
    verdict = json.loads((workplace.run_dir / "verdict.json").read_text())
    assert (verdict["injected"], verdict["survived"], verdict["bit_identical"]) == (20, 20, True)
    assert len({fault["component"] for fault in verdict["faults"]}) == 18
    assert len(verdict["by_kind"]) >= 12, "of different mechanisms"
    kills = [
        fault for fault in verdict["faults"] if fault["kind"] in ("kill", "segfault", "exception", "abort")
    ]
    assert kills and not any(fault["lost_steps"] for fault in kills), "memory has every step"
    assert_nothing_left(workplace)
