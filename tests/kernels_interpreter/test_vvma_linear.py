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
    kernels_of,
    launch,
    products_of,
    sums_of,
    whole_of,
)
from fxpress.ops.linear_samples import vvma_samples
from fxpress.ops.vvma_linear import VvmaSite, vvma_reference
from fxpress.testing import assert_equivalent

DTYPES = [torch.float32, torch.float16]
NAMES = [s.name for s in vvma_samples(torch.float32, "cpu")]


def interpreted(x: Tensor, core: Tensor, vectors: Tensor, *rest: Any) -> Tensor:
    bias, activation, m = rest
    rows = x.reshape(-1, x.shape[-1])
    site = VvmaSite.of(rows, core, vectors, bias, activation, m)
    kernels = [(emit(s).load().kernel, s) for s in kernels_of(site)]
    return launch(kernels, rows, core, vectors, bias).view(*x.shape[:-1], m)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    (s,) = (s for s in vvma_samples(dtype, "cpu") if s.name == name)
    assert_equivalent(interpreted, vvma_reference, s.args)


@pytest.mark.parametrize("terms", [4, 16])
def test_options_change_no_result(terms: int) -> None:
    core, vectors = torch.randn(terms, 16, 16), torch.randn(terms, 4, 8, 16)
    x = torch.randn(5, 128)
    one = whole_of(VvmaSite.of(x, core, vectors, None, None, 64))
    ways: list[tuple[VvmaKernel, ...]] = [(one,), (replace(one, group=2, width=4),)]
    for group, rows, width in ((1, 1, 8), (2, 4, 4), (4, 8, 8)):
        sums = replace(sums_of(one, 5), group=group, rows=rows, width=width)
        ways += [(sums, products_of(one)), (sums, replace(products_of(one), group=2, rows=32))]
    for kernels in ways:
        loaded = [(emit(s).load().kernel, s) for s in kernels]

        def call(x: Tensor, core: Tensor, vectors: Tensor, loaded: Any = loaded) -> Tensor:
            return launch(loaded, x, core, vectors, None)

        assert_equivalent(call, vvma_reference, (x, core, vectors))
