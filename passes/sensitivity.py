"""How much the model's output minds an error in each row of an attention's output.

To second order the divergence of the outputs under a small change d_i of row i of an attention
output o is  1/2 E[(g_i . d_i)^2]: for logits with g the gradient of the log-probability of a label
drawn from the model itself (the Fisher information, so that this is a KL divergence); for other
outputs with g the gradient of a random projection of them. Taking the directions of g for
isotropic leaves one weight for each row, E|g_i|^2 / D, comparable between all sites of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxpress.capture import Call
from fxpress.passes.sites import AttentionSite
from fxpress.profile import run_observed
from fxpress.program import Program
from fxpress.progress import Progress
from fxpress.quality import float_outputs, logit_outputs
from fxpress.regions import CapturedModel

__all__ = ["row_weights"]


@dataclass
class _Output:
    """Holds an attention's output (B, H, Nq, Dv) of the current call, for its gradient."""

    node: fx.Node
    value: Tensor | None = None

    def observe(self, _inputs: Mapping[str, Any], output: Any) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        self.value = output


@dataclass
class _Weights:
    """Running mean of |g_i|^2 / D, (H, Nq) of the longest call."""

    total: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    count: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, gradient: Tensor) -> None:
        square = gradient.float().square().mean(-1).cpu()  # (B, H, Nq)
        missing = square.shape[2] - self.count.shape[0]
        if not self.total.shape[0]:
            self.total = square.new_zeros(square.shape[1], 0)
        if missing > 0:
            self.total, self.count = (
                F.pad(self.total, (0, missing)),
                F.pad(self.count, (0, missing)),
            )
        self.total[:, : square.shape[2]] += square.sum(0)
        self.count[: square.shape[2]] += square.shape[0]

    def mean(self) -> Tensor:
        return self.total / self.count.clamp_min(1)


def row_weights(
    captured: CapturedModel,
    sites: Sequence[AttentionSite],
    calls: Sequence[Call],
    progress: Progress,
) -> dict[str, Tensor]:
    """Weight of a squared error in each row of each site's output, (H, Nq) by site.

    A model without differentiable output, or one whose gradients would be wrong, gets ones: its
    rows and sites then count alike.
    """
    outputs = {site.name: _Output(site.node) for site in sites}

    def runner(program: Program, leaves: Sequence[Any]) -> Any:
        return run_observed(program, leaves, outputs.values())

    weights = {site.name: _Weights() for site in sites}
    module = captured.build(runner)
    trainable = not any(program.untrainable for program in captured.programs.values())
    with torch.enable_grad(), progress.step("sensitivity", len(calls)) as advance:
        for args, kwargs in calls if trainable else ():
            _add_gradients(_probe(module(*args, **kwargs)), outputs, weights)
            advance()
    if not all(float(w.total.sum()) > 0 for w in weights.values() if w.total.numel()):
        weights = {}
    return {
        site.name: weights[site.name].mean()
        for site in sites
        if site.name in weights and weights[site.name].total.numel()
    }


def _probe(output: Any) -> Tensor | None:
    """A scalar whose gradient, squared, is the curvature of the output's divergence."""
    if logits := logit_outputs(output):
        total = logits[0].new_zeros(())
        for tensor in logits:
            scores = tensor.float().log_softmax(-1).flatten(0, -2)
            label = torch.multinomial(scores.detach().exp(), 1)
            total = total + scores.gather(1, label).sum()
        return total if total.requires_grad else None
    floats = [t for t in float_outputs(output) if t.requires_grad]
    if not floats:
        return None
    parts = [(t * torch.randint_like(t, 2).mul(2).sub(1)).sum() / t.detach().norm() for t in floats]
    return torch.stack([p.float() for p in parts]).sum()


def _add_gradients(
    probe: Tensor | None, outputs: Mapping[str, _Output], weights: Mapping[str, _Weights]
) -> None:
    held = {name: o.value for name, o in outputs.items() if o.value is not None}
    if probe is not None and held:  # a call that nothing was captured for runs no site
        found = torch.autograd.grad(probe, list(held.values()), allow_unused=True)
        for name, gradient in zip(held, found, strict=True):
            if gradient is not None:
                weights[name].add(gradient)
    for output in outputs.values():
        output.value = None
