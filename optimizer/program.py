"""`Program`: a captured call of a module as an fx graph: read, run, copied and rewritten.

A program shares its parameters with the module that it was captured from. Passes replace nodes and
register new tensors under new names; they never write into a tensor that is there already.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxpress.errors import CaptureError
from fxpress.signature import Signature

__all__ = [
    "Program",
    "Provenance",
    "alias_parameter",
    "attribute",
    "captured",
    "format_node",
    "has_effect",
    "is_contiguous",
    "module_path",
    "preceding",
    "same_sizes",
    "source_line",
]

_SHORT_DTYPE = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
_FRAME = re.compile(r'File "(?P<file>.+?)", line (?P<line>\d+), in')


@dataclass(frozen=True)
class Provenance:
    """Where a node that a pass made comes from.

    Attributes:
        rule: name of the pass or rule that made the node.
        sources: names of the nodes that it stands for.
        site: the site (attention, matmul, recurrence) that it belongs to, if any.
    """

    rule: str
    sources: tuple[str, ...]
    site: str = ""


def module_path(node: fx.Node) -> str:
    """Dotted path of the module call that made the node; the root is `""`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]) if paths else ""


def source_line(node: fx.Node) -> str:
    """`file:line` of the innermost frame of model code that made the node, or `""`."""
    frames = [
        frame
        for frame in _FRAME.finditer(node.meta.get("stack_trace") or "")
        if not frame["file"].startswith("<")  # code that torch made up
    ]
    return f"{frames[-1]['file']}:{frames[-1]['line']}" if frames else ""


def attribute(root: nn.Module, target: str) -> Any:
    """The parameter, buffer or constant that a `get_attr` target names."""
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value


def alias_parameter(parameter: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
    """A parameter of its own on the storage of another tensor, for as long as it is not trained.

    When its first gradient arrives the storage is cloned, before any optimizer can write to it.

    Args:
        parameter: a parameter, or a view of one.
        requires_grad: whether the alias trains; as `parameter` when None.
    """
    trains = parameter.requires_grad if requires_grad is None else requires_grad
    alias = nn.Parameter(parameter.detach(), requires_grad=trains)
    if alias.requires_grad:
        alias.register_post_accumulate_grad_hook(_clone_storage)
    return alias


def _clone_storage(parameter: Tensor) -> None:
    if not getattr(parameter, "_fxpress_own", False):
        parameter.data = parameter.data.clone()
        parameter._fxpress_own = True  # type: ignore[attr-defined]


def _format_value(value: Any) -> str:
    if isinstance(value, Tensor):
        sizes = ", ".join(str(size) for size in value.shape)
        return f"{_SHORT_DTYPE.get(value.dtype, str(value.dtype))}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_format_value(item) for item in value) + ")"
    return type(value).__name__


def _format_argument(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, (tuple, list)):
        return "[" + ", ".join(_format_argument(item) for item in argument) + "]"
    if isinstance(argument, torch.device | torch.dtype):
        return str(argument).replace("torch.", "")
    return repr(argument)


def _format_target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def format_node(node: fx.Node) -> str:
    """One line: name, dtype and shape, operator with arguments, module path."""
    if node.op == "output":
        return f"return {_format_argument(node.args[0])}"
    shown = _format_value(node.meta["val"]) if "val" in node.meta else "?"
    head = f"%{node.name}: {shown}"
    if node.op in ("placeholder", "get_attr"):
        return f"{head} = {node.op} {node.target}"
    arguments = [_format_argument(a) for a in node.args]
    arguments += [f"{key}={_format_argument(a)}" for key, a in node.kwargs.items()]
    path = module_path(node)
    where = f"  # {path}" if path else ""
    body = ""
    if str(node.target) == "fxpress.recurrence.default":
        arguments[-1], body = "cell", _format_cell(node.args[-1])
    return f"{head} = {_format_target(node)}({', '.join(arguments)}){where}{body}"


def _format_cell(text: Any) -> str:
    """The step of a recurrence, on lines of its own."""
    from fxpress.ops.recurrence import Cell

    return "".join(f"\n    {line}" for line in str(Cell.read(text)).splitlines())


@dataclass
class Program:
    """A captured module.

    Attributes:
        graph_module: the fx graph with its parameters; callable like the model.
        signature: how a call is bound to the graph's inputs.
        path: path of the captured module within the model; `""` for the model itself.
        untrainable: why gradients of this graph would be wrong, or `""`.
        shorter: the same module captured at shorter lengths, the shortest first, where export
            fixed a size that differs between calls; until the exact passes are through.
    """

    graph_module: fx.GraphModule
    signature: Signature
    path: str = ""
    untrainable: str = ""
    shorter: tuple[Program, ...] = field(default=(), repr=False)
    _fresh: int = field(default=0, repr=False)

    @property
    def graph(self) -> fx.Graph:
        """The fx graph."""
        return self.graph_module.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in the order of the flattened call."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on a call of the original module."""
        leaves = self.signature.flatten(args, kwargs)
        if isinstance(leaves, str):
            raise CaptureError(f"this call does not fit the captured one: {leaves}")
        if reason := self.mismatch(leaves):
            raise CaptureError(f"this call does not fit the captured one: {reason}")
        return self.run(leaves)

    def run(self, leaves: Sequence[Any]) -> Any:
        """Run the graph on flattened inputs that are known to fit."""
        args, kwargs = self.signature.unflatten(leaves)
        return self.graph_module(*args, **kwargs)

    def mismatch(self, leaves: Sequence[Any]) -> str:
        """Why flattened inputs do not fit the captured shapes and dtypes, or `""`."""
        for node, leaf in zip(self.placeholders, leaves, strict=True):
            if reason := _leaf_mismatch(node, leaf):
                return f"argument {node.target}: {reason}"
        return ""

    def __str__(self) -> str:
        """The graph as text, one line per node that is not a parameter."""
        return "\n".join(format_node(node) for node in self.graph.nodes)

    def copy(self) -> Program:
        """A program with a graph of its own and the same tensors."""
        graph = fx.Graph()
        result, output = graph.graph_copy(self.graph, {}, return_output_node=True)  # type: ignore[misc]
        graph.output(result).meta = dict(cast("fx.Node", output).meta)
        graph.set_codegen(self.graph._codegen)
        return replace(self, graph_module=fx.GraphModule(self.graph_module, graph))

    def register(self, name: str, tensor: Tensor) -> str:
        """Register a new tensor under a fresh name that starts with `name`; return the name.

        Parameters stay parameters (they train); everything else becomes a buffer.
        """
        base = re.sub(r"\W", "_", name)
        fresh, suffix = base, 0
        while hasattr(self.graph_module, fresh):
            suffix += 1
            fresh = f"{base}_{suffix}"
        if isinstance(tensor, nn.Parameter):
            self.graph_module.register_parameter(fresh, tensor)
        else:
            self.graph_module.register_buffer(fresh, tensor)
        return fresh

    def finish(self) -> None:
        """Drop dead nodes, refresh metadata of new nodes, and compile the Python of the graph."""
        self.graph.eliminate_dead_code(has_effect)
        self.refresh()
        self._drop_unused()
        self.graph_module.recompile()

    def refresh(self, before: fx.Node | None = None) -> None:
        """Compute shape, dtype and stride of every node that has none yet.

        With `before`, only of what was just built in front of that node: a rewrite then costs
        what it makes, and not what the graph holds.
        """
        from torch._dispatch.python import enable_python_dispatcher

        mode = self._fake_mode()
        for node in self.graph.nodes if before is None else _new_before(before):
            if "val" in node.meta or node.op == "output":
                continue
            if node.op == "get_attr":
                value = attribute(self.graph_module, str(node.target))
                is_tensor = isinstance(value, Tensor)
                # A weight has fixed sizes, also beside inputs that have dynamic ones.
                fake = mode.from_tensor(value, static_shapes=True) if is_tensor else value
                node.meta["val"] = fake
            elif callable(node.target):
                # Composite operators in C++ may ask for sizes as numbers, which fixes dynamic ones.
                with mode, enable_python_dispatcher():
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                    node.meta["val"] = node.target(*args, **kwargs)

    def _fake_mode(self) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

        for node in self.graph.nodes:
            for leaf in pytree.tree_leaves(node.meta.get("val")):
                if isinstance(leaf, FakeTensor):
                    return leaf.fake_mode
        return FakeTensorMode(allow_non_fake_inputs=True)

    def _drop_unused(self) -> None:
        """Forget modules and tensors that no node reads, so that they are not saved or counted.

        `GraphModule.delete_all_unused_submodules` does the first in time quadratic in depth.
        """
        named = (str(n.target) for n in self.graph.nodes if n.op in ("get_attr", "call_module"))
        used = {path for target in named for path in itertools.accumulate(target.split("."), _join)}
        for path, module in list(self.graph_module.named_modules()):
            for names in (module._parameters, module._buffers, module._modules):
                for name in [n for n in names if _join(path, n) not in used]:
                    del names[name]

    def calls(self, target: Any) -> Iterator[fx.Node]:
        """The nodes that call an operator, in graph order."""
        return (n for n in list(self.graph.nodes) if n.op == "call_function" and n.target is target)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers that the graph reads, each memory once, by first name.

        What begins at one address is one tensor, in whatever layout; parts of one storage count
        each by itself.
        """
        seen: dict[int, str] = {}
        found: dict[str, Tensor] = {}
        for node in self.graph.nodes:
            if node.op != "get_attr":
                continue
            value = attribute(self.graph_module, str(node.target))
            if isinstance(value, Tensor) and value.data_ptr() not in seen:
                seen[value.data_ptr()] = str(node.target)
                found[str(node.target)] = value
        return found


def captured(size: Any) -> int:
    """A size as captured, where it is dynamic; two where only the data decides it.

    Asking a dynamic size for its value would make it that for good.
    """
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.hint is not None else 2


def same_sizes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, told without asking a dynamic size for its value."""
    return [str(size) for size in a.shape] == [str(size) for size in b.shape]


def is_contiguous(tensor: Tensor, undecided: bool = False) -> bool:
    """Whether a tensor lies in memory in the order of its dimensions.

    Args:
        tensor: the tensor, without data.
        undecided: what is said where only the data decides it.
    """
    sizes: list[Any] = [size for size in tensor.shape if type(size) is not int]
    if any(size.node.hint is None for size in sizes):
        return undecided
    return tensor.is_contiguous()


def _join(path: str, name: str) -> str:
    """The path of what a module has under a name."""
    return f"{path}.{name}" if path else name


def preceding(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes in front of one, nearest first."""
    while (node := node.prev).op != "root":
        yield node


def _new_before(node: fx.Node) -> list[fx.Node]:
    """The nodes directly in front of one that have no metadata yet, in graph order."""
    return [*itertools.takewhile(lambda n: "val" not in n.meta, preceding(node))][::-1]


def has_effect(node: fx.Node) -> bool:
    """As fx sees it, but that dropout at inference draws no random numbers."""
    is_idle = node.target is torch.ops.aten.dropout.default and node.args[2] is False
    return not is_idle and bool(node.is_impure())


def _leaf_mismatch(node: fx.Node, leaf: Any) -> str:
    expected = node.meta.get("val")
    if not isinstance(expected, Tensor):
        same = leaf is expected or leaf == expected
        return "" if same else f"captured with {expected!r}, called with {leaf!r}"
    if not isinstance(leaf, Tensor):
        return f"a tensor was captured, called with {type(leaf).__name__}"
    if leaf.dtype != expected.dtype:
        return f"captured as {expected.dtype}, called with {leaf.dtype}"
    if leaf.ndim != expected.ndim or not all(
        _size_fits(want, have) for want, have in zip(expected.shape, leaf.shape, strict=True)
    ):
        return f"captured with shape {_format_value(expected)}, called with {tuple(leaf.shape)}"
    return ""


def _size_fits(expected: Any, size: int) -> bool:
    """Whether a size fits a captured one: equal, or inside the range of a dynamic dimension."""
    if isinstance(expected, int):
        return expected == size
    bounds = expected.node.shape_env.bound_sympy(expected.node.expr)
    # A dynamic dimension is captured for sizes of two and more: one broadcasts.
    return bool(bounds.lower <= size <= bounds.upper) and size > 1
