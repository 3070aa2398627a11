"""What of the health section cannot be is said before anything starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from parallel.errors import ConfigError
from tests.configs import composed
from trainer.compose import compose, freeze, load_frozen
from trainer.config import Machine, resolve
from trainer.rules import validate

MISTAKES = [
    ("health.collapse=1.5", "health.collapse=1.5: a share in [0, 1). Fix: health.collapse=0.25"),
    ("health.drop_rate=-0.1", "health.drop_rate=-0.1: a share in [0, 1). Fix: health.drop_rate=0.4"),
    ("health.rank_max_over_mean=0.5", "a multiple of the mean above 1, or 0 for no such alarm"),
    ("health.window=0", "health.window=0: must be above 0"),
    ("health.every=-1", "health.every=-1: must not be negative. Fix: health.every=0"),
    (
        "health.trace_every=1 layout=dense",
        "layout=dense routes nothing. Fix: health.trace_every=0, or a layout",
    ),
    (
        "health.replay=runs/a layout=dense",
        "layout=dense routes nothing. Fix: health.replay=null, or a layout",
    ),
    ("data.domain_field=kind", "data.domain_field=kind: names a field of rows, as data=jsonl"),
    ("data=text data.path=a data.domain_field=kind", "Fix: data.domain_field=null"),
    ("data=jsonl data.target=a:b data.domain_field=kind", 'and yield {"text": …, "domain": …}'),
]


@pytest.mark.parametrize(("overrides", "said"), MISTAKES, ids=[overrides for overrides, _ in MISTAKES])
def test_mistakes_are_told(overrides: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        validate(resolve(composed("device=cpu", *overrides.split()), Machine(num_cpus=2)))


def test_a_trace_is_found_from_any_folder(tmp_path: Path) -> None:
    config = compose(["health.replay=runs/a"])
    freeze(config, tmp_path / "config.yaml")
    assert load_frozen(tmp_path / "config.yaml").health.replay == str(Path("runs/a").absolute())
