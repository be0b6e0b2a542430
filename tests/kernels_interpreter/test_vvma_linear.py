"""The generated kernels of `vvma_linear`, run on CPU by Triton's interpreter (fp32 and fp16)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxpress.kernels.vvma_linear import emit, kernels_of, launch
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
