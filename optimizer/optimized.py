"""`OptimizedModule`: the result of `optimize`, an `nn.Module` that is called like the original."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fxpress.config import nearest
from fxpress.errors import PlanError
from fxpress.plan import Plan
from fxpress.regions import CapturedModel
from fxpress.report import Report
from fxpress.rewrite import PassRecord

__all__ = ["OptimizedModule"]


class OptimizedModule(nn.Module):
    """The rewritten model, with what was done to it.

    It is called like the original; attributes that it does not have are the original's. Parameters
    share storage with the original's until they are trained, moved or loaded. A call that it was
    not captured for runs the original, with one warning, where that was kept on the same device,
    and raises `CaptureError` otherwise.

    Attributes:
        passes: record of each pass, by name.
        plan: the decisions and verdicts, to be stored and applied again.
        report: what was gained, lost and refused.
        original: the untouched model (None with `keep_original=False`; with `"cpu"` a copy there).
        captured: the programs behind this module.
    """

    passes: Mapping[str, PassRecord]
    plan: Plan
    report: Report
    original: nn.Module | None
    captured: CapturedModel

    def __init__(
        self,
        captured: CapturedModel,
        *,
        passes: Mapping[str, PassRecord],
        plan: Plan,
        report: Report,
        original: nn.Module | None,
        rebuild: Callable[[Plan], OptimizedModule] | None = None,
    ) -> None:
        super().__init__()
        body = captured.build()
        # The same dictionaries: parameters, devices and state-dict keys are the body's.
        self._parameters = body._parameters
        self._buffers = body._buffers
        self._modules = body._modules
        self.__dict__.update(
            body=body,
            captured=captured,
            passes=passes,
            plan=plan,
            report=report,
            original=original,
            _rebuild=rebuild,
            _own=False,
        )
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the rewritten model on the original's arguments."""
        return self.body(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the model that this stands for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "body" not in self.__dict__:
                raise
            return getattr(self.__dict__["body"], name)

    @property
    def sources(self) -> Mapping[str, str]:
        """Generated kernel source by site; empty where no kernel was generated (on CPU)."""
        from fxpress.lowered import kernel_sources

        return types.MappingProxyType(kernel_sources(self.captured))

    def without(self, pass_name: str) -> OptimizedModule:
        """The same model without one of the passes.

        Raises:
            PlanError: no such pass had decisions, or the original was not kept.
        """
        if pass_name not in self.plan.decisions:
            raise PlanError(
                f"no pass {pass_name!r} to leave out: {nearest(pass_name, self.plan.decisions)}"
            )
        if self._rebuild is None:
            raise PlanError("without() needs the original: optimize with keep_original=True")
        return self._rebuild(self.plan.without(pass_name))  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> Path:
        """Save the module for `fxpress.load`: graphs, tensors, plan and report; no code.

        The files replace what was saved there before all at once: a process that is killed leaves
        the old artifact or the new one.

        Args:
            path: a folder, or a stored zip where it ends in `.zip`.

        Raises:
            ArtifactError: the path holds something else, or the graph something that the format
                cannot hold; the message names the node.
        """
        from fxpress import artifact

        return artifact.save(self, path)

    def export(self, path: str | Path) -> Path:
        """Write the module for `torch.export.load`, for runtimes and compilers that read `.pt2`.

        A process that loads it has to import fxpress first where masks or factors were put in:
        those are operators of fxpress. Unlike an artifact, a `.pt2` of a stranger may run code
        when it is loaded, and has neither plan nor report.

        Raises:
            ArtifactError: a part of the model stayed Python, or the name does not end in `.pt2`.
        """
        from fxpress import artifact

        return artifact.export(self, path)

    def unshare(self) -> OptimizedModule:
        """Part from the original's storage: every parameter and buffer becomes a copy."""
        if not self._own:
            for parameter in self.parameters():
                parameter.data = parameter.data.clone()
            for module in self.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = buffer.clone()
            self.__dict__["_own"] = True
        return self

    def train(self, mode: bool = True) -> OptimizedModule:
        """Switch to training (parameters become this module's own) or evaluation.

        The graph was captured in evaluation mode: dropout stays off while training.
        """
        if mode and "body" in self.__dict__:
            self.unshare()
        super().train(mode)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.load_state_dict`, into parameters of this module's own."""
        self.unshare()
        return super().load_state_dict(*args, **kwargs)
