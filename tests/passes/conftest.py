"""What tests of passes share: the comparison of gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxpress.testing import APPROXIMATES, REASSOCIATES, assert_equivalent

# The gradient of a single number is one sum, whose terms may cancel: how far off the model's own is
# from run to run differs twentyfold, and is luck in any one.
_CANCELLING = APPROXIMATES(1e-4)


class Gradients(nn.Module):
    """The gradients of a module's outputs by its inputs and the parameters of some names."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """A fixed combination of all outputs, differentiated."""
        with torch.enable_grad():
            args, kwargs = pytree.tree_map(_followed, (args, kwargs))
            inputs = [t for t in pytree.tree_leaves((args, kwargs)) if _is_float(t)]
            outputs = pytree.tree_leaves(self.module(*args, **kwargs))
            floats = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
            weights = [(torch.arange(t.numel()) % 7 - 3).view(t.shape).to(t.dtype) for t in floats]
            loss = sum((t * w).sum() for t, w in zip(floats, weights, strict=True))
            assert isinstance(loss, Tensor)
            wanted = inputs + [self.module.get_parameter(name) for name in self.names]
            if not wanted:
                return []
            return list(torch.autograd.grad(loss, wanted, materialize_grads=True))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _followed(value: Any) -> Any:
    """A tensor whose gradient is followed, where it has one."""
    return value.detach().requires_grad_() if _is_float(value) else value


def _identity(parameter: nn.Parameter) -> tuple[int, torch.Size]:
    return parameter.data_ptr(), parameter.shape


@pytest.fixture
def assert_same_gradients() -> Callable[..., None]:
    """Compare the gradients of a graph and of the module that it was captured from.

    Parameters are paired by their storage, which the two share: tied ones go by several names.
    """

    def compare(
        graph: nn.Module, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None
    ) -> None:
        named = {_identity(p): name for name, p in graph.named_parameters() if p.requires_grad}
        pairs = [
            (named[_identity(p)], name)
            for name, p in model.named_parameters()
            if _identity(p) in named
        ]
        assert pairs
        single = [pair for pair in pairs if model.get_parameter(pair[1]).numel() == 1]
        several = [pair for pair in pairs if pair not in single]
        for some, exactness in ((several, REASSOCIATES), (single, _CANCELLING)):
            mine, theirs = ([pair[i] for pair in some] for i in (0, 1))
            ours, wanted = Gradients(graph, mine), Gradients(model, theirs)
            assert_equivalent(ours, wanted, args, kwargs, exactness=exactness)

    return compare
