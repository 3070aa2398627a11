"""A rank's place when Slurm itself started it: ``srun python -m trainer …``, without agent or torchrun."""

from __future__ import annotations

import re
from collections.abc import Mapping

from parallel.errors import ConfigError

_FIRST_PORT = 20000  # 20000 to 29999: below the ports that a system hands out by itself


def slurm_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The variables torchrun would have set, from Slurm's; empty where somebody else has, or this is no job step.

    Not all of Slurm's variables will do: a batch script outside of srun, too, has SLURM_PROCID=0 and, as
    SLURM_NTASKS, the number of ranks that could be started.

    Raises:
        ConfigError: the nodes run unequal numbers of tasks.
    """
    if "RANK" in env or "SLURM_STEP_NUM_TASKS" not in env:
        return {}
    per_node = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
    if len(set(per_node)) > 1:
        raise ConfigError(
            "SLURM_STEP_TASKS_PER_NODE",
            env["SLURM_STEP_TASKS_PER_NODE"],
            "every node runs the same number of processes",
            f"srun --ntasks-per-node={min(per_node)}",
        )
    # Two jobs, or two steps of one, may share a node.
    port = _FIRST_PORT + int(env["SLURM_JOB_ID"]) % 1000 * 10 + int(env["SLURM_STEP_ID"]) % 10
    return {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(per_node[0]),
        "MASTER_ADDR": env.get("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": env.get("MASTER_PORT", str(port)),
    }


def tasks_per_node(text: str) -> list[int]:
    """Slurm's ``2(x3),1`` as [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, repeated = part.partition("(x")
        counts += [int(count)] * int(repeated.rstrip(")") or 1)
    return counts


def first_host(node_list: str) -> str:
    """The first name of Slurm's ``gpu[003-007,12]-ib,login1``: gpu003-ib."""
    first = re.split(r",(?![^\[]*\])", node_list)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)
