"""Makes bfloat16 faithful in Triton's interpreter, which computes on its raw 16-bit patterns.

Casts round to nearest even; arithmetic is done in float32 and rounded; matmuls and sums accumulate
in float32. Installed once by `conftest.py` where the interpreter is on.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
_COMPARE = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bit patterns (uint16)."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns of values, rounded to nearest even."""
    shape = np.shape(values)
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(shape)


def _is_bfloat16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle) -> np.ndarray:
    return widen(handle.data) if _is_bfloat16(handle) else handle.data


def install() -> None:
    """Replace the interpreter's operations on bfloat16."""
    cast, binary, unary = _Builder.cast_impl, _Builder.binary_op, _Builder.unary_op
    dot, convert, total = _Builder.create_dot, _Builder.create_fp_to_fp, interpreter.ReduceOps.sum

    def cast_impl(self, source, target):
        have, want = source.dtype.scalar, target.scalar
        if have == want:
            return _Handle(source.data, want)
        if have == tl.bfloat16:
            return _Handle(widen(source.data).astype(interpreter._get_np_dtype(target)), want)
        if want == tl.bfloat16:
            return _Handle(narrow(source.data.astype(np.float32)), want)
        return cast(self, source, target)

    def create_fp_to_fp(self, source, target, rounding):
        have, want = source.dtype.scalar, target.scalar
        wide = min(have.primitive_bitwidth, want.primitive_bitwidth) >= 16
        if tl.bfloat16 in (have, want) and wide:
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    def binary_op(self, left, right, op):
        if not _is_bfloat16(left) or op in _BITWISE:
            return binary(self, left, right, op)
        out = op(widen(left.data), _values(right))
        return _Handle(out, tl.int1) if op in _COMPARE else _Handle(narrow(out), tl.bfloat16)

    def unary_op(self, argument, op):
        if not _is_bfloat16(argument):
            return unary(self, argument, op)
        return _Handle(narrow(op(widen(argument.data))), tl.bfloat16)

    def create_dot(self, a, b, accumulator, precision, max_imprecise):
        if not (_is_bfloat16(a) or _is_bfloat16(b)):
            return dot(self, a, b, accumulator, precision, max_imprecise)
        product = np.matmul(_values(a), _values(b), dtype=accumulator.data.dtype)
        return _Handle(product + accumulator.data, accumulator.dtype.scalar)

    def reduce_sum(self, x):
        if not _is_bfloat16(x.handle):
            return total(self, x)
        out = np.sum(widen(x.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(narrow(out), x.dtype)

    _Builder.cast_impl, _Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    _Builder.binary_op, _Builder.unary_op, _Builder.create_dot = binary_op, unary_op, create_dot
    interpreter.ReduceOps.sum = reduce_sum
