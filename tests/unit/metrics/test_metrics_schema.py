from pathlib import Path

import pytest
from metrics_helpers import finish, moe, start, step

from trainer.metrics import schema

DESIGN_NAMES = [
    "loss/train",
    "loss/valid",
    "loss/balance",
    "loss/router_z",
    "grad_norm",
    "perf/tokens_per_second",
    "perf/mfu",
    "perf/step_seconds",
    "moe/L{i}/load",
    "moe/max_over_mean",
    "moe/dead_experts",
    "moe/drop_rate",
    "moe/router_entropy",
    "moe/a2a_bytes",
    "ft/goodput",
    "ft/lost_steps",
    "ft/restart_seconds",
    "ft/checkpoint_stall_seconds",
]


def test_the_contract_names_are_there() -> None:
    assert set(DESIGN_NAMES) <= {metric.name for metric in schema.METRICS}


def test_names_are_unique() -> None:
    names = [metric.name for metric in schema.METRICS]
    assert len(names) == len(set(names))


def test_docs_page_is_the_printed_schema() -> None:
    page = Path(__file__).parents[3] / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == schema.markdown(), (
        "python -m trainer.metrics.schema > docs/metrics.md"
    )


def test_known_and_user_names_pass() -> None:
    schema.check_record(step(1, 0.0, user__answer=42) | moe())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"loss/trian": 1.0}, "'loss/trian' is not in trainer/metrics/schema.py"),
        ({"moe/Lx/load": [1.0]}, "'moe/Lx/load' is not in"),
        ({"moe/L0/load": 0.5}, "'moe/L0/load' takes fractions"),
        ({"grad_norm": [0.5]}, "'grad_norm' takes number"),
    ],
)
def test_other_records_are_refused(extra: dict[str, object], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        schema.check_record(step(1, 0.0) | extra)


def test_a_record_needs_its_axes() -> None:
    with pytest.raises(AssertionError, match=r"without \['step', 'tokens'\]"):
        schema.check_record({"time": 1.0, "grad_norm": 1.0})


def test_events_need_their_fields() -> None:
    schema.check_event(start(0.0) | {"further": "is welcome"})
    schema.check_event({"time": 0.0, "step": 1, "event": "evaluation", "loss_valid": 3.0, "best": True})
    with pytest.raises(AssertionError, match="event 'begin' is not in"):
        schema.check_event({"time": 0.0, "step": 0, "event": "begin"})
    broken = finish(1.0, 1)
    del broken["weights_digest"]
    with pytest.raises(AssertionError, match=r"'finish' without \['weights_digest'\]"):
        schema.check_event(broken)
