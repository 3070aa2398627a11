"""Named points of a run where a fault may be injected; no-ops unless ``muster chaos`` turned them on.

``muster chaos`` names a schedule in the environment (:data:`SCHEDULE_VARIABLE`); a worker whose run it belongs to
arms itself with it. Everywhere else :func:`reach` is one comparison with ``None``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.faults.inject import Injector
    from trainer.loop import Trainer
    from trainer.run import Place

FOLDER = "faults"
"""Below a run directory: the schedule, and a mark for each fault that struck."""
SCHEDULE_FILE = "schedule.jsonl"
SCHEDULE_VARIABLE = "MUSTER_FAULTS"

_injector: Injector | None = None


def arm(trainer: Trainer, place: Place) -> None:
    """Inject this run's scheduled faults into this process from now on, if there are any.

    Raises:
        ConfigError: the schedule cannot be read.
    """
    schedule = os.environ.get(SCHEDULE_VARIABLE)
    # A proof or an evaluation that the run starts inherits the variable, and must not be disturbed.
    if schedule is None or Path(schedule).parent != trainer.run_dir / FOLDER:
        return
    from trainer.faults.inject import Injector

    global _injector
    _injector = Injector(Path(schedule), trainer, place)


def reach(point: str, step: int, **facts: Any) -> None:
    """This process comes to a point of a run.

    Args:
        point: one of :data:`trainer.faults.kinds.POINTS`.
        step: optimizer steps done.
        facts: what the point has to offer to a fault: the path that is being written, …
    """
    if _injector is not None:
        _injector.reach(point, step, facts)
