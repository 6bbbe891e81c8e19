"""Peers run as they are, and nothing of theirs changes."""

import dataclasses
import sys

import pytest
import torch
from helpers.tools import tiny_config

from hotlap.bench import inference, modded, peers, training
from hotlap.bench.peer_steps import nanochat_step, nanochat_uses_fp8, nanogpt_step
from hotlap.cli import main
from hotlap.model.build import build
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
    step = peers.our_step(shape, 2, CPU)
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

    def kept(*arguments) -> GPT:
        models.append(build(*arguments))
        return models[-1]

    monkeypatch.setattr(training, "build", kept)
    monkeypatch.setattr(training, "fast_dtype", lambda *_: torch.float32)
    for rows in (4, 2):
        peers.our_step(shape, rows, CPU)(tokens)
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


# A peer's model with the interface that its script uses. nanochat's modules are made of the same class.
PEER = """
import torch
from dataclasses import dataclass
@dataclass
class GPTConfig:
    FIELDS
class GPT(torch.nn.Module):
    made = []
    def __init__(self, c):
        super().__init__()
        self.made.append(self)
        self.config = c
        self.table = torch.nn.Embedding(c.vocab_size, c.vocab_size)
        self.init_weights()
    def init_weights(self):
        self.table.weight.data.zero_()
    def configure_optimizers(self, decay, rate, betas, kind):
        return torch.optim.SGD(self.parameters(), rate)
    def setup_optimizer(self):
        return torch.optim.SGD(self.parameters(), 0.1)
    def loss(self, ids, targets):
        return torch.nn.functional.cross_entropy(self.table(ids).flatten(0, 1), targets.flatten())
    def get_device(self):
        return self.table.weight.device
    def forward(self, ids, targets=None, kv_cache=None):
        RETURN
"""
NANOGPT = PEER.replace(
    "FIELDS",
    "block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool",
).replace("RETURN", "return None, self.loss(ids, targets)")
NANOCHAT = PEER.replace(
    "FIELDS",
    "sequence_len: int; vocab_size: int; n_layer: int; n_head: int; n_kv_head: int; n_embd: int; "
    "window_pattern: str",
).replace("RETURN", "return self.loss(ids, targets) if kv_cache is None else kv_cache.add(self.table(ids))")
# The cache holds no more tokens than it has room for.
ENGINE = """
import torch
from nanochat.checkpoint_manager import load_model
COMPUTE_DTYPE = torch.float32
class KVCache:
    def __init__(self, batch_size, num_heads, seq_len, head_dim, num_layers, device, dtype):
        shape = (num_layers, batch_size, seq_len, num_heads, head_dim)
        self.k_cache, self.v_cache = (torch.zeros(shape, device=device) for _ in range(2))
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
    def add(self, logits):
        assert logits.shape[0] == len(self.cache_seqlens)
        self.cache_seqlens += logits.shape[1]
        assert self.cache_seqlens.max() <= self.k_cache.shape[2]
        return logits
def sample_next_token(logits, rng, temperature):
    return logits.argmax(-1, keepdim=True)
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Checkouts of nanoGPT and nanochat with models that run anywhere."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    paths = {name: tmp_path / name for name in ("nanogpt", "nanochat")}
    (paths["nanochat"] / "nanochat").mkdir(parents=True)
    (paths["nanochat"] / "nanochat" / "gpt.py").write_text(NANOCHAT)
    (paths["nanochat"] / "nanochat" / "flash_attention.py").write_text("USE_FA3 = False")
    (paths["nanochat"] / "nanochat" / "engine.py").write_text(ENGINE)
    (paths["nanochat"] / "nanochat" / "checkpoint_manager.py").write_text("import not_installed")
    paths["nanogpt"].mkdir()
    (paths["nanogpt"] / "model.py").write_text(NANOGPT)
    yield paths
    for name in [name for name in sys.modules if name.split(".")[0] in ("nanochat", "nanogpt_model")]:
        del sys.modules[name]


def test_a_peers_step_is_timed_beside_ours(stand_ins, tmp_path):
    before = sorted(path for folder in stand_ins.values() for path in folder.rglob("*"))
    config = peers.PeersConfig(
        **stand_ins, models=("tiny",), rows=2, micro_batches=3, seconds=0.01, out=tmp_path / "out"
    )
    rows = peers.bench_peers(config)
    assert [row["provider"] for row in rows] == ["hotlap", "nanogpt", "hotlap", "nanochat"]
    for ours, theirs in (rows[:2], rows[2:]):
        assert ours["times_as_fast_as_peer"] == pytest.approx(theirs["ms"] / ours["ms"])
        assert theirs["tokens_per_second"] == pytest.approx(3 * 2 * 64 / theirs["ms"] * 1e3)
    assert rows[0]["case"] == "step tiny 3x2x64 beside nanogpt"
    assert sorted(path for folder in stand_ins.values() for path in folder.rglob("*")) == before


@pytest.mark.parametrize("peer", ["nanogpt", "nanochat"])
def test_a_peers_step_is_the_same_in_micro_batches(stand_ins, peer):
    shape, build = tiny_config(context=32), {"nanogpt": nanogpt_step, "nanochat": nanochat_step}[peer]
    tokens = torch.randint(shape.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
    changes = []
    for rows in (4, 2):
        step = build(stand_ins[peer], shape, rows, CPU)
        weight = (
            sys.modules["nanogpt_model" if peer == "nanogpt" else "nanochat.gpt"].GPT.made[-1].table.weight
        )
        before = weight.detach().clone()
        step(tokens)
        changes.append(weight.detach() - before)
    torch.testing.assert_close(changes[1], changes[0], atol=1e-9, rtol=1e-3)
    assert changes[0].any()


def test_both_sides_have_the_windows_that_are_asked_for(stand_ins, tmp_path, monkeypatch):
    ours = []
    monkeypatch.setattr(peers, "model_config", lambda name: tiny_config(context=256))
    monkeypatch.setattr(training, "build", lambda shape, dtype: ours.append(shape) or build(shape, dtype))
    both = peers.PeersConfig(**stand_ins, models=("tiny",), rows=1, seconds=0.01, out=tmp_path / "out")
    for pattern, attention in (("SL", "SDPA, with a mask in layers with a window"), ("L", "SDPA")):
        ours.clear()
        rows = peers.bench_peers(dataclasses.replace(both, window_pattern=pattern))
        assert [shape.window_pattern for shape in ours] == ["L", pattern]  # nanoGPT has no windows
        assert [shape.value_embeddings for shape in ours] == [False, True]
        assert not any(shape.document_masks for shape in ours)
        assert sys.modules["nanochat.gpt"].GPT.made[-1].config.window_pattern == pattern
        assert (rows[3]["windows"], rows[3]["attention"]) == (pattern, attention)
        assert rows[3]["case"] == f"step tiny 1x256 windows {pattern} beside nanochat"


def test_a_pair_that_fails_or_comes_too_late_is_a_row_and_the_others_go_on(stand_ins, tmp_path, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(peers, "nanogpt_step", fails)
    config = peers.PeersConfig(**stand_ins, models=("tiny",), rows=1, seconds=0.01, out=tmp_path / "out")
    failed, *timed = peers.bench_peers(config)
    assert failed["note"] == "out of memory; give fewer --rows" and failed["ms"] is None
    assert [row["provider"] for row in timed] == ["hotlap", "nanochat"]
    rows = peers.bench_peers(dataclasses.replace(config, minutes=1e-9))
    assert [row["note"] for row in rows] == ["skipped: no time left"] * 2


def test_fp8_is_compared_with_a_peer_that_has_it(stand_ins):
    with pytest.raises(ValueError, match="nanoGPT has no fp8"):
        peers.bench_peers(peers.PeersConfig(nanogpt=stand_ins["nanogpt"], fp8=True))
    sizes = ((128, 256), (128, 12), (64, 128), (136, 128))
    assert [nanochat_uses_fp8(torch.nn.Linear(*size), "") for size in sizes] == [True, False, False, False]
    assert not nanochat_uses_fp8(torch.nn.Embedding(128, 128), "")


def test_nanochats_decoding_is_timed_beside_ours_against_the_same_limit(stand_ins, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "TURNS", 3)
    config = inference.InferenceConfig(
        batches=(1, 3), prompt=8, nanochat=stand_ins["nanochat"], out=tmp_path / "out"
    )
    rows = inference.bench_inference(config)
    for batch in (1, 3):
        found = [row for row in rows if row["case"] == f"tiny prompt 8 batch {batch}"]
        ours, theirs = found[0], found[-1]
        assert (ours["provider"], theirs["provider"]) == ("hotlap", "nanochat")
        assert ours["limit_ms"] == theirs["limit_ms"]
        assert theirs["share_of_bandwidth"] == pytest.approx(theirs["limit_ms"] / theirs["ms"])
        assert ours["times_as_fast_as_peer"] == pytest.approx(theirs["ms"] / ours["ms"])
    assert "nanochat.checkpoint_manager" not in sys.modules  # as it needs more packages
