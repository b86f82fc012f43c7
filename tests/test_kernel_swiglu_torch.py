"""Do compiled activations and gradients equal those by passes, wherever they are asked for?"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import assert_equals, randn
from torch.utils.flop_counter import FlopCounterMode

from kernels.swiglu_torch import MAX_VARIANTS, activate, activate_backward, dot_rows


@pytest.mark.parametrize("num_rows", [0, 1, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_of_rows_are_not_rounded(num_rows, dtype, monkeypatch):
    # In parts of ten rows, the last of three.
    monkeypatch.setattr("kernels.swiglu_torch.DOT_ELEMENTS", 400)
    a, b = (randn(num_rows, 40, seed=seed).to(dtype) for seed in (1, 2))
    dots = dot_rows(a, b)
    assert dots.dtype == torch.promote_types(dtype, torch.float32)
    assert_equals(dots, (a.double() * b.double()).sum(-1))


def test_under_a_counter_in_a_thread_and_whatever_the_default_device(compiler):
    h, grad_a, scale = randn(1, 6, 40, seed=1), randn(6, 20, seed=2), randn(6, seed=3)

    def both_ways(compiled=True):
        a = activate(h, 0.5, compiled=compiled)
        dots = h.new_empty(6)
        gradients = activate_backward(h, grad_a, scale, dots, 0.5, compiled=compiled)
        return a, *gradients, dots, torch.compiler.config.recompile_limit

    *expected, _ = both_ways(compiled=False)
    results = [both_ways()]
    with FlopCounterMode(display=False):
        results.append(both_ways())
    results.append(both_ways())  # PyTorch has not given the functions up
    with torch.device("meta"):
        results.append(both_ways())
    with ThreadPoolExecutor(1) as thread:
        results.append(thread.submit(both_ways).result())
    for *ours, limit in results:
        assert limit >= MAX_VARIANTS
        for actual, passes in zip(ours, expected, strict=True):
            assert_equals(actual, passes.double())
