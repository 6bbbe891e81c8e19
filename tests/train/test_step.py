"""The gradient of a step, its norm and its clipping, on any number of ranks."""

import numpy as np
import pytest
import torch
from helpers.rank_functions import clipped_step, small_gpt, step_rows
from helpers.ranks import in_world, run_ranks

from hotlap.model.gpt import GPT

NODES_OF_TWO = {"LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize("size, env", [(1, {}), (3, {}), (4, NODES_OF_TWO)])
@pytest.mark.parametrize("clips", [False, True])
def test_ranks_and_their_replicas_report_and_clip_the_norm_of_the_whole_gradient(clips, size, env):
    model, ids = GPT(small_gpt("float32").config).init_weights(1), step_rows()
    loss = model(ids[:, :-1], ids[:, 1:], reduction="mean")
    loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.stack([g.double().square().sum() for g in wanted.values()]).sum().sqrt().item()
    clip = norm / 3 if clips else norm * 1.1
    scale = 1 / 3 if clips else 1
    for found in run_ranks(size, in_world, clipped_step, clip, env=env):
        assert found["norm"] == pytest.approx(norm, rel=1e-4)
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
        for name, gradient in found["gradients"].items():
            expected = scale * wanted[name].numpy()
            assert np.abs(gradient - expected).max() <= 1e-4 * np.abs(expected).max() + 1e-8, name


@pytest.mark.parametrize("silent", [0, 2])
def test_a_rank_without_any_target_changes_the_gradient_by_nothing(silent):
    model, ids = GPT(small_gpt("float32").config).init_weights(1), step_rows()
    ids = ids[[i for i in range(12) if i % 3 != silent]]
    loss = model(ids[:, :-1], ids[:, 1:], reduction="mean")
    loss.backward()
    for found in run_ranks(3, in_world, clipped_step, 0.0, silent):
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            wanted = parameter.grad.numpy()
            assert np.abs(found["gradients"][name] - wanted).max() <= 1e-4 * np.abs(wanted).max() + 1e-8, name
