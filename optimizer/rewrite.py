"""The vocabulary of passes: `Pass`, `Rewrite`, `Decline`, and what a pass reports.

A rewrite is pattern, check, replace. That a pattern does not apply is a value, `Decline`, with a
reason that a person can act on; the nearest miss is what `fxpress explain` prints.
"""

from __future__ import annotations

import difflib
import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, fx

from fxpress.program import Program, Provenance, module_path, preceding, source_line
from fxpress.testing import REASSOCIATES, Exactness

if TYPE_CHECKING:
    from fxpress.ops.mask_layout import MaskLayout

__all__ = [
    "Applied",
    "Decline",
    "Fuel",
    "Pass",
    "PassContext",
    "PassRecord",
    "Rewrite",
    "RolledBack",
    "Snapshot",
    "provide",
]


@dataclass(frozen=True)
class Decline:
    """Why something was not rewritten.

    Attributes:
        reason: one line: what stands in the way and, where there is one, what would help.
        at: the node where the match ended (the furthest one that matched).
        site: name of the site, where it has one.
    """

    reason: str
    at: fx.Node | None = None
    site: str = ""

    @property
    def path(self) -> str:
        """Module path of the node."""
        return module_path(self.at) if self.at is not None else ""

    @property
    def source(self) -> str:
        """`file:line` of the node."""
        return source_line(self.at) if self.at is not None else ""

    def as_dict(self) -> dict[str, str]:
        """A JSON-able form."""
        node = self.at.name if self.at is not None else ""
        where = {"site": self.site, "path": self.path, "node": node, "source": self.source}
        return {"reason": self.reason, **where}


@dataclass(frozen=True)
class Applied:
    """One rewrite that was done."""

    rule: str
    node: str
    path: str
    site: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "rule": self.rule,
            "node": self.node,
            "path": self.path,
            "site": self.site,
            **self.detail,
        }


@dataclass(frozen=True)
class RolledBack:
    """A rewrite that the judge took back, with the figures that it went by."""

    site: str
    reason: str
    figures: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {"site": self.site, "reason": self.reason, **self.figures}


@dataclass(frozen=True)
class Snapshot:
    """The captured graphs of a model at one moment, by region path."""

    programs: Mapping[str, Program]

    def __str__(self) -> str:
        """The graphs as text."""
        if list(self.programs) == [""]:
            return str(self.programs[""])
        return "\n".join(f"region {path}:\n{program}" for path, program in self.programs.items())


@dataclass
class Fuel:
    """How many more rewrites may be applied; None: no limit."""

    left: int | None = None

    def burn(self) -> bool:
        """Take one unit; False when there is none left."""
        if self.left is None:
            return True
        if self.left <= 0:
            return False
        self.left -= 1
        return True


@dataclass
class PassContext:
    """What a pass may look at: nothing is global.

    Attributes:
        config: the settings of the pass, a frozen dataclass (`Pass.config_type`).
        decisions: what the plan decided for this pass, by site.
        device: type of the device that the model will run on, `"cpu"` or `"cuda"`.
        fuel: shared by all passes of a run.
        enabled: whether a module path may be rewritten by this pass.
    """

    config: Any = None
    decisions: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    fuel: Fuel = field(default_factory=Fuel)
    enabled: Callable[[str], bool] = lambda _path: True


@dataclass
class PassRecord:
    """What one pass did.

    Attributes:
        name: name of the pass.
        rewrites: the rewrites done, in graph order.
        declined: the refusals, each with reason and node.
        rolled_back: what the judge took back, with figures.
        seconds: time spent in the pass itself.
        before, after: the graphs; text by `str`.
        ledger: per site, the figures of the rewrite (densities, parameters, bytes, multiply-adds).
        masks: per site, the compiled mask (attention pruning).
        mean_attention: per site, the mean attention map (H, Nq, Nk) (attention pruning).
        recovery: how a proposal was trained back into the budget; None where none was.
    """

    name: str
    exactness: Exactness = REASSOCIATES
    rewrites: list[Applied] = field(default_factory=list)
    declined: list[Decline] = field(default_factory=list)
    rolled_back: list[RolledBack] = field(default_factory=list)
    seconds: float = 0.0
    before: Snapshot = field(default_factory=lambda: Snapshot({}))
    after: Snapshot = field(default_factory=lambda: Snapshot({}))
    ledger: dict[str, dict[str, Any]] = field(default_factory=dict)
    masks: dict[str, MaskLayout] = field(default_factory=dict)
    mean_attention: dict[str, Tensor] = field(default_factory=dict)
    recovery: dict[str, Any] | None = None

    def counts(self) -> dict[str, int]:
        """How often each rule was applied."""
        totals: dict[str, int] = {}
        for rewrite in self.rewrites:
            totals[rewrite.rule] = totals.get(rewrite.rule, 0) + 1
        return totals

    def diff(self) -> str:
        """Unified diff of the graph text before and after the pass."""
        before, after = str(self.before).splitlines(), str(self.after).splitlines()
        lines = difflib.unified_diff(
            before, after, f"before {self.name}", f"after {self.name}", lineterm=""
        )
        return "\n".join(lines)

    def merge(self, other: PassRecord) -> None:
        """Take over what the same pass did in another region, or noted while it planned."""
        self.rewrites += other.rewrites
        self.declined += other.declined
        self.seconds += other.seconds
        self.ledger |= other.ledger
        self.masks |= other.masks
        self.mean_attention |= other.mean_attention
        self.recovery = self.recovery or other.recovery

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "name": self.name,
            "exactness": self.exactness.name,
            "counts": self.counts(),
            "rewrites": [r.as_dict() for r in self.rewrites],
            "declined": [d.as_dict() for d in self.declined],
            "rolled_back": [r.as_dict() for r in self.rolled_back],
            "seconds": round(self.seconds, 4),
            "recovery": self.recovery,
        }


class Pass(ABC):
    """One transformation of a program: valid in, valid out.

    Class attributes:
        name: unique, verb-noun, saying the result.
        phase: `"canonicalize"` (exact, always useful) or `"rewrite"` (approximate, planned).
        after: passes that must run earlier, each with the reason.
        exactness: what the pass promises about outputs.
        config_type: frozen dataclass of settings.
    """

    name: ClassVar[str]
    phase: ClassVar[str]
    after: ClassVar[Mapping[str, str]] = {}
    exactness: ClassVar[Exactness] = REASSOCIATES
    config_type: ClassVar[type | None] = None

    @abstractmethod
    def run(self, program: Program, ctx: PassContext) -> PassRecord:
        """Rewrite the program in place and report what was done."""


class Rewrite(ABC):
    """A local rule: pattern, check, replace. The docstring of each draws it."""

    name: ClassVar[str]

    @abstractmethod
    def match(self, node: fx.Node, program: Program) -> Any | Decline | None:
        """What was matched with `node` as anchor; None: not an anchor; Decline: nearly."""

    @abstractmethod
    def replace(self, node: fx.Node, match: Any, program: Program) -> fx.Node:
        """Build the replacement in front of the anchor and return it."""


class RewritePass(Pass):
    """A pass that applies rules to every node, in graph order, each anchor at most once."""

    @abstractmethod
    def rules(self) -> Iterable[Rewrite]:
        """The rules, first match wins."""

    def run(self, program: Program, ctx: PassContext) -> PassRecord:
        """Apply the rules once over the graph."""
        record = PassRecord(self.name, self.exactness)
        rules = list(self.rules())
        for node in list(program.graph.nodes):
            if node.op == "call_function" and ctx.enabled(module_path(node)):
                _apply_first(rules, node, program, ctx, record)
        program.finish()
        return record


def _apply_first(
    rules: list[Rewrite], node: fx.Node, program: Program, ctx: PassContext, record: PassRecord
) -> None:
    nearest: Decline | None = None
    for rule in rules:
        match = rule.match(node, program)
        if match is None:
            continue
        if isinstance(match, Decline):
            nearest = nearest or match
            continue
        if not ctx.fuel.burn():
            return
        provide(program, node, rule.name, functools.partial(rule.replace, node, match, program))
        record.rewrites.append(Applied(rule.name, node.name, module_path(node)))
        return
    if nearest is not None:
        record.declined.append(nearest)


def provide(
    program: Program,
    node: fx.Node,
    rule: str,
    build: Callable[[], fx.Node],
    site: str = "",
    folded: Sequence[fx.Node] = (),
) -> fx.Node:
    """Replace `node` by what `build` makes in front of it; every new node gets its provenance.

    Nodes in front of it that the replacement computes too are `folded`; they die unless others
    read them.
    """
    last = node.prev
    sources = (node.name, *(n.name for n in folded))
    with program.graph.inserting_before(node):
        new = build()
    for fresh in itertools.takewhile(lambda n: n is not last, preceding(node)):
        for key in ("nn_module_stack", "stack_trace"):
            if key in node.meta:
                fresh.meta.setdefault(key, node.meta[key])
        fresh.meta.setdefault("provenance", Provenance(rule, sources, site))
    program.refresh(node)  # the next match may end at a node that was made here
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)
    return new
