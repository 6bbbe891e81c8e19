"""The name of a CPU tells it from others, and says what matters to its speed."""

import platform

import pytest
import torch

from hotlap.common import machine
from hotlap.common.cpu import LIMITS, cpu_name

INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: {model}
model name\t: {name}
stepping\t: 2
flags\t\t: fpu vme avx2 avx512f avx512_bf16 amx_bf16 amx_tile
"""
AMD = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: {family}
model\t\t: {model}
model name\t: {name}
stepping\t: 1
"""
ARM = """processor\t: {number}
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes sve asimdfhm
CPU implementer\t: {implementer}
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: {part}
CPU revision\t: 1

"""
AVX2 = {"architecture": "x86_64", "avx2": True, "avx512_f": False}
BF16 = AVX2 | {"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}
AMX = BF16 | {"amx_bf16": True}
SVE = {"architecture": "arm64", "neon": True, "bf16": True, "sve": True, "sve_bf16": True}


@pytest.fixture(autouse=True)
def unlimited(monkeypatch):
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("said", "capabilities", "name"),
    [
        ("Intel(R) Xeon(R) Platinum 8488C", AMX, "Intel Xeon Platinum 8488C (AMX)"),
        ("Intel(R) Xeon(R) CPU E5-2686 v4 @ 2.30GHz", AVX2, "Intel Xeon E5-2686 v4 (AVX2)"),
        ("Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", AVX2, "Intel Core i7-8650U (AVX2)"),
        ("Intel(R) Xeon(R) Processor", AMX, "Intel Xeon (family 6, model 207, AMX)"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", BF16, "Intel Xeon (family 6, model 207, AVX512-BF16)"),
        ("QEMU Virtual", {}, "Intel QEMU Virtual (family 6, model 207)"),
    ],
)
def test_an_intel_cpu(said, capabilities, name):
    assert cpu_name(INTEL.format(name=said, model=207), capabilities) == name


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("AMD EPYC 9654P 96-Core Processor", "AMD EPYC 9654P (AVX512-BF16)"),
        ("AMD EPYC 9R14", "AMD EPYC 9R14 (AVX512-BF16)"),
        ("AMD Ryzen 7 7840U w/ Radeon  780M Graphics", "AMD Ryzen 7 7840U (AVX512-BF16)"),
        ("AMD EPYC", "AMD EPYC (family 26, model 17, AVX512-BF16)"),
    ],
)
def test_an_amd_cpu(said, name):
    assert cpu_name(AMD.format(name=said, family=26, model=17), BF16) == name


def test_an_arm_cpu_is_named_by_its_cores():
    one = ARM.format(number=0, implementer="0x41", part="0xd40")
    assert cpu_name(one, SVE) == "Arm (part 0xd40, SVE-BF16)"
    assert cpu_name("model name\t: ARMv8 Processor rev 1 (v8l)\n" + one, SVE) == cpu_name(one, SVE)
    small, big = (ARM.format(number=n, implementer="0x41", part=f"0xd0{part}") for n, part in enumerate("5b"))
    assert cpu_name(small + small + big, {"neon": True}) == "Arm (part 0xd05 and 0xd0b, NEON)"
    assert cpu_name(ARM.format(number=0, implementer="0x99", part="0x1"), {}) == (
        "ARM implementer 0x99 (part 0x1)"
    )


def test_without_cpuinfo_the_platform_names_the_cpu(monkeypatch):
    assert cpu_name("", {"cpu_name": "Apple M2 Pro", "neon": True}) == "Apple M2 Pro (NEON)"
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    for info in ("", "processor\t: 0\nisa\t: rv64imafdc\n"):
        assert cpu_name(info, {"architecture": "riscv64"}) == "riscv64"


def test_cpus_that_a_hypervisor_calls_the_same_have_names_of_their_own():
    def names(text, capabilities, models):
        return {cpu_name(text.format(name="AMD EPYC", family=25, model=m), capabilities) for m in models}

    assert len(names(AMD, BF16, (17, 97))) == 2
    assert names(AMD, BF16, (17,)) != names(AMD, AVX2, (17,))


def test_a_limit_on_the_instructions_that_torch_uses_is_part_of_the_name(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert cpu_name(INTEL.format(name="Intel Xeon", model=207), AMX) == (
        "Intel Xeon (family 6, model 207, AMX limited to AVX2)"
    )


@pytest.mark.parametrize(("threads", "end"), [(1, ", 1 thread"), (2, ", 2 threads")])
def test_the_device_of_a_measurement_has_the_threads_in_use(threads, end, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert machine.device_name(torch.device("cpu")).endswith(end)
