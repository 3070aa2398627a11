"""Names, units and meanings of all that a run writes about itself: metrics and events.

This file is the one place where a name is made. ``docs/metrics.md`` is printed from it
(``python -m trainer.metrics.schema > docs/metrics.md``) and a test keeps the two equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
"""One line of metrics.jsonl or events.jsonl."""

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
HEALTH_FILE = "health.jsonl"
USER_PREFIX = "user/"


@dataclass(frozen=True)
class Metric:
    """One named quantity of a logged step.

    Attributes:
        name: the key in metrics.jsonl; ``{i}`` stands for a layer's index.
        unit: of the value, as plots print it; empty for pure numbers.
        kind: ``number``, or ``fractions`` for a list with one share an expert.
        description: what is measured, over what.
    """

    name: str
    unit: str
    kind: str
    description: str


_AXES = (
    Metric("step", "step", "number", "Optimizer steps committed so far; the first step of a run is 1."),
    Metric("tokens", "token", "number", "Input tokens of all steps so far, over all ranks."),
    Metric("time", "s", "number", "Unix time at which the line was written."),
)

METRICS: tuple[Metric, ...] = (
    Metric(
        "loss/train",
        "nat/token",
        "number",
        "Cross-entropy of the step: sum over its target tokens on all ranks, divided once by their number. "
        "Auxiliary losses are not in it.",
    ),
    Metric("loss/valid", "nat/token", "number", "The same on the held-out rows (`eval.max_rows`)."),
    Metric(
        "loss/balance",
        "",
        "number",
        "Load-balance loss, mean over MoE layers, before its coefficient; even: 1.",
    ),
    Metric(
        "loss/router_z",
        "",
        "number",
        "Router z-loss: mean of squared log-sum-exp of the router's logits (arXiv:2202.08906), before its "
        "coefficient.",
    ),
    Metric(
        "grad_norm", "", "number", "Global L2 norm of the gradients over all parameters, before clipping."
    ),
    Metric("optim/lr", "", "number", "Learning rate that the step used."),
    Metric(
        "perf/tokens_per_second",
        "token/s",
        "number",
        "Tokens of a step on all ranks / `perf/step_seconds`.",
    ),
    Metric(
        "perf/mfu",
        "fraction",
        "number",
        "Model FLOPs utilisation (arXiv:2204.02311, appendix B), 0 to 1: (6 · N + 6 · layers · heads · "
        "head_dim · seq_len) · tokens per second / peak FLOP/s of all devices. N: parameters that a token "
        "passes, without the input embedding; the second term is attention, causal half only; recomputation "
        "does not count. The peak is the device's stated one; on CPU, a measured matrix product's.",
    ),
    Metric(
        "perf/step_seconds",
        "s",
        "number",
        "Wall seconds of a step, mean over the steps since the last logged one: from asking for the batch to "
        "the end of the optimizer step. Evaluations and waits for checkpoints are not in it.",
    ),
    Metric(
        "perf/rank_work_max_over_median",
        "of median",
        "number",
        "Time that the slowest rank works in a step (its wall seconds less its waits in collectives) / the median "
        "rank's, medians over `resilience.straggler_seconds`. On CPUs, with `resilience.straggler_factor` above 0.",
    ),
    Metric(
        "moe/L{i}/load",
        "fraction",
        "fractions",
        "Share of the routed (token, expert) pairs of layer i that each expert was chosen for, before drops; "
        "one value an expert, sum 1. In W&B: a histogram with one bin an expert.",
    ),
    Metric(
        "moe/max_over_mean",
        "of mean",
        "number",
        "Load of the busiest expert / mean load; the worst MoE layer.",
    ),
    Metric("moe/dead_experts", "expert", "number", "Experts that no token chose, summed over MoE layers."),
    Metric(
        "moe/drop_rate",
        "fraction",
        "number",
        "Share of routed pairs dropped for capacity, over all MoE layers.",
    ),
    Metric(
        "moe/unserved_rate",
        "fraction",
        "number",
        "Share of tokens that no expert answered: every pair was dropped, or no expert picked the token. Mean over "
        "MoE layers.",
    ),
    Metric(
        "moe/rank_max_over_mean",
        "of mean",
        "number",
        "Routed pairs sent to the busiest ep rank's experts, before drops / mean over the ep ranks; the worst MoE "
        "layer. With ep above 1.",
    ),
    Metric(
        "moe/wait_seconds",
        "s/step",
        "number",
        "Seconds that a rank waited in the step's exchanges of tokens, forward and backward, for the last rank to "
        "come: its time in each exchange minus the least of the ranks of that exchange, summed; mean over ranks. "
        "Uneven loads are the usual cause, slow ranks another. With ep above 1.",
    ),
    Metric(
        "moe/router_entropy",
        "nat",
        "number",
        "Entropy of a token's normalised scores over the experts, mean over tokens and MoE layers; "
        "even: ln(experts).",
    ),
    Metric(
        "moe/router_confidence",
        "probability",
        "number",
        "Largest of a token's normalised scores, mean over tokens and MoE layers; even: 1 / experts.",
    ),
    Metric(
        "moe/balance_coefficient",
        "",
        "number",
        "Coefficient of the balance loss in the layer where it is largest; logged where `cure` sets it.",
    ),
    Metric(
        "moe/a2a_bytes",
        "byte/step",
        "number",
        "Bytes that dispatch and combine send to other ranks in a step, forward and backward, all ranks.",
    ),
    Metric(
        "ft/goodput",
        "fraction",
        "number",
        "Useful seconds / wall seconds so far (see Goodput below), 0 to 1.",
    ),
    Metric(
        "ft/lost_steps", "step", "number", "Steps computed again after restarts, total since the first start."
    ),
    Metric("ft/restart_seconds", "s", "number", "Seconds of all restarts since the first start."),
    Metric(
        "ft/checkpoint_stall_seconds",
        "s",
        "number",
        "Seconds that training waited for checkpoints, total since the first start.",
    ),
)

EVENTS: dict[str, dict[str, str]] = {
    "start": {
        "generation": "0 at first, one more with every restart or resume",
        "world_size": "ranks",
        "parallel": "degrees as text",
        "device": "hardware as text",
        "num_parameters": "all parameters",
        "num_active_parameters": "parameters a token passes",
        "run_dir": "of this run",
        "steps": "at which the run ends",
        "train_rows": "packed rows of the training split; null if streamed",
        "tokens_per_step": "over all ranks",
        "config": "short summary: name → value",
        "wandb_id": "of the W&B run that every generation goes on with",
    },
    "resume": {
        "step": "of the state; comes after its generation's `start`",
        "tier": "where it was found: `memory`, `peer` or `durable`",
        "path": "of the checkpoint or of the folder in memory",
        "load_seconds": "to find, verify and load it",
    },
    "rollback": {
        "step": "that the run went back to, in the same process",
        "from_step": "it stood at",
        "restores": "of this process so far",
        "reason": "why",
        "tier": "as of `resume`; `start` for the run's first state",
        "load_seconds": "to find, verify and load it",
    },
    "checkpoint": {
        "path": "of the checkpoint",
        "bytes": "over all ranks",
        "stall_seconds": "that training waited",
        "write_seconds": "until it was committed",
    },
    "evaluation": {
        "loss_valid": "nat/token",
        "best": "whether it is the lowest so far",
        "seconds": "it took",
    },
    "profile": {
        "path": "folder of the traces (`train.profile`)",
        "parts_ms": "part of the model → milliseconds a step, of rank 0",
        "seconds": "that writing took",
    },
    "failure": {
        "kind": "crash, hang, …; `storage`: a checkpoint that could not be written, training went on",
        "rank": "that failed",
        "host": "its name",
        "cause": "why",
        "evidence": "the end of its log, its stacks if it hung, what the kernel said",
        "began": "unix time at which it most likely happened; `time` is when it was noticed",
        "path": "that could not be written (`storage`)",
    },
    "restart": {
        "generation": "that starts",
        "restart_seconds": "from the failure until the state was loaded again",
        "lost_steps": "to compute again",
    },
    "recovered": {
        "kind": "of the first failure",
        "generation": "that came through",
        "failures": "that this recovery is of; above 1: others came before its end",
        "detect_seconds": "from the fault until it was noticed",
        "restart_seconds": "until the state was being loaded",
        "load_seconds": "until it was loaded",
        "recompute_seconds": "until the step reached before the fault was done again, at least one step",
        "seconds": "of all that",
    },
    "member": {
        "change": "`lost`, `back`, `taken_in`, `spare` (took a lost node's place) or `excluded`",
        "host": "its name",
        "node_rank": "its place; null: it has none yet",
    },
    "leader": {
        "host": "of the agent that took over from node 0's",
        "term": "number of its term",
        "reason": "why node 0's agent leads no longer",
    },
    "regroup": {"reason": "why the workers save and start again with more nodes; no failure"},
    "relayout": {
        "from": "layout as text",
        "to": "the one of the next generation",
        "world_size": "ranks of it",
        "reason": "which nodes are missing, or back",
    },
    "stop": {
        "reason": "why",
        "resumable": "whether `muster resume` can go on",
        "kind": "`preempted`: a signal asked for it; `storage`: a disk is full or fails",
        "rank": "the first that was asked, or whose disk it is",
        "host": "its name",
        "cause": "the signal, or what the disk did",
    },
    "alarm": {
        "kind": "of trouble; those of the routing are in [health.md](health.md)",
        "message": "what, and what was done",
        "state": "of the routing: `raised` or `cleared`",
        "layers": "that are in this trouble now",
        "since": "step at which the trouble of the message was found",
        "evidence": "a dict a layer of the message: `layer`, `experts` and numbers",
        "remedy": "what to change in the config",
        "action": "of the guard: `redone` or `stepped over`; with `value` (the loss), `threshold`, `rank`, `host`",
        "began": "of kind `straggler`, with `rank`, `host` and the ranks' times as `evidence`: unix time since "
        "which it was slow and no alarm had said so",
    },
    "cure": {
        "kind": "policy that acted",
        "layer": "it acted on",
        "experts": "it is about; none: the whole layer",
        "evidence": "loads that it acted upon",
        "before": "coefficient, dead experts or spread of the bias",
        "after": "the same, by this action",
        "message": "all of that in words",
    },
    "finish": {
        "weights_digest": "128 bits; equal if and only if the weights are",
        "goodput": "0 to 1",
        "seconds": "wall, since the first start",
        "loss_valid": "nat/token at the end",
        "loss_valid_untrained": "nat/token at step 0",
        "unigram_loss": "nat/token of a unigram model of the training split",
        "best_step": "of the lowest validation loss",
        "best_loss": "nat/token",
        "sample": "{prompt, text} or null",
    },
}
# Goodput puts an evaluation that was not timed under *other*.
_OPTIONAL_FIELDS = {
    "evaluation": {"seconds"},
    "start": {"wandb_id"},
    "resume": {"load_seconds"},
    "stop": {"kind", "rank", "host", "cause"},
    "alarm": {"state", "layers", "since", "evidence", "remedy", "action", "began"},
    "failure": {"evidence", "began", "path"},
}

_BY_NAME = {metric.name: metric for metric in (*_AXES, *METRICS)}
_LOAD = re.compile(r"moe/L(\d+)/load")


def number(value: object) -> float:
    """A numeric field as a finite float; 0 for what is missing, NaN or infinite (sums must stay numbers)."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return 0.0


def as_float(value: Any) -> float:
    """A metric's value as a float, NaN if it is not a number."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def load_name(layer: int) -> str:
    """Metric name of a MoE layer's expert load."""
    return f"moe/L{layer}/load"


def load_layer(name: str) -> int | None:
    """Layer index of an expert-load metric, None for any other name."""
    match = _LOAD.fullmatch(name)
    return int(match.group(1)) if match else None


def find(name: str) -> Metric | None:
    """The schema's entry for a key of metrics.jsonl; None for unknown and user metrics."""
    return _BY_NAME["moe/L{i}/load"] if load_layer(name) is not None else _BY_NAME.get(name)


def interrupts(event: Mapping[str, Any]) -> bool:
    """Whether this event is a failure that stopped training; after one of storage it goes on."""
    return event.get("event") == "failure" and event.get("kind") != "storage"


def check_record(record: Mapping[str, Any]) -> None:
    """Assert that a metrics record has its axes and only known names (or ``user/…``) of the right kind."""
    missing = {"step", "tokens", "time"} - record.keys()
    assert not missing, f"metrics record without {sorted(missing)}"
    for name, value in record.items():
        if name.startswith(USER_PREFIX):
            continue
        metric = find(name)
        assert metric is not None, (
            f"metric {name!r} is not in trainer/metrics/schema.py; your own start with {USER_PREFIX!r}"
        )
        is_list = hasattr(value, "__len__") and not isinstance(value, str)
        assert is_list == (metric.kind == "fractions"), f"metric {name!r} takes {metric.kind}, got {value!r}"


def check_event(record: Mapping[str, Any]) -> None:
    """Assert that an event is known and carries its fields; further fields are welcome."""
    event = record.get("event")
    assert event in EVENTS, f"event {event!r} is not in trainer/metrics/schema.py"
    needed = {"time", "step", *EVENTS[event]} - _OPTIONAL_FIELDS.get(event, set())
    missing = needed - record.keys()
    assert not missing, f"event {event!r} without {sorted(missing)}"


_GOODPUT = """\
## Goodput

`ft/goodput`, the `finish` event and the report share one account (`trainer/metrics/goodput.py`), made from
events.jsonl and metrics.jsonl alone. Every second since the first `start` stands under exactly one cause:

| cause | what it holds |
| --- | --- |
| useful | the seconds of steps that are part of the final model, each counted once |
| startup | from the first `start`, or the `start` after a stop, to its first step |
| checkpoint | waits for checkpoints (`stall_seconds`) |
| evaluation | evaluations (`seconds`) |
| detect | from a fault (`failure.began`; without it, the last sign of life) until it was noticed (`time`) |
| restart | from there, or from a `regroup`, until the state is being loaded; and what the first step waits for |
| load | `load_seconds` of `resume` |
| recompute | from there until the step reached before the fault is done again; and what the fault cut off |
| straggling | what steps took beyond the median while a straggler was there |
| other | what no event explains |

A second fault before that step is reached again makes the same recovery longer. A failure after which training
goes on without loading state (`storage`) is none. Goodput is useful / the sum of these. Time between a `stop` or
`finish` and the next `start`, when the run held no machine, is listed as *stopped* and is not in the sum.
"""


def markdown() -> str:
    """The text of ``docs/metrics.md``."""
    lines = [
        "# Metrics and events",
        "",
        "<!-- Printed by `python -m trainer.metrics.schema > docs/metrics.md`; edit that module. -->",
        "",
        f"A run directory holds `{METRICS_FILE}`, one JSON object a logged step, and `{EVENTS_FILE}`, one",
        "JSON object an event. Both are only appended to, except that a resume removes the metrics of steps",
        'it will redo. JSON has no NaN: such values are the strings `"NaN"`, `"Infinity"` and `"-Infinity"`',
        "(`float()` reads them). What is too large for every step is in `health.jsonl`: [health.md](health.md).",
        "",
        "## metrics.jsonl",
        "",
        f"A name of your own starts with `{USER_PREFIX}`; any other unknown name is refused.",
        "",
        "| name | unit | meaning |",
        "| --- | --- | --- |",
    ]
    lines += [f"| `{m.name}` | {m.unit} | {m.description} |" for m in (*_AXES, *METRICS)]
    lines += [
        "",
        "## events.jsonl",
        "",
        "Every event carries `time` (unix seconds), `step` and `event`, and:",
        "",
        "| event | field | meaning |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| `{e}` | `{field}` | {text} |" for e, fields in EVENTS.items() for field, text in fields.items()
    ]
    return "\n".join(lines) + "\n\n" + _GOODPUT


if __name__ == "__main__":
    print(markdown(), end="")
