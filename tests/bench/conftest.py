from types import SimpleNamespace

import pytest
from helpers.tools import tiny_config

from hotlap.bench import cases, inference, kernels, peers, training
from hotlap.bench.models import model_config
from hotlap.common import machine, timing
from hotlap.kernels import peaks


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Models are small, ceilings given, nothing is warmed up: no test is about how long anything takes."""
    ceilings, model = peaks.Ceilings(1e10, 1e11, "float32"), tiny_config()
    for module in (kernels, inference):
        monkeypatch.setattr(module, "measure_ceilings", lambda device: ceilings)
    for module in (training, inference, peers):
        monkeypatch.setattr(module, "model_config", lambda name: model_config(name) and model)
    monkeypatch.setattr(kernels, "buffer_sets", lambda size, device: 2)
    monkeypatch.setattr(machine, "busy_share", lambda: 0.0)
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-4)
    monkeypatch.setitem(timing.measure.__kwdefaults__, "seconds", 0.03)
    monkeypatch.setattr(cases, "gc", SimpleNamespace(collect=int))  # slow after many tests
