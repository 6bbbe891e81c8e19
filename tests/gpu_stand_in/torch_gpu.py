"""torch believes in one H100: FakeTensors on cuda, AOTAutograd, FSDP2 and Inductor's code for sm_90.

For tensors without memory alone: nothing here can hold or compute numbers. Needs the CUDA build of
torch, whose libraries, C++ classes and checks are used as they are.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch
from gpu_stand_in.patches import find, put


class Properties(SimpleNamespace):
    """What torch.cuda.get_device_properties returns."""


PROPERTIES = Properties(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=85 << 30,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
    uuid="",
)


class Stream:
    """An order of work, of which there is none."""

    stream_id = device_index = cuda_stream = 0
    device = torch.device("cuda", 0)

    def __init__(self, device=None, priority=0, **_):
        self.priority = priority

    def record_event(self, event=None) -> Event:
        return event or Event()

    def wait_event(self, event) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Event:
    """A moment of a stream."""

    def __init__(self, *_, **__):
        pass

    def record(self, stream=None) -> Event:
        return self

    def wait(self, stream=None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def install() -> None:
    """To be called before torch._dynamo is imported, which takes these functions over."""
    state, stream = torch.zeros(16, dtype=torch.uint8), Stream()
    for name, answer in {
        # stand for: a driver that finds one device, and its numbers
        "is_available": True,
        "is_initialized": True,
        "_lazy_init": None,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": PROPERTIES.name,
        "get_device_capability": (9, 0),
        "get_device_properties": PROPERTIES,
        "is_bf16_supported": True,
        # stand for: switching to a device, of which there is only one
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        # stand for: streams, which keep work in order, and graphs
        "current_stream": stream,
        "default_stream": stream,
        "synchronize": None,
        "is_current_stream_capturing": False,
        # stand for: the state of its random numbers, which is kept around a compilation
        "get_rng_state": state,
        "get_rng_state_all": [state],
        "set_rng_state": None,
        "memory_allocated": 0,
    }.items():
        put(f"torch.cuda.{name}", lambda *_, answer=answer, **__: answer)
    put("torch.cuda.stream", lambda _: contextlib.nullcontext())
    put("torch.cuda.Stream", Stream)
    put("torch.cuda.Event", Event)

    # stand for: the same questions, asked of the C++ side
    put("torch._C._cuda_getCurrentRawStream", lambda _: 0)
    put("torch._C._cuda_getDevice", lambda: 0)
    # stands for: the first tensor on a device, which makes the context of a process there
    put("torch._subclasses.fake_tensor.init_gpu_context", lambda _: None)
    # stands for: a type that Dynamo takes as a constant
    if constants := find("torch._dynamo.utils.common_constant_types"):
        constants.add(Properties)
