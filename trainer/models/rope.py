"""Frequencies of the rotary embedding, also where a model's context was extended after pretraining.

The formulas are written as the published models' own code has them, term by term, so that the angles of an
imported model are theirs to the last bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.config import RopeScaling, RopeScalingConfig


def rotary_frequencies(dim: int, theta: float, scaling: RopeScalingConfig, device: torch.device) -> Tensor:
    """Radians a position turns each pair of features by: fp32 ``[dim / 2]`` (arXiv:2104.09864).

    ``llama3`` slows down the wavelengths beyond the old context by ``factor`` and blends those near it (Llama
    3.1's release). ``yarn`` does so by a ramp over the dims (arXiv:2309.00071, section 3.2).
    """
    exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    base = 1.0 / theta**exponent
    if scaling.kind is RopeScaling.llama3:
        return _llama3(base, scaling)
    if scaling.kind is RopeScaling.yarn:
        return _yarn(theta**exponent, dim, theta, scaling)
    return base


def rotary_gain(scaling: RopeScalingConfig) -> float:
    """Factor on cos and sin: YaRN's temperature on queries and keys (arXiv:2309.00071, section 3.3)."""
    if scaling.kind is not RopeScaling.yarn:
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def softmax_gain(scaling: RopeScalingConfig) -> float:
    """Factor on latent attention's logits, parts without rotation included (DeepSeek-V3's release)."""
    if scaling.kind is RopeScaling.none or not scaling.mscale_all_dim:
        return 1.0
    return _mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(base: Tensor, scaling: RopeScalingConfig) -> Tensor:
    length, low, high = scaling.original_context, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / base
    slowed = torch.where(wavelength > length / low, base / scaling.factor, base)
    smooth = (length / wavelength - low) / (high - low)
    blended = (1 - smooth) * slowed / scaling.factor + smooth * slowed
    between = (wavelength >= length / high) & (wavelength <= length / low)
    return torch.where(between, blended, slowed)


def _yarn(powers: Tensor, dim: int, theta: float, scaling: RopeScalingConfig) -> Tensor:
    def turning(rotations: float) -> float:
        """The dim that turns so many times over the old context."""
        return dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(turning(scaling.beta_fast)), 0)
    last: float = min(math.ceil(turning(scaling.beta_slow)), dim - 1)
    if first == last:
        last += 0.001
    ramp = (
        (torch.arange(dim // 2, dtype=torch.float32, device=powers.device) - first) / (last - first)
    ).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
