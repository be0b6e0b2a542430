"""The numeric policy: what is equal passes, what is a little wrong does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxpress.testing import APPROXIMATES, BITWISE, assert_equivalent


class Casts(nn.Module):
    """Names float32 wherever a model can: as a cast, a dtype, and by making tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.baddbmm(torch.zeros(2, 16, 16), x, self.mix(x).to(torch.float32))
        filled = torch.where(y > 0, y, torch.tensor(0.5))
        return (filled.float() + torch.full((16,), 0.25, dtype=torch.float32)).softmax(-1)


X = torch.randn(2, 16, 16)


@pytest.mark.parametrize("exactness", [BITWISE, APPROXIMATES(0.0)])
def test_a_model_is_equal_to_itself(exactness: object) -> None:
    model = Casts()
    before = torch.get_default_dtype()
    assert_equivalent(model, model, (X,), exactness=exactness)  # type: ignore[arg-type]
    assert torch.get_default_dtype() == before


@pytest.mark.parametrize(("error", "message"), [(1e-5, "against float64"), (torch.nan, "finite")])
def test_a_small_error_is_found(error: float, message: str) -> None:
    model = Casts()
    wrong = model(X).detach().clone()
    wrong[0, 0, 0] += error
    with pytest.raises(AssertionError, match=message):
        assert_equivalent(lambda _: wrong, model, (X,))


def test_an_approximation_may_err_within_its_budget() -> None:
    model = Casts()
    near = model(X).detach() * 1.0005
    assert_equivalent(lambda _: near, model, (X,), exactness=APPROXIMATES(1e-3))
    with pytest.raises(AssertionError, match="allowed"):
        assert_equivalent(lambda _: near, model, (X,), exactness=APPROXIMATES(1e-4))


def test_shape_and_dtype_count() -> None:
    model = Casts()
    with pytest.raises(AssertionError, match="shape"):
        assert_equivalent(lambda x: model(x)[:1], model, (X,))
    with pytest.raises(AssertionError, match="dtype"):
        assert_equivalent(lambda x: model(x).double(), model, (X,))
