"""Recovery: train what a rewrite brought in, until the model answers as the original did again.

Distillation (Hinton et al. 2015) on calibration data: the loss is the divergence that the judge
measures, KL(original || rewritten) of logits or else the squared relative error of outputs. Only
tensors that a pass made are trained, each at a rate that is a share of its own size (a core and
its vectors differ by orders of magnitude, and one rate for both serves neither); the weights of the
original stay as they are, so that a plan that holds the trained tensors is complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxpress.capture import Call
from fxpress.errors import PlanError
from fxpress.progress import Progress
from fxpress.quality import References, float_outputs, kl_divergence, logit_outputs

__all__ = ["RecoverConfig", "Recovery", "distill"]


@dataclass(frozen=True)
class RecoverConfig:
    """Settings of recovery.

    Attributes:
        steps: of training at most, one calibration batch each.
        seconds: of training at most.
        least_steps: where fewer fit into `seconds`, nothing is trained, and that is said.
        reach: a proposal is recovered if it missed the budget by no more than this factor.
        rate: learning rate as a share of the RMS of each tensor; it falls to 0 at the end.
        check_every: steps between looks at the batches that are not trained on.
        patience: looks without an improvement after which training stops.
    """

    steps: int = 300
    seconds: float = 30.0
    least_steps: int = 30
    reach: float = 10.0
    rate: float = 0.02
    check_every: int = 10
    patience: int = 6

    def __post_init__(self) -> None:
        for name in ("steps", "seconds", "reach", "rate", "check_every", "patience"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or value <= 0:
                raise PlanError(f"config: recover: {name} is {value!r}: give a positive number")


@dataclass
class Recovery:
    """How training went.

    Attributes:
        strength: the proposal that was recovered.
        losses: of every step, on its batch.
        checks: (steps done, loss on the batches that are not trained on).
        best: steps after which the tensors were taken.
        seconds: that it took.
        stopped: why it ended.
    """

    strength: str
    losses: list[float] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    seconds: float = 0.0
    stopped: str = ""

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "strength": self.strength,
            "losses": self.losses,
            "checks": [list(check) for check in self.checks],
            "best": self.best,
            "seconds": round(self.seconds, 2),
            "stopped": self.stopped,
        }


def _loss(reference: Any, candidate: Any) -> Tensor:
    """What the judge measures, differentiable: summed over the tensors of an output."""
    if logits := logit_outputs(reference):
        pairs = zip(logits, logit_outputs(candidate), strict=True)
        return torch.stack([kl_divergence(r, c) for r, c in pairs]).sum()
    pairs = zip(float_outputs(reference), float_outputs(candidate), strict=True)
    errors = [((c - r).float().square().mean(), r.float().square().mean()) for r, c in pairs]
    return torch.stack([error / scale.clamp_min(1e-30) for error, scale in errors]).sum()


@dataclass
class _Trainer:
    """Adam on float32 copies of some parameters, so that half precision trains too."""

    answers: References
    candidate: nn.Module
    parameters: Sequence[Tensor]
    rate: float

    def __post_init__(self) -> None:
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.rates = [self.rate * float(m.square().mean().sqrt()) for m in self.masters]
        groups = [{"params": [m], "lr": r} for m, r in zip(self.masters, self.rates, strict=True)]
        self.optimizer = torch.optim.Adam(groups)

    def loss(self, index: int) -> Tensor:
        """Of one batch, whose answer by the original is computed once."""
        args, kwargs = self.answers.calls[index]
        return _loss(self.answers[index], self.candidate(*args, **kwargs))

    def step(self, index: int, left: float) -> float:
        """One batch, at rates that fall with the share of the training that is left.

        Gradients are asked for these parameters only: no other is touched.
        """
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * left
        with torch.enable_grad():
            loss = self.loss(index)
            gradients = torch.autograd.grad(loss, list(self.parameters))
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.float()
        self.optimizer.step()
        self.load(self.masters)
        return float(loss.detach())

    def load(self, values: Sequence[Tensor]) -> None:
        """Set the parameters."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


def distill(
    original: nn.Module,
    candidate: nn.Module,
    parameters: Sequence[Tensor],
    calls: Sequence[Call],
    settings: RecoverConfig,
    *,
    strength: str = "",
    seed: int = 0,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Recovery:
    """Train parameters of `candidate` in place until it answers like `original`.

    Every fifth call is left out of training; the parameters of the least loss there are kept.

    Args:
        original: the teacher.
        candidate: the rewritten model.
        parameters: those of `candidate` to train; nothing else is changed.
        calls: calibration calls.
        settings: when to stop.
        strength: name of what is recovered, for the report.
        seed: of the order of the batches.
        progress: told of every step.
        clock: seconds, for tests.
    """
    start = clock()
    recovery = Recovery(strength)
    every = range(len(calls))
    held = every[4::5] or every[-1:]
    trained = [i for i in every if i % 5 != 4]
    trainer = _Trainer(References(original, calls), candidate, parameters, settings.rate)
    generator = torch.Generator().manual_seed(seed)
    best = [master.clone() for master in trainer.masters]

    def check() -> bool:
        """Look at the held-out batches; False when patience is out."""
        with torch.no_grad():
            loss = float(torch.stack([trainer.loss(index) for index in held]).mean())
        if not recovery.checks or loss < min(value for _, value in recovery.checks):
            recovery.best = len(recovery.losses)
            best[:] = [master.clone() for master in trainer.masters]
        recovery.checks.append((len(recovery.losses), loss))
        since = (len(recovery.losses) - recovery.best) / settings.check_every
        return since < settings.patience

    def too_slow() -> bool:
        """Whether too few steps fit, told by one run of both models: a step takes two at most."""
        begin = clock()
        with torch.no_grad():
            trainer.loss(held[0])
        step = 2 * (clock() - begin)
        if step * settings.least_steps > settings.seconds:
            recovery.stopped = (
                f"given up: a step takes about {step:.1f} s, too long for {settings.seconds:g} s"
            )
        return bool(recovery.stopped)

    if too_slow():
        return recovery
    title = f"recover: {strength}" if strength else "recover"
    with (progress or Progress()).step(title, settings.steps) as advance:
        check()
        while not recovery.stopped:
            pick = int(torch.randint(len(trained), (), generator=generator))
            gone = max(len(recovery.losses) / settings.steps, (clock() - start) / settings.seconds)
            recovery.losses.append(trainer.step(trained[pick], max(1 - gone, 0.02)))
            advance()
            done, spent = len(recovery.losses), clock() - start
            if done % settings.check_every == 0 and not check():
                recovery.stopped = "no more improvement"
            elif done >= settings.steps:
                recovery.stopped = "all steps done"
            elif spent > settings.seconds:
                recovery.stopped = f"{settings.seconds:g} s are over"
    check()
    trainer.load(best)
    recovery.seconds = clock() - start
    return recovery
