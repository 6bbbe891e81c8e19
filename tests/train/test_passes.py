"""Passes as graphs give what they give one by one. On a CPU the graphs only pretend."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers.tools import tiny_config

from hotlap.train import passes as module
from hotlap.train.data.rows import Batch
from hotlap.train.losses import next_token_loss
from hotlap.train.passes import Passes

CONFIG = tiny_config(context=32)


def a_batch(seed: int, rows: int = 2) -> Batch:
    ids = torch.randint(64, (rows, 33), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1], ids[:, 1:], torch.zeros_like(ids[:, 1:]), ids[:, 1:].numel())


def metered_loss(model, batch):
    value, _ = next_token_loss(model, batch)
    return value, {"squared": value.detach() ** 2}


@pytest.fixture
def captures(monkeypatch):
    """Let Passes capture graphs on a CPU; a list of the graphs.

    Capturing changes no number. A replay computes again, and writes where the capture did.
    """
    graphs = []

    def captured(calls, pool, capture_error_mode):
        parameters = graphs.parameters
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        makes = all(gradient is None for gradient in before)
        value, metrics = calls()
        gradients = [p.grad for p in parameters]
        for gradient, old in zip(gradients, before, strict=True):
            gradient.fill_(float("nan")) if old is None else gradient.copy_(old)

        def replay():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = None if makes else gradient
            new, found = calls()
            value.copy_(new)
            for name, tensor in found.items():
                metrics[name].copy_(tensor)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                gradient.copy_(parameter.grad)
            graph.replays += 1

        graph = SimpleNamespace(replay=replay, pool=lambda: "pool", replays=0, makes=makes)
        graphs.append(graph)
        return graph, (value, metrics)

    class Graphs(list):
        parameters = ()

    graphs = Graphs()
    monkeypatch.setattr(module, "captured", captured)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (50, 100))
    return graphs


def pair(random_model, captures):
    """Passes of two equal models: one that captures, one that does not."""
    one = random_model(CONFIG)
    two = copy.deepcopy(one)
    graphs, eager = Passes(one, metered_loss), Passes(two, metered_loss)
    graphs.captures, eager.captures = True, False
    captures.parameters = list(one.parameters())
    return graphs, eager


def step(passes, batches, weight=64.0):
    """The sums of the loss and the gradients of a step, which updates the weights."""
    sums = []
    for batch in batches:
        value, metrics = passes(batch, weight)
        sums += [value.clone(), metrics["squared"].clone()]
    gradients = [p.grad.clone() for p in passes.model.parameters()]
    with torch.no_grad():
        for parameter in passes.model.parameters():
            parameter -= 0.1 * parameter.grad
    passes.model.zero_grad()
    return [*sums, *gradients]


def same(graphs, eager, *arguments):
    for one, two in zip(step(graphs, *arguments), step(eager, *arguments), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("micro", [1, 3])
def test_replayed_steps_are_the_eager_ones(micro, random_model, captures):
    graphs, eager = pair(random_model, captures)
    for i in range(5):
        same(graphs, eager, [a_batch(10 * i + j) for j in range(micro)], 64.0 + i)
    assert [graph.makes for graph in captures] == [True, False][:micro]
    assert captures[0].replays == 4 and all(graph.replays >= 4 for graph in captures)


def test_other_shapes_and_windows_are_captured_anew(random_model, captures):
    graphs, eager = pair(random_model, captures)
    for i, (rows, window) in enumerate([(2, 32)] * 3 + [(1, 32)] * 3 + [(1, 8)] * 3):
        for passes in (graphs, eager):
            for block in passes.model.blocks:
                block.attention.window = window
        same(graphs, eager, [a_batch(10 * i + j, rows) for j in range(2)])
    assert [graph.makes for graph in captures] == [True, False] * 3


def test_a_graph_adds_only_to_gradients_that_a_graph_made(random_model, captures):
    graphs, eager = pair(random_model, captures)
    for i in range(6):
        if i == 3:  # the first pass of this step runs eagerly
            graphs._begin(None)
        same(graphs, eager, [a_batch(10 * i + j) for j in range(2)])
    assert len(captures) == 4


@pytest.mark.parametrize("fails_at", [0, 1])
def test_passes_run_eagerly_where_a_capture_fails(fails_at, random_model, captures, monkeypatch, caplog):
    graphs, eager = pair(random_model, captures)
    real, calls = module.captured, []

    def captured(*arguments, **options):
        calls.append(1)
        if len(calls) > fails_at:
            raise RuntimeError("cannot be captured\nmore")
        return real(*arguments, **options)

    monkeypatch.setattr(module, "captured", captured)
    for i in range(4):
        same(graphs, eager, [a_batch(10 * i + j) for j in range(3)])
    assert caplog.text.count("training without CUDA graphs: capture failed: cannot be captured") == 1


def test_passes_run_eagerly_where_graphs_leave_too_little_memory(random_model, captures, monkeypatch, caplog):
    graphs, eager = pair(random_model, captures)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * 10**9, 100 * 10**9))
    for i in range(4):
        same(graphs, eager, [a_batch(10 * i + j) for j in range(2)])
    assert "training without CUDA graphs: they would leave 5.0 GB of memory" in caplog.text
