"""Makes Triton's interpreter right, and faster. Imported only where kernels run in it."""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def hasten() -> None:
    """Do in fewer steps what takes the interpreter half of its time.

    It puts its functions into triton.language again in each call of a device function, where once a launch is
    enough. And it looks for overflow by a dozen operations of its own for each operation on integers.
    """
    compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    patch = interpreter._patch_lang

    @functools.cache
    def languages(function) -> list:
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def patch_once(function):
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return patch(function)
        return interpreter._LangPatchScope()  # with nothing to restore

    def refuse_overflow(self, a, b, operation) -> None:
        a, b = a.handle.data, b.handle.data
        if a.itemsize < 8:
            exact = compute[operation.__name__](a, b, dtype=np.int64)
            assert np.array_equal(exact, exact.astype(a.dtype)), f"{operation.__name__} overflows"

    interpreter._patch_lang = patch_once
    TritonSemantic.binary_op_sanitize_overflow_impl = refuse_overflow


def mend() -> None:
    """Mend the interpreter, which keeps bfloat16 as uint16, truncates and computes on the bits, rounds
    to fp8 wrongly, and keeps NaN in a maximum, where GPUs take the other number.
    """

    def widen(x: TensorHandle) -> TensorHandle:
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def narrow(data: np.ndarray) -> TensorHandle:
        rounded = torch.from_numpy(np.ascontiguousarray(data, np.float32)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy().reshape(data.shape), tl.bfloat16)

    fp8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    cast, dot, binary = (getattr(InterpreterBuilder, n) for n in ("cast_impl", "create_dot", "binary_op"))
    convert = InterpreterBuilder.create_fp_to_fp

    def cast_impl(self, source, target):
        types = (source.dtype.scalar, target.scalar)
        if types == (tl.float32, tl.bfloat16):
            return narrow(source.data)
        if types == (tl.bfloat16, tl.float32):
            return widen(source)
        return cast(self, source, target)

    def create_fp_to_fp(self, source, target, mode):
        if source.dtype.scalar == tl.float32 and target.scalar in fp8:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(fp8[target.scalar])
            return TensorHandle(rounded.view(torch.uint8).numpy().reshape(source.data.shape), target.scalar)
        return convert(self, source, target, mode)

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = widen(a), widen(b)
        return dot(self, a, b, *rest)

    def binary_op(self, a, b, operation):
        if a.dtype.scalar == tl.bfloat16 and b.dtype.scalar == tl.bfloat16:
            result = operation(widen(a).data, widen(b).data)
            return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else narrow(result)
        return binary(self, a, b, operation)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
