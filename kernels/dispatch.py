"""Choose Triton, C or torch, register kernels as torch operations, query devices: here and nowhere else.

GPUs have kernels in Triton, CPUs in C. Both are optional: without Triton or a C compiler, everything runs in
torch. Kernel files take `triton`, `tl` and `jit` from here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.infer_schema import infer_schema
from torch.library import custom_op, triton_op
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hotlap.common.log import log
from hotlap.kernels.cpu.library import MACROS, library
from hotlap.kernels.cpu.measured import fastest

try:
    import triton
    import triton.language as tl
except ImportError:  # not available on this platform
    triton = tl = None

# TRITON_INTERPRET as @triton.jit has seen it
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels take


def jit(function: Callable, **options: Any) -> Any:
    """`triton.jit`, where there is Triton."""
    return triton.jit(function, **options) if triton else function


class _Thread(threading.local):
    launches = False  # whether an operation of this thread launches kernels now, so that nothing traces them


_thread = _Thread()
_unregistered: list[Callable[[], None]] = []  # what registers the operations with torch
_registering = threading.RLock()


def launches() -> bool:
    """Whether `wrap_triton` leaves kernels as they are, so that launches may have options that no tracer
    takes: where `kernel_op` launches them, and in the interpreter, whose kernels torch does not wrap before
    2.13.
    """
    return INTERPRETED or _thread.launches


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton` for tracers, or just the kernel."""
    return kernel if launches() else torch.library.wrap_triton(kernel)


def allow_descriptors() -> None:
    """Give the kernels that this thread launches memory for tensor descriptors. Compiled graphs do so
    themselves.
    """
    triton.set_allocator(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory on the current GPU for the descriptors of a launch."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@functools.cache
def _decide(device_type: str) -> str:
    choice = os.environ.get("HOTLAP_KERNELS", "")
    if choice not in ("", "torch", "triton", "c"):
        raise ValueError(f"HOTLAP_KERNELS={choice!r} is unknown; it can be torch, triton or c, or unset")
    why = f"HOTLAP_KERNELS={choice}"
    if choice == "triton":
        if triton is None:
            raise ValueError("HOTLAP_KERNELS=triton, but there is no Triton; pip install triton, or unset it")
        if device_type != "cuda" and not INTERPRETED:
            raise ValueError(
                f"HOTLAP_KERNELS=triton, but Triton has no code for tensors on {device_type!r}; unset it, or "
                "set TRITON_INTERPRET=1 as well to run the kernels in Triton's interpreter (slow: for tests)"
            )
    elif choice == "c" or (not choice and device_type == "cpu"):
        choice, why = _compiled(required=bool(choice)) if device_type == "cpu" else ("torch", "C is for CPUs")
    elif not choice:
        if device_type != "cuda":
            choice, why = "torch", f"tensors are on {device_type!r}"
        elif triton is None:
            choice, why = "torch", "there is no Triton"
        elif torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
            choice, why = "torch", "the GPU is older than compute capability 8.0"
        else:
            choice, why = "triton", "tensors are on a GPU"
    log.info("kernels: %s (%s)", choice, why)
    return choice


def _compiled(required: bool) -> tuple[str, str]:
    """Compile the C kernels, and return the choice for CPUs with its reason."""
    try:
        for dtype in MACROS:
            library(dtype)
    except OSError as error:
        if required:
            raise ValueError(f"HOTLAP_KERNELS=c, but {error}; install gcc, set CC, or unset it") from None
        return "torch", f"no kernels in C: {error}"
    return "c", "tensors are on a CPU"


def constant(function: Callable) -> Callable:
    """Let compilers use the function's result instead of tracing the call.

    The same as `torch.compiler.assume_constant_result`, which would import the compiler: 2 s at start-up.
    """
    function._dynamo_marked_constant = True
    return function


@constant
def kernel_choice(device_type: str) -> str:
    """`torch`, `triton` or `c` for tensors on devices of this type; HOTLAP_KERNELS overrides."""
    return _decide(device_type)


def use_triton(x: Tensor) -> bool:
    """Whether operations on x run our Triton kernels rather than the torch reference.

    This is a branch in Python because an operation that holds both cannot be compiled on a CPU.
    """
    return x.device.type != "meta" and x.dtype in DTYPES and kernel_choice(x.device.type) == "triton"


def use_c(x: Tensor) -> bool:
    """Whether operations on x run our C kernels."""
    return x.device.type == "cpu" and x.dtype in MACROS and kernel_choice("cpu") == "c"


def traced() -> bool:
    """Whether a compiler or a dispatch mode records the operations that run now."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


@constant
def register_operations() -> None:
    """Register the operations of all kernels with torch, those that are not yet."""
    with _registering:
        while _unregistered:
            _unregistered.pop()()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that `torch.autocast` computes matmuls in on the device of x; None where it is off."""
    kind = x.device.type  # torch knows no autocast for meta tensors, and raises
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What a matmul is given, cast as `torch.autocast` casts it: to its dtype, but not from float64."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def promote(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors of an elementwise operation, under `torch.autocast` in the widest of their dtypes: matmuls have
    its dtype there, and what was not multiplied its own.
    """
    if autocast_dtype(tensors[0]) is None:
        return tensors
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors if x is not None))
    return tuple(None if x is None else x.to(dtype) for x in tensors)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which torch computes in the dtypes that it is given on the device of x."""
    off = autocast_dtype(x) is None
    return contextlib.nullcontext() if off else torch.autocast(x.device.type, enabled=False)


class kernel_op:
    """An operation of torch whose implementation launches kernels, with `torch.autocast` switched off.

    implementation: launches Triton kernels. It has type annotations, takes a tensor first, returns new
    tensors or None, and modifies only the tensors, or lists of them, that `mutates` names. fake: the same for
    shapes only. save(ctx, inputs, output) and backward(ctx, *grads): as in `torch.autograd.Function`; an
    operation without them is not differentiable.

    In the interpreter it is a custom_op, because an interpreted kernel cannot be traced. On a GPU it is a
    triton_op, whose kernels Inductor sees. An opaque operation is a custom_op on a GPU too: it plans its own
    memory, or calls what Inductor cannot compile. Plain eager calls skip the dispatcher, which takes the time
    of a call from 6 to 18 us (measured on a Zen 5 EPYC). They and opaque calls launch kernels directly:
    torch's operator for launches, which only a tracer needs, makes a launch six times as long, and no
    dispatch mode has a rule for it.

    c: the implementation for CPUs, with the same arguments and results, where there is one. It is an
    operation of its own, opaque to compilers, that shares all the rest.

    It is registered when the dispatcher first needs it, because registering a triton_op imports torch's
    compiler, which takes 2 s at start-up. Eager calls do without.
    """

    def __init__(
        self,
        name: str,
        implementation: Callable,
        fake: Callable,
        save: Callable | None = None,
        backward: Callable | None = None,
        mutates: tuple[str, ...] = (),
        opaque: bool = False,
        c: Callable | None = None,
    ):
        self.c = c and kernel_op(f"{name}_c", c, fake, save, backward, mutates, opaque=True)

        def launch(*inputs):
            outer, _thread.launches = _thread.launches, True
            try:
                with no_autocast(inputs[0]):  # inputs have the dtypes to compute in, and results are written
                    return implementation(*inputs)
            finally:
                _thread.launches = outer

        def register():
            if triton and not (INTERPRETED or opaque):
                op = triton_op(f"hotlap::{name}", implementation, mutates_args=mutates)
            else:
                schema = infer_schema(implementation, mutates_args=mutates)
                op = custom_op(f"hotlap::{name}", launch, mutates_args=mutates, schema=schema)
            op.register_fake(fake)
            if backward:
                op.register_autograd(backward, setup_context=save)
            self.op = op

        _unregistered.append(register)
        self.eager = launch
        names = list(inspect.signature(implementation).parameters)
        self.mutated = [names.index(name) for name in mutates]
        if backward is None:
            return

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                output = launch(*inputs)
                save(ctx, inputs, output)
                return output

        Eager.backward = staticmethod(backward)

        def eager(*inputs):
            learns = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in inputs)
            return Eager.apply(*inputs) if learns else launch(*inputs)

        self.eager = eager

    def registered(self) -> Callable:
        """The operation that dispatcher and compilers see."""
        register_operations()
        return self.op

    def __call__(self, *inputs):
        if self.c and use_c(inputs[0]):
            return self.c(*inputs)
        plain = not traced() and type(inputs[0]) in (Tensor, Parameter)
        if not plain:
            return self.registered()(*inputs)
        output = self.eager(*inputs)
        if self.mutated:  # so that autograd notices a tensor saved before
            for changed in (inputs[i] for i in self.mutated):
                torch.autograd.graph.increment_version(changed)
        return output


class Device(NamedTuple):
    """Properties of a GPU that the choice of a tile depends on."""

    name: str
    shared_memory: int  # bytes that one block may use
    processors: int  # streaming multiprocessors, or compute units
    warp: int = 32  # threads
    tma: bool = False  # copies tiles by tensor descriptors (Tensor Memory Accelerator)
    compute: int = 0  # NVIDIA's compute capability, times ten


@functools.cache
def device_facts(device: torch.device) -> Device:
    """Properties of a GPU, or on a CPU those that the interpreter pretends to have."""
    if device.type != "cuda":
        return Device("interpreter", shared_memory=64 << 10, processors=2)
    facts = torch.cuda.get_device_properties(device)
    # ROCm leaves the opt-in size at zero
    shared = getattr(facts, "shared_memory_per_block_optin", 0) or facts.shared_memory_per_block
    compute = 0 if torch.version.hip else 10 * facts.major + facts.minor
    return Device(
        facts.name, shared, facts.multi_processor_count, facts.warp_size, tma=compute >= 90, compute=compute
    )


def default_device() -> torch.device:
    """The first GPU with CUDA or ROCm, or the CPU. HOTLAP_DEVICE overrides; ValueError if there is none."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    choice = os.environ.get("HOTLAP_DEVICE", "")
    if choice and not there.get(choice):
        names = " or ".join(name for name in there if there[name])
        raise ValueError(f"HOTLAP_DEVICE={choice!r} is no device of this machine; set {names}, or unset it")
    if not choice and there["mps"]:
        _log_untried()
    return torch.device(choice or ("cuda" if there["cuda"] else "cpu"))


@functools.cache
def _log_untried() -> None:
    log.info("on the CPU: HOTLAP_DEVICE=mps takes this Mac's GPU, which has not been tried so far")


@functools.cache
def fast_dtype(device_type: str, width: int = 768) -> torch.dtype:
    """The dtype with the fastest matmuls on this device that is accurate enough for training.

    A GPU: bfloat16 if it has it. A CPU: float32 or bfloat16, whichever multiplies matrices of a model of this
    width faster (from 512 on, of 512). CPUs that list bfloat16 instructions differ: two cores of a Zen 5 EPYC
    reach 800 GFLOP/s in bfloat16 and 165 in float32, two of a Xeon without AMX 144 and 252.
    """
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    if device_type != "cpu":
        return torch.float32
    width = min(width, 512)
    rows = (1 << 23) // width**2  # 0.13 GFLOP, about a millisecond

    def prepare(dtype: torch.dtype) -> Callable[[], Tensor]:
        x, w = torch.ones(rows, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)
        return lambda: x @ w.T @ w

    candidates = {name: functools.partial(prepare, getattr(torch, name)) for name in ("float32", "bfloat16")}
    return getattr(torch, fastest(f"compute dtype for a width of {width}", candidates))
