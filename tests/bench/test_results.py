"""What is on disk says what it is of, is never lost, and is compared with its like alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from hotlap.bench import compare, results
from hotlap.bench.kernels import KernelsConfig, bench_kernels
from hotlap.cli import main
from hotlap.common.machine import device_name

CPU = torch.device("cpu")
QUICK = {"rows": 16, "seconds": 0.001, "compile": False}


def test_results_hold_the_device_versions_and_the_share_of_the_ceiling(tmp_path):
    rows = bench_kernels(KernelsConfig(("rms_norm",), out=tmp_path, **QUICK))
    content = results.load(tmp_path / "kernels.json")
    assert content["device"] == device_name(CPU) and content["versions"]["torch"] == torch.__version__
    assert content["rows"] == rows and content["ceilings"]["copy"] > 0
    assert {row["case"].split()[1] for row in rows} == {"forward", "backward", "both"}
    for row in rows:
        assert row["share_of_ceiling"] > 0 and row["ms_low"] <= row["ms"] <= row["ms_high"]
    assert (tmp_path / "kernels.csv").read_text().count("\n") == len(rows) + 1
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert "| rms_norm forward d12 16x768 | hotlap |" in results.write_page(tmp_path).read_text()


def write_result(path, device: str, ms: float, spread: float) -> None:
    row = {"case": "c", "provider": "p", "ms": ms, "ms_low": ms - spread, "ms_high": ms + spread}
    path.write_text(json.dumps({"kind": "kernels", "device": device, "rows": [row]}))


def test_comparing_flags_what_is_slower_beyond_the_noise_and_refuses_other_devices(tmp_path, capsys):
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    config = compare.CompareConfig(before, after)
    write_result(before, "card", 1.0, 0.1)
    write_result(after, "card", 1.15, 0.1)
    assert "SLOWER" not in compare.compare(config)[0]
    write_result(after, "card", 1.3, 0.1)
    assert "1.30x time  SLOWER" in compare.compare(config)[0]
    write_result(after, "card", 0.7, 0.1)
    assert "faster" in compare.compare(config)[0]
    assert compare.compare(config)[-1] == "0 slower, 1 faster, 0 within their spread"
    row = {"case": "c", "provider": "p", "ms": None, "note": "WRONG: its output is off"}
    after.write_text(json.dumps({"kind": "kernels", "device": "card", "rows": [row]}))
    assert compare.compare(config)[0].endswith("WRONG: its output is off")
    row["case"] = "other"
    after.write_text(json.dumps({"kind": "peers", "device": "card", "rows": [row]}))
    assert main(["bench", "compare", str(before), str(after)]) == 2
    assert "(kernels) and" in (said := capsys.readouterr().err) and "compare files of the same kind" in said
    write_result(after, "other card", 1.0, 0.1)
    assert main(["bench", "compare", str(before), str(after)]) == 2
    assert "compare files from the same device" in capsys.readouterr().err


def test_what_else_differs_between_two_files_is_said(tmp_path):
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    for path, commit in ((before, "1"), (after, "2")):
        write_result(path, "card", 1.0, 0.1)
        content = json.loads(path.read_text()) | {"commit": commit, "warnings": [f"busy at {commit}"]}
        path.write_text(json.dumps(content))
    lines = compare.compare(compare.CompareConfig(before, after))[2:]
    assert lines == [
        "commit: before 1, after 2",
        "warning in before: busy at 1",
        "warning in after: busy at 2",
    ]


def test_a_run_sets_aside_what_an_earlier_one_left(tmp_path):
    config = KernelsConfig(("relu2",), out=tmp_path, **QUICK)
    bench_kernels(config)
    first = results.load(tmp_path / "kernels.json")
    bench_kernels(config)
    (earlier,) = tmp_path.glob("kernels-*.json")
    assert results.load(earlier) == first
    (tmp_path / "kernels.json").write_text(json.dumps(first))  # of the same minute as the earlier one
    bench_kernels(config)
    kept = [results.load(path) for path in tmp_path.glob("kernels-*.json")]
    assert kept == [first, first]
    assert results.write_page(tmp_path).read_text().count("\n## ") == 1


def test_nothing_of_the_users_is_overwritten(tmp_path, caplog):
    (tmp_path / "README.md").write_text("# Mine\n")
    (tmp_path / "config.json").write_text("{}")
    assert results.write_page(tmp_path) is None
    assert (tmp_path / "README.md").read_text() == "# Mine\n" and "is not a page of results" in caplog.text
    (tmp_path / "kernels.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"kernels\.json is not a file of results"):
        bench_kernels(KernelsConfig(("relu2",), out=tmp_path, **QUICK))
    assert (tmp_path / "kernels.json").read_text() == "[1, 2]"


@pytest.mark.parametrize("name", ["kernels", "training", "inference", "look"])
def test_a_folder_that_cannot_be_written_is_found_before_time_is_spent(name, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", name, "--out", str(tmp_path / "file")]) == 73
    said = capsys.readouterr().err
    assert "cannot write results to" in said and "ceiling" not in said and "name another --out" in said


def test_the_page_of_results_is_what_the_files_say(tmp_path):
    page = Path(__file__).parents[2] / "bench" / "results"
    shutil.copytree(page, tmp_path / "results")
    assert results.write_page(tmp_path / "results").read_text() == (page / "README.md").read_text()
