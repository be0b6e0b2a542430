"""fxpress: a compiler for trained PyTorch models.

`optimize(model, calib_data)` captures a model as a graph, watches it run on calibration data, and
rewrites it into a smaller, faster one that can be inspected pass by pass.
"""

from __future__ import annotations

from fxpress import errors, testing
from fxpress import hf as hf
from fxpress.api import optimize, optimize_
from fxpress.artifact import load
from fxpress.capture import capture
from fxpress.config import OptimizeConfig
from fxpress.explain import Explanation, Site, explain
from fxpress.optimized import OptimizedModule
from fxpress.plan import Plan, Verdict
from fxpress.program import Program
from fxpress.report import Report
from fxpress.rewrite import Decline, Pass, PassContext, PassRecord, Rewrite

__all__ = [
    "Decline",
    "Explanation",
    "OptimizeConfig",
    "OptimizedModule",
    "Pass",
    "PassContext",
    "PassRecord",
    "Plan",
    "Program",
    "Report",
    "Rewrite",
    "Site",
    "Verdict",
    "capture",
    "errors",
    "explain",
    "hf",
    "load",
    "optimize",
    "optimize_",
    "testing",
]
