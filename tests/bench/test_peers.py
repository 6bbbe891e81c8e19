"""Peers run as they are, and nothing of theirs changes."""

import sys

import pytest
import torch
from helpers.tools import tiny_config

from hotlap.bench import modded, peers
from hotlap.cli import main
from hotlap.model.gpt import GPT

CPU = torch.device("cpu")

# What modded-nanogpt's scripts do around their steps, and print; a step takes 20 ms, the first 10 a second.
SCRIPT = """
import os, pathlib, sys, time
with open(sys.argv[0]) as file:
    code = file.read()
import triton_kernels
assert [os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["0", "0", "1"]
assert os.environ["MASTER_ADDR"] and int(os.environ["MASTER_PORT"])
for folder in (pathlib.Path.cwd(), pathlib.Path(os.environ.get("DATA_PATH", "."))):
    assert len(list(folder.glob("data/fineweb10B/fineweb_train_*.bin"))) == 2
os.makedirs("logs")
print("logs/1.txt")
val_batch_size: int = 4 * 64 * 1024 * 8
stages = [dict(train_max_seq_len=896, batch_size=4 * 32, lr=1.0), dict(batch_size=9 * 9)]
t, total = 0, 1285
print(f"step:0/{total} val_loss:10.8258 train_time:{t:.0f}ms step_avg:nanms")
for step in range(total):
    t += 1000 if step < 10 else 20
    print(f"step:{step+1}/{total} train_time:LINE step_avg:{t/(step+1):.2f}ms")
    if step == 20:
        print(f"step:{step+1}/{total} val_loss:7.1 train_time:{t:.0f}ms step_avg:{t/(step+1):.2f}ms")
    END
time.sleep(600)
"""


@pytest.fixture
def checkout(tmp_path):
    """A function that makes a checkout whose script prints times in a format, and does `end` each step."""

    def make(line: str = "{t:.0f}ms", end: str = "pass"):
        (tmp_path / "triton_kernels.py").write_text("")
        (tmp_path / "train_gpt.py").write_text(SCRIPT.replace("LINE", line).replace("END", end))
        data = tmp_path / "data" / "fineweb10B"
        data.mkdir(parents=True)
        for name in ("train_000001", "train_000002", "val_000000"):
            (data / f"fineweb_{name}.bin").write_bytes(b"")
        return tmp_path

    return make


def measure(path, name="modded-nanogpt"):
    shape = tiny_config(context=32)
    step = peers.our_step(shape, CPU, micro_rows=2)
    script = path / modded.SCRIPTS[name]
    return modded.bench_script(name, script, modded.data_folder(path), shape, step, CPU)


@pytest.mark.parametrize("line", ["{t:.0f}ms", "{t / 1e3:.3f}s"])
def test_a_script_of_modded_nanogpt_is_timed_by_its_own_lines_after_its_first_steps(checkout, line):
    ours, theirs = measure(checkout(line))
    assert (ours["provider"], theirs["provider"]) == ("hotlap", "modded-nanogpt")
    assert theirs["case"] == ours["case"] == "step 124m 128 tokens beside modded-nanogpt"
    assert [theirs[name] for name in ("ms", "ms_low", "ms_high")] == pytest.approx([20, 20, 20])
    assert theirs["tokens_per_second"] == pytest.approx(128 / 0.020)
    assert ours["times_as_fast_as_peer"] == pytest.approx(theirs["ms"] / ours["ms"])


def test_nothing_is_written_to_a_checkout(checkout, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    path = checkout()
    before = sorted(path.rglob("*"))
    measure(path)
    assert sorted(path.rglob("*")) == before


def test_a_script_that_fails_is_a_row_with_its_last_words(checkout):
    end = "if step == 4: raise ModuleNotFoundError(\"No module named 'kernels'\")"
    ours, theirs = measure(checkout(end=end))
    assert theirs["ms"] is None
    assert theirs["note"].endswith("it ended after 5 steps: ModuleNotFoundError: No module named 'kernels'")
    assert ours["ms"] > 0 and ours["times_as_fast_as_peer"] is None


def test_our_step_is_the_same_in_micro_batches(monkeypatch):
    shape, models = tiny_config(context=32), []
    tokens = torch.randint(shape.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))

    class Kept(GPT):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            models.append(self)

    monkeypatch.setattr(peers, "GPT", Kept)
    monkeypatch.setattr(peers, "fast_dtype", lambda *_: torch.float32)
    for rows in (0, 2):
        peers.our_step(shape, CPU, micro_rows=rows)(tokens)
    whole, parts = (model.head.weight for model in models)
    torch.testing.assert_close(parts, whole)
    assert not torch.equal(whole, GPT(shape).init_weights().head.weight)


def test_what_modded_nanogpt_needs_is_said(checkout, tmp_path, capsys, monkeypatch):
    path = checkout()
    if not torch.cuda.is_available():
        assert main(["bench", "peers", "--modded", str(path)]) == 2
        assert "need an NVIDIA GPU" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="is that a checkout of modded-nanogpt"):
        modded.runnable(path / "data", CPU)
    gpu, capability = torch.device("cuda"), (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert list(modded.runnable(path, gpu)) == ["modded-nanogpt"]
    (path / modded.PLAIN).parent.mkdir(parents=True)
    (path / modded.PLAIN).write_text("")
    assert list(modded.runnable(path, gpu)) == ["modded-nanogpt-plain", "modded-nanogpt"]
    capability = (8, 0)
    assert list(modded.runnable(path, gpu)) == ["modded-nanogpt-plain"]
    (path / modded.PLAIN).unlink()
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        modded.runnable(path, gpu)
    (path / "data" / "fineweb10B" / "fineweb_train_000002.bin").unlink()
    with pytest.raises(ValueError, match=r"holds 1 shards fineweb_train.*cached_fineweb10B\.py 2"):
        modded.runnable(path, gpu)


def test_a_script_whose_batch_cannot_be_read_is_named(tmp_path):
    (tmp_path / "train_gpt.py").write_text("local_batch_size = 4 * 2\nbatch_size: int = 3")
    with pytest.raises(ValueError, match=r"train_gpt\.py has no line `batch_size"):
        modded.batch_tokens(tmp_path / "train_gpt.py")


def test_a_peers_step_is_timed_beside_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "model.py").write_text(
        "import torch\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class GPTConfig:\n"
        "    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int\n"
        "    dropout: float; bias: bool\n"
        "class GPT(torch.nn.Module):\n"
        "    def __init__(self, c):\n"
        "        super().__init__()\n"
        "        self.table = torch.nn.Embedding(c.vocab_size, c.vocab_size)\n"
        "    def configure_optimizers(self, decay, rate, betas, kind):\n"
        "        return torch.optim.SGD(self.parameters(), rate)\n"
        "    def forward(self, ids, targets):\n"
        "        y = self.table(ids)\n"
        "        return y, torch.nn.functional.cross_entropy(y.flatten(0, 1), targets.flatten())\n"
    )
    config = peers.PeersConfig(nanogpt=tmp_path, models=("tiny",), rows=1, seconds=0.01, out=tmp_path / "out")
    ours, theirs = peers.bench_peers(config)
    assert (ours["provider"], theirs["provider"]) == ("hotlap", "nanogpt")
    assert ours["times_as_fast_as_peer"] == pytest.approx(theirs["ms"] / ours["ms"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.py", "out"]
