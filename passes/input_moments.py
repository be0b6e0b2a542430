"""Second moments of the inputs of linear maps, over the calibration set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxpress.passes.sites import LinearSite

__all__ = ["InputMoment"]


@dataclass
class InputMoment:
    """Mean of x^2 (n,), or of x x' (n, n), over all vectors that a site maps; by expert of a bank.

    Sums are float64 and the mean float32: what the order of the batches changes is rounded away.

    Attributes:
        site: the linear map.
        full: whether products between features are kept too.
    """

    site: LinearSite
    full: bool = False
    _sum: Tensor | None = None
    _count: int = 0
    _calls: int = 0

    @property
    def node(self) -> fx.Node:
        """The linear node."""
        return self.site.node

    def observe(self, inputs: Mapping[str, Any], _output: Any) -> None:
        """Add one call."""
        x = self.site.vectors(inputs[self.site.source.name].detach())
        if self.full:
            moment = x.double().mT @ x.double()
        else:  # summed in float64 without a copy
            moment = torch.linalg.vector_norm(x, dim=-2, dtype=torch.float64).square()
        moment = moment.cpu()
        self._sum = moment if self._sum is None else self._sum + moment
        self._count += x.shape[-2]
        self._calls += 1

    @property
    def tokens(self) -> int:
        """Vectors that one call maps, on average."""
        return round(self._count / self._calls) if self._calls else self.site.tokens

    def mean(self) -> Tensor | None:
        """The moment, float32; None where the site was not reached."""
        if self._sum is None or not self._count:
            return None
        return (self._sum / self._count).to(torch.float32)
