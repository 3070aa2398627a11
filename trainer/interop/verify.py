"""The last word on a conversion: both sides compute the same logits on random tokens."""

from __future__ import annotations

import copy
import gc
import importlib.util
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import whole_state
from parallel.errors import ConfigError
from trainer.build import build_model
from trainer.checkpoint.resume import Checkpoint
from trainer.config import Dtype, RunConfig
from trainer.interop.plan import Piece
from trainer.models.init import fill_buffers

TOLERANCE = 1e-5
"""Largest difference of a logit over the largest logit, fp32."""
_ROWS, _LENGTH = 2, 48


def check_possible(num_parameters: int) -> None:
    """Refuse before a long conversion what could not be verified after it.

    Raises:
        ConfigError: transformers is not installed, or the model does not fit into memory.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "verify",
            True,
            "the logits are compared with those of transformers, which is not installed",
            "pip install 'muster-moe[hf]', or verify=false to go without",
        )
    need, free = 4 * num_parameters, psutil.virtual_memory().available
    if need > 0.9 * free:
        raise ConfigError(
            "verify",
            True,
            f"comparing logits holds the model in fp32, {need:,} bytes, and {free:,} bytes of memory are free",
            "verify=false here, or a machine with more memory",
        )


def compare(
    folder: Path,
    config: RunConfig,
    checkpoint: Checkpoint,
    stored: dict[str, torch.dtype],
    pieces: list[Piece],
    tolerance: float,
) -> dict[str, Any]:
    """Logits of the model in ``folder`` by transformers and of the checkpoint by Muster, one after the other.

    Both compute in fp32 on the CPU. Muster's weights are rounded to the types on disk first, so that both
    have the same ones.

    Args:
        stored: entry on disk → its dtype.
        tolerance: see TOLERANCE.

    Returns:
        What was compared and how far apart it was.

    Raises:
        ConfigError: too far apart, or transformers did not find the tensors it looks for.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.model.vocab_size, (_ROWS, _LENGTH), generator=generator)
    theirs, version = _logits_of_transformers(folder, tokens)
    gc.collect()
    ours = _logits_of_muster(config, checkpoint, stored, pieces, tokens)
    largest = float(theirs.abs().max())
    difference = float((ours - theirs).abs().max())
    relative = difference / largest if largest else difference
    found: dict[str, Any] = {
        "tokens": [_ROWS, _LENGTH],
        "max_abs_logit": largest,
        "max_abs_difference": difference,
        "relative": relative,
        "tolerance": tolerance,
        "transformers": version,
    }
    if not relative <= tolerance:  # NaN fails too
        raise ConfigError(
            "tolerance",
            tolerance,
            f"the logits differ by {relative:.2e} of the largest one from those of transformers",
            "please report this model; a tolerance above it accepts the conversion as it is",
        )
    return found


@torch.no_grad()
def _logits_of_transformers(folder: Path, tokens: Tensor) -> tuple[Tensor, str]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    try:
        model, report = load(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    except Exception as error:  # whatever a model's own code raises
        relation = f"transformers cannot load it: {type(error).__name__}: {str(error).splitlines()[0]}"
        raise ConfigError("verify", folder, relation, "verify=false converts without it") from error
    # What is left out on purpose is unexpected to no one; what is missing would be random.
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            first = sorted(map(str, report[kind]))[0]
            raise ConfigError(
                "verify", folder, f"transformers has {kind}: {first}", "please report this model"
            )
    logits: Tensor = model.eval()(tokens).logits
    return logits.float(), transformers.__version__


@torch.no_grad()
def _logits_of_muster(
    config: RunConfig,
    checkpoint: Checkpoint,
    stored: dict[str, torch.dtype],
    pieces: list[Piece],
    tokens: Tensor,
) -> Tensor:
    config = copy.deepcopy(config)
    config.train.dtype = Dtype.fp32
    model = build_model(config, LocalDispatcher()).to_empty(device="cpu")
    fill_buffers(model)
    checkpoint.load_into(whole_state(model), prefix="model.")
    state = dict(model.state_dict(keep_vars=True))
    for piece in pieces:
        dtype = stored[piece.hf.name]
        if dtype is not torch.float32:
            box = state[piece.muster]
            for dim, (offset, size) in enumerate(zip(piece.offsets, piece.shape, strict=True)):
                box = box.narrow(dim, offset, size)
            box.copy_(box.to(dtype))
    logits: Tensor = model.eval()(tokens)
    return logits
