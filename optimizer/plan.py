"""`Plan`: what was decided, as plain data that can be stored, read, compared and applied again.

Decisions come from errors and a cost model and are deterministic. What the judge measured stands
beside them as verdicts: a replay applies the decisions that the verdicts let stand.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxpress.capture import Call
from fxpress.errors import PlanError

__all__ = ["Plan", "Verdict"]

SCHEMA = 1
_INLINE_BYTES = 1 << 16
_FILE = "plan.json"
_TENSORS = "plan.safetensors"


@dataclass(frozen=True)
class Verdict:
    """What the judge said of a site (or, with an empty site, of a whole pass).

    Attributes:
        site: name of the site.
        kept: whether the rewrite stands.
        reason: one line.
        figures: what was measured.
    """

    site: str
    kept: bool
    reason: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "site": self.site,
            "kept": self.kept,
            "reason": self.reason,
            "figures": dict(self.figures),
        }


@dataclass
class Plan:
    """Decisions by pass and site, verdicts by pass, and the calls that the model is captured for.

    Attributes:
        decisions: pass name -> site -> plain data; tensors (masks) are allowed as values.
        verdicts: pass name -> verdicts.
        calls: example calls, values forgotten: they carry structure, shapes and dtypes.
    """

    decisions: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)

    def standing(self, pass_name: str) -> dict[str, dict[str, Any]]:
        """The decisions of a pass that no verdict took back."""
        verdicts = self.verdicts.get(pass_name, [])
        if any(not v.kept and not v.site for v in verdicts):
            return {}
        gone = {v.site for v in verdicts if not v.kept}
        decisions = self.decisions.get(pass_name, {})
        return {site: decision for site, decision in decisions.items() if site not in gone}

    def without(self, pass_name: str) -> Plan:
        """The same plan without one pass."""
        if pass_name not in self.decisions:
            raise PlanError(f"the plan has no pass {pass_name!r}: it has {sorted(self.decisions)}")
        rest = copy.copy(self)
        rest.decisions = {k: v for k, v in self.decisions.items() if k != pass_name}
        rest.verdicts = {k: v for k, v in self.verdicts.items() if k != pass_name}
        return rest

    def check_fits(self, model: nn.Module, device: torch.device | None = None) -> None:
        """Run a model on the example calls.

        Raises:
            PlanError: it cannot take one of them: the plan was made for another model.
        """
        for args, kwargs in self.example_calls(device):
            try:
                with torch.no_grad():
                    model(*args, **kwargs)
            except Exception as error:
                raise PlanError(
                    "the plan was made for another model: this one cannot be called alike; "
                    f"{type(error).__name__}: {error}"
                ) from error

    def example_calls(self, device: torch.device | None = None) -> list[Call]:
        """Calls of the recorded structure: zeros for floats, ones for integers and flags."""
        calls = []
        for call in self.calls:
            args, kwargs = _example(call["args"], device), _example(call["kwargs"], device)
            calls.append((tuple(args), kwargs))
        return calls

    def to_json(self) -> str:
        """The whole plan as text; masks are compressed inline."""
        return json.dumps(self._as_dict({}, inline=None), indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            PlanError: the text is no plan, or of an unknown schema.
        """
        return _from_dict(_parse(text, "the text"), {})

    def save(self, folder: str | Path) -> Path:
        """Write the plan into a folder: small masks inline, large ones in a safetensors file.

        The files are replaced one by one, the JSON last, each by a rename: a reader never sees
        half a file, and the JSON names its tensors by the hash of their content.
        """
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        text = json.dumps(self._as_dict(tensors, _INLINE_BYTES), indent=1, sort_keys=True)
        if tensors:
            _write(folder / _TENSORS, save(tensors))
        _write(folder / _FILE, text.encode())
        return folder

    @staticmethod
    def load(folder: str | Path) -> Plan:
        """The plan that `save` wrote.

        Raises:
            PlanError: there is none, or it is damaged.
        """
        from safetensors.torch import load

        folder = Path(folder)
        path = folder / _FILE if folder.is_dir() else folder
        if not path.is_file():
            raise PlanError(f"{path} does not exist: save a plan with plan.save(folder)")
        data = _parse(path.read_text(encoding="utf-8"), str(path))
        stored = path.parent / _TENSORS
        try:
            tensors = load(stored.read_bytes()) if stored.is_file() else {}
        except Exception as error:
            raise PlanError(f"{stored} is damaged: {error}") from error
        return _from_dict(data, tensors)

    def _as_dict(self, tensors: dict[str, Tensor], inline: int | None) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "decisions": _encode(self.decisions, tensors, inline),
            "verdicts": {k: [v.as_dict() for v in vs] for k, vs in self.verdicts.items()},
            "calls": self.calls,
        }


def describe_call(call: Call) -> dict[str, Any]:
    """A call as plain data: tensors become dtype and shape.

    Raises:
        PlanError: an argument is no tensor, number, text, flag, None, list, tuple or dict.
    """
    return {"args": _describe(list(call[0])), "kwargs": _describe(dict(call[1]))}


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": [dtype, list(value.shape)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_describe(item) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _describe(item) for key, item in value.items()}}
    return {"opaque": type(value).__qualname__}


def _example(described: Mapping[str, Any], device: torch.device | None) -> Any:
    kind, content = next(iter(described.items()))
    if kind == "tensor":
        dtype = getattr(torch, content[0])
        make = torch.zeros if dtype.is_floating_point or dtype.is_complex else torch.ones
        return make(content[1], dtype=dtype, device=device)
    if kind == "value":
        return content
    if kind == "dict":
        return {key: _example(item, device) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_example(item, device) for item in content]
        return tuple(items) if kind == "tuple" else items
    raise PlanError(
        f"the model was captured with an argument of type {content}, which a plan cannot hold: "
        "give calib_data together with plan="
    )


def _encode(value: Any, tensors: dict[str, Tensor], inline: int | None) -> Any:
    if isinstance(value, Tensor):
        return _encode_tensor(value.cpu().contiguous(), tensors, inline)
    if isinstance(value, Mapping):
        return {str(key): _encode(item, tensors, inline) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item, tensors, inline) for item in value]
    return value


def _encode_tensor(value: Tensor, tensors: dict[str, Tensor], inline: int | None) -> Any:
    packed = _pack(value)
    head = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    data = zlib.compress(packed.numpy().tobytes(), 9)
    if inline is None or len(data) <= inline:
        return {"tensor": head | {"zlib": base64.b64encode(data).decode()}}
    digest = hashlib.sha256(packed.numpy().tobytes()).hexdigest()
    tensors[digest] = packed
    return {"tensor": head | {"sha256": digest}}


def _pack(value: Tensor) -> Tensor:
    """Bytes of a tensor; flags take a bit each."""
    if value.dtype is not torch.bool:
        return value.flatten().view(torch.uint8)
    flat = value.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
    return (flat * weights).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if dtype is not torch.bool:
        return packed.view(dtype).view(shape)
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    count = torch.Size(shape).numel()
    return bits.flatten()[:count].bool().view(shape)


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Mapping) and list(value) == ["tensor"]:
        return _decode_tensor(value["tensor"], tensors)
    if isinstance(value, Mapping):
        return {key: _decode(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    return value


def _decode_tensor(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    dtype = getattr(torch, str(entry["dtype"]))
    if "zlib" in entry:
        packed = torch.frombuffer(_inflate(entry, dtype), dtype=torch.uint8)
    elif entry["sha256"] in tensors:
        packed = tensors[entry["sha256"]]
        if hashlib.sha256(packed.numpy().tobytes()).hexdigest() != entry["sha256"]:
            raise PlanError(f"tensor {entry['sha256'][:12]} is damaged: its hash differs")
    else:
        raise PlanError(
            f"tensor {entry['sha256'][:12]} is missing: load the plan from its folder "
            "(Plan.load), which holds the large masks"
        )
    return _unpack(packed, dtype, list(entry["shape"]))


def _inflate(entry: Mapping[str, Any], dtype: torch.dtype) -> bytearray:
    """The bytes of a tensor; never more than its shape calls for, whatever the data says."""
    count = torch.Size(entry["shape"]).numel()
    size = -(-count // 8) if dtype is torch.bool else count * dtype.itemsize
    raw = zlib.decompressobj().decompress(base64.b64decode(entry["zlib"]), max(size, 1) + 1)
    if len(raw) != size:
        raise PlanError(f"the plan is damaged: a tensor of {size} bytes has other data")
    return bytearray(raw)


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(f"{where} is no plan: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise PlanError(f"{where} is no plan of schema {SCHEMA}; write one with plan.to_json()")
    return data


def _from_dict(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    try:
        verdicts = {
            name: [Verdict(**entry) for entry in entries]
            for name, entries in data["verdicts"].items()
        }
        return Plan(_decode(data["decisions"], tensors), verdicts, list(data["calls"]))
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(f"the plan is damaged: {type(error).__name__}: {error}") from error


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
