"""RUM against its equations with explicit rotation matrices, and what holds of any sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.testing import BITWISE, assert_equivalent
from fxpress.zoo import RUM
from fxpress.zoo import rum as rum_module
from fxpress.zoo.rum import RUMCell, State

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp_min(0),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softsign": lambda x: x / (1 + x.abs()),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lambda_": 1},
    {"lambda_": 1, "eta": 0.1},
    {"eta": 1.0, "activation": "tanh"},
    {"activation": "sigmoid", "update_gate": False},
    {"lambda_": 1, "activation": "softsign", "layer_norm": True},
]


def rotation_matrix(a: Tensor, b: Tensor) -> Tensor:
    """R(a, b) of METHODS for vectors (H,)."""
    a, b = a / a.norm(), b / b.norm()
    c, eye = a @ b, torch.eye(len(a), dtype=a.dtype)
    aa, ab, ba, bb = (torch.outer(p, q) for p, q in itertools.product((a, b), repeat=2))
    return eye + ba - ab + (c * (ba + ab) - aa - bb) / (1 + c)


class Explicit(nn.Module):
    """The equations of METHODS, one vector and one step at a time, on the cell's weights."""

    def __init__(self, rum: RUM, *, eta: float | None, activation: str, update_gate: bool) -> None:
        super().__init__()
        self.rum, self.eta, self.f, self.gated = rum, eta, ACTIVATIONS[activation], update_gate

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs (T, B, H) and the last state, for inputs (T, B, I)."""
        states = []
        for cell in self.rum.cells:
            runs = [self.sequence(cell, x[:, i]) for i in range(x.shape[1])]
            outputs, memories = zip(*runs, strict=True)
            x = torch.stack(outputs, 1)
            states.append((x[-1], torch.stack(memories)))
        h, R = (torch.stack(parts) for parts in zip(*states, strict=True))
        return (x, h, R) if self.rum.cells[0].lambda_ else (x, h)

    def sequence(self, cell: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (T, H) and the last memory for one sequence (T, I)."""
        n = cell.hidden_size
        W_eps, W_r, *W_u = cell.from_input.weight.split(n)
        b_eps, b_r, *b_u = cell.from_input.bias.split(n)
        U_r, *U_u = cell.from_state.weight.split(n)
        norms = cell.norms or [nn.Identity(), nn.Identity()]
        h, R = x.new_zeros(n), torch.eye(n, dtype=x.dtype)
        outputs = []
        for x_t in x:
            r = norms[0](torch.cat([W_r, U_r], 1) @ torch.cat([x_t, h]) + b_r)
            eps = W_eps @ x_t + b_eps
            turn = rotation_matrix(eps, r)
            R = R @ turn if cell.lambda_ else turn
            c = self.f(eps + R @ h)
            u = torch.zeros_like(c)
            if self.gated:
                before = torch.cat([W_u[0], U_u[0]], 1) @ torch.cat([x_t, h]) + b_u[0]
                u = 1 / (1 + torch.exp(-norms[1](before)))
            h = u * h + (1 - u) * c
            if self.eta is not None:
                h = self.eta * h / h.norm()
            outputs.append(h)
        return torch.stack(outputs), R


def flat(rum: RUM, x: Tensor, state: State | None = None) -> tuple[Tensor, ...]:
    y, last = rum(x, state)
    return y, *last


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_follows_the_equations(options: dict[str, Any], num_layers: int) -> None:
    rum = RUM(5, 6, num_layers, **options)
    explicit = Explicit(
        rum,
        eta=options.get("eta"),
        activation=options.get("activation", "relu"),
        update_gate=options.get("update_gate", True),
    )
    assert_equivalent(lambda x: flat(rum, x), explicit, (torch.randn(7, 3, 5),))


@pytest.mark.parametrize("lambda_", [0, 1])
def test_batch_first_only_swaps_axes(lambda_: int) -> None:
    rum = RUM(4, 5, 2, lambda_)
    swapped = RUM(4, 5, 2, lambda_, batch_first=True)
    swapped.load_state_dict(rum.state_dict())
    y, state = rum(x := torch.randn(6, 3, 4))
    z, other = swapped(x.transpose(0, 1))
    assert torch.equal(z.transpose(0, 1), y)
    assert all(map(torch.equal, other, state))


@pytest.mark.parametrize("lambda_", [0, 1])
@pytest.mark.parametrize("batch_first", [False, True])
def test_two_halves_make_the_whole(lambda_: int, batch_first: bool) -> None:
    rum = RUM(4, 5, 2, lambda_, batch_first=batch_first)
    time = 1 if batch_first else 0

    def halves(x: Tensor) -> tuple[Tensor, ...]:
        first, second = x.split([4, 5], time)
        y, state = rum(first)
        z, state = rum(second, state)
        return torch.cat([y, z], time), *state

    shape = (3, 9, 4) if batch_first else (9, 3, 4)
    assert_equivalent(halves, Flat(rum), (torch.randn(shape),))


class Flat(nn.Module):
    """A RUM whose outputs and states are one tuple."""

    def __init__(self, rum: RUM) -> None:
        super().__init__()
        self.rum = rum

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs, then the state."""
        return flat(self.rum, x)


def assert_orthogonal(R: Tensor) -> None:
    assert_equivalent(
        lambda R: R @ R.mT,
        lambda R: torch.eye(R.shape[-1], dtype=R.dtype).expand_as(R).contiguous(),
        (R,),
    )


@torch.no_grad()
def test_memory_stays_orthogonal_over_a_long_sequence() -> None:
    _, (_, R) = RUM(8, 50, lambda_=1, eta=0.1)(torch.randn(2500, 2, 8))
    assert_orthogonal(R)


@torch.no_grad()
def test_memory_stays_orthogonal_over_many_pieces() -> None:
    rum = RUM(8, 50, lambda_=1, eta=0.1)
    state = None
    for _ in range(100):
        _, state = rum(torch.randn(25, 2, 8), state)
    assert state is not None
    assert_orthogonal(state[1])


@torch.no_grad()
def test_memory_would_drift_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two tests above can fail: without the correction, rounding adds up."""
    monkeypatch.setattr(rum_module, "ORTHOGONAL_EVERY", 10**9)
    _, (_, R) = RUM(8, 50, lambda_=1, eta=0.1)(torch.randn(2500, 2, 8))
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_orthogonal(R)


def test_eta_zero_is_not_none() -> None:
    x = torch.randn(3, 2, 4)
    assert not RUM(4, 5, eta=0.0)(x)[0].any()
    assert RUM(4, 5, eta=None)(x)[0].any()


@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_eta_is_the_norm_of_the_state(eta: float) -> None:
    y, _ = RUM(4, 30, eta=eta)(torch.randn(5, 2, 4))
    assert_equivalent(lambda y: y.norm(dim=-1), lambda y: torch.full_like(y[..., 0], eta), (y,))


def test_starts_as_the_method_says() -> None:
    cell = RUMCell(4, 6)
    b_eps, b_r, b_u = cell.from_input.bias.split(6)
    assert torch.equal(torch.stack([b_r, b_u]), torch.ones(2, 6))
    assert not b_eps.any()
    inputs, states = cell.from_input.weight.split(6)[1:], cell.from_state.weight.split(6)
    for weights in zip(inputs, states, strict=True):
        W = torch.cat(weights, 1).detach()
        assert_equivalent(lambda W: W @ W.T, lambda W: torch.eye(6, dtype=W.dtype), (W,))
    W_eps = cell.from_input.weight[:6].detach()
    assert_equivalent(lambda W: W.T @ W, lambda W: torch.eye(4, dtype=W.dtype), (W_eps,))
    h, R = RUMCell(4, 6, lambda_=1).initial_state(2)
    assert not h.any()
    assert torch.equal(R, torch.eye(6).expand(2, 6, 6))


@pytest.mark.parametrize("lambda_", [0, 1])
def test_gradient_is_right(lambda_: int) -> None:
    rum = RUM(3, 4, 1, lambda_, eta=0.5, activation="tanh").double()
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: flat(rum, x), (x,))


@pytest.mark.parametrize("lambda_", [0, 1])
def test_gradients_are_finite_for_silent_input(lambda_: int) -> None:
    """Zero input and zero bias: ε = 0, and h stays 0 under time normalization."""
    rum = RUM(3, 4, 1, lambda_, eta=0.1)
    nn.init.zeros_(rum.get_parameter("cells.0.from_input.bias"))
    x = torch.zeros(6, 2, 3, requires_grad=True)
    y, _ = rum(x)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *rum.parameters()])


def test_zoneout_keeps_units_in_training_and_averages_in_evaluation() -> None:
    cell = RUMCell(4, 200, zoneout=0.25)
    plain = RUMCell(4, 200)
    plain.load_state_dict(cell.state_dict())
    x, old = torch.randn(3, 4), (torch.randn(3, 200),)
    new, zoned = plain(x, old)[0], cell(x, old)[0]
    kept = zoned == old[0]
    assert torch.equal(zoned, torch.where(kept, old[0], new))
    assert 0 < kept.sum() < kept.numel() / 2
    assert_equivalent(
        lambda x, h: cell.eval()(x, (h,)),
        lambda x, h: 0.25 * h + 0.75 * plain.to(h.dtype)(x, (h,))[0],
        (x, *old),
    )


@pytest.mark.parametrize("lambda_", [0, 1])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_exports(lambda_: int, num_layers: int) -> None:
    rum = Flat(RUM(4, 5, num_layers, lambda_, eta=0.1)).eval()
    x = torch.randn(3, 2, 4)
    exported = torch.export.export(rum, (x,), strict=False).module()
    assert_equivalent(exported, rum, (x,), exactness=BITWISE)


def test_cell_is_a_layer_of_one_step() -> None:
    rum = RUM(4, 5, lambda_=1)
    cell, x = rum.cells[0], torch.randn(1, 2, 4)
    y, state = rum(x)
    h, R = cell(x[0])
    assert torch.equal(h, y[0])
    assert torch.equal(R, state[1][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lambda_": 2}, "lambda_ is 2"),
        ({"activation": "gelu"}, "give one of relu"),
        ({"zoneout": 1.0}, "zoneout is 1.0"),
        ({"num_layers": 0}, "num_layers is 0"),
    ],
)
def test_refuses_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RUM(3, 4, **arguments)


def test_refuses_inputs_and_states_that_do_not_fit() -> None:
    rum = RUM(3, 4)
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        rum(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"shapes \[\(1, 2, 5\)\]: this layer takes"):
        rum(torch.zeros(6, 2, 3), (torch.zeros(1, 2, 5),))


def test_activations_are_the_named_ones() -> None:
    x = torch.linspace(-2, 2, 9)
    assert torch.equal(rum_module.ACTIVATIONS["relu"](x), F.relu(x))
    for name, expected in ACTIVATIONS.items():
        assert_equivalent(rum_module.ACTIVATIONS[name], expected, (x,))
