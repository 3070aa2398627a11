"""A real worker with a bug in it: ``python -m tests.distributed.mutated_worker MUTATION --config FILE``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.distributed.mutations import MUTATIONS
from trainer.__main__ import main
from trainer.compose import load_frozen

if __name__ == "__main__":
    mutation, *argv = sys.argv[1:]
    config = load_frozen(Path(argv[argv.index("--config") + 1]))
    with MUTATIONS[mutation](config, int(os.environ["RANK"])):
        main(argv)
