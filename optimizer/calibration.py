"""Calibration data: from whatever a user has to a list of calls that fit the model.

Bad data is refused before any work starts, by batch, argument and shape.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxpress.capture import Call, frozen
from fxpress.errors import CalibrationError

__all__ = ["MAX_BATCHES", "Calibration", "collect"]

MAX_BATCHES = 512
"""How many batches of a one-shot or endless iterable are read."""

_ROWS_PER_BATCH = 8


@dataclass(frozen=True)
class Calibration:
    """Calls of a model, checked, with those set apart for judging.

    Attributes:
        profile: calls that decisions may be learned from.
        heldout: calls that only the judge sees.
        dropped: arguments that the model does not take (labels), by name.
        notes: what a reader of the report must know about the data.
    """

    profile: list[Call]
    heldout: list[Call]
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def calls(self) -> list[Call]:
        """All calls."""
        return self.profile + self.heldout


def collect(
    model: nn.Module,
    calib_data: Any,
    *,
    input_fn: Callable[[Any], Any] | None = None,
    validation_data: Any = None,
    device: torch.device | None = None,
) -> Calibration:
    """Read, normalize, check and split calibration data.

    Args:
        model: the model that the batches are for.
        calib_data: an iterable of batches (tensor; tuple or list of positional arguments; mapping
            of keyword arguments), a `DataLoader`, a `datasets.Dataset`, or a callable
            `forward_loop(model)` that calls the model itself.
        input_fn: picks the model's inputs from a batch.
        validation_data: batches to judge on, in the same forms; without it every fifth batch is
            held out, at least one, and two of four or more.
        device: where the batches are moved.

    Raises:
        CalibrationError: nothing to calibrate on; or a batch that is no batch, does not fit the
            model or the other batches, or holds NaN or Inf.
    """
    calls, dropped = _calls(model, calib_data, input_fn, device, "calib_data")
    notes: tuple[str, ...] = ()
    if validation_data is not None:
        heldout, more = _calls(model, validation_data, input_fn, device, "validation_data")
        _check_like(heldout, calls[0], "validation_data")
        dropped |= more
        profile = calls
    elif len(calls) == 1:
        profile = heldout = calls
        notes = ("judged on the data that it was calibrated on: only one batch was given",)
    else:
        profile, heldout = _split(calls)
    _try_calls(model, calls)
    return Calibration(profile, heldout, tuple(sorted(dropped)), notes)


def _split(calls: list[Call]) -> tuple[list[Call], list[Call]]:
    """Every fifth call is held out, spread over the whole: ordered data is judged fairly.

    The largest of each size is learned from: what is learned, such as a mask, reaches that far.
    """
    wanted = max(len(calls) // 5, 2 if len(calls) >= 4 else 1)
    chosen = {len(calls) - 1 - (i * len(calls)) // wanted for i in range(wanted)}
    largest = _largest(calls, chosen)
    for index in sorted(chosen & largest):
        others = set(range(len(calls))) - chosen - largest
        if others:
            nearest = min(others, key=lambda other: (abs(other - index), other))
            chosen = chosen - {index} | {nearest}
    profile = [call for i, call in enumerate(calls) if i not in chosen]
    return profile, [calls[i] for i in sorted(chosen)]


def _largest(calls: Sequence[Call], last: set[int]) -> set[int]:
    """For each size that differs between calls one that has the largest, those of `last` last."""
    tensors = [[x for x in pytree.tree_leaves(call) if isinstance(x, Tensor)] for call in calls]
    shapes = [[size for tensor in row for size in tensor.shape] for row in tensors]
    order = sorted(range(len(calls)), key=lambda index: (index in last, index))
    columns = [column for column in zip(*shapes, strict=False) if len(set(column)) > 1]
    return {max(order, key=lambda index: column[index]) for column in columns}


def _calls(
    model: nn.Module,
    data: Any,
    input_fn: Callable[[Any], Any] | None,
    device: torch.device | None,
    name: str,
) -> tuple[list[Call], set[str]]:
    dropped: set[str] = set()
    if callable(data) and not isinstance(data, Iterable):
        calls = _record(model, data)
    else:
        calls = []
        for index, batch in enumerate(_batches(data, name)):
            picked = input_fn(batch) if input_fn is not None else batch
            calls.append(_call(model, picked, f"{name}[{index}]", dropped))
    if not calls:
        raise CalibrationError(f"{name} is empty: give at least two batches of model inputs")
    calls = [pytree.tree_map(lambda v: _on_device(v, device), call) for call in calls]
    _check_like(calls[1:], calls[0], name, 1)
    for index, call in enumerate(calls):
        _check_finite(call, f"{name}[{index}]")
    return calls, dropped


def _batches(data: Any, name: str) -> Iterable[Any]:
    if data is None:
        raise CalibrationError(f"{name} is None: give an iterable of batches, or plan=")
    if isinstance(data, (Tensor, str, bytes, Mapping)):
        kind = type(data).__name__
        raise CalibrationError(f"{name} is one {kind}, not batches: wrap it in a list: [{name}]")
    if hasattr(data, "column_names") and hasattr(data, "with_format"):
        batches = data.with_format("torch").iter(batch_size=_ROWS_PER_BATCH)
        return itertools.islice(batches, MAX_BATCHES)
    if not isinstance(data, Iterable):
        raise CalibrationError(f"{name} is a {type(data).__name__}: give an iterable of batches")
    return itertools.islice(data, MAX_BATCHES)


def _record(model: nn.Module, forward_loop: Callable[[nn.Module], Any]) -> list[Call]:
    calls: list[Call] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(calls) < MAX_BATCHES:
            calls.append((args, kwargs))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with frozen(model), torch.no_grad():
            forward_loop(model)
    except Exception as error:
        raise CalibrationError(f"forward_loop raised {_brief(error)}") from error
    finally:
        handle.remove()
    return calls


def _call(model: nn.Module, batch: Any, where: str, dropped: set[str]) -> Call:
    """A batch as a call; what the signature does not take is dropped and named."""
    parameters = inspect.signature(model.forward).parameters
    kinds = {p.kind for p in parameters.values()}
    if isinstance(batch, Mapping):
        if inspect.Parameter.VAR_KEYWORD in kinds:
            return (), dict(batch)
        extra = [key for key in batch if key not in parameters]
        if len(extra) == len(batch):
            raise CalibrationError(
                f"{where} has the keys {sorted(map(str, batch))}, none of which the model takes: "
                f"{list(parameters)}; pass input_fn= to pick its inputs"
            )
        dropped.update(str(key) for key in extra)
        return (), {key: value for key, value in batch.items() if key not in extra}
    if isinstance(batch, (tuple, list)):
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            return tuple(batch), {}
        room = sum(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in parameters.values())
        dropped.update(f"item {index}" for index in range(room, len(batch)))
        return tuple(batch[:room]), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise CalibrationError(
        f"{where} is a {type(batch).__name__}: a batch is a tensor, a tuple or list of arguments, "
        "or a mapping of keyword arguments; pass input_fn= to make one"
    )


def _on_device(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device is not None else value


def _named(call: Call) -> dict[str, Any]:
    leaves, _ = pytree.tree_flatten_with_path(call)
    return {_argument(path): leaf for path, leaf in leaves}


def _argument(path: Sequence[Any]) -> str:
    """`input_ids`, `2` or `state.0`: a key path without the outer (args, kwargs) pair."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path[1:])


def _check_like(calls: Sequence[Call], first: Call, name: str, first_index: int = 0) -> None:
    expected = _named(first)
    for index, call in enumerate(calls, first_index):
        where, found = f"{name}[{index}]", _named(call)
        if found.keys() != expected.keys():
            raise CalibrationError(
                f"{where} has the arguments {list(found)}, but the first batch has "
                f"{list(expected)}: give all batches the same"
            )
        for argument, value in found.items():
            if reason := _unlike(value, expected[argument]):
                raise CalibrationError(f"{where}, argument {argument}: {reason}")


def _unlike(value: Any, expected: Any) -> str:
    if not isinstance(expected, Tensor) or not isinstance(value, Tensor):
        same = type(value) is type(expected)
        return "" if same else f"{type(value).__name__}, not {type(expected).__name__}"
    if value.dtype != expected.dtype:
        return f"dtype {value.dtype}, but {expected.dtype} in the first batch"
    if value.ndim != expected.ndim:
        return f"shape {tuple(value.shape)}, but {tuple(expected.shape)} in the first batch"
    return ""


def _check_finite(call: Call, where: str) -> None:
    for argument, value in _named(call).items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if not torch.isfinite(value).all():
            what = "NaN" if torch.isnan(value).any() else "Inf"
            raise CalibrationError(f"{where}, argument {argument}: holds {what}")


def _try_calls(model: nn.Module, calls: Sequence[Call]) -> None:
    """Run the model once for every combination of shapes."""
    tried: set[str] = set()
    with frozen(model), torch.no_grad():
        for index, call in enumerate(calls):
            shapes = _shapes(call)
            if shapes in tried:
                continue
            tried.add(shapes)
            try:
                model(*call[0], **call[1])
            except Exception as error:
                raise CalibrationError(
                    f"calib_data[{index}] does not fit the model: {shapes}"
                    + (f", where the first batch has {_shapes(calls[0])}" if index else "")
                    + f"; the model raised {_brief(error)}"
                ) from error


def _shapes(call: Call) -> str:
    described = [
        f"{name} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        for name, value in _named(call).items()
        if isinstance(value, Tensor)
    ]
    return ", ".join(described)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
