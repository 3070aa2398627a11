"""The ledger of skips and the window of losses: what they judge, and that they come back as they were."""

from __future__ import annotations

import json
import math
from pathlib import Path

from trainer.guard.ledger import Ledger
from trainer.guard.spikes import Spikes


def test_a_skip_is_on_the_disk_and_counts_for_its_own_data_only(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    ledger = Ledger(path, "data", 8)
    assert ledger.read() == []
    for step in (3, 4, 7):
        ledger.add(step, "non_finite", write=True)
    again = Ledger(path, "data", 8)
    again.load(again.read())
    assert [step for step in range(10) if again.has(step)] == [3, 4, 7]
    assert (again.in_a_row_before(5), again.in_a_row_before(6), again.in_a_row_before(8)) == (2, 0, 1)
    assert (again.before(4), again.before(9)) == (1, 3)
    for other in (Ledger(path, "other", 8), Ledger(path, "data", 16)):
        other.load(other.read())
        assert not any(other.has(step) for step in range(10)), "the step holds another batch there"


def test_ranks_that_do_not_write_leave_the_file_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "guard.json", "data", 8)
    ledger.add(3, "spike", write=False)
    assert ledger.has(3) and not ledger.path.exists()


def test_nothing_is_a_spike_before_the_window_is_full_or_where_it_is_off() -> None:
    spikes, off = Spikes(10.0, 4), Spikes(0.0, 4)
    for loss in (3.0, 2.9, 2.8):
        spikes.add(loss)
        off.add(loss)
        assert spikes.threshold() == math.inf
    spikes.add(2.7)
    off.add(2.7)
    assert off.threshold() == math.inf
    # median 2.85; deviations .15 .05 .05 .15: MAD 0.1
    assert math.isclose(spikes.threshold(), 2.85 + 10 * 1.4826 * 0.1)


def test_one_outlier_in_the_window_hardly_moves_the_threshold() -> None:
    spikes = Spikes(10.0, 11)
    for step in range(11):
        spikes.add(3.0 + 0.01 * (step % 3))
    calm = spikes.threshold()
    spikes.add(1e6)
    assert spikes.threshold() < calm + 0.2


def test_equal_losses_make_no_spike_of_rounding() -> None:
    spikes = Spikes(3.0, 10)
    for _ in range(10):
        spikes.add(2.0)
    assert 2.0 < spikes.threshold() < 2.001


def test_the_window_comes_back_from_json_to_the_bit() -> None:
    spikes = Spikes(5.0, 3)
    for loss in (0.1, 1 / 3, 2 / 7, 0.7):
        spikes.add(loss)
    again = Spikes(5.0, 3)
    again.load_state_dict(json.loads(json.dumps(spikes.state_dict())))
    assert again.threshold() == spikes.threshold()
