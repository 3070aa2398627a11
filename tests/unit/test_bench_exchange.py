"""`make bench-exchange`: over real processes all compute the same layer, and no fewer bytes go than must."""

from __future__ import annotations

import argparse

from bench import exchange as bench
from bench.exchange_ranks import FLOOR, MUSTER, WIRE


def test_all_compute_the_layer_over_two_processes() -> None:
    given = argparse.Namespace(shape="fine", routing="zipf", rounds=2, tokens=96)
    bandwidths, (block,) = bench.run_world(2, given)
    assert [line["bytes"] for line in bandwidths] == [1 << n for n in range(12, 25, 2)]
    assert {row.name: row.note for row in block.rows} == dict.fromkeys(
        (MUSTER, "DeepSpeed MoE, no drop", WIRE, FLOOR), ""
    )
    assert all(len(row.ms) == 2 and min(row.ms) > 0 for row in block.rows)
    least, sent = block.row(WIRE).mb, block.row(MUSTER).mb
    # Combine weights and experts ride along, 8 of 4 and 4 bytes beside 1,024 of the token, there and back.
    assert least is not None and sent is not None and least < sent < 1.05 * least
    text = bench.page("head", bandwidths, [block], 2, ["{}"])
    assert "| 2 | fine | zipf |" in text and "| 1.45 |" in text
