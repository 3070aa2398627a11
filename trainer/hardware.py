"""What the devices are and what they could do at best, for MFU."""

from __future__ import annotations

import time

import torch

from trainer.environment import cpu_model

# Dense bf16 FLOP/s as the vendors state them.
_STATED_BF16 = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


def device_name(device: torch.device) -> str:
    """The accelerator's or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_model()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is measured against: a GPU's stated bf16 peak, else a measured matrix product's."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        for model, flops in _STATED_BF16.items():
            if model in device_name(device):
                return flops
    return measured_matmul_flops(device, torch.float32 if device.type == "cpu" else dtype)


@torch.no_grad()
def measured_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Best FLOP/s of a square matrix product seen within about ``seconds``, at the current thread count."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    b = torch.ones(size, size, device=device, dtype=dtype)
    best, until = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < until:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best
