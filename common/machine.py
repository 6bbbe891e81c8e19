"""The machine, versions and date that are recorded with a measurement, and the state of the device."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from hotlap.common.cpu import cpu_name
from hotlap.common.log import log

PACKAGES = ("hotlap", "triton", "flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel")
# NVML's reasons for low clocks: hardware slowdown, software and hardware thermal slowdown, power brake
SLOWED = 0x08 | 0x20 | 0x40 | 0x80
BUSY = 0.15  # CPU share of other processes above which times are unreliable


def circumstances(device: torch.device) -> dict[str, Any]:
    """Device name, versions and date."""
    return {"device": device_name(device), "versions": versions(), "date": now()}


def device_name(device: torch.device) -> str:
    """The driver's name of a GPU; for a CPU, its name (cpu.py) and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    threads = torch.get_num_threads()
    name = cpu_name(text, torch.cpu.get_capabilities())
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, torch (with its build), CUDA or ROCm, and the installed ones of PACKAGES."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    runtimes = {"cuda": torch.version.cuda, "rocm": torch.version.hip}
    return found | {name: version for name, version in runtimes.items() if version}


def now() -> str:
    """Date and time in UTC, to the minute."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def device_state(device: torch.device) -> tuple[dict[str, object], list[str]]:
    """Clocks, power, temperature and processes of a GPU (None if unknown), and warnings about those that
    would distort a measurement.
    """
    if device.type != "cuda" or torch.version.hip:
        return {}, []
    try:
        import pynvml
    except ImportError:
        return {}, ["nvidia-ml-py is missing, so clocks and other processes on the GPU are unknown"]
    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError as error:
        return {}, [f"cannot read the GPU's state: {error}"]

    def ask(name: str, *more: object) -> Any:
        try:
            return getattr(pynvml, f"nvmlDeviceGet{name}")(handle, *more)
        except (pynvml.NVMLError, AttributeError):  # not supported by this GPU or driver
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
        warnings.append(f"the GPU is throttled by heat or power ({state['temperature_c']} C)")
    cap, usual = state["power_cap_w"], state["power_cap_default_w"]
    if cap and usual and cap < 0.95 * usual:
        warnings.append(f"the GPU's power is capped at {cap:.0f} of {usual:.0f} W")
    if state["processes"] > 1:
        warnings.append(f"{state['processes'] - 1} other processes use the GPU")
    return state, warnings


def cpu_seconds() -> tuple[float, float] | None:
    """Seconds of all CPUs since the machine started, and those in which they were busy; None if unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = [int(field) for field in stat.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]  # or waiting for a disk
    rate = os.sysconf("SC_CLK_TCK")
    return sum(ticks) / rate, (sum(ticks) - idle) / rate


def busy_share(seconds: float = 0.2) -> float | None:
    """CPU share of other processes, sampled while this one sleeps; None if unknown."""
    before = cpu_seconds()
    if before is None:
        return None
    time.sleep(seconds)
    whole, busy = (after - at for after, at in zip(cpu_seconds(), before, strict=True))
    return busy / whole if whole else None


def log_warnings(device: torch.device) -> None:
    """Warn about whatever would distort a measurement that is about to start."""
    warnings = device_state(device)[1]
    share = busy_share() if device.type == "cpu" else None
    if share and share > BUSY:
        warnings.append(f"other processes use {share:.0%} of the CPUs, which distorts times")
    for warning in warnings:
        log.warning("warning: %s", warning)
