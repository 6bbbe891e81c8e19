"""What is measured on a CPU: the faster candidate, once, without a trace in the process that asks."""

import json
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hotlap.kernels import attention, dispatch
from hotlap.kernels.cpu import measured
from hotlap.kernels.cpu.measured import fastest


def busy(seconds: float):
    """A candidate that takes so long."""

    def run():
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    return lambda: run


FAST_AND_SLOW = {"slow": busy(0.03), "fast": busy(0.001)}


def must_not_run():
    raise AssertionError("measured again")


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """The file of answers, in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = measured._answers_path, attention._choose, dispatch.fast_dtype
    for function in caches:
        function.cache_clear()
    yield measured._answers_path()
    for function in caches:
        function.cache_clear()


@pytest.mark.parametrize("names", [("slow", "fast"), ("fast", "slow")])
def test_the_faster_one_is_chosen_and_not_measured_again(names, path):
    assert fastest("a question", {name: FAST_AND_SLOW[name] for name in names}) == "fast"
    assert fastest("a question", dict.fromkeys(names, must_not_run)) == "fast"
    assert json.loads(path.read_text()) == {"a question": "fast"}


def test_answers_to_other_questions_stay(path):
    fastest("one", {"a": busy(0)})
    fastest("another", {"b": busy(0)})
    assert json.loads(path.read_text()) == {"one": "a", "another": "b"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"a question": "fa',
        "[1]",
        '"fast"',
        '{"a question": "third"}',
        '{"a question": ["fast"]}',
        "\xff",
    ],
)
def test_a_file_that_is_damaged_or_from_elsewhere_is_measured_again(content, path):
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("latin-1"))
    assert fastest("a question", FAST_AND_SLOW) == "fast"
    assert json.loads(path.read_text())["a question"] == "fast"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    measured._answers_path.cache_clear()
    assert fastest("a question", FAST_AND_SLOW) == "fast"


@pytest.mark.parametrize("fails", [False, True])
def test_one_thread_runs_while_measuring_and_as_many_as_before_afterwards(fails):
    seen, before = [], torch.get_num_threads()

    def prepare():
        seen.append(torch.get_num_threads())
        if fails:
            raise RuntimeError("of a candidate")
        return lambda: None

    try:
        torch.set_num_threads(3)
        if fails:
            with pytest.raises(RuntimeError, match="of a candidate"):
                fastest("a question", {"a": prepare})
        else:
            fastest("a question", {"a": prepare})
        assert seen == [1] and torch.get_num_threads() == 3
        in_another = []
        thread = threading.Thread(target=lambda: in_another.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert in_another == [3]
    finally:
        torch.set_num_threads(before)


def test_attention_is_measured_again_when_there_are_other_kernels(choose_kernels, path, monkeypatch):
    monkeypatch.setattr(measured, "RUNS", 1)
    x = torch.ones(1, 16, 1, 32)
    for kernels in ("torch", "c"):  # a compiler has been installed
        choose_kernels(kernels)
        attention._choose.cache_clear()
        attention.attention(x, x, x)
    assert len(json.loads(path.read_text())) == 2


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.name())
        return function(*arguments, **(keywords or {}))


CONTEXTS = {
    "no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "recorder": Recorder,
    "autocast": lambda: torch.autocast("cpu"), "device": lambda: torch.device("meta"),
}  # fmt: skip


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kernels", ["c", "torch"])
def test_what_is_measured_does_not_depend_on_where_it_is_asked_and_leaves_no_trace(
    context, kernels, choose_kernels, path, monkeypatch
):
    choose_kernels(kernels)
    monkeypatch.setattr(measured, "RUNS", 1)
    x, state = torch.ones(1, 16, 1, 32), torch.get_rng_state()
    with CONTEXTS[context]() as mode:
        y = attention.attention(x, x, x)
        assert dispatch.fast_dtype("cpu", 64) in (torch.float32, torch.bfloat16)
    assert len(json.loads(path.read_text())) == 2
    assert torch.equal(torch.get_rng_state(), state)
    if context == "recorder":  # only the attention that was asked for
        again = Recorder()
        with again:
            attention.attention(x, x, x)
        assert mode.names == again.names
    else:
        torch.testing.assert_close(y, x.to(y.dtype))
