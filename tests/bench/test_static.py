"""The gate runs in a process of its own: where the interpreter was chosen, nothing can be compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

LIBRARY = """
import json, re
from hotlap.bench import static
"""


def python(code: str, cache: Path | None = None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    if cache:
        environment["XDG_CACHE_HOME"] = str(cache)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_every_kernel_passes_on_every_target_at_its_default_tile():
    result = python("import sys; from hotlap.cli import main; sys.exit(main(['bench', 'static']))")
    assert result.returncode == 0, (
        "\n".join(line for line in result.stdout.splitlines() if "FAULT" in line or "error" in line)
        + result.stderr[-2000:]
    )
    for target in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"):
        assert f" {target} " in result.stdout
    for kernel in ("attention_forward", "attention_dq", "attention_dk_dv"):
        rows = [line for line in result.stdout.splitlines() if line.startswith(f"{kernel}_hopper ")]
        assert len(rows) == 2 and all(" sm_90 " in row for row in rows)


def test_bad_kernels_are_rejected_each_for_its_reason_also_from_the_cache(tmp_path):
    code = LIBRARY + (
        "config = static.StaticConfig(arch=('sm_89',), kernel=('bad',))\n"
        "jobs = [job for job in static.jobs(config, {'bad': 'bad_kernels'}) if job.dtype == 'bf16']\n"
        "rows = [static.examine(job) for job in jobs]\n"
        "static.compile_case = None\n"
        "assert [static.examine(job) for job in jobs] == rows\n"
        "print(json.dumps({row['kernel']: row['faults'] for row in rows}))\n"
    )
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    faults = json.loads(result.stdout)
    reasons = {
        "spills": "spills",
        "oversize": "bytes of shared memory; a block has 101376",
        "narrow": "narrowly",
        "float64": "computes in float64",
        "descriptor": "without TMA instructions",
        "crowded": "keeps 5 programs",
    }
    assert faults.keys() == reasons.keys()
    for kernel, reason in reasons.items():
        assert reason in faults[kernel][0], (kernel, faults[kernel])


def test_a_product_that_starts_early_only_fetches_before_it_waits():
    code = LIBRARY + (
        "from hotlap.kernels import decode_linear\n"
        "import torch\n"
        "memory = r'prefetch|griddepcontrol\\.(?:wait|launch)|[ls][dt]\\.global|cp\\.async\\.c[ag]'\n"
        "target = static.TARGETS['sm_90']\n"
        "for case in decode_linear.cases(torch.bfloat16):\n"
        "    tile = next(tile for tile in case.table(case.size, target.device) if tile.kernel)\n"
        "    kernel = getattr(decode_linear, tile.kernel)\n"
        "    ptx = static.compile_case(kernel, case.arguments, tile, target).asm['ptx']\n"
        "    print(json.dumps(re.findall(memory, ptx)))\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        accesses = json.loads(line)
        wait = accesses.index("griddepcontrol.wait")
        assert set(accesses[:wait]) == {"prefetch"} and "prefetch" not in accesses[wait:]
        assert accesses[wait + 1] == "griddepcontrol.launch"
        assert {"st.global"} < set(accesses[wait + 2 :])


def test_elementwise_offsets_are_64_bits_wide():
    code = LIBRARY + (
        "from hotlap.kernels import relu2\n"
        "import torch\n"
        "for case in relu2.cases(torch.bfloat16):\n"
        "    target = static.TARGETS['sm_90']\n"
        "    tile = case.table(0, target.device)[0]\n"
        "    kernel = getattr(relu2, case.kernel)\n"
        "    ttir = static.compile_case(kernel, case.arguments, tile, target).asm['ttir']\n"
        "    print(re.findall(r'tt.addptr .*x(i\\d+)>', ttir))\n"
    )
    result = python(code)
    assert result.stdout.split("\n")[:2] == ["['i64', 'i64']", "['i64', 'i64', 'i64']"], result.stderr


def test_unknown_targets_and_missing_gpus_are_one_line_errors():
    code = (
        "import torch; from hotlap.cli import main\n"
        "torch.cuda.is_available = lambda: False\n"
        "for flags in (['static', '--arch', 'sm_70'], ['static', '--kernel', 'softmax'], ['tune']):\n"
        "    print(main(['bench', *flags]))"
    )
    result = python(code)
    assert result.stdout.split() == ["2", "2", "2"]
    arch, kernel, gpu = result.stderr.splitlines()
    assert "sm_70 is unknown; known: sm_80" in arch and "softmax is unknown; known: " in kernel
    assert "this machine has none" in gpu
