"""The tasks of EleutherAI's lm-evaluation-harness on a model of ours (the package lm-eval, extra ``eval``).

Every rank runs the harness over the same requests and the ranks share each list of them out, so each has all
answers; to the harness each looks like a world of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from parallel.errors import ConfigError
from trainer.build import Inference
from trainer.draws import Sampling
from trainer.evaluation import log_likelihoods
from trainer.generation import Stop, complete

_MAX_NEW_TOKENS = 256
"""As the harness's own models have it where a task does not say."""


class Request(Protocol):
    """What the harness asks: the arguments of one call."""

    args: tuple[Any, ...]


class Answers:
    """The three questions of the harness. Collective: every rank is given the same requests.

    A text that stands before nothing follows the end-of-text token.
    """

    def __init__(self, inference: Inference, batch_size: int) -> None:
        super().__init__()
        self.inference, self.batch = inference, batch_size
        self.tokenizer = inference.tokenizer
        self.context = inference.config.train.seq_len

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """log p of each continuation after its context, and whether greedy decoding gives it."""
        return self._score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """log p of each whole text, its tokens after as many others as the model reads."""
        pairs, owner = [], []
        for index, request in enumerate(requests):
            windows = rolling_windows(
                self.tokenizer.encode(request.args[0]), self.tokenizer.eos, self.context
            )
            pairs += windows
            owner += [index] * len(windows)
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owner, self._score(pairs), strict=True):
            totals[index] += value
        return totals

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """A continuation of each context up to one of its stop strings, which is left out."""
        texts = [""] * len(requests)
        alike: dict[Sampling, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[_sampling(request.args[1])].append(index)
        for sampling, group in alike.items():
            ends = [_stop_strings(requests[index].args[1]) for index in group]
            found = complete(
                self.inference.model,
                [self._encode(requests[index].args[0]) for index in group],
                sampling,
                eos=self.tokenizer.eos,
                context=self.context,
                device=self.inference.device,
                batch_size=self.batch,
                stops=[self._stop(strings) for strings in ends],
            )
            for index, strings, completion in zip(group, ends, found, strict=True):
                text = self.tokenizer.decode(completion.tokens)
                texts[index] = text[: min((at for s in strings if (at := text.find(s)) >= 0), default=None)]
        return texts

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        too_long = max((len(after) for _, after in pairs), default=0)
        if too_long > self.context:
            raise ConfigError(
                "tasks",
                f"{too_long} tokens",
                f"a continuation to be scored is longer than what the model reads (train.seq_len={self.context})",
                "a task with shorter answers",
            )
        inference = self.inference
        return log_likelihoods(
            inference.model, pairs, context=self.context, device=inference.device, batch_size=self.batch
        )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) or [self.tokenizer.eos]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, divided as the whole text is: blanks at the seam belong to the continuation."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self.tokenizer.encode(stripped)
        after = self.tokenizer.encode(stripped + continuation)[len(before) :]
        # Where the first letters of the continuation merge into the last token before it.
        return before or [self.tokenizer.eos], after or self.tokenizer.encode(continuation)

    def _stop(self, strings: list[str]) -> Stop | None:
        if not strings:
            return None
        # A token is at least a byte, so no stop string reaches further back.
        reach = max(len(string.encode()) for string in strings) + 4

        def stop(tokens: list[int]) -> bool:
            tail = self.tokenizer.decode(tokens[-reach:])
            return any(string in tail for string in strings)

        return stop


def rolling_windows(tokens: list[int], first: int, context: int) -> list[tuple[list[int], list[int]]]:
    """(before, to predict) of consecutive windows: each token is predicted once.

    The last window is as long as the others, so its first part is context only.
    """
    windows = []
    for start in range(0, len(tokens), context):
        wanted = tokens[start : start + context]
        before = [first, *tokens][start + len(wanted) - context if start else 0 : start + 1]
        windows.append((before, wanted))
    return windows


def _sampling(options: dict[str, Any]) -> Sampling:
    drawn = options.get("do_sample", float(options.get("temperature", 0.0)) > 0.0)
    return Sampling(
        max_new_tokens=int(options.get("max_gen_toks", _MAX_NEW_TOKENS)),
        temperature=float(options.get("temperature", 1.0)) if drawn else 0.0,
        top_p=float(options.get("top_p", 1.0)),
        top_k=int(options.get("top_k", 0)),
    )


def _stop_strings(options: dict[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [until] if isinstance(until, str) else [string for string in until if string]


@dataclass(frozen=True)
class Tasks:
    """What the harness is asked to run.

    Attributes:
        names: tasks or groups of tasks.
        include_path: a folder with task files of the user's own.
        num_fewshot: examples before each question; None: as the task has it.
        limit: questions of each task; None: all.
    """

    names: list[str]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 16


def require_harness(tasks: Tasks) -> None:
    """Raises ConfigError where lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "tasks",
            ",".join(tasks.names),
            f"tasks are run by lm-eval, which cannot be imported ({error})",
            "pip install 'muster-moe[eval]'",
        ) from None


def run_tasks(inference: Inference, tasks: Tasks) -> dict[str, dict[str, float]]:
    """Metrics of each task, as the harness names them; on rank 0. Collective.

    Raises:
        ConfigError: lm-eval is not installed or does not know one of the tasks.
    """
    require_harness(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM

    class Model(Answers, LM):
        """To the harness: one process with a model."""

    found = simple_evaluate(
        model=Model(inference, tasks.batch_size),
        tasks=list(tasks.names),
        num_fewshot=tasks.num_fewshot,
        limit=tasks.limit,
        task_manager=_task_manager(tasks),
        log_samples=False,
    )
    if found is None:  # it has seen LOCAL_RANK, and answers on the first rank only
        return {}
    return {name: _plain(metrics) for name, metrics in found["results"].items()}


def _task_manager(tasks: Tasks) -> Any:
    """The harness's index of the tasks; its own thousands are read only where the folder has not got them all."""
    from lm_eval.tasks import TaskManager

    if tasks.include_path is not None:
        if not Path(tasks.include_path).is_dir():
            raise ConfigError(
                "include_path", tasks.include_path, "is not a directory", "the folder of your tasks"
            )
        manager = TaskManager(include_path=tasks.include_path, include_defaults=False)
        if set(tasks.names) <= set(manager.match_tasks(tasks.names)):
            return manager
    manager = TaskManager(include_path=tasks.include_path)
    known = set(manager.match_tasks(tasks.names))
    for name in tasks.names:
        if name not in known:
            raise ConfigError("tasks", name, "lm-eval knows no such task", "`lm-eval ls tasks` lists them")
    return manager


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    """``{"acc,none": 0.5, "alias": …}`` → ``{"acc": 0.5}``; a filter other than none stays in the name."""
    plain: dict[str, float] = {}
    for name, value in metrics.items():
        metric, comma, filtered = name.partition(",")
        if comma and isinstance(value, (int, float)):
            plain[metric if filtered == "none" else name] = float(value)
    return plain
