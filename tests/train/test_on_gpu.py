"""What training asks of a real GPU."""

import warnings

import pytest
import torch
from helpers.tools import tiny_config

from hotlap.model.gpt import GPT
from hotlap.train.data.rows import Batch
from hotlap.train.distributed.sharding import materialize
from hotlap.train.distributed.world import joined
from hotlap.train.losses import next_token_loss
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig
from hotlap.train.optim.schedule import ScheduleConfig, set_schedule
from hotlap.train.step import take_step

pytestmark = pytest.mark.gpu


def test_a_step_waits_for_the_gpu_once():
    with joined() as world:
        with torch.device("meta"):
            model = GPT(tiny_config(context=64), torch.bfloat16)
        materialize(model, world.device, seed=0)
        optimizer = MuonAdamW(model, OptimConfig())
        ids = torch.arange(4 * 64).view(4, 64) % 64
        batch = Batch(ids, ids, torch.zeros_like(ids), ids.numel()).change(torch.Tensor.pin_memory)

        def step() -> None:
            micro = [batch.to(world.device) for _ in range(2)]
            set_schedule(model, optimizer, ScheduleConfig(), 0, 0.0)
            take_step(model, micro, next_token_loss, 2 * batch.weight, 1.0, world)
            optimizer.step()
            optimizer.zero_grad()

        step()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len([w for w in waits if "synchroniz" in str(w.message)]) == 1  # for the loss and the norm
