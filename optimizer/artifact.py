"""Save an optimized module, load it in another process, export it.

An artifact holds graphs, tensors, plan and report as plain data; `docs/artifact.md` states the
format. Reading one runs no code of it: there is no pickle, no text is evaluated, and graphs call
listed operators only. Kernels are generated again and compared with the saved hashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxpress import artifact_files as files
from fxpress.artifact_files import canonical_json, parse_json
from fxpress.artifact_graph import decode_program, encode_program
from fxpress.artifact_tensors import encode_tensors, load_tensors, write_tensors
from fxpress.artifact_values import fields, parts
from fxpress.errors import ArtifactError, PlanError
from fxpress.lowered import kernel_sources
from fxpress.ops.mask_layout import MaskLayout
from fxpress.optimized import OptimizedModule
from fxpress.plan import Plan
from fxpress.program import Program, attribute
from fxpress.regions import CapturedModel, RegionFailure
from fxpress.report import Report
from fxpress.rewrite import Applied, Decline, PassRecord, RolledBack
from fxpress.testing import BITWISE, REASSOCIATES, Exactness

__all__ = ["export", "load", "save"]

_GRAPH = {
    "device": str,
    "programs": list,
    "failures": list,
    "host": dict,
    "tensors": dict,
    "kernels": dict,
}
_MOVED = (
    "masks stay compiled for the other device; "
    "optimize(model, None, plan=loaded.plan) compiles them for this one"
)


# Saving


def save(optimized: OptimizedModule, path: str | Path) -> Path:
    """As `OptimizedModule.save`."""
    path = Path(path)
    graph, stored = _encode(optimized)
    _check_readable(graph, optimized)
    with files.staged(path) as folder:
        (folder / files.GRAPH).write_bytes(canonical_json(graph))
        write_tensors(stored, folder / files.TENSORS)
        optimized.plan.save(folder)
        (folder / files.REPORT).write_text(optimized.report.to_json(), encoding="utf-8")
    if failures := optimized.captured.failures:
        warnings.warn(
            f"{failures[0].path or 'the root'} stays Python and is not in {path}: "
            "load it with fxpress.load(path, model=...)",
            stacklevel=3,
        )
    return path


def _encode(optimized: OptimizedModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    named: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def name_of(tensor: Tensor, path: str) -> str:
        if id(tensor) not in names:
            names[id(tensor)] = path
            named[path] = tensor
        return names[id(tensor)]

    captured = optimized.captured
    programs = [encode_program(program, name_of) for program in captured.programs.values()]
    host = {path: name_of(tensor, path) for path, tensor in _host_tensors(optimized)}
    records, stored = encode_tensors(named)
    graph = {
        "device": _device_type(named),
        "programs": programs,
        "failures": [[failure.path, failure.reason] for failure in captured.failures],
        "host": host,
        "tensors": records,
        "kernels": _kernel_digests(captured),
    }
    return graph, stored


def _host_tensors(optimized: OptimizedModule) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the modules that stay Python, by path."""
    regions = list(optimized.captured.programs)
    if regions == [""]:
        return
    modules = dict(optimized.body.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if any(f"{path}.".startswith(f"{region}.") for region in regions):
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}".lstrip("."), tensor


def _device_type(tensors: Mapping[str, Tensor]) -> str:
    kinds = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(kinds) > 1:
        raise ArtifactError(f"the model lies on {', '.join(kinds)}: move it to one device to save")
    return torch.device(kinds[0]).type if kinds else "cpu"


def _kernel_digests(captured: CapturedModel) -> dict[str, str]:
    sources = kernel_sources(captured)
    return {site: hashlib.sha256(text.encode()).hexdigest() for site, text in sources.items()}


def _check_readable(graph: Mapping[str, Any], optimized: OptimizedModule) -> None:
    """What cannot be read back is refused here and not when it is needed."""
    for data, program in zip(graph["programs"], optimized.captured.programs.values(), strict=True):
        held = {
            entry["tensor"]: attribute(program.graph_module, target)
            for target, entry in data["tensors"].items()
        }
        device = next(iter(held.values())).device if held else torch.device("cpu")
        try:
            decode_program(data, held, device.type, device)
        except ArtifactError as error:
            raise ArtifactError(f"the model cannot be saved as it is: {error}") from error


# Loading


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
) -> OptimizedModule:
    """Read what `OptimizedModule.save` wrote. No code of the artifact runs.

    The result has `.plan`, `.report`, `.sources` and, as far as the report tells, `.passes`: graphs
    before and after each pass and mean attention maps are not stored.

    Args:
        path: a folder, or a `.zip`.
        model: the original model. Needed where a part of it stayed Python; otherwise it serves
            calls that were not captured, attributes such as `.config`, and `without()`, which
            captures it again with default settings.
        device: where to put the tensors; where they were saved from when None, or on the CPU if
            there is no such device.

    Raises:
        ArtifactError: the artifact is missing, damaged, unsafe, of another schema, or does not
            fit `model`.
    """
    path = Path(path)
    content = files.read(path)
    graph = parse_json(content[files.GRAPH], f"{path}: {files.GRAPH}")
    kind, programs, failures, host, table, kernels = fields(graph, _GRAPH, f"{path}: graph.json")
    where, notes = _device(kind, device)
    with _blamed(path):
        tensors = load_tensors(table, content.pop(files.TENSORS), where)
        decoded = [decode_program(data, tensors, kind, where) for data in programs]
        failed = [RegionFailure(*parts(entry, (str, str), "a failure")) for entry in failures]
    captured = _captured(decoded, failed, model, path)
    with _blamed(path):
        notes += _kernel_notes(captured, kernels)
        layouts = _layouts(captured)
        report = _report(content[files.REPORT], layouts, notes)
        records = _records(report.facts, layouts)
        plan = _plan(content)

    def rebuild(plan: Plan) -> OptimizedModule:
        from fxpress.api import optimize

        if model is None:
            raise PlanError(f"without() needs the original: fxpress.load({str(path)!r}, model=...)")
        return optimize(model, None, plan=plan)

    optimized = OptimizedModule(
        captured,
        passes=records,
        plan=plan,
        report=report,
        original=model,
        rebuild=rebuild,
    )
    _restore_host(optimized.body, host, tensors)
    return optimized


class _Absent(nn.Module):
    """Stands where the original would, which was not given to `load`."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{name!r} is the original model's, which an artifact does not hold: "
            "fxpress.load(path, model=...)"
        )


def _device(kind: str, wanted: torch.device | str | None) -> tuple[torch.device, list[str]]:
    if kind not in ("cpu", "cuda"):
        raise ArtifactError(f"the graph is damaged: {kind!r:.40} is no device")
    missing = kind == "cuda" and not torch.cuda.is_available()
    where = torch.device(wanted or ("cpu" if missing else kind))
    return where, [] if where.type == kind else [f"saved on {kind}, loaded on {where}: {_MOVED}"]


@contextlib.contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Name the artifact in every error that its content causes."""
    try:
        yield
    except Exception as error:  # whatever data may do that is not as it was written
        kind = "" if isinstance(error, ArtifactError) else f"{type(error).__name__}: "
        raise ArtifactError(
            f"{path}: {kind}{error}; it was altered, or written by a newer fxpress: save it again"
        ) from error


def _captured(
    decoded: list[Program], failed: list[RegionFailure], model: nn.Module | None, path: Path
) -> CapturedModel:
    by_path = {program.path: program for program in decoded}
    if not decoded or len(by_path) < len(decoded) or ("" in by_path and len(decoded) > 1):
        raise ArtifactError(f"{path}: its graphs {sorted(by_path)} are no model")
    if model is None and "" not in by_path:
        raise ArtifactError(
            f"{path} holds {len(decoded)} parts of a model whose rest stayed Python: "
            f"fxpress.load({str(path)!r}, model=...)"
        )
    if model is None:
        return CapturedModel(_Absent(), by_path, failed, released=True)
    for program in decoded:
        if reason := _misfit(program, model):
            raise ArtifactError(f"{path} does not fit the model given: {reason}")
    return CapturedModel(model, by_path, failed)


def _misfit(program: Program, model: nn.Module) -> str:
    """Why a program was not captured from this model, or nothing."""
    part = dict(model.named_modules()).get(program.path)
    if part is None:
        return f"it has no module {program.path!r}"
    saved, present = list(program.signature.python.parameters), inspect.signature(part.forward)
    if list(present.parameters) != saved:
        return f"{program.path or 'it'} takes {list(present.parameters)}, not {saved}"
    state = part.state_dict()
    for name, tensor in program.graph_module.state_dict().items():
        if name in state and state[name].shape != tensor.shape:
            return f"{name} is {tuple(state[name].shape)} there, {tuple(tensor.shape)} as saved"
    return ""


def _restore_host(body: nn.Module, host: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Give the modules that stay Python the saved tensors; the model given keeps its own."""
    for path, name in host.items():
        prefix, _, last = path.rpartition(".")
        tensor = tensors.get(name) if isinstance(name, str) else None
        owner = dict(body.named_modules(remove_duplicate=False)).get(prefix)
        table = next((t for t in _tables(owner) if last in t), None)
        present = table[last] if table else None
        if tensor is None or table is None or present is None or present.shape != tensor.shape:
            raise ArtifactError(f"the model given does not fit: it has no {path} as saved")
        table[last] = tensor


def _tables(owner: nn.Module | None) -> list[dict[str, Any]]:
    return [owner._parameters, owner._buffers] if owner is not None else []


def _kernel_notes(captured: CapturedModel, saved: Mapping[str, Any]) -> list[str]:
    """Sites whose kernel is another than when it was saved: the generator may be newer."""
    now = _kernel_digests(captured)
    changed = sorted(site for site in saved if site in now and now[site] != saved[site])
    if not changed:
        return []
    return [f"another kernel than when saved, generated by this version: {', '.join(changed)}"]


def _layouts(captured: CapturedModel) -> dict[str, MaskLayout]:
    """The compiled masks in the graphs, by site."""
    found: dict[str, MaskLayout] = {}
    for program in captured.programs.values():
        for node in program.calls(torch.ops.fxpress.sparse_attention.default):
            layout, spec, made = node.args[3], str(node.args[4]), node.meta.get("provenance")
            if made is not None:
                read = [attribute(program.graph_module, str(n.target)) for n in layout]  # type: ignore[union-attr]
                found[made.site] = MaskLayout(spec, tuple(read))
    return found


class _DenseMasks(Mapping[str, Tensor]):
    """Dense masks by site, made when they are looked at."""

    def __init__(self, layouts: Mapping[str, MaskLayout]) -> None:
        self._layouts = layouts

    def __getitem__(self, site: str) -> Tensor:
        return self._layouts[site].to_dense().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)


def _report(data: bytes, layouts: Mapping[str, MaskLayout], notes: list[str]) -> Report:
    facts = parse_json(data, files.REPORT, constants=True)  # figures may be
    if not isinstance(facts, dict):
        raise ArtifactError(f"{files.REPORT} is damaged: it is no mapping")
    if notes:
        facts["notes"] = [*facts.get("notes", []), *notes]
    return Report(facts, _DenseMasks(layouts))


def _plan(content: Mapping[str, bytes]) -> Plan:
    # Plans are read from folders; these are the bytes whose hashes were compared.
    with tempfile.TemporaryDirectory() as folder:
        for name in (files.PLAN, files.PLAN_TENSORS):
            if name in content:
                (Path(folder) / name).write_bytes(content[name])
        try:
            return Plan.load(folder)
        except (PlanError, ValueError, RecursionError) as error:
            reason = str(error).replace(f"{folder}/", "")
            raise ArtifactError(f"{files.PLAN} is damaged: {reason}") from error


@dataclass(frozen=True)
class _Stored(Decline):
    """A refusal as the report tells it: the node is gone, its place is known."""

    where: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return self.where.get("path", "")

    @property
    def source(self) -> str:
        return self.where.get("source", "")

    def as_dict(self) -> dict[str, str]:
        return {"reason": self.reason, **self.where}


def _records(facts: Mapping[str, Any], layouts: Mapping[str, MaskLayout]) -> dict[str, PassRecord]:
    """What the report tells of each pass."""
    sites = {row["site"]: row for row in facts.get("sites", [])}
    records = {}
    for entry in facts.get("passes", []):
        record = PassRecord(entry["name"], _exactness(entry["exactness"]))
        record.rewrites = [_applied(dict(done)) for done in entry["rewrites"]]
        record.declined = [_declined(dict(refused)) for refused in entry["declined"]]
        record.rolled_back = [_rolled_back(dict(undone)) for undone in entry["rolled_back"]]
        record.seconds = entry["seconds"]
        changed = {done.site for done in record.rewrites}
        record.ledger = {site: sites[site] for site in sites if site in changed}
        record.masks = {site: layouts[site] for site in layouts if site in changed}
        records[record.name] = record
    return records


def _applied(done: dict[str, Any]) -> Applied:
    rule, node, path, site = (done.pop(key) for key in ("rule", "node", "path", "site"))
    return Applied(rule, node, path, site, done)


def _declined(refused: dict[str, Any]) -> Decline:
    return _Stored(refused.pop("reason"), site=refused.get("site", ""), where=refused)


def _rolled_back(undone: dict[str, Any]) -> RolledBack:
    return RolledBack(undone.pop("site"), undone.pop("reason"), undone)


def _exactness(name: str) -> Exactness:
    budget = re.fullmatch(r"APPROXIMATES\((.+)\)", name)
    if name == BITWISE.name:
        return BITWISE
    return Exactness(name, REASSOCIATES.factor, float(budget[1]) if budget else 0.0)


# Exporting


def export(optimized: OptimizedModule, path: str | Path) -> Path:
    """As `OptimizedModule.export`."""
    path = Path(path)
    if path.suffix != ".pt2":
        raise ArtifactError(f"{path}: torch.export.load wants a name that ends in .pt2")
    programs = optimized.captured.programs
    if list(programs) != [""]:
        raise ArtifactError(
            f"{path}: only a model that was captured as a whole can be exported; this one has "
            f"{len(programs)} parts with Python between them: save it with save(path)"
        )
    args, kwargs, shapes = _example_call(programs[""])
    module = programs[""].graph_module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
        torch.export.save(exported, path)
    return path


def _example_call(program: Program) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """A call of the captured sizes, and which of its sizes are dynamic, by argument."""
    inputs = [node.meta["val"] for node in program.placeholders]
    args, kwargs = program.signature.unflatten([_example(value) for value in inputs])
    by_position, by_name = program.signature.unflatten([_dynamic(value) for value in inputs])
    names = program.graph._codegen.pytree_info.orig_args  # type: ignore[attr-defined]
    shapes = dict(zip(names, by_position, strict=False)) | by_name
    return args, kwargs, shapes


def _example(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    sizes: list[Any] = list(value.shape)
    plain = [size if isinstance(size, int) else size.node.hint for size in sizes]
    return torch.ones(plain, dtype=value.dtype, device=value.device)


def _dynamic(value: Any) -> dict[int, Any] | None:
    sizes: list[Any] = list(value.shape) if isinstance(value, Tensor) else []
    auto = torch.export.Dim.AUTO
    return {d: auto for d, size in enumerate(sizes) if not isinstance(size, int)} or None
