"""Capture: from a module and a call to a `Program`.

`torch.export` traces the module (non-strict first, strict where that fails) in eval mode. What it
returns is brought to the form that passes expect: whole operators (`aten.linear`,
`aten.scaled_dot_product_attention`, `aten.layer_norm`), no mutation but the epilogue, no baked-in
devices, no nested graphs for gradient modes.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxpress.containers import register_containers
from fxpress.errors import CaptureError
from fxpress.ops.recurrent_layers import opaque_layers
from fxpress.pieces import join_pieces
from fxpress.program import Program, alias_parameter, source_line
from fxpress.signature import Signature
from fxpress.verify import mutates, verify

__all__ = ["Call", "capture", "capture_calls", "check_module", "frozen", "kept_buffers"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""

_LEAST_LENGTH = 2  # of a loop of one step nothing shows that it is one

aten = torch.ops.aten


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Program:
    """Capture one call of a module as a graph.

    Args:
        model: any module; it is left as it was, training flags included.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        dynamic_shapes: as for `torch.export.export`, by argument name or position: which
            dimensions may change between calls. All others are fixed.

    Returns:
        The program; `program.graph_module` is callable like the model.

    Raises:
        CaptureError: the model cannot be exported as a whole; the message names the reason and
            the source line. `fxpress.optimize` and `fxpress.explain` then work on the largest
            parts that can.
    """
    check_module(model)
    register_containers((args, kwargs))
    args, kwargs = _on_meta(model, (tuple(args), dict(kwargs or {})))
    try:
        signature, cargs, ckwargs = Signature.of(model, args, kwargs)
    except TypeError as error:
        raise CaptureError(f"{type(model).__name__} cannot be called like this: {error}") from error
    shapes = _by_name(model, cargs, ckwargs, dynamic_shapes)
    functions: list[str] = []
    with frozen(model), _custom_functions(functions), opaque_layers():
        exported = _export(model, cargs, ckwargs, shapes)
    program = Program(_graph_module(exported), signature)
    _refuse_nested_graphs(model, program.graph)
    program.untrainable = _why_untrainable(functions)
    verify(program)
    return program


def check_module(model: Any) -> None:
    """Check that a model is a module of Python.

    Raises:
        CaptureError: it is none; the message says what to give instead.
    """
    if isinstance(model, torch.jit.ScriptModule):
        name = "TorchScript holds no Python to capture"
        raise CaptureError(f"{name}: give the nn.Module that it was made from")
    if not isinstance(model, nn.Module):
        what = f"a model is an nn.Module, not {type(model).__name__}"
        raise CaptureError(f"{what}: call a function in the forward of a module")


def capture_calls(model: nn.Module, calls: Sequence[Call]) -> Program:
    """Capture a module for several calls: sizes that differ between them become dynamic.

    Raises:
        CaptureError: as `capture`, and where the calls differ in more than sizes.
    """
    register_containers(calls)
    canonical = []
    for args, kwargs in calls:
        try:
            _, cargs, ckwargs = Signature.of(model, args, kwargs)
        except TypeError as error:
            name = type(model).__name__
            raise CaptureError(f"{name} cannot be called like this: {error}") from error
        canonical.append((cargs, ckwargs))
    structures = {str(pytree.tree_structure(call)) for call in canonical}
    if len(structures) > 1:
        raise CaptureError("the calls differ in their arguments; give all batches the same keys")
    chosen = _least_specialized(canonical)
    args, kwargs = chosen
    program = capture(model, args, kwargs, _dynamic(model, canonical, chosen))
    fixed = _fixed_length(program, canonical)
    return program if fixed is None else _capture_lengths(model, canonical, fixed)


def _fixed_length(program: Program, calls: Sequence[Call]) -> list[tuple[int, int]] | None:
    """Inputs and dimensions of the one size that differs between calls but was fixed by export."""
    leaves = [pytree.tree_leaves(call) for call in calls]
    found: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for at, node in enumerate(program.placeholders):
        column = [row[at] for row in leaves]
        for dim in _varying(column):
            size = node.meta["val"].shape[dim]
            if isinstance(size, int) or size.node.expr.is_number:
                sizes = tuple(int(tensor.shape[dim]) for tensor in column)
                found.setdefault(sizes, []).append((at, dim))
    return next(iter(found.values())) if len(found) == 1 else None


def _capture_lengths(
    model: nn.Module, calls: Sequence[Call], fixed: Sequence[tuple[int, int]]
) -> Program:
    """Capture at the longest length, and beside it at the shortest and at the one above that.

    A pass that finds the loop which fixed the length can make of these one of dynamic length.
    """
    at, dim = fixed[0]
    lengths = [int(pytree.tree_leaves(call)[at].shape[dim]) for call in calls]
    longest = calls[lengths.index(max(lengths))]
    shapes = _dynamic(model, calls, longest, fixed)
    program = capture(model, longest[0], longest[1], shapes)
    least = max(min(lengths), _LEAST_LENGTH)
    shorter = []
    for length in sorted({n for n in (least, least + 1) if n < max(lengths)}):
        leaves, structure = pytree.tree_flatten(longest)
        for index, along in fixed:
            leaves[index] = leaves[index].narrow(along, 0, length).contiguous()
        try:
            args, kwargs = pytree.tree_unflatten(leaves, structure)
            shorter.append(capture(model, args, kwargs, shapes))
        except CaptureError:
            return program
    return replace(program, shorter=tuple(shorter))


def _least_specialized(calls: Sequence[Call]) -> Call:
    """The call whose smallest size, of those that differ between calls, is largest.

    A size of one specializes in export.
    """
    rows = [pytree.tree_leaves(call) for call in calls]
    marks = [_varying(column) for column in zip(*rows, strict=True)]

    def smallest(index: int) -> int:
        leaves = zip(rows[index], marks, strict=True)
        return min((leaf.shape[dim] for leaf, dims in leaves for dim in dims), default=0)

    return calls[max(range(len(calls)), key=smallest)]


def _dynamic(
    model: nn.Module, calls: Sequence[Call], chosen: Call, fixed: Sequence[tuple[int, int]] = ()
) -> dict[str, Any] | None:
    """Dimensions whose size differs between calls, less fixed ones, as `dynamic_shapes`."""
    leaves = [pytree.tree_leaves(call) for call in calls]
    marks = [_varying(column) for column in zip(*leaves, strict=True)]
    for at, dim in fixed:
        marks[at].pop(dim)
    if not any(marks):
        return None
    args, kwargs = _as_shapes(pytree.tree_structure(chosen), iter(marks))
    shapes = dict(kwargs)
    if args:
        shapes |= _positional_names(model, args)
    return shapes


def _as_shapes(structure: Any, marks: Iterator[dict[int, Any]]) -> Any:
    """Marks in the form of `dynamic_shapes`: torch wants lists in the place of other objects."""
    if structure.is_leaf():
        return next(marks) or None
    inner = [_as_shapes(child, marks) for child in structure.children()]
    if structure.type not in (tuple, list, dict):
        return inner
    return pytree.SUPPORTED_NODES[structure.type].unflatten_fn(inner, structure.context)


def _varying(column: Sequence[Any]) -> dict[int, Any]:
    tensors = [leaf for leaf in column if isinstance(leaf, Tensor)]
    if len({t.ndim for t in tensors}) != 1:
        return {}
    auto = torch.export.Dim.AUTO
    return {d: auto for d in range(tensors[0].ndim) if len({t.shape[d] for t in tensors}) > 1}


def _positional_names(model: nn.Module, values: Sequence[Any]) -> dict[str, Any]:
    """Positional values by the parameter that takes them; `*args` gets a tuple."""
    named: dict[str, Any] = {}
    rest = list(values)
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if not rest:
            break
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            named[name], rest = tuple(rest), []
        else:
            named[name] = rest.pop(0)
    return named


def _by_name(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: Any
) -> dict[str, Any] | None:
    if not shapes:
        return None
    given = dict(shapes) if isinstance(shapes, Mapping) else _positional_names(model, shapes)
    wanted = [*_positional_names(model, args), *kwargs]
    if unknown := [name for name in given if name not in wanted]:
        raise CaptureError(f"dynamic_shapes names {unknown}, but the call has {wanted}")
    return {name: given.get(name) for name in wanted}


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, without torch's opaque fast path, and restore every flag after."""
    flags = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in flags.items():
            module.training = training


@contextlib.contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Let a model run, and give its buffers the values back that they had."""
    before = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    values = {name: buffer.clone() for name, buffer in before.items()}
    versions = {name: buffer._version for name, buffer in before.items()}
    try:
        yield
    finally:
        for name, buffer in before.items():
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, buffer)  # it may have been assigned anew
            if buffer._version != versions[name]:
                buffer.copy_(values[name])


@contextlib.contextmanager
def _custom_functions(seen: list[str]) -> Iterator[None]:
    """Note every user-defined `autograd.Function` that runs: export drops its backward."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            seen.append(f"{cls.__module__}.{cls.__qualname__}")
        return original.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def _why_untrainable(functions: Sequence[str]) -> str:
    if not functions:
        return ""
    names = ", ".join(sorted(set(functions)))
    return f"the model defines its own backward in {names}, which capture cannot keep"


def _on_meta(model: nn.Module, call: Call) -> Call:
    """A call of a model without storage, without storage too; any other call as it is."""
    tensors = [*model.parameters(), *model.buffers()]
    if not tensors or not all(t.is_meta for t in tensors):
        return call
    moved: Call = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), call)
    return moved


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> torch.export.ExportedProgram:
    """Export, once more where the outputs turn out to be objects that torch does not know."""
    try:
        return _export_known(model, args, kwargs, shapes)
    except CaptureError:
        if not _learns_outputs(model, args, kwargs):
            raise
        return _export_known(model, args, kwargs, shapes)


def _learns_outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a run of the model returns objects that were not known before."""
    try:
        with torch.no_grad(), kept_buffers(model):
            return register_containers(model(*args, **kwargs))
    except Exception:  # noqa: BLE001  (export has raised it already)
        return False


def _export_known(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> torch.export.ExportedProgram:
    first: Exception | None = None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    place = torch.device("meta") if device.type == "meta" else contextlib.nullcontext()
    for strict in (False, True):
        try:
            # Where torch gives up it prints the whole graph; the reason alone is for the user.
            with (
                place,
                _no_hooks_left(),
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                return torch.export.export(
                    model, args, kwargs, dynamic_shapes=shapes, strict=strict
                )
        except Exception as error:  # noqa: BLE001  (export raises whatever the model does)
            first = first or error
    assert first is not None
    line = _user_frame(first)
    reason = " ".join(str(first).split())[:300]
    raise CaptureError(
        f"{type(model).__name__} cannot be exported: {type(first).__name__}: {reason}"
        + (f" (at {line})" if line else "")
    ) from first


@contextlib.contextmanager
def _no_hooks_left() -> Iterator[None]:
    """Remove what an export that gave up leaves: hooks on buffers, which hold the model."""
    hooks = torch.nn.modules.module._global_buffer_registration_hooks
    before = set(hooks)
    try:
        yield
    finally:
        for left in set(hooks) - before:
            del hooks[left]


def _user_frame(error: BaseException) -> str:
    """`file:line` of the innermost frame that is neither torch's nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    ours = [f for f in frames if not f.filename.startswith(foreign)]
    return f"{ours[-1].filename}:{ours[-1].lineno}" if ours else ""


def _graph_module(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own types, which it copies
        if any(mutates(node) or _is_transform(node) for node in exported.graph.nodes):
            exported = exported.run_decompositions({})
            _reshape_views(exported.graph)
        unlifted = exported.module(check_guards=False)
    # The unlifted module refuses `.train()`, even when a parent calls it; a plain one does not.
    module = fx.GraphModule(unlifted, unlifted.graph)
    _inline_gradient_modes(module)
    _strip(module.graph)
    join_pieces(module.graph)
    _own_tensors(module)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _is_transform(node: fx.Node) -> bool:
    """Whether a node is a step of `torch.vmap` or the like: what lies between hides dimensions."""
    return getattr(node.target, "__module__", "") == "torch._functorch.predispatch"


def _reshape_views(graph: fx.Graph) -> None:
    """Undo what decompositions make of `reshape`: a view that fits the strides of this one call.

    With gradients asked for, attention may run another kernel, whose output lies differently.
    """
    for node in graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default


def _strip(graph: fx.Graph) -> None:
    """Drop metadata assertions and the device of `.to()`, which would pin the graph to one."""
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is aten.to.dtype_layout and node.kwargs.get("device") is not None:
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "device"}
        elif node.target is aten.to.device and isinstance(node.args[0], fx.Node):
            node.target = aten.to.dtype
            node.args = (node.args[0], node.args[2], *node.args[3:])
        elif node.target is aten.narrow.default and all(type(n) is int for n in node.args[1:]):
            source, dim, start, length = node.args
            if start >= 0:
                node.target = aten.slice.Tensor
                node.args = (source, dim, start, start + length)
        elif node.target is aten._assert_scalar.default:
            node.meta.setdefault("val", None)  # torch adds some late, without metadata
        elif mutates(node):
            node.meta["epilogue"] = True
            written = node.args[0]
            assert isinstance(written, fx.Node)
            node.meta.setdefault("val", written.meta["val"])


def _refuse_nested_graphs(model: nn.Module, graph: fx.Graph) -> None:
    """Refuse what holds graphs of its own (`torch.cond`, say): no pass would look into them."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            line = source_line(node)
            raise CaptureError(
                f"{type(model).__name__} cannot be captured whole: {node.target} holds a graph "
                "of its own" + (f" (at {line})" if line else "")
            )


def _inline_gradient_modes(module: fx.GraphModule) -> None:
    """Inline the subgraphs of `torch.no_grad()` blocks; their outputs are detached instead."""
    wrap = torch.ops.higher_order.wrap_with_set_grad_enabled
    for node in [n for n in module.graph.nodes if n.target is wrap]:
        enabled, body, *inputs = node.args
        outputs = _inline(module, node, getattr(module, body.target), inputs)
        if not enabled:
            outputs = [_detached(module.graph, node, value) for value in outputs]
        for user in list(node.users):
            user.replace_all_uses_with(outputs[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        module.graph.erase_node(body) if not body.users else None


def _inline(
    module: fx.GraphModule, at: fx.Node, body: fx.GraphModule, inputs: Sequence[Any]
) -> list[Any]:
    _inline_gradient_modes(body)
    formal = [n for n in body.graph.nodes if n.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(formal, inputs, strict=True))
    for node in body.graph.nodes:
        if node.op == "get_attr":
            name = f"{at.name}_{str(node.target).replace('.', '_')}"
            setattr(module, name, getattr(body, str(node.target)))
            with module.graph.inserting_before(at):
                values[node] = module.graph.get_attr(name)
            values[node].meta = dict(node.meta)
        elif node.op == "call_function":
            with module.graph.inserting_before(at):
                values[node] = module.graph.node_copy(node, lambda n: values[n])
    result = next(n for n in body.graph.nodes if n.op == "output").args[0]
    return [values[r] if isinstance(r, fx.Node) else r for r in result]


def _detached(graph: fx.Graph, at: fx.Node, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not value.meta["val"].is_floating_point():
        return value
    with graph.inserting_before(at):
        fresh = graph.call_function(aten.detach.default, (value,))
    fresh.meta = dict(value.meta)
    return fresh


def _own_tensors(module: fx.GraphModule) -> None:
    """Give the graph parameters of its own on the model's storage, so that gradients are its own.

    Storage is shared until the first gradient arrives: then the parameter is cloned before any
    optimizer can write to it. Buffers that the graph itself writes are cloned at once.
    """
    written = {
        str(node.args[0].target)
        for node in module.graph.nodes
        if node.meta.get("epilogue") and isinstance(node.args[0], fx.Node)
    }
    own: dict[int, nn.Parameter] = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                if id(parameter) not in own:
                    fresh = alias_parameter(parameter)
                    own[id(parameter)] = own[id(fresh)] = fresh
                child._parameters[name] = own[id(parameter)]
        for name, buffer in list(child._buffers.items()):
            if buffer is not None and f"{prefix}.{name}".lstrip(".") in written:
                child._buffers[name] = buffer.clone()
