"""Define an operator whose body compilers see through, without importing Triton.

This is `torch.library.triton_op` less its search for Triton kernels in the body's source: that
search imports Triton (or warns where there is none) as soon as an operator is defined, and would
not find generated kernels anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch._library.triton import set_wrap_triton_enabled
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

__all__ = ["define"]


def define(name: str, body: Callable[..., Any], fake: Callable[..., Any]) -> CustomOpDef:
    """Define `name` with the schema of `body`'s annotations.

    Args:
        name: full name, such as `fxpress::sparse_attention`.
        body: plain torch and wrapped Triton kernels, on every device. `torch.compile` and
            ahead-of-time compilers trace it; `torch.export` keeps the operator whole.
        fake: shapes and strides of the outputs, without looking at more than it must: a size that
            is compared with a number is no longer dynamic.
    """

    def eager(*args: Any) -> Any:
        with set_wrap_triton_enabled(False):  # plain tensors: launch kernels directly
            return body(*args)

    def decompose(
        mode: FunctionalTensorMode,
        operator: Any,
        types: Sequence[type],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        if not all(
            t in (torch.Tensor, FunctionalTensor) or issubclass(t, FakeTensor) for t in types
        ):
            return NotImplemented
        with mode:
            return body(*args, **kwargs)

    schema = torch.library.infer_schema(body, mutates_args=())
    operator = torch.library.custom_op(name, eager, mutates_args=(), schema=schema)
    assert isinstance(operator, CustomOpDef)
    # Past the checks and switches of `custom_op`, which on CPU cost more than a small call.
    operator._lib.impl(name.partition("::")[2], body, "CPU")
    operator.register_fake(fake)
    operator.register_torch_dispatch(FunctionalTensorMode, decompose)
    return operator
