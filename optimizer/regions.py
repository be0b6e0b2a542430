"""A captured model: one program for the whole of it, or one for each part that can be captured.

Where the root cannot be exported (data-dependent Python, say), the module tree is descended and
the largest parts that can be are captured, each with the inputs of recorded calls. The rest stays
Python. A captured part sits in the tree where the module sat, under the same state-dict keys.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxpress.capture import Call, capture_calls, frozen, kept_buffers
from fxpress.containers import register_containers
from fxpress.errors import CaptureError
from fxpress.program import Program
from fxpress.rewrite import Snapshot

__all__ = ["CapturedModel", "Region", "RegionFailure", "capture_model"]

Runner = Callable[[Program, Sequence[Any]], Any]
"""Runs a program on flattened inputs; the default is `Program.run`."""

_RECORDED_CALLS = 2


@dataclass(frozen=True)
class RegionFailure:
    """A module that stays Python, and why."""

    path: str
    reason: str

    def as_dict(self) -> dict[str, str]:
        """A JSON-able form."""
        return {"path": self.path, "captured": "no", "reason": self.reason}


@dataclass
class CapturedModel:
    """The captured programs of a model, by module path, and what could not be captured.

    Attributes:
        model: the original; once released, what is left of it.
        programs: by path of the captured module, `""` for the root.
        failures: modules that stay Python.
        released: whether the captured modules themselves were let go.
    """

    model: nn.Module
    programs: dict[str, Program]
    failures: list[RegionFailure] = field(default_factory=list)
    released: bool = False

    def copy(self) -> CapturedModel:
        """Graphs of its own, the same tensors."""
        return replace(self, programs={path: p.copy() for path, p in self.programs.items()})

    def release(self) -> CapturedModel:
        """The same programs, holding no captured module: of these only plain attributes stay."""
        if list(self.programs) == [""]:
            return replace(self, model=_Remains(self.model), released=True)
        host = _structural_copy(self.model)
        for path in self.programs:
            _exchange(host, path, _Remains(host.get_submodule(path)))
        return replace(self, model=host, released=True)

    def snapshot(self) -> Snapshot:
        """A copy of the graphs, for reports."""
        return Snapshot({path: p.copy() for path, p in self.programs.items()})

    def build(self, runner: Runner = Program.run, fallback: bool = True) -> nn.Module:
        """A module that runs the programs in place of the captured modules.

        Args:
            runner: how a program is run (profiling runs it node by node).
            fallback: run the original module for calls that do not fit the captured one, as long as
                it was not released; else they raise `CaptureError`.
        """
        fallback = fallback and not self.released
        if list(self.programs) == [""]:
            return Region(self.programs[""], self.model, runner, fallback)
        host = _structural_copy(self.model)
        for path, program in self.programs.items():
            region = Region(program, self.model.get_submodule(path), runner, fallback)
            _exchange(host, path, region)
        return host.eval()

    def as_dicts(self) -> list[dict[str, str]]:
        """Every region and every module that stays Python, JSON-able."""
        captured = [{"path": p, "captured": "yes", "reason": ""} for p in self.programs]
        return captured + [failure.as_dict() for failure in self.failures]


class _Remains(nn.Module):
    """What stays of a released module: its public attributes that hold no tensor and no module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        plain = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and not callable(value) and not isinstance(value, Tensor)
        }
        self.__dict__.update(plain)


def _exchange(host: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(host.get_submodule(parent), name, module)


class Region(nn.Module):
    """A captured module in the place of the original one.

    Unknown attributes are the original's; a call that was not captured is answered by the
    original, with one warning, or refused where that was released.
    """

    def __init__(
        self, program: Program, original: nn.Module, runner: Runner, fallback: bool
    ) -> None:
        super().__init__()
        graph_module = program.graph_module
        # The same dictionaries: state-dict keys, devices and dtypes are those of the graph.
        self._parameters = graph_module._parameters
        self._buffers = graph_module._buffers
        self._modules = graph_module._modules
        self.__dict__.update(
            program=program, original=original, runner=runner, fallback=fallback, _warned=False
        )
        self.training = False

    def __getattr__(self, name: str) -> Any:
        """Own parameters and modules first, then whatever the original has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:
                raise
            if name == "generate":
                raise AttributeError(
                    "generate() would run the original model: use fxpress.hf.attach(model, plan) "
                    "to have the rewritten attention inside the model that generates"
                ) from None
            return getattr(self.__dict__["original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program, or the original for a call that does not fit."""
        leaves = self.program.signature.flatten(args, kwargs)
        reason = leaves if isinstance(leaves, str) else self.program.mismatch(leaves)
        if not reason:
            result = self.runner(self.program, leaves)
            return _refuse_backward(result, self.program.untrainable)
        if not self.fallback:
            raise CaptureError(
                f"this call does not fit the captured one ({reason}); "
                "capture it with calibration batches of this kind"
            )
        if not self._warned:
            self.__dict__["_warned"] = True
            where = f" of {self.program.path}" if self.program.path else ""
            warnings.warn(f"a call{where} runs the original module: {reason}", stacklevel=2)
        return self.original(*args, **kwargs)


class _RefuseBackward(torch.autograd.Function):
    """Identity whose backward raises: no gradient is better than a wrong one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reason: str) -> Tensor:
        ctx.reason = reason
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> Any:
        raise CaptureError(f"gradients would be wrong: {ctx.reason}; train the original model")


def _refuse_backward(result: Any, reason: str) -> Any:
    if not reason:
        return result

    def guard(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            return _RefuseBackward.apply(leaf, reason)  # type: ignore[no-untyped-call]
        return leaf

    return pytree.tree_map(guard, result)


def _structural_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, memo)


def capture_model(model: nn.Module, calls: Sequence[Call]) -> CapturedModel:
    """Capture the whole model or, where that fails, its largest parts.

    Args:
        model: left as it was.
        calls: calls to capture for; sizes that differ between them become dynamic.

    Raises:
        CaptureError: not even a part of the model can be captured.
    """
    try:
        return CapturedModel(model, {"": capture_calls(model, calls)})
    except CaptureError as error:
        captured = CapturedModel(model, {}, [RegionFailure("", str(error))])
    try:
        recorded = _record_calls(model, calls[:_RECORDED_CALLS])
    except Exception as error:
        raise CaptureError(f"the model does not run: {error}") from error
    _descend(model, "", recorded, captured)
    if not captured.programs:
        raise CaptureError(f"no part of the model can be captured; {captured.failures[0].reason}")
    return captured


def _descend(
    module: nn.Module, path: str, recorded: Mapping[str, list[Call]], captured: CapturedModel
) -> None:
    for name, child in module.named_children():
        child_path = f"{path}.{name}".lstrip(".")
        calls = recorded.get(child_path, [])
        if calls and any(True for _ in child.parameters()):
            try:
                program = capture_calls(child, calls)
                captured.programs[child_path] = replace(program, path=child_path)
                continue
            except CaptureError as error:
                captured.failures.append(RegionFailure(child_path, str(error)))
        _descend(child, child_path, recorded, captured)


def _record_calls(model: nn.Module, calls: Sequence[Call]) -> dict[str, list[Call]]:
    """The inputs of every submodule during some calls, by path."""
    recorded: dict[str, list[Call]] = {}
    recording = [True]

    def recorder(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entry = recorded.setdefault(path, [])
            if recording[0] and len(entry) < _RECORDED_CALLS:
                register_containers((args, kwargs))
                entry.append(pytree.tree_map(_keep, (args, kwargs)))

        return hook

    handles = [
        module.register_forward_pre_hook(recorder(path), with_kwargs=True)
        for path, module in model.named_modules()
        if path
    ]
    try:
        with frozen(model), kept_buffers(model), torch.no_grad(), _eager_branches(recording):
            for args, kwargs in calls:
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return recorded


@contextlib.contextmanager
def _eager_branches(recording: list[bool]) -> Iterator[None]:
    """Run `torch.cond` as Python would, without recording: torch compiles what is in a branch.

    What is compiled there must not become a region, for tracing cannot look through one.
    """
    original = torch.cond

    def cond(pred: Any, true_fn: Any, false_fn: Any, operands: Any = ()) -> Any:
        outside, recording[0] = recording[0], False
        try:
            return (true_fn if pred else false_fn)(*operands)
        finally:
            recording[0] = outside

    torch.cond = cond
    try:
        yield
    finally:
        torch.cond = original


def _keep(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
