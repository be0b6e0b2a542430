"""The Rotational Unit of Memory (Dangovski et al. 2019, TACL; arXiv 1710.09537).

ε = W_ε x + b_ε,   r = W_r [x; h] + b_r,   u = σ(W_u [x; h] + b_u)
λ = 0:  g = R(ε, r) h
λ = 1:  R ← R · R(ε, r),   g = R h
h ← u∘h + (1 − u)∘f(ε + g),   then h ← η h/|h| where η is given
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.zoo.rotations import rotation, unit

__all__ = ["RUM", "RUMCell", "State"]

State = tuple[Tensor, ...]  # (h,) for λ = 0, (h, R) for λ = 1

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}
ORTHOGONAL_EVERY = 128  # steps; rounding makes R drift by about one unit in the last place a step


class RUMCell(nn.Module):
    """One step of the Rotational Unit of Memory.

    Args:
        input_size: I, width of the input x.
        hidden_size: H, width of the state h.
        lambda_: 1 to accumulate the rotations in a memory R, 0 to forget them.
        eta: norm that h is scaled to after each step (time normalization); None for none.
        activation: f, one of "relu", "tanh", "sigmoid", "softsign".
        update_gate: False for u = 0.
        layer_norm: normalize the target r, and the update gate before its sigmoid.
        zoneout: probability with which a unit of h keeps its value in training (Krueger et al.
            2017, arXiv 1606.01305).

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        lambda_: int = 0,
        eta: float | None = None,
        activation: str = "relu",
        *,
        update_gate: bool = True,
        layer_norm: bool = False,
        zoneout: float = 0.0,
    ) -> None:
        super().__init__()
        if lambda_ not in (0, 1):
            raise ValueError(f"lambda_ is {lambda_!r}: give 0 or 1")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}: give one of {', '.join(ACTIVATIONS)}")
        if not 0 <= zoneout < 1:
            raise ValueError(f"zoneout is {zoneout!r}: give a probability below 1")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.lambda_, self.eta, self.activation, self.zoneout = lambda_, eta, activation, zoneout
        gates = 1 + update_gate  # r, u
        self.from_input = nn.Linear(input_size, (1 + gates) * hidden_size)  # ε, r, u
        self.from_state = nn.Linear(hidden_size, gates * hidden_size, bias=False)  # r, u
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(gates * layer_norm))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W_ε, W_r and W_u orthogonal, b_ε = 0, b_r = b_u = 1."""
        width = self.hidden_size
        embed, *inputs = self.from_input.weight.split(width)
        nn.init.orthogonal_(embed)
        for of_input, of_state in zip(inputs, self.from_state.weight.split(width), strict=True):
            whole = nn.init.orthogonal_(torch.cat([of_input, of_state], 1))  # W_r is of [x; h]
            of_input.copy_(whole[:, : self.input_size])
            of_state.copy_(whole[:, self.input_size :])
        self.from_input.bias.fill_(1.0)
        self.from_input.bias[:width] = 0.0

    def initial_state(self, batch: int) -> State:
        """The state at rest: h = 0 (B, H), and for λ = 1 R = I (B, H, H)."""
        weight, width = self.from_state.weight, self.hidden_size
        h = weight.new_zeros(batch, width)
        if not self.lambda_:
            return (h,)
        eye = torch.eye(width, dtype=weight.dtype, device=weight.device)
        return h, eye.expand(batch, width, width)

    def forward(self, x: Tensor, state: State | None = None) -> State:
        """The state after the input x (B, I), given the state before it."""
        return self.step(self.from_input(x), self.initial_state(len(x)) if state is None else state)

    def step(self, projected: Tensor, state: State) -> State:
        """`forward`, given `from_input(x)`, which is cheaper to compute for all steps at once."""
        h, *memory = state
        eps, *of_input = projected.split(self.hidden_size, -1)
        of_state = self.from_state(h).split(self.hidden_size, -1)
        gates = [i + s for i, s in zip(of_input, of_state, strict=True)]
        if self.norms:
            gates = [norm(gate) for norm, gate in zip(self.norms, gates, strict=True)]
        r, *update = gates
        if memory:
            # R · R(ε, r), by rows: R(ε, r)ᵀ = R(r, ε).
            memory = [rotation(r[:, None], eps[:, None], memory[0])]
            turned = (memory[0] @ h[..., None])[..., 0]
        else:
            turned = rotation(eps, r, h)
        new = ACTIVATIONS[self.activation](eps + turned)
        if update:
            u = torch.sigmoid(update[0])
            new = u * h + (1 - u) * new
        if self.eta is not None:
            new = self.eta * unit(new)
        return self._zone_out(h, new), *memory

    def _zone_out(self, old: Tensor, new: Tensor) -> Tensor:
        if not self.zoneout:
            return new
        if not self.training:
            # The mean over what training draws.
            return self.zoneout * old + (1 - self.zoneout) * new
        return torch.where(torch.rand_like(new) < self.zoneout, old, new)


class RUM(nn.Module):
    """Layers of the Rotational Unit of Memory, called like `torch.nn.LSTM`.

    For λ = 1 the memory is made orthogonal again every 128 steps and whenever a state is handed
    in, so that it does not drift over long sequences, in one piece or in many.

    Args:
        input_size: I, width of the input.
        hidden_size: H, width of the state.
        num_layers: L; each layer reads the outputs of the one before.
        lambda_: as the others below, see `RUMCell`.
        eta: norm of h.
        activation: f.
        batch_first: inputs and outputs are (B, T, ·), not (T, B, ·); states stay (L, B, ·).
        update_gate: False for none.
        layer_norm: normalize the gates.
        zoneout: probability.

    Raises:
        ValueError: an argument out of its range, or an input or state of the wrong shape.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        lambda_: int = 0,
        eta: float | None = None,
        activation: str = "relu",
        batch_first: bool = False,
        *,
        update_gate: bool = True,
        layer_norm: bool = False,
        zoneout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}: give at least 1")
        self.input_size, self.batch_first = input_size, batch_first
        self.cells = nn.ModuleList(
            RUMCell(
                hidden_size if layer else input_size,
                hidden_size,
                lambda_,
                eta,
                activation,
                update_gate=update_gate,
                layer_norm=layer_norm,
                zoneout=zoneout,
            )
            for layer in range(num_layers)
        )

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a sequence.

        Args:
            x: inputs (T, B, I), or (B, T, I) with `batch_first`; T at least 1.
            state: (h,) or (h, R) of an earlier call, h (L, B, H), R (L, B, H, H); None: from rest.

        Returns:
            The last layer's h at every step, (T, B, H) or (B, T, H), and the last state.
        """
        if x.dim() != 3 or x.shape[-1] != self.input_size:
            raise ValueError(
                f"the input has shape {tuple(x.shape)}: give (·, ·, {self.input_size})"
            )
        y = x.transpose(0, 1) if self.batch_first else x
        last: list[State] = []
        for cell, before in zip(self.cells, self._states(state, y.shape[1]), strict=True):
            assert isinstance(cell, RUMCell)
            y, after = _run(cell, y, before)
            last.append(after)
        stacked = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        return y.transpose(0, 1) if self.batch_first else y, stacked

    def _states(self, state: State | None, batch: int) -> list[State]:
        """The state of each layer before the first step."""
        rest = [cell.initial_state(batch) for cell in self.cells]  # type: ignore[operator]
        if state is None:
            return rest
        want = [(len(rest), *part.shape) for part in rest[0]]
        if (got := [tuple(part.shape) for part in state]) != want:
            raise ValueError(f"the state has shapes {got}: this layer takes {want}")
        h, *memory = state
        return list(zip(h, *map(_orthogonal, memory), strict=True))


def _run(cell: RUMCell, x: Tensor, state: State) -> tuple[Tensor, State]:
    """One layer over inputs (T, B, I): outputs (T, B, H) and the last state."""
    outputs = []
    for t, projected in enumerate(cell.from_input(x).unbind(0), start=1):
        state = cell.step(projected, state)
        outputs.append(state[0])
        if t % ORTHOGONAL_EVERY == 0:
            h, *memory = state
            state = (h, *map(_orthogonal, memory))
    return torch.stack(outputs), state


def _orthogonal(R: Tensor) -> Tensor:
    """The orthogonal matrix near R (..., H, H): one Newton-Schulz step, which squares the error."""
    return 1.5 * R - 0.5 * R @ (R.mT @ R)
