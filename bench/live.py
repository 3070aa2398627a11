"""Peak bytes of tensors that live at the same time, on any device, without an allocator's help."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts every storage that an operation returns inside this context until it is freed; backward too.

    What lived before is not counted, nor what an operation allocates and frees while it runs.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given:
                    self._add(storage)
        return found

    def _add(self, storage: UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class LiveLog(LiveBytes):
    """Also remembers what came and went when, so that what was to stay can be left out of the peak."""

    def __init__(self) -> None:
        super().__init__()
        self._log: list[tuple[int, int]] = []

    def peak_without(self, kept: Iterable[Tensor]) -> int:
        """The peak in bytes without these tensors, which are still alive: gradients of weights, say."""
        left_out = {tensor.untyped_storage()._cdata for tensor in kept}
        # An address may have been another storage's before: theirs is the last one there.
        came = {key: index for index, (key, size) in enumerate(self._log) if size > 0 and key in left_out}
        skipped = set(came.values())
        now = peak = 0
        for index, (_, size) in enumerate(self._log):
            if index not in skipped:
                now += size
                peak = max(peak, now)
        return peak

    def _add(self, storage: UntypedStorage) -> None:
        if storage._cdata not in self._seen:
            self._log.append((storage._cdata, storage.nbytes()))
        super()._add(storage)

    def _remove(self, key: int, size: int) -> None:
        self._log.append((key, -size))
        super()._remove(key, size)
