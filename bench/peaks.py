"""What a device could do: its peaks on paper, the ceilings that it reaches, and the state that it is in."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

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
    ("GH200", 4.0e12),
    ("H100 PCIe", 2.0e12),
    ("H100 NVL", 3.9e12),
    ("H100", 3.35e12),
    ("A100-SXM4-80GB", 2.04e12),
    ("A100 80GB", 1.94e12),
    ("A100", 1.56e12),
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
    """Measured in the run: bytes/s of a copy, read and written, and FLOP/s of a large product in `dtype`."""

    copy: float
    product: float
    dtype: str


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
    """Clocks, power, temperature and users of a GPU, and warnings where they would spoil a measurement."""
    if device.type != "cuda":
        return {}, []
    try:
        import pynvml
    except ImportError:
        return {}, ["nvidia-ml-py is missing, so clocks and other users of the GPU are not known"]
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        state = {
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "sm_clock_max_mhz": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "power_cap_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
            "power_cap_default_w": pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) / 1e3,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "processes": len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }
        reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        slowed = reasons & (
            pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksThrottleReasonHwSlowdown
        )
    except pynvml.NVMLError as error:
        return {}, [f"the GPU's state cannot be read: {error}"]
    warnings = []
    if slowed:
        warnings.append(f"the GPU is slowed by heat or power ({state['temperature_c']} C)")
    if state["power_cap_w"] < 0.95 * state["power_cap_default_w"]:
        warnings.append(
            f"its power is capped at {state['power_cap_w']:.0f} of {state['power_cap_default_w']:.0f} W"
        )
    if state["processes"] > 1:
        warnings.append(f"{state['processes'] - 1} other processes use the GPU")
    return state, warnings


def log_warnings(device: torch.device) -> None:
    for warning in device_state(device)[1]:
        log.warning("warning: %s", warning)


def paper_peaks(device: torch.device) -> dict[str, float | None]:
    return {"flops": peak_flops(device), "bandwidth": peak_bandwidth(device)}
