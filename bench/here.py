"""Where and when a result was measured."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch

from trainer.environment import cpu_model

RESULTS = Path(__file__).resolve().parent / "results"


def measured(command: str) -> str:
    """Machine, versions, load of the last minute, date and command, for the head of a page."""
    spin = os.environ.get("GOMP_SPINCOUNT")
    version = torch.__version__ if spin is None else f"{torch.__version__}, GOMP_SPINCOUNT={spin}"
    return (
        f"{os.cpu_count()} cores of {cpu_model()} (shared), {platform.system()}, torch {version}, load "
        f"{os.getloadavg()[0]:.1f} before, {time.strftime('%Y-%m-%d')}:\n\n```bash\n{command}\n```\n"
    )
