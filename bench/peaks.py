"""What a device could do: its peaks on paper, the ceilings that it reaches, and the state that it is in."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hotlap.bench.timing import measure
from hotlap.kernels.dispatch import fast_dtype
from hotlap.model.flops import of_card, peak_flops
from hotlap.train.log import log

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


SLOWED = (
    0x08 | 0x20 | 0x40 | 0x80
)  # NVML's reasons for low clocks: hardware, heat as software and hardware see it, power brake
BUSY = 0.15  # share of the processors that others may use before times are doubtful


@dataclass(frozen=True)
class Ceilings:
    """Measured in the run: bytes/s of a copy, read and written, and FLOP/s of a large product in `dtype`."""

    copy: float
    product: float
    dtype: str

    def in_tera(self) -> tuple[float, float]:
        """TB/s and TFLOP/s."""
        return self.copy / 1e12, self.product / 1e12


def device_name(device: torch.device) -> str:
    """What the driver calls the device; for a CPU its model and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def peak_bandwidth(device: torch.device) -> float | None:
    """Paper peak of the memory in bytes/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    return of_card(PEAK_BANDWIDTH, torch.cuda.get_device_name(device))


def measure_ceilings(device: torch.device) -> Ceilings:
    """A copy of a buffer far larger than any cache, and a product of random matrices (never zeros: they run
    faster).
    """
    large = device.type == "cuda"
    source = torch.randn((1 << 28) if large else (1 << 25), device=device)
    target = torch.empty_like(source)
    dtype, size = fast_dtype(device.type), 8192 if large else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    timings = measure(
        {"copy": lambda _: target.copy_(source), "product": lambda _: torch.mm(a, b, out=out)}, device
    )
    copied = 2 * source.numel() * source.element_size()
    return Ceilings(
        copied / timings["copy"].median,
        2 * size**3 / timings["product"].median,
        str(dtype).removeprefix("torch."),
    )


def device_state(device: torch.device) -> tuple[dict[str, object], list[str]]:
    """Clocks, power, temperature and users of a GPU, and warnings where they would spoil a measurement. What
    the driver does not tell is None.
    """
    if device.type != "cuda" or torch.version.hip:
        return {}, []
    try:
        import pynvml
    except ImportError:
        return {}, ["nvidia-ml-py is missing, so clocks and other users of the GPU are not known"]
    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError as error:
        return {}, [f"the GPU's state cannot be read: {error}"]

    def ask(name: str, *more: object) -> Any:
        try:
            return getattr(pynvml, f"nvmlDeviceGet{name}")(handle, *more)
        except (pynvml.NVMLError, AttributeError):  # not of this card, or not in this version
            return None

    def watts(name: str) -> float | None:
        milliwatts = ask(name)
        return None if milliwatts is None else milliwatts / 1e3

    state = {
        "driver": driver,
        "sm_clock_mhz": ask("ClockInfo", pynvml.NVML_CLOCK_SM),
        "sm_clock_max_mhz": ask("MaxClockInfo", pynvml.NVML_CLOCK_SM),
        "power_w": watts("PowerUsage"),
        "power_cap_w": watts("EnforcedPowerLimit"),
        "power_cap_default_w": watts("PowerManagementDefaultLimit"),
        "temperature_c": ask("Temperature", pynvml.NVML_TEMPERATURE_GPU),
        "processes": len(ask("ComputeRunningProcesses") or ()),
    }
    warnings = []
    if (ask("CurrentClocksEventReasons") or 0) & SLOWED:
        warnings.append(f"the GPU is slowed by heat or power ({state['temperature_c']} C)")
    cap, usual = state["power_cap_w"], state["power_cap_default_w"]
    if cap and usual and cap < 0.95 * usual:
        warnings.append(f"the GPU's power is capped at {cap:.0f} of {usual:.0f} W")
    if state["processes"] > 1:
        warnings.append(f"{state['processes'] - 1} other processes use the GPU")
    return state, warnings


def busy_share(seconds: float = 0.2) -> float | None:
    """How much of the processors others use while we wait, or None where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None

    def ticks() -> tuple[int, int]:
        fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # all, and those idle or waiting for a disk

    before = ticks()
    time.sleep(seconds)
    whole, idle = (after - at for after, at in zip(ticks(), before, strict=True))
    return 1 - idle / whole if whole else None


def log_warnings(device: torch.device) -> None:
    """Say what would spoil a measurement that is about to begin."""
    warnings = device_state(device)[1]
    share = busy_share() if device.type == "cpu" else None
    if share and share > BUSY:
        warnings.append(f"other processes use {share:.0%} of the processors, which spoils times")
    for warning in warnings:
        log.warning("warning: %s", warning)


def paper_peaks(device: torch.device) -> dict[str, float | None]:
    return {"flops": peak_flops(device), "bandwidth": peak_bandwidth(device)}
