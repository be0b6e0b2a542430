"""A program as closed JSON, and back.

A graph is a list of nodes: inputs with shape and dtype, tensors by name, calls of listed operators,
one output. Metadata of the other nodes is computed again on reading, by running the graph on fake
tensors, which also shows that every call is a valid one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpress.artifact_targets import check_call, target_name, target_named
from fxpress.artifact_values import (
    DTYPES,
    decode_signature,
    decode_size,
    decode_structure,
    decode_value,
    encode_signature,
    encode_size,
    encode_structure,
    encode_value,
    fields,
    identifier,
    parts,
    plain_dtype,
)
from fxpress.errors import ArtifactError
from fxpress.program import Program, Provenance, attribute, module_path
from fxpress.verify import verify

__all__ = ["decode_program", "encode_program"]

_TARGET = re.compile(r"[\w\-]+(\.[\w\-]+)*", re.ASCII)
_NODE = {"name", "op", "path", "target", "args", "kwargs", "epilogue", "value", "provenance"}
_LARGEST = (1 << 63) - 1
_PROGRAM = {
    "path": str,
    "untrainable": str,
    "signature": dict,
    "arguments": list,
    "inputs": dict,
    "outputs": object,
    "symbols": dict,
    "tensors": dict,
    "nodes": list,
}


def encode_program(program: Program, tensor_name: Callable[[Tensor, str], str]) -> dict[str, Any]:
    """A program as JSON.

    Args:
        program: what to save.
        tensor_name: tensor and its path -> the name that it is saved under.

    Raises:
        ArtifactError: naming the node that the format cannot hold.
    """
    codegen = program.graph._codegen
    if type(codegen) is not fx.graph._PyTreeCodeGen:
        raise ArtifactError(f"the graph of {program.path or 'the model'} was not made by capture")
    info = codegen.pytree_info
    return {
        "path": program.path,
        "untrainable": program.untrainable,
        "signature": encode_signature(program.signature),
        "arguments": list(info.orig_args),
        "inputs": encode_structure(info.in_spec),
        "outputs": encode_structure(info.out_spec),
        "symbols": _encode_symbols(program),
        "tensors": _encode_attributes(program, tensor_name),
        "nodes": [_encode_node(node) for node in program.graph.nodes],
    }


def decode_program(
    data: Any, tensors: Mapping[str, Tensor], home: str, device: torch.device
) -> Program:
    """The program that JSON stands for, verified.

    Args:
        data: what `encode_program` returned.
        tensors: by the names that `tensor_name` gave.
        home: type of the device that the program was saved from.
        device: takes its place.

    Raises:
        ArtifactError: the data is no program, or calls what no artifact may call.
    """
    values = fields(data, _PROGRAM, "the graph")
    path, untrainable, signature, arguments, inputs, outputs, symbols, attributes, nodes = values
    root = _module_tree(attributes, tensors)
    graph = _decode_graph(nodes, _decode_symbols(symbols), home, device)
    names = [identifier(name, "an argument") for name in arguments]
    info = fx.graph._PyTreeInfo(names, _input_structure(inputs), decode_structure(outputs))
    graph.set_codegen(fx.graph._PyTreeCodeGen(info))
    if fault := _graph_fault(graph, info, attributes):
        raise ArtifactError(f"the graph is damaged: {fault}")
    program = Program(fx.GraphModule(root, graph), decode_signature(signature), path, untrainable)
    _restore_persistence(program, attributes)
    _compute_metadata(program)
    return program


def _graph_fault(graph: fx.Graph, info: Any, attributes: Mapping[str, Any]) -> str:
    """Where nodes and structures do not belong together, or nothing."""
    inputs = graph.find_nodes(op="placeholder")
    positional, named = info.in_spec.children()
    results = graph.output_node().args[0]
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in attributes:
            return f"it reads {node.target!r:.80}, which it does not hold"
    if len(inputs) != info.in_spec.num_leaves:
        return f"it has {len(inputs)} inputs, not those of {info.in_spec}"
    if len(info.orig_args) != positional.num_children + named.num_children:
        return f"its arguments {info.orig_args!r:.80} are not those of {info.in_spec}"
    if not isinstance(results, (list, tuple)) or len(results) != info.out_spec.num_leaves:
        return f"its results are not those of {info.out_spec}"
    return ""


def _compute_metadata(program: Program) -> None:
    try:
        with torch.no_grad():
            program.refresh()
        verify(program, "reading")
    except Exception as error:  # an operator raises what it likes about its arguments
        where = f" of {program.path}" if program.path else ""
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"the graph{where} does not run: {reason}") from error


# Tensors


def _encode_attributes(
    program: Program, tensor_name: Callable[[Tensor, str], str]
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for node in program.graph.nodes:
        if node.op != "get_attr" or node.target in found:
            continue
        target = str(node.target)
        value = attribute(program.graph_module, target)
        if not isinstance(value, Tensor) or not _TARGET.fullmatch(target):
            raise ArtifactError(
                f"{node.name} reads {target!r}, a {type(value).__name__}: "
                "only tensors under plain names can be saved"
            )
        captured = node.meta["val"]
        if (value.dtype, value.shape) != (captured.dtype, captured.shape):
            raise ArtifactError(
                f"{target} was captured as {captured.dtype} {tuple(captured.shape)} and is now "
                f"{value.dtype} {tuple(value.shape)}: bring the model into its final form, then "
                "optimize it"
            )
        prefix, _, name = target.rpartition(".")
        owner = program.graph_module.get_submodule(prefix)
        full = f"{program.path}.{target}".lstrip(".")
        persistent = name not in owner._non_persistent_buffers_set
        found[target] = {"tensor": tensor_name(value, full), "persistent": persistent}
    return found


def _module_tree(attributes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Nested modules that hold the tensors under their paths."""
    root = nn.Module()
    for target, entry in attributes.items():
        name, _ = fields(entry, {"tensor": str, "persistent": bool}, f"the tensor {target!r:.80}")
        if not _TARGET.fullmatch(target) or name not in tensors:
            raise ArtifactError(f"{target!r:.80} is no tensor of the artifact")
        *path, last = target.split(".")
        owner, tensor = root, tensors[name]
        try:
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(last, tensor)
            else:
                owner.register_buffer(last, tensor)
        except (KeyError, AttributeError) as error:
            raise ArtifactError(f"{target!r:.80} is no name for a tensor: {error}") from error
    return root


def _restore_persistence(program: Program, attributes: Mapping[str, Any]) -> None:
    for target, entry in attributes.items():
        prefix, _, name = target.rpartition(".")
        owner = program.graph_module.get_submodule(prefix)
        if not entry["persistent"] and name in owner._buffers:
            owner._non_persistent_buffers_set.add(name)


# Sizes that change from call to call


def _encode_symbols(program: Program) -> dict[str, list[Any]]:
    """Range (None: no upper end) and example of each symbol in the shapes of the inputs."""
    found: dict[str, list[Any]] = {}
    for node in program.placeholders:
        value = node.meta["val"]
        sizes = [*value.shape, *value.stride()] if isinstance(value, Tensor) else []
        for size in sizes:
            if isinstance(size, int):
                continue
            environment = size.node.shape_env
            for symbol in size.node.expr.free_symbols:
                bounds = environment.bound_sympy(symbol)
                finite = bounds.upper.is_Integer
                example = environment.create_symintnode(symbol, hint=None).node.hint
                upper = int(bounds.upper) if finite else None
                found[str(symbol)] = [int(bounds.lower), upper, int(example)]
    return found


def _decode_symbols(data: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A fake mode, and the symbolic sizes that live in it by name."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    environment = ShapeEnv()
    symbols: dict[str, Any] = {}
    for name, entry in data.items():
        plain = identifier(name, "a symbol")
        lower, upper, example = _symbol_range(plain, entry)
        bounds = ValueRanges(lower, int_oo if upper is None else upper)
        symbol = environment.create_symbol(
            example,
            ConstantSource(f"size_{plain}"),
            DimDynamic.DYNAMIC,
            StrictMinMaxConstraint(warn_only=False, vr=bounds),
        )
        symbols[name] = environment.create_symintnode(symbol, hint=example)
    return FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True), symbols


def _symbol_range(name: str, entry: Any) -> tuple[int, int | None, int]:
    if isinstance(entry, list) and len(entry) == 3:
        lower, upper, example = entry
        last = _LARGEST if upper is None else upper
        whole = all(type(number) is int for number in (lower, last, example))
        # Zero and one are never dynamic: one broadcasts.
        if whole and 0 <= lower <= example <= last and example >= 2:
            return lower, upper, example
    raise ArtifactError(f"the size {name} is damaged: {entry!r:.60} is no range and example")


# Nodes


def _encode_node(node: fx.Node) -> dict[str, Any]:
    data: dict[str, Any] = {"name": node.name, "op": node.op, "path": module_path(node)}
    try:
        data |= _encode_content(node)
    except ArtifactError as error:
        where = f" (in {data['path']})" if data["path"] else ""
        raise ArtifactError(f"{node.name}{where}: {error}") from error
    if made := node.meta.get("provenance"):
        data["provenance"] = [made.rule, list(made.sources), made.site]
    return data


def _encode_content(node: fx.Node) -> dict[str, Any]:
    if node.op == "get_attr":
        return {"target": str(node.target)}
    if node.op == "placeholder":
        return {"target": str(node.target), "value": _encode_input(node.meta["val"])}
    args = [encode_value(argument) for argument in node.args]
    if node.op == "output":
        return {"args": args}
    if node.op != "call_function":
        raise ArtifactError(f"a {node.op} cannot be saved")
    kwargs = {name: encode_value(value) for name, value in node.kwargs.items()}
    epilogue = bool(node.meta.get("epilogue"))
    target = target_name(node.target)
    check_call(target_named(target), node.args, node.kwargs, epilogue)
    return {"target": target, "args": args, "kwargs": kwargs, "epilogue": epilogue}


def _encode_input(value: Any) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        return {"constant": encode_value(value)}
    return {
        "dtype": plain_dtype(value.dtype),
        "device": value.device.type,
        "shape": [encode_size(size) for size in value.shape],
        "stride": [encode_size(size) for size in value.stride()],
    }


def _decode_graph(
    nodes: list[Any], sizes: tuple[Any, dict[str, Any]], home: str, device: torch.device
) -> fx.Graph:
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}

    def on(kind: str) -> torch.device:
        return device if kind == home else torch.device(kind)

    for data in nodes:
        if not isinstance(data, dict) or not set(data) <= _NODE:
            raise ArtifactError(f"{data!r:.80} is no node")
        node = _decode_node(data, graph, known, on)
        if node.op == "placeholder":
            node.meta["val"] = _decode_input(data.get("value"), sizes, on)
        _restore_origin(node, data)
        known[node.name] = node
    if [node.op == "output" for node in known.values()] != [False] * (len(nodes) - 1) + [True]:
        raise ArtifactError("the graph is damaged: it has not one output, at its end")
    return graph


def _decode_node(
    data: Mapping[str, Any],
    graph: fx.Graph,
    known: Mapping[str, fx.Node],
    on: Callable[[str], torch.device],
) -> fx.Node:
    op, name = data.get("op"), identifier(data.get("name"), "a node")
    target: Any = data.get("target")
    args = decode_value({"tuple": data.get("args", [])}, known, on)
    kwargs = data.get("kwargs", {})
    if op == "call_function" and isinstance(kwargs, dict):
        target = target_named(target)
        kwargs = {identifier(k, name): decode_value(v, known, on) for k, v in kwargs.items()}
        check_call(target, args, kwargs, data.get("epilogue") is True)
    elif op == "placeholder" and not args and not kwargs:
        target = identifier(target, "an input")
    elif op == "output" and not kwargs:
        target = "output"
    elif op != "get_attr" or args or kwargs or not isinstance(target, str):
        raise ArtifactError(f"node {name} is damaged: {op!r:.40} is none of the four kinds")
    node = graph.create_node(op, target, args, kwargs, name=name)
    if node.name != name:
        raise ArtifactError(f"{name!r} is no name for a node, or there twice")
    if data.get("epilogue") is True:
        node.meta["epilogue"] = True
    return node


def _decode_input(
    data: Any, sizes: tuple[Any, Mapping[str, Any]], on: Callable[[str], torch.device]
) -> Any:
    if isinstance(data, dict) and list(data) == ["constant"]:
        return decode_value(data["constant"], {}, on)
    kinds = {"dtype": str, "device": str, "shape": list, "stride": list}
    dtype, device, shape, stride = fields(data, kinds, "an input")
    if dtype not in DTYPES or device not in ("cpu", "cuda") or len(shape) != len(stride):
        raise ArtifactError(f"an input is damaged: {data!r:.80}")
    mode, symbols = sizes
    plain = [[decode_size(size, symbols) for size in part] for part in (shape, stride)]
    with mode:
        return torch.empty_strided(*plain, dtype=DTYPES[dtype], device=on(device))


def _restore_origin(node: fx.Node, data: Mapping[str, Any]) -> None:
    """Module path and provenance, for text, reports and kernels."""
    path, made = data.get("path"), data.get("provenance")
    if not isinstance(path, str):
        raise ArtifactError(f"node {node.name} is damaged: its path is {path!r:.40}")
    if path:
        node.meta["nn_module_stack"] = {path: (path, "")}
    if made is not None:
        rule, sources, site = parts(made, (str, list, str), f"the provenance of {node.name}")
        node.meta["provenance"] = Provenance(rule, tuple(sources), site)


def _input_structure(data: Any) -> Any:
    """The structure of a call: positional arguments, and keywords, which generated code names."""
    spec = decode_structure(data)
    children = spec.children()
    if spec.type is not tuple or [child.type for child in children] != [tuple, dict]:
        raise ArtifactError(f"the structure of the inputs is damaged: {spec}")
    for key in children[1].context:
        identifier(key, "a keyword")
    return spec
