"""The vocabulary of planned passes: what they learn from, and what they propose to the judge."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from fxpress.capture import Call
from fxpress.program import Program
from fxpress.progress import Progress
from fxpress.regions import CapturedModel
from fxpress.rewrite import Pass, PassRecord

__all__ = ["OBJECTIVES", "Decisions", "PlanContext", "PlannedPass", "Proposal"]

OBJECTIVES = ("latency", "memory")

Decisions = dict[str, dict[str, Any]]
"""Site -> plain data, tensors allowed; `"error"` is the predicted error."""


@dataclass(frozen=True)
class Proposal:
    """Decisions of one strength that a pass could apply.

    Attributes:
        strength: how strong, in words for the report (`"20 % of the dense attention cost"`).
        decide: makes the decisions.
    """

    strength: str
    decide: Callable[[], Decisions]


@dataclass
class PlanContext:
    """What a planned pass may look at while it plans.

    Attributes:
        captured: the programs as earlier passes left them.
        calls: calibration calls to learn from.
        settings: module path -> the settings of the pass there.
        enabled: whether a module path may be rewritten.
        device: type of the device that the model will run on.
        objective: what is to fall: `"latency"` or `"memory"`.
        forced: whether what the settings state is applied at any cost, as `judge="off"` asks.
        exact: whether the budget allows no change of the outputs, not even of their rounding.
        progress: told of the profiling.
        record: receives refusals and what was profiled.
    """

    captured: CapturedModel
    calls: Sequence[Call]
    settings: Callable[[str], Any]
    enabled: Callable[[str], bool]
    record: PassRecord
    device: str = "cpu"
    objective: str = "latency"
    forced: bool = False
    exact: bool = False
    progress: Progress = field(default_factory=Progress)


class PlannedPass(Pass):
    """A pass of the phase `"rewrite"`: it proposes decisions and applies what the judge lets stand.

    `run` applies `ctx.decisions`. Its record's ledger holds for each site `"modelled_ms"` by the
    cost model and, for the objective `"memory"`, `"bytes"`: each `{"before", "after"}`.

    Class attributes:
        objectives: what the pass can gain: `"latency"`, `"memory"`.
    """

    objectives: ClassVar[tuple[str, ...]] = OBJECTIVES

    def trainable(self, program: Program) -> Mapping[tuple[str, str], nn.Parameter]:  # noqa: ARG002
        """What recovery may train: (site, key of its decision) -> parameter."""
        return {}

    @abstractmethod
    def propose(self, ctx: PlanContext) -> list[Proposal]:
        """What could be done, strongest first; nothing where there is no site."""

    @abstractmethod
    def sites(self, program: Program) -> Mapping[str, Mapping[str, Any]]:
        """Every place that the pass could rewrite: name -> `kind`, `path`, `shape` for reports."""
