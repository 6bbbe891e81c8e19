"""What a device could do: its peaks on paper, the ceilings that it reaches, and the state that it is in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hotlap.bench.timing import measure
from hotlap.kernels.dispatch import fast_dtype
from hotlap.model.flops import of_card

# Memory bandwidth on paper in bytes/s, by words of the driver's name; the first match counts. Sources: the
# makers' data sheets of each card.
PEAK_BANDWIDTH = (
    ("B200", 8.0e12),
    ("H200", 4.8e12),
    ("GH200 144G", 4.9e12),
    ("GH200 480GB", 4.0e12),
    ("H100 PCIe", 2.0e12),
    ("H100 NVL", 3.9e12),
    ("H100", 3.35e12),
    (r"A100-SXM4?-80GB", 2.04e12),
    ("A100 80GB", 1.94e12),
    (r"A100-(SXM4?|PCIE)-40GB", 1.56e12),
    ("L40S", 0.864e12),
    ("L4", 0.3e12),
    ("A10G", 0.6e12),
    ("RTX 5090", 1.79e12),
    ("RTX 4090", 1.008e12),
    ("RTX 3090", 0.936e12),
    ("MI300X", 5.3e12),
)


@dataclass(frozen=True)
class Ceilings:
    """Measured in the run: bytes/s of a copy, read and written, and FLOP/s of a large matmul in `dtype`."""

    copy: float
    matmul: float
    dtype: str

    def in_tera(self) -> tuple[float, float]:
        """TB/s and TFLOP/s."""
        return self.copy / 1e12, self.matmul / 1e12


def peak_bandwidth(device: torch.device) -> float | None:
    """Paper peak of the memory in bytes/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    return of_card(PEAK_BANDWIDTH, torch.cuda.get_device_name(device))


def measure_ceilings(device: torch.device) -> Ceilings:
    """A copy of a buffer far larger than any cache, and a matmul of random matrices (never zeros: they run
    faster).
    """
    large = device.type == "cuda"
    source = torch.randn((1 << 28) if large else (1 << 25), device=device)
    target = torch.empty_like(source)
    dtype, size = fast_dtype(device.type), 8192 if large else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    timings = measure(
        {"copy": lambda _: target.copy_(source), "matmul": lambda _: torch.mm(a, b, out=out)}, device
    )
    copied = 2 * source.numel() * source.element_size()
    return Ceilings(
        copied / timings["copy"].median,
        2 * size**3 / timings["matmul"].median,
        str(dtype).removeprefix("torch."),
    )
