"""Sample and error inputs of the factored linears: what their tests loop over, on every device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LinearSample", "low_rank_samples", "vvma_errors", "vvma_samples"]


@dataclass(frozen=True)
class LinearSample:
    """One call: `vvma_linear(*args)` or `low_rank_linear(*args)`."""

    name: str
    args: tuple[Any, ...]


class _Drawn:
    """Tensors of one dtype and device, the same on each."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, fan: int = 1) -> Tensor:
        drawn: Tensor = torch.randn(*shape, generator=self.generator) * float(fan) ** -0.5
        return drawn.to(self.device, self.dtype)


def vvma_samples(dtype: torch.dtype, device: str) -> Iterator[LinearSample]:
    """Yield small calls that together reach every branch of every implementation."""
    draw = _Drawn(dtype, device)

    def sample(
        name: str,
        rows: tuple[int, ...],
        features: tuple[int, int],
        block: int = 16,
        terms: int = 1,
        own: bool = False,
        bias: bool = False,
        activation: str | None = None,
    ) -> LinearSample:
        m, n = features
        p, q = -(-m // block), -(-n // block)
        core = draw(*[p] * own, terms, block, block, fan=block)
        vectors = draw(terms, p, q, block, fan=terms * q)
        args = (draw(*rows, n), core, vectors, draw(m) if bias else None, activation, m)
        return LinearSample(name, args)

    yield sample("one row", (1,), (48, 64))
    yield sample("vector", (), (48, 64), block=32)
    yield sample("bias", (5,), (48, 64), bias=True)
    yield sample("terms", (3,), (96, 128), block=32, terms=4, bias=True)
    yield sample("all terms", (2,), (32, 48), terms=16)
    yield sample("ragged", (3,), (45, 77), bias=True, activation="gelu")
    yield sample("ragged, terms", (2, 4), (45, 77), terms=3, bias=True, activation="silu")
    yield sample("own cores", (9,), (30, 48), terms=2, own=True, activation="relu")
    yield sample("own cores, many terms", (2,), (30, 48), terms=5, own=True, bias=True)
    yield sample("many rows", (70,), (64, 80), terms=2, activation="gelu_tanh")
    yield sample("wide input", (2,), (40, 9000), bias=True, activation="tanh")
    yield sample("wide input, terms", (1,), (40, 9000), terms=3, activation="sigmoid")
    yield sample("large tiles", (2,), (300, 200), block=128, terms=2)


def low_rank_samples(dtype: torch.dtype, device: str) -> Iterator[LinearSample]:
    """Yield small calls of `low_rank_linear`."""
    draw = _Drawn(dtype, device)

    def factors(m: int, n: int, rank: int) -> tuple[Tensor, Tensor]:
        return draw(rank, n, fan=n), draw(m, rank, fan=rank)

    yield LinearSample("plain", (draw(3, 40), *factors(30, 40, 4), None, None))
    yield LinearSample("vector", (draw(40), *factors(30, 40, 1), draw(30), None))
    yield LinearSample("epilogue", (draw(2, 5, 20), *factors(50, 20, 7), draw(50), "gelu"))


def vvma_errors() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (part of the message, what differs) of calls that refuse.

    The call they differ from: x (3, 30), core (2, 16, 16), vectors (2, 3, 2, 16).
    """
    yield "core is (r, k, k) or (p, r, k, k)", {"vectors": torch.zeros(3, 2, 16)}
    yield "core is (r, k, k) or (p, r, k, k)", {"core": torch.zeros(16, 16)}
    yield "one floating dtype", {"core": torch.zeros(2, 16, 16).double()}
    yield "one floating dtype", {"x": torch.zeros(3, 30).long()}
    yield "on one device", {"bias": torch.zeros(48, device="meta")}
    yield "core is (2, 16, 16), or (3, 2, 16, 16)", {"core": torch.zeros(1, 16, 16)}
    yield "core is (2, 16, 16), or (3, 2, 16, 16)", {"core": torch.zeros(2, 2, 16, 16)}
    yield "more than 16 and at most 32 features", {"x": torch.zeros(3, 16)}
    yield "more than 16 and at most 32 features", {"x": torch.zeros(3, 33)}
    yield "more than 32 and at most 48 features", {"out_features": 32}
    yield "more than 32 and at most 48 features", {"bias": torch.zeros(49)}
    yield "bias is (40,)", {"bias": torch.zeros(48), "out_features": 40}
    yield "activation is None or one of", {"activation": "softmax"}
