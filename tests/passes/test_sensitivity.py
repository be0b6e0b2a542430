"""Row weights: what the output minds of an error in each row, against gradients by brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.capture import Call, capture_calls
from fxpress.passes.sensitivity import row_weights
from fxpress.passes.sites import attention_sites
from fxpress.progress import Progress
from fxpress.regions import CapturedModel
from fxpress.testing import assert_equivalent

ROWS = 6


class Read(nn.Module):
    """A number read from rows of attention (1, 2, N, 4), some rows more than others.

    `as_logits` gives the two classes (s, -s) with s = 0 on the call of the test: both labels then
    have gradients of one length, so that drawing one of them changes nothing.
    """

    def __init__(self, as_logits: bool) -> None:
        super().__init__()
        self.importance = torch.linspace(0, 1, 2 * ROWS).view(1, 2, ROWS, 1)
        self.mix = nn.Parameter(torch.randn(1, 2, 1, 4))
        self.as_logits = as_logits
        self.zero = torch.zeros(())

    def attend(self, x: Tensor) -> Tensor:
        """What the weights are about."""
        return F.scaled_dot_product_attention(x * self.mix, x, x)

    def read(self, o: Tensor) -> Tensor:
        """A number (1,)."""
        return (torch.tanh(o * self.mix) * self.importance).sum().view(1) - self.zero

    def forward(self, x: Tensor) -> Any:
        s = self.read(self.attend(x))
        return {"logits": torch.stack([s, -s], -1)} if self.as_logits else s


class Gradients(nn.Module):
    """|ds/do|^2 / D by row, (H, N): of s over |s|, or of the logits (0, -0)."""

    def __init__(self, model: Read) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            o = self.model.attend(x).detach().requires_grad_()
            s = self.model.read(o)
            (gradient,) = torch.autograd.grad(s.sum(), o)
        scale = 1.0 if self.model.as_logits else float(s.detach().abs())
        return (gradient[0] / scale).square().mean(-1)


def weights_of(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Row weights of a model with one attention."""
    calls: list[Call] = [((x,), {}) for x in inputs]
    program = capture_calls(model, calls)
    captured = CapturedModel(model, {"": program})
    return row_weights(captured, attention_sites(program), calls, Progress())


@pytest.mark.parametrize("as_logits", [False, True])
def test_weights_are_squared_gradients(as_logits: bool) -> None:
    model, x = Read(as_logits), torch.randn(1, 2, ROWS, 4)
    if as_logits:
        model.zero = model.read(model.attend(x)).detach()[0]
    (weights,) = weights_of(model, x).values()
    assert_equivalent(lambda _: weights, Gradients(model), (x,))
    assert weights[0, 0] == 0  # a row that is not read


def test_weights_are_means_over_calls() -> None:
    model = Read(False)
    one, other = torch.randn(2, 1, 2, ROWS, 4)
    single = [next(iter(weights_of(model, x).values())) for x in (one, other)]
    (both,) = weights_of(model, one, other).values()
    assert_equivalent(lambda: both, lambda: (single[0] + single[1]) / 2, ())


class Longer(nn.Module):
    """A number (1,) from attention of any length."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x).square().sum().view(1)


def test_rows_that_few_calls_have_are_means_over_those() -> None:
    short, long = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 8, 4)
    (both,) = weights_of(Longer(), short, long).values()
    (alone,) = weights_of(Longer(), long).values()
    assert both.shape == (2, 8)
    assert_equivalent(lambda: both[:, 5:], lambda: alone[:, 5:], ())
    assert not torch.equal(both[:, :5], alone[:, :5])


def test_a_call_that_runs_the_original_counts_for_nothing() -> None:
    row, *longer = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 8, 4)
    (weights,) = weights_of(Longer(), *longer).values()
    with pytest.warns(UserWarning, match="a call runs the original module"):
        (same,) = weights_of(Longer(), row, *longer).values()
    assert_equivalent(lambda: same, lambda: weights, ())


class Chosen(nn.Module):
    """An output that has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x).argmax(-1)


def test_without_a_gradient_there_are_no_weights() -> None:
    assert weights_of(Chosen(), torch.randn(1, 2, ROWS, 4)) == {}
