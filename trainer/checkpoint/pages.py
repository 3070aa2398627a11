"""Host memory by the page: what a disk can take without a copy, and a GPU fill behind training."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

PAGE = 4096
"""Bytes. Memory, place in the file and length must be multiples of it for a transfer past the page cache."""


def empty_pages(size: int) -> Tensor:
    """Zeros at the beginning of a page, uint8 [``size`` rounded up to whole pages]."""
    pages = mmap.mmap(-1, max(size + -size % PAGE, PAGE))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that was built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def register(memory: Tensor) -> None:
    """Lock the pages for copies from a GPU, which are asynchronous and fast only then.

    Raises:
        RuntimeError: the driver refused.
    """
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(code) != 0:
        raise RuntimeError(f"cudaHostRegister of {memory.numel():,} bytes: error {int(code)}")


def unregister(memory: Tensor) -> None:
    """Before registered memory is given up."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
