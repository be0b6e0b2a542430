"""The forms that a linear map can take: what each costs, what it loses, and the fit itself.

What a form loses is predicted for all its sizes at once, without fitting any: the squared error of
the best rank-r fit is the sum of the eigenvalues that it leaves out (`vvma_fit`, `low_rank_fit`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.cost import Hardware, Work, dense_work, low_rank_work, vvma_work
from fxpress.ops.vvma_linear import lay_out
from fxpress.passes.factor_settings import FactorVvmaConfig
from fxpress.passes.low_rank_fit import fit_low_rank
from fxpress.passes.sites import LinearSite
from fxpress.passes.vvma_fit import fit_vvma

__all__ = [
    "Form",
    "Place",
    "candidates",
    "dense_cost",
    "fit",
    "fit_layer",
    "frontier",
    "predicted_errors",
]

_BLOCKS = (32, 64, 128)
_TERMS = (1, 2, 4, 8, 16, 32, 64)
_RANK_STEP = 16


@dataclass(frozen=True)
class Place:
    """What the cost of a linear map depends on.

    Attributes:
        shape: (m, n).
        tokens: vectors that one call maps.
        dtype: of the weight.
        hardware: where it runs.
        freed: whether nothing else reads the weight, so that replacing it frees its bytes.
        copied: whether another form copies its input and its output, as that of patches does.
        experts: how many matrices of that shape there are, each with vectors of its own.
    """

    shape: tuple[int, int]
    tokens: int
    dtype: torch.dtype
    hardware: Hardware
    freed: bool = True
    copied: bool = False
    experts: int = 1

    @classmethod
    def of(cls, site: LinearSite, dtype: torch.dtype, hardware: Hardware) -> Place:
        """The place of a site."""
        copied, experts = site.kind == "patches", site.experts or 1
        return cls(site.shape, site.tokens, dtype, hardware, copied=copied, experts=experts)

    def ms(self, work: Sequence[Work]) -> float:
        """Milliseconds of work that is done for each expert, in calls that do it for all."""
        each = [
            replace(w, multiply_adds=w.multiply_adds * self.experts, bytes=w.bytes * self.experts)
            for w in work
        ]
        return self.hardware.ms(each, self.dtype)


@dataclass(frozen=True)
class Form:
    """One form of a linear map: vector-vector-matrix where there is a block, else low rank.

    Attributes:
        block: k, or 0.
        terms: r, or 0.
        rank: or 0.
        share: as in `FactorVvmaConfig`.
    """

    block: int = 0
    terms: int = 0
    rank: int = 0
    share: str = "matrix"

    def __str__(self) -> str:
        if self.block:
            return f"vvma, {self.block} x {self.block} tiles, {self.terms} terms"
        return f"low rank {self.rank}"

    def multiply_adds(self, shape: tuple[int, int]) -> int:
        """Multiply-adds for one vector."""
        m, n = shape
        if not self.block:
            return self.rank * (m + n)
        p, q = -(-m // self.block), -(-n // self.block)
        return self.terms * (p * q * self.block + p * self.block**2)

    def parameters(self, shape: tuple[int, int]) -> int:
        """Numbers that it stores."""
        m, n = shape
        if not self.block:
            return self.rank * (m + n)
        p, q = -(-m // self.block), -(-n // self.block)
        cores = p if self.share == "row" else 1
        return self.terms * (p * q * self.block + cores * self.block**2)

    def arithmetic(self, shape: tuple[int, int]) -> str:
        """Multiply-adds against the dense form's, as a person would write them down."""
        m, n = shape
        count = "r(mn/k + mk)" if self.block else "r(m + n)"
        after, before = self.multiply_adds(shape), m * n
        return f"{count} = {after:,} multiply-adds against mn = {before:,} ({after / before:.2f}x)"

    def cost(self, place: Place, objective: str) -> float:
        """Milliseconds of a call, or bytes, by `objective`."""
        if objective == "memory":
            return float(self.parameters(place.shape) * place.dtype.itemsize * place.experts)
        size, hardware = place.dtype.itemsize, place.hardware
        if self.block:
            cores = -(-place.shape[0] // self.block) if self.share == "row" else 1
            sizes = (self.block, self.terms)
            work = vvma_work(place.shape, *sizes, place.tokens, size, hardware, cores)
        else:
            work = low_rank_work(place.shape, self.rank, place.tokens, size)
        if place.copied:
            work = [*work, *(Work(0, 2 * size * place.tokens * n) for n in place.shape)]
        return place.ms(work)


def dense_cost(place: Place, objective: str) -> float:
    """What a place costs as it is; in bytes, only what a rewrite would free."""
    if objective == "memory":
        numbers = place.experts * place.shape[0] * place.shape[1]
        return float(place.freed * numbers * place.dtype.itemsize)
    return place.ms(dense_work(place.shape, place.tokens, place.dtype.itemsize))


def candidates(shape: tuple[int, int], config: FactorVvmaConfig) -> Iterator[Form]:
    """The forms that a configuration leaves open; one where it states one."""
    m, n = shape
    if config.rank is not None:
        yield Form(rank=min(config.rank, m, n))
    elif config.terms is not None:
        yield Form(config.block or 32, config.terms, share=config.share)
    else:
        if config.form != "low-rank":
            for block in (config.block,) if config.block else _BLOCKS:
                for terms in _TERMS:
                    if terms < block <= min(m, n):
                        yield Form(block, terms, share=config.share)
        if config.form != "vvma":
            for rank in range(_RANK_STEP, min(m, n), _RANK_STEP):
                yield Form(rank=rank)


# --- what is lost ---------------------------------------------------------------------------


def _left_out(values: Tensor) -> Tensor:
    """Energy beyond the r largest eigenvalues, r from 0 on, ascending values in the last axis."""
    energy = F.pad(values.clamp_min(0).cumsum(-1), (1, 0))
    return energy.flip(-1)


def _low_rank_energies(weight: Tensor, moment: Tensor) -> Tensor:
    root = weight * moment.sqrt()
    small = root @ root.mT if root.shape[0] <= root.shape[1] else root.mT @ root
    return _left_out(torch.linalg.eigvalsh(small))


def _vvma_energies(weight: Tensor, moment: Tensor, block: int, rowwise: bool) -> Tensor:
    m, n = weight.shape
    padded = F.pad(weight * moment.sqrt(), (0, -n % block, 0, -m % block))
    tiles = padded.view(-(-m // block), block, -1, block)  # (p, k, q, k)
    if rowwise:
        columns = tiles.permute(3, 0, 1, 2).contiguous()  # (lane, p, k, q)
    else:
        columns = tiles.permute(3, 1, 0, 2).flatten(2)  # (lane, k, p q)
    values = torch.linalg.eigvalsh(columns @ columns.mT)
    return _left_out(values).reshape(-1, block + 1).sum(0)


def predicted_errors(
    weight: Tensor, moment: Tensor | None, forms: Sequence[Form]
) -> dict[Form, float]:
    """Squared relative error of the outputs under each form, by the diagonal of the moment.

    From above where a block does not divide the sizes: errors in the padding count.

    Args:
        weight: (m, n), or (experts, m, n).
        moment: mean of x^2 (n,) or of x x' (n, n), by expert where there are several, or None for
            inputs of one size.
        forms: which forms.
    """
    lost, total = dict.fromkeys(forms, 0.0), 0.0
    for matrix, of_inputs in _matrices(weight, moment):
        wide = matrix.detach()
        wide = wide if wide.dtype == torch.float64 else wide.float()
        diagonal = wide.new_ones(wide.shape[1])
        if of_inputs is not None:
            given = of_inputs.to(wide)
            diagonal = given if given.dim() == 1 else given.diagonal()
        total += float((wide.square() * diagonal).sum())
        energies: dict[tuple[int, bool], Tensor] = {}
        for form in forms:
            key = (form.block, form.share == "row")
            if key not in energies:
                energies[key] = (
                    _vvma_energies(wide, diagonal, *key)
                    if form.block
                    else _low_rank_energies(wide, diagonal)
                )
            lost[form] += float(energies[key][form.terms or form.rank])
    return {form: energy / (total or 1.0) for form, energy in lost.items()}


def _matrices(weight: Tensor, moment: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The matrices of a weight, each with the moment of its inputs."""
    if weight.dim() == 2:
        yield weight, moment
    else:
        moments = [None] * len(weight) if moment is None else moment
        yield from zip(weight, moments, strict=True)


def frontier(forms: Sequence[Form], costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Indices of the forms that no other beats in both cost and error, cheapest first."""
    kept: list[int] = []
    for i in sorted(range(len(forms)), key=lambda i: (costs[i], errors[i])):
        if not kept or errors[i] < errors[kept[-1]]:
            kept.append(i)
    return kept


# --- fit ------------------------------------------------------------------------------------


def fit(weight: Tensor, form: Form, moment: Tensor | None) -> dict[str, Any]:
    """Fit a weight and return what the plan holds of it: factors, sizes, and the error.

    The factors of a bank (experts, m, n) are stacked; with share="layer" its experts share cores.
    """
    if weight.dim() == 3:
        return _fit_bank(weight, form, moment)
    if form.block:
        done = fit_vvma(weight, form.block, form.terms, form.share, moment)
        factors = {"core": done.core, "vectors": done.vectors}
        return {"form": "vvma", **factors, "error": done.relative_error}
    low = fit_low_rank(weight, form.rank, moment)
    return {"form": "low-rank", "down": low.down, "up": low.up, "error": low.relative_error}


def _fit_bank(weight: Tensor, form: Form, moment: Tensor | None) -> dict[str, Any]:
    if form.block and form.share == "layer" and weight.shape[1] % form.block == 0:
        fits = fit_layer(list(weight), form, None if moment is None else moment.mean(0))
        return {**fits[0], "vectors": torch.stack([one["vectors"] for one in fits])}
    fits, lost, total = [], 0.0, 0.0
    for matrix, of_inputs in _matrices(weight, moment):
        fits.append(fit(matrix, form, of_inputs))
        energy = _energy(matrix, of_inputs)
        lost, total = lost + energy * fits[-1]["error"] ** 2, total + energy
    stacked = {
        key: torch.stack([one[key] for one in fits])
        for key, value in fits[0].items()
        if isinstance(value, Tensor)
    }
    return {"form": fits[0]["form"], **stacked, "error": (lost / (total or 1.0)) ** 0.5}


def _energy(weight: Tensor, moment: Tensor | None) -> float:
    """Mean square of the outputs, summed."""
    wide = weight.double()
    if moment is None:
        return float(wide.square().sum())
    given = moment.to(wide)
    return float(((wide * given if given.dim() == 1 else wide @ given) * wide).sum())


def fit_layer(weights: Sequence[Tensor], form: Form, moment: Tensor | None) -> list[dict[str, Any]]:
    """Fit several weights of one input with cores in common; each has whole tiles of rows."""
    done = fit_vvma(list(weights), form.block, form.terms, "layer", moment)
    parts = done.vectors.split([w.shape[0] // form.block for w in weights], dim=1)
    shared = {"form": "vvma", "core": done.core, "error": done.relative_error}
    return [{**shared, "vectors": lay_out(done.core, part)[1]} for part in parts]
