"""A ``muster`` command that dies with whoever started it: ``python -m launch.chaos.child PID …``."""

from __future__ import annotations

import sys

from launch.__main__ import main
from trainer.process import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv.pop(1)))
    raise SystemExit(main())
