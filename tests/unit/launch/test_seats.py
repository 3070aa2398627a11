"""Who sits where, and who is left out."""

from __future__ import annotations

from launch.seats import OFFENCE_SECONDS, Offences, assign


def test_a_spare_takes_the_lost_nodes_seat() -> None:
    assert assign({0: 1, 2: 3, 3: None}, 4) == {0: 1, 2: 3, 3: 2}


def test_fewer_seats_are_filled_without_a_gap() -> None:
    assert assign({0: 1, 1: 3}, 3) == {0: 1, 1: 2}


def test_who_had_a_seat_comes_before_who_had_none() -> None:
    assert assign({0: None, 1: 5, 2: 4}, 3) == {2: 1, 1: 2}
    assert assign({4: None, 3: None}, 2) == {3: 1}, "then in order of arrival"


def test_offences_of_the_last_hour_count() -> None:
    offences = Offences(2)
    assert not offences.add("a", 0.0)
    assert not offences.add("b", 1.0), "each host for itself"
    assert not offences.add("a", OFFENCE_SECONDS), "an hour is over"
    assert offences.add("a", OFFENCE_SECONDS + 1.0)
    never = Offences(0)
    assert not any(never.add("a", float(second)) for second in range(9))
