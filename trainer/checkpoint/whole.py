"""What a checkpoint must hold to be whole: every element of every tensor once, and every tensor of the model.

A tensor of which some elements are missing shows in its own chunks. One that no rank names at all shows only
beside the model, whose names and shapes rank 0 knows from before an engine cut it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from parallel.engines.base import whole_state
from trainer.checkpoint.boxes import cover_fault
from trainer.checkpoint.files import StorageError
from trainer.checkpoint.format import TensorEntry

_MODEL, _OPTIM = "model.", "optim."


@dataclass(frozen=True)
class Contents:
    """The tensors of a model.

    Attributes:
        shapes: of its parameters and persistent buffers in one process, by their names in a checkpoint
            (``model.embedding.weight``).
        trained: names of the parameters that an optimizer steps, without the prefix.
    """

    shapes: Mapping[str, tuple[int, ...]]
    trained: frozenset[str]


def contents_of(model: nn.Module) -> Contents:
    """Of a model that no engine has cut yet; it may stand on the meta device."""
    shapes = {part.name: part.global_shape for part in whole_state(model)}
    return Contents(shapes, frozenset(n for n, p in model.named_parameters() if p.requires_grad))


def check_whole(tensors: Mapping[str, TensorEntry], contents: Contents | None) -> None:
    """Every element is there exactly once, and of the model every tensor with every optimizer slot.

    Args:
        tensors: of all ranks.
        contents: of the model; None: only what some rank names can be missed.

    Raises:
        StorageError: a tensor, or a part of one, is missing or there twice, or has another shape.
    """
    for name, entry in tensors.items():
        if fault := cover_fault(entry.global_shape, [chunk.box for chunk in entry.chunks]):
            raise refused(name, fault)
    for name, shape in contents.shapes.items() if contents is not None else ():
        if name not in tensors:
            raise refused(name, "no rank holds it")
        if tensors[name].global_shape != shape:
            found = list(tensors[name].global_shape)
            raise refused(name, f"the ranks hold it with shape {found}, and the model has {list(shape)}")
    _check_slots(tensors, frozenset() if contents is None else contents.trained)


def _check_slots(tensors: Mapping[str, TensorEntry], trained: frozenset[str]) -> None:
    """Every parameter has every optimizer slot that any of them has, each a number or of the parameter's shape."""
    slots: dict[str, set[str]] = {}
    for name in tensors:
        if name.startswith(_OPTIM):
            slot, _, parameter = name.removeprefix(_OPTIM).partition(".")
            if parameter:  # else it is one for all parameters
                slots.setdefault(slot, set()).add(parameter)
    everyone = trained.union(*slots.values()) if slots else frozenset()
    for parameter in sorted(everyone):
        if _MODEL + parameter not in tensors:
            raise refused(_MODEL + parameter, "no rank holds it, and its optimizer slots are there")
        shape = tensors[_MODEL + parameter].global_shape
        for slot in sorted(slots):
            name = f"{_OPTIM}{slot}.{parameter}"
            if name not in tensors:
                raise refused(name, "no rank holds it, and that slot of other parameters is there")
            found = tensors[name].global_shape
            if found not in ((), shape):
                raise refused(name, f"its shape {list(found)} is not that of the parameter, {list(shape)}")


def refused(name: str, fault: str) -> StorageError:
    """What is said of a tensor that the ranks' slices do not make up."""
    return StorageError(
        "checkpoint",
        name,
        f"the ranks' slices do not make up this tensor: {fault}",
        "this is a fault in the engine's named_state(): every element needs exactly one owner",
    )
