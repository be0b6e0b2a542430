"""`fxpress bisect`: the first rewrite that breaks a model, found by fuel.

The script is a Python file with

    def model() -> nn.Module: ...             # the model, the same each time
    def calib_data() -> Iterable: ...         # as for fxpress.optimize
    def check(optimized) -> bool: ...         # whether the optimized model is still good
    options = {"judge": "off", ...}           # optional: further arguments of fxpress.optimize

The run is planned once; its plan is then applied with fuel for the first n rewrites only, so a
trial is cheap and always decides the same. A check that raises counts as one that fails.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from fxpress.environment import limited_fuel
from fxpress.errors import PlanError
from fxpress.optimized import OptimizedModule
from fxpress.plan import Plan
from fxpress.rewrite import Applied, PassRecord

__all__ = ["Culprit", "Verdict", "bisect"]

_REPLAYED = ("config", "device", "objective")  # options that a plan is applied with


@dataclass(frozen=True)
class Culprit:
    """The first rewrite after which the check fails.

    Attributes:
        number: counted from 1, in the order in which they are applied.
        pass_name: the pass that made it.
        rewrite: what it was.
        diff: the graph around it before and after, as a unified diff.
    """

    number: int
    pass_name: str
    rewrite: Applied
    diff: str


@dataclass
class Verdict:
    """What a bisection found.

    Attributes:
        rewrites: how many there are in all.
        culprit: None where there is none to be found; `reason` says why.
        reason: one line.
        trials: (number of rewrites, whether the check passed), in order.
    """

    rewrites: int = 0
    culprit: Culprit | None = None
    reason: str = ""
    trials: list[tuple[int, bool]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        found = {"schema": 1, "rewrites": self.rewrites, "reason": self.reason}
        found["trials"] = [{"rewrites": n, "passed": good} for n, good in self.trials]
        if (c := self.culprit) is not None:
            rewrite = {"number": c.number, "pass": c.pass_name, **c.rewrite.as_dict()}
            found["culprit"] = {**rewrite, "diff": c.diff}
        return found

    def __str__(self) -> str:
        """The finding for a terminal."""
        if (c := self.culprit) is None:
            return self.reason
        where = f" in {c.rewrite.path}" * bool(c.rewrite.path)
        head = f"rewrite {c.number} of {self.rewrites} breaks it: {c.pass_name}"
        return f"{head}, {c.rewrite.rule} of %{c.rewrite.node}{where}\n{c.diff}"


def bisect(
    script: ModuleType, optimize: Callable[..., OptimizedModule], echo: Callable[[str], None]
) -> Verdict:
    """Find the first rewrite of `optimize` after which the script's check fails.

    Args:
        script: as the module's description says.
        optimize: `fxpress.optimize`.
        echo: told of every trial.

    Raises:
        PlanError: the script lacks a function.
    """
    for name in ("model", "calib_data", "check"):
        if not callable(getattr(script, name, None)):
            raise PlanError(f"{script.__file__} defines no function {name}()")
    return _Bisection(script, optimize, echo).run()


@dataclass
class _Bisection:
    script: ModuleType
    optimize: Callable[..., OptimizedModule]
    echo: Callable[[str], None]
    verdict: Verdict = field(default_factory=Verdict)
    plan: Plan = field(default_factory=Plan)
    exact: int = 0  # rewrites before the first planned one

    def run(self) -> Verdict:
        options = {"judge": "off", **getattr(self.script, "options", {})}
        full = self.optimize(self.script.model(), self.script.calib_data(), **options)
        self.plan = full.plan
        counts = {name: len(record.rewrites) for name, record in full.passes.items()}
        self.exact = sum(n for name, n in counts.items() if name not in self.plan.decisions)
        total = self.verdict.rewrites = sum(counts.values())
        if not self._passes(0):
            self.verdict.reason = "the check fails before any rewrite: on the model itself"
        elif self._passes(total):
            self.verdict.reason = f"the check passes with all {total} rewrites: nothing to find"
        else:
            self.verdict.culprit = self._culprit(self._first_bad(0, total))
        return self.verdict

    def _first_bad(self, good: int, bad: int) -> int:
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if self._passes(middle) else (good, middle)
        return bad

    def _passes(self, count: int) -> bool:
        optimized = self._with_rewrites(count)
        try:
            good, why = bool(self.script.check(optimized)), ""
        except Exception as error:  # noqa: BLE001 - a model that cannot run is broken
            good, why = False, f" ({type(error).__name__}: {' '.join(str(error).split())})"
        self.verdict.trials.append((count, good))
        self.echo(f"{count} rewrites: {'good' if good else 'bad'}{why}")
        return good

    def _with_rewrites(self, count: int) -> OptimizedModule:
        given = getattr(self.script, "options", {})
        options = {name: given[name] for name in _REPLAYED if name in given}
        # Sites that the plan names may not be there yet where exact rewrites are held back.
        plan = self.plan if count > self.exact else Plan(calls=self.plan.calls)
        with limited_fuel(count):
            return self.optimize(self.script.model(), None, plan=plan, **options)

    def _culprit(self, number: int) -> Culprit:
        before, after = self._with_rewrites(number - 1), self._with_rewrites(number)
        name, rewrite = _last(after.passes)
        old, new = (str(o.captured.snapshot()).splitlines() for o in (before, after))
        lines = difflib.unified_diff(old, new, f"before {name}", f"after {name}", lineterm="")
        return Culprit(number, name, rewrite, "\n".join(lines))


def _last(passes: Any) -> tuple[str, Applied]:
    records: list[PassRecord] = [record for record in passes.values() if record.rewrites]
    return records[-1].name, records[-1].rewrites[-1]
