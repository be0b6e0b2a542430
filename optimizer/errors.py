"""The error hierarchy.

Every message says what went wrong, where (module path, source line, batch or file) and what to do
about it. Each class also inherits the builtin that a caller would expect to catch.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CaptureError",
    "FxpressError",
    "LoweringError",
    "PassError",
    "PlanError",
    "VerifyError",
]


class FxpressError(Exception):
    """Base of everything that fxpress raises on purpose."""


class CaptureError(FxpressError, RuntimeError):
    """The model, or a call of it, could not be captured as a graph."""


class CalibrationError(FxpressError, ValueError):
    """Calibration or validation data is missing, malformed, or does not fit the model."""


class VerifyError(FxpressError, AssertionError):
    """A program broke an invariant; the message names the pass and prints the graph around it."""


class PassError(FxpressError, RuntimeError):
    """A pass could not do its work, or was configured or named wrongly."""


class LoweringError(FxpressError, RuntimeError):
    """An operator has no lowering for this device, or was called with arguments that do not fit."""


class PlanError(FxpressError, ValueError):
    """A plan, a configuration or a budget is not valid, or does not fit the model."""


class ArtifactError(FxpressError, OSError):
    """A saved file is damaged, unknown or unsafe."""
