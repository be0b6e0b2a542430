"""The numeric policy: one function that says whether two computations are the same.

A tolerance typed into a test says nothing about the computation. Here the reference itself sets
the scale: run in float64 it is taken for the truth, and the candidate may be no further from that
truth than the reference in its own dtype is, times a factor that its declared exactness allows,
plus a floor per dtype for references that happen to be exact.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = [
    "APPROXIMATES",
    "BITWISE",
    "REASSOCIATES",
    "Exactness",
    "assert_equivalent",
    "relative_rms",
]


@dataclass(frozen=True)
class Exactness:
    """How close a rewritten computation stays to the original.

    Attributes:
        name: the word used in reports and docstrings.
        factor: how many times the reference's own rounding error is allowed.
        budget: relative RMS error allowed on top, in units of the reference's RMS.
    """

    name: str
    factor: float
    budget: float = 0.0


BITWISE = Exactness("BITWISE", 0.0)
REASSOCIATES = Exactness("REASSOCIATES", 4.0)


def APPROXIMATES(budget: float) -> Exactness:
    """An exactness that allows a relative RMS error of `budget` on top of reassociation."""
    return Exactness(f"APPROXIMATES({budget:g})", REASSOCIATES.factor, budget)


# The rounding of one operation, times what a few dozen operations in a row add up to.
_FLOOR = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def relative_rms(candidate: Tensor, reference: Tensor) -> float:
    """RMS of the difference over RMS of the reference, in float64; 0 for two empty tensors."""
    c, r = candidate.detach().double().cpu(), reference.detach().double().cpu()
    if not r.numel():
        return 0.0
    least = 1e-30 * r.numel() ** 0.5
    return float((c - r).norm() / r.norm().clamp_min(least))


def _upcast(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double()
    return value


class _Widened(TorchFunctionMode):
    """Every floating dtype that a computation names is float64: it is the truth in every step."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        if func in _CASTS:
            return args[0].double()
        wide_args, wide_kwargs = pytree.tree_map(_widened, (args, dict(kwargs or {})))
        return func(*wide_args, **wide_kwargs)


_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


def _widened(value: Any) -> Any:
    is_floating = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if is_floating else value


@contextmanager
def _float64_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _truth(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a function gives in float64."""
    if isinstance(function, nn.Module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # copying a graph module warns of torch's own types
            function = copy.deepcopy(function).double()
    wide_args, wide_kwargs = pytree.tree_map(_upcast, (tuple(args), dict(kwargs)))
    with _float64_by_default(), _Widened():
        return function(*wide_args, **wide_kwargs)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _allowed(mine: Tensor, truth: Tensor, exactness: Exactness) -> float:
    floor = 0.0 if exactness is BITWISE else _FLOOR[mine.dtype]
    return exactness.factor * relative_rms(mine, truth) + floor + exactness.budget


def _compare(index: int, got: Tensor, want: Tensor, truth: Tensor, exactness: Exactness) -> None:
    where = f"output {index}"
    assert got.shape == want.shape, f"{where}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{where}: dtype {got.dtype}, not {want.dtype}"
    if exactness is BITWISE or not want.is_floating_point():
        same = torch.equal(got.cpu(), want.cpu())
        assert same, f"{where}: not bit for bit the reference"
        return
    finite = torch.isfinite(truth).cpu()
    assert torch.equal(torch.isfinite(got).cpu(), finite), f"{where}: not finite where it should be"
    if not finite.all():
        got, want, truth = (t[finite.to(t.device)] for t in (got, want, truth))
    error, allowed = relative_rms(got, truth), _allowed(want, truth, exactness)
    assert error <= allowed, (
        f"{where}: relative RMS error {error:.3g} against float64, allowed {allowed:.3g} "
        f"({exactness.name}; the reference's own error is {relative_rms(want, truth):.3g})"
    )


def assert_equivalent(
    candidate: Callable[..., Any],
    reference: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    exactness: Exactness = REASSOCIATES,
) -> None:
    """Assert that `candidate(*args)` is `reference(*args)` within the declared exactness.

    Args:
        candidate: the rewritten callable or module.
        reference: the original; it also runs in float64 (a module is copied and upcast, a plain
            function is called with upcast arguments; casts and tensors that it makes are float64).
        args: positional arguments, tensors or anything else.
        kwargs: keyword arguments.
        exactness: `BITWISE`, `REASSOCIATES` or `APPROXIMATES(budget)`.

    Raises:
        AssertionError: naming the output, its error against float64 and what was allowed.
    """
    kwargs = dict(kwargs or {})
    with torch.no_grad():
        got = _tensors(candidate(*args, **kwargs))
        want = _tensors(reference(*args, **kwargs))
        truth = want if exactness is BITWISE else _tensors(_truth(reference, args, kwargs))
    assert len(got) == len(want), f"{len(got)} output tensors, not {len(want)}"
    for index, (g, w, t) in enumerate(zip(got, want, truth, strict=True)):
        _compare(index, g, w, t, exactness)
