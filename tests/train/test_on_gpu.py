"""What training asks of a real GPU."""

import warnings

import pytest
import torch
from helpers.preference_runs import make_base, preferring
from helpers.rl_runs import reinforcing
from helpers.tools import tiny_config

from hotlap.model.gpt import GPT
from hotlap.train.data.rows import Batch, prefetched
from hotlap.train.distributed.sharding import materialize, parallelize
from hotlap.train.distributed.world import joined
from hotlap.train.loop import LoopConfig
from hotlap.train.losses import next_token_loss
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig
from hotlap.train.optim.schedule import ScheduleConfig, set_schedule
from hotlap.train.passes import Passes
from hotlap.train.step import take_step

pytestmark = pytest.mark.gpu


def on_gpu(world, compile=False, **config):
    """A small model and its optimizer, as in training."""
    with torch.device("meta"):
        model = GPT(tiny_config(context=64, **config), torch.bfloat16)
    parallelize(model, world, "none", compile)
    materialize(model, world.device, seed=0)
    return model, MuonAdamW(model, OptimConfig())


@pytest.mark.parametrize("compile", [False, True])
def test_steps_in_graphs_are_the_eager_ones(compile):
    """Losses, gradient norms and weights of 8 steps, whose windows change, while a thread pins memory."""
    with joined() as world:
        results = []
        for captures in (True, False):
            model, optimizer = on_gpu(world, compile, layers=3, width=256, heads=2, kv_heads=2)
            passes, outcomes = Passes(model, next_token_loss), []
            passes.captures = captures
            generator = torch.Generator().manual_seed(0)
            ids = (torch.randint(64, (4, 65), generator=generator) for _ in range(24))
            rows = [Batch(i[:, :-1], i[:, 1:], torch.arange(64).expand(4, 64) // 9 * 9, 256) for i in ids]
            batches = prefetched((rows[i : i + 3] for i in range(0, 24, 3)), world.device)
            for step, micro in enumerate(batches):
                micro = [batch.to(world.device) for batch in micro]
                for block in model.blocks:
                    block.attention.window = 64 if step < 4 else 16
                found = take_step(passes, micro, 3 * 256, 1.0, world, step)
                optimizer.step()
                optimizer.zero_grad()
                outcomes += [found.loss, found.norm]
            assert len(passes.graphs) == (2 if captures else 0)
            results.append((outcomes, torch.cat([p.detach().flatten() for p in model.parameters()])))
        (outcomes, weights), (expected, expected_weights) = results
        assert outcomes == pytest.approx(expected, rel=1e-3)
        assert (weights - expected_weights).norm() < 1e-2 * expected_weights.norm()


def test_a_loss_that_waits_for_the_gpu_runs_eagerly(caplog):
    def loss(model, batch):
        value, metrics = next_token_loss(model, batch)
        assert value.item() > 0
        return value, metrics

    with joined() as world:
        model, optimizer = on_gpu(world)
        passes = Passes(model, loss)
        ids = torch.arange(4 * 64).view(4, 64) % 64
        batch = Batch(ids, ids, torch.zeros_like(ids), ids.numel()).to(world.device)
        losses = []
        for _ in range(5):
            losses.append(take_step(passes, [batch] * 2, 2 * batch.weight, 1.0, world).loss)
            optimizer.step()
            optimizer.zero_grad()
        assert losses == sorted(losses, reverse=True) and caplog.text.count("without CUDA graphs") == 1


def test_a_step_waits_for_the_gpu_once():
    with joined() as world:
        model, optimizer = on_gpu(world)
        passes = Passes(model, next_token_loss)
        ids = torch.arange(4 * 64).view(4, 64) % 64
        batch = Batch(ids, ids, torch.zeros_like(ids), ids.numel()).change(torch.Tensor.pin_memory)

        def step() -> None:
            micro = [batch.to(world.device) for _ in range(2)]
            set_schedule(model, optimizer, ScheduleConfig(), 0, 0.0)
            take_step(passes, micro, 2 * batch.weight, 1.0, world)
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(2):  # the second one is captured
            step()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len([w for w in waits if "synchroniz" in str(w.message)]) == 1  # for the loss and the norm


def test_preferences_start_at_their_reference_in_graphs_too(tmp_path):
    """The first step of four micro-batches has passes that run eagerly and passes that are replayed."""
    first = preferring(str(tmp_path), "run", str(make_base(tmp_path)), "1", "bfloat16")[0]
    assert [first[name] for name in ("margin", "chosen_reward", "rejected_reward", "kl")] == [0, 0, 0, 0]


@pytest.mark.parametrize("compile", ["off", "on"])
def test_rollouts_run_between_steps_in_graphs(compile, tmp_path):
    """The engine decodes with the weights as they are, in graphs of its own, beside compiled blocks."""
    fields = {"dtype": "bfloat16", "compile": compile, "updates": 2, "loop": LoopConfig(8, 8, 8)}
    lines = reinforcing(str(tmp_path), "run", str(make_base(tmp_path)), **fields)
    assert all(line["gradient_norm"] > 0 for line in lines if line["equal_groups"] < 1)
    assert all(line["engine_kl"] < 1e-2 for line in lines[::2]), "before the second update"
