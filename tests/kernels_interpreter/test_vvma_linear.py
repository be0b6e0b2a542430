"""The generated kernels of `vvma_linear`, run on CPU by Triton's interpreter (fp32 and fp16)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpress.kernels.vvma_linear import (
    VvmaKernel,
    emit,
    kernel_of,
    launch,
    sums_of,
    whole_of,
)
from fxpress.ops.linear_samples import vvma_samples
from fxpress.ops.vvma_linear import VvmaSite, lay_out_cores, vvma_reference
from fxpress.testing import assert_equivalent

DTYPES = [torch.float32, torch.float16]
NAMES = [s.name for s in vvma_samples(torch.float32, "cpu")]


def interpreted(x: Tensor, core: Tensor, vectors: Tensor, *rest: Any) -> Tensor:
    bias, activation, m = rest
    rows = x.reshape(-1, x.shape[-1])
    site = VvmaSite.of(rows, core, vectors, bias, activation, m)
    kernel = kernel_of(site)
    y = launch(emit(kernel).load().kernel, kernel, rows, core, vectors, bias)
    return y.view(*x.shape[:-1], m)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    (s,) = (s for s in vvma_samples(dtype, "cpu") if s.name == name)
    assert_equivalent(interpreted, vvma_reference, s.args)


@pytest.mark.parametrize("terms", [4, 8])
def test_options_change_no_result(terms: int) -> None:
    core, vectors = torch.randn(terms, 16, 16), torch.randn(terms, 4, 8, 16)
    x = torch.randn(5, 128)
    site = VvmaSite.of(x, core, vectors, None, None, 64)
    ways = [whole_of(site), sums_of(site)]
    for group, rows, width in ((1, 1, 8), (2, 1, 4), (4, 2, 4), (1, 4, 2), (2, 8, 8)):
        ways.append(replace(ways[0], group=group, rows=rows, width=width))
        ways.append(replace(ways[1], rows=rows, width=width))
    for kernel in ways:
        function = emit(kernel).load().kernel

        def call(
            x: Tensor,
            core: Tensor,
            vectors: Tensor,
            run: Any = function,
            kernel: VvmaKernel = kernel,
        ) -> Tensor:
            return launch(run, kernel, x, core, vectors, None)

        assert_equivalent(call, vvma_reference, (x, core, vectors))
        assert_equivalent(call, vvma_reference, (x, lay_out_cores(core), vectors))
