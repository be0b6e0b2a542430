"""Quality: what a rewritten model must keep, and how it is measured on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxpress.capture import Call
from fxpress.errors import CalibrationError, PlanError

__all__ = [
    "Quality",
    "References",
    "divergence",
    "float_outputs",
    "kl_divergence",
    "logit_outputs",
]

_CACHE_BYTES = 1 << 30
_DEFAULT_RMS = {torch.float64: 0.02, torch.float32: 0.02, torch.float16: 0.03, torch.bfloat16: 0.05}
_DEFAULT_KL = {torch.float64: 0.02, torch.float32: 0.02, torch.float16: 0.02, torch.bfloat16: 0.03}


def kl_divergence(reference: Tensor, candidate: Tensor) -> Tensor:
    """Mean KL(reference || candidate) in nats over all positions of logits (..., classes)."""
    p, q = reference.float().log_softmax(-1), candidate.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def logit_outputs(output: Any) -> list[Tensor]:
    """Outputs that are logits by name: a field or key called `logits`."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    named = [(str(path[-1]) if path else "", leaf) for path, leaf in leaves]
    return [leaf for name, leaf in named if "logits" in name and isinstance(leaf, Tensor)]


def float_outputs(output: Any) -> list[Tensor]:
    """All floating-point tensors of an output."""
    leaves = pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def divergence(reference: Any, candidate: Any) -> float:
    """How far two outputs of a model are apart: KL for logits, else relative RMS.

    The largest over the tensors counts; NaN in the candidate counts as infinite.
    """
    if logits := logit_outputs(reference):
        pairs = zip(logits, logit_outputs(candidate), strict=True)
        values = [float(kl_divergence(r, c)) for r, c in pairs]
    else:
        pairs = zip(float_outputs(reference), float_outputs(candidate), strict=True)
        values = [_relative_rms(r, c) for r, c in pairs]
    return max((math.inf if math.isnan(v) else max(v, 0.0) for v in values), default=0.0)


def _relative_rms(reference: Tensor, candidate: Tensor) -> float:
    error = (candidate.double() - reference.double()).pow(2).mean().sqrt()
    return float(error / reference.double().pow(2).mean().sqrt().clamp_min(1e-30))


@dataclass
class References:
    """Outputs of a model on calls, by their index; kept while they fit into memory together."""

    model: nn.Module
    calls: Sequence[Call]
    _kept: dict[int, Any] = field(default_factory=dict, repr=False)
    _bytes: int = 0

    def __getitem__(self, index: int) -> Any:
        if index in self._kept:
            return self._kept[index]
        args, kwargs = self.calls[index]
        with torch.no_grad():
            output = self.model(*args, **kwargs)
        size = sum(t.nbytes for t in float_outputs(output))
        if self._bytes + size <= _CACHE_BYTES:
            self._kept[index] = output
            self._bytes += size
        return output


@dataclass
class Quality:
    """The budget and its measure.

    With `validation_fn` the score (higher is better) may fall by at most `budget`; without it,
    the mean divergence of the outputs on the held-out calls may be at most `budget`.

    Attributes:
        model: the original.
        calls: held-out calls.
        validation_fn: scores a module.
        budget: the largest `drop` allowed.
        metric: what the numbers are, in words.
        before: score of the original (0 for a divergence).
    """

    model: nn.Module
    calls: Sequence[Call]
    validation_fn: Callable[[nn.Module], float] | None
    budget: float
    metric: str = ""
    before: float = 0.0

    def __post_init__(self) -> None:
        self._references = References(self.model, self.calls)

    @staticmethod
    def of(
        model: nn.Module,
        calls: Sequence[Call],
        validation_fn: Callable[[nn.Module], float] | None = None,
        max_drop: float = 0.01,
        max_divergence: float | None = None,
    ) -> Quality:
        """Check the budget and measure the original.

        Raises:
            PlanError: a budget out of range, or both kinds of budget.
            CalibrationError: `validation_fn` is not a function, raised, or gave no number.
        """
        if validation_fn is not None and max_divergence is not None:
            raise PlanError("give validation_fn with max_drop, or max_divergence, not both")
        _check_budget("max_drop", max_drop)
        if max_divergence is not None:
            _check_budget("max_divergence", max_divergence)
        if validation_fn is not None:
            if not callable(validation_fn):
                raise CalibrationError("validation_fn is no function: give one of a module")
            quality = Quality(model, calls, validation_fn, max_drop, "validation_fn score")
            quality.before = quality.score(model)
            return quality
        quality = Quality(model, calls, None, 0.0)
        output = quality._references[0]
        logits = bool(logit_outputs(output))
        dtype = float_outputs(output)[0].dtype if float_outputs(output) else torch.float32
        default = (_DEFAULT_KL if logits else _DEFAULT_RMS)[dtype]
        quality.budget = default if max_divergence is None else max_divergence
        quality.metric = "KL divergence of logits (nats)" if logits else "relative RMS of outputs"
        return quality

    @property
    def is_exact(self) -> bool:
        """Whether outputs may not change at all; a score may stay where outputs change."""
        return self.validation_fn is None and self.budget == 0

    def drop(self, module: nn.Module) -> float:
        """How much worse a module is: score lost, or mean divergence on the held-out calls."""
        if self.validation_fn is not None:
            return self.before - self.score(module)
        with torch.no_grad():
            total = 0.0
            for index, (args, kwargs) in enumerate(self.calls):
                total += divergence(self._references[index], module(*args, **kwargs))
        return total / len(self.calls)

    def score(self, module: nn.Module) -> float:
        """`validation_fn` of a module, checked."""
        assert self.validation_fn is not None
        try:
            with torch.no_grad():
                value = float(self.validation_fn(module))
        except Exception as error:
            brief = " ".join(str(error).split())[:200]
            raise CalibrationError(
                f"validation_fn raised {type(error).__name__}: {brief}"
            ) from error
        if not math.isfinite(value):
            raise CalibrationError(f"validation_fn gave {value}: it must give a finite number")
        return value


def _check_budget(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise PlanError(f"{name} is {value!r}: give a number of at least 0")
