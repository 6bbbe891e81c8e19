"""The name of a CPU: vendor, model, and the best instruction set that torch finds."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from typing import Any

VENDORS = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}  # of x86
IMPLEMENTERS = {  # of Arm's architecture, as in Linux's arch/arm64/include/asm/cputype.h
    "0x41": "Arm", "0x46": "Fujitsu", "0x48": "HiSilicon", "0x4e": "NVIDIA", "0x51": "Qualcomm",
    "0x61": "Apple", "0x6d": "Microsoft", "0xc0": "Ampere",
}  # fmt: skip
# Best first: name, and key in torch.cpu.get_capabilities()
INSTRUCTION_SETS = {
    "AMX": "amx_bf16", "AVX512-BF16": "avx512_bf16", "AVX512": "avx512_f", "AVX2": "avx2",
    "SVE-BF16": "sve_bf16", "NEON-BF16": "bf16", "SVE": "sve", "NEON": "neon",
}  # fmt: skip
# What keeps torch from using all that the CPU has
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
NOISE = re.compile(r"\((r|tm)\)|\bcpu\b|@.*|\b\w+-core\b|\bprocessor\b|\bw(ith|/) radeon.*", re.IGNORECASE)
MODEL_NUMBER = re.compile(r"\d\w\w")  # 8488C, 9R14, i7-8650U; not Apple M2


def cpu_name(info: str, capabilities: Mapping[str, Any]) -> str:
    """Such as `AMD EPYC 9R14 (AVX512-BF16)`, or `Intel Xeon (family 6, model 207, AMX)` where a hypervisor
    hides the model number.

    info: /proc/cpuinfo, or "" where there is none. capabilities: torch.cpu.get_capabilities().
    """
    lines = [line.split(":", 1) for line in info.splitlines() if ":" in line]
    fields = [(field.strip(), value.strip()) for field, value in lines]
    first = dict(reversed(fields))  # of the first processor
    parts = dict.fromkeys(value for field, value in fields if field == "CPU part")  # of big and small cores
    if parts:
        implementer = first.get("CPU implementer", "")
        name = IMPLEMENTERS.get(implementer, f"ARM implementer {implementer}")
        details = [f"part {' and '.join(parts)}"]
    else:
        name = first.get("model name") or capabilities.get("cpu_name") or platform.processor()
        name = " ".join(NOISE.sub(" ", name or platform.machine()).split())
        vendor = VENDORS.get(first.get("vendor_id", ""), "")
        if vendor not in name:
            name = f"{vendor} {name}"
        details = []
        if not MODEL_NUMBER.search(name) and "cpu family" in first:
            details = [f"family {first['cpu family']}", f"model {first.get('model', 'unknown')}"]
    best = next((name for name, key in INSTRUCTION_SETS.items() if capabilities.get(key)), "")
    limits = " and ".join(dict.fromkeys(os.environ[name].upper() for name in LIMITS if name in os.environ))
    if limits:
        best += f" limited to {limits}"
    details += [best] if best else []
    return f"{name} ({', '.join(details)})" if details else name
