"""`fxpress::recurrence`: a loop over time as one node.

    state, outputs_t, last = cell(inputs_t, state, weights)        t = 0 .. steps - 1

    inputs   tensors, read along dimension 0 at step t (or at steps - 1 - t)
    state    what a step hands to the next; here before the first step
    weights  what all steps share; and sizes, which may be dynamic
    cell     one step, as text: a small graph of listed operators

What a step puts out is stacked or concatenated over time; of other values the last step's is
returned. The operator is a composite one: off a device with a kernel for the cell it runs the
cell's operators step by step, and autograd sees those, so that outputs, gradients and gradients of
gradients are those of the loop that was rolled. Only its metadata is computed without the loop:
from two steps, whatever `steps` is, which may thus be a dynamic size.

The text is read as an artifact is: by a closed reader that knows a list of operators and evaluates
nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor

from fxpress.artifact_targets import check_call, target_name, target_named
from fxpress.artifact_values import decode_value, encode_value, fields, identifier, parts
from fxpress.errors import ArtifactError

__all__ = ["Cell", "Collected", "recurrence"]

_FIELDS: dict[str, type] = {
    "inputs": list,
    "state": int,
    "weights": int,
    "sizes": int,
    "nodes": list,
    "next": list,
    "collected": list,
    "last": list,
}


@dataclass(frozen=True)
class Collected:
    """How the outputs of the steps become one tensor.

    Attributes:
        how: `"stack"` or `"cat"`.
        dim: along which dimension.
        reverse: the last step's comes first.
    """

    how: str
    dim: int
    reverse: bool = False

    def __str__(self) -> str:
        """In words."""
        back = ", from the last step" if self.reverse else ""
        return f"{self.how} along {self.dim}{back}"

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """One tensor of the values of all steps."""
        ordered = list(reversed(values)) if self.reverse else list(values)
        return (
            torch.stack(ordered, self.dim) if self.how == "stack" else torch.cat(ordered, self.dim)
        )

    def blank(self, value: Tensor, steps: Any) -> Tensor:
        """A tensor of that shape for one step's value, without contents."""
        shape = list(value.shape)
        if self.how == "stack":
            shape.insert(self.dim, steps)
        else:
            shape[self.dim] = shape[self.dim] * steps
        return value.new_empty(shape)


@dataclass(frozen=True)
class Cell:
    """One step of a recurrence.

    Attributes:
        graph: placeholders for inputs, state, weights and sizes, in that order; returns the next
            state, what is collected, and what the last step returns, each a tuple.
        reverse: for each input, whether it is read from its end.
        states: how many tensors the state has.
        sizes: how many sizes it reads.
        collected: how each output is collected over time.
    """

    graph: fx.Graph
    reverse: tuple[bool, ...]
    states: int
    sizes: int
    collected: tuple[Collected, ...]

    @property
    def results(self) -> tuple[Any, Any, Any]:
        """The nodes of the next state, of what is collected, and of what is returned last."""
        results: Any = self.graph.output_node().args[0]
        following, outputs, last = results
        return following, outputs, last

    def __str__(self) -> str:
        """One line per operator, then what the step hands on and puts out."""
        lines = []
        for node in self.graph.nodes:
            if node.op == "call_function":
                target = str(getattr(node.target, "__name__", node.target))
                if isinstance(node.target, torch._ops.OpOverload):
                    target = str(node.target).removesuffix(".default")
                kwargs = [f"{name}={value}" for name, value in node.kwargs.items()]
                arguments = ", ".join([*(_shown(a) for a in node.args), *kwargs])
                lines.append(f"%{node.name} = {target}({arguments})")
        following, outputs, last = self.results
        reads = [f"x{i} from its end" for i, back in enumerate(self.reverse) if back]
        joins = [f"{_shown(n)} by {how}" for how, n in zip(self.collected, outputs, strict=True)]
        parts = {"reads": reads, "hands on": following, "collects": joins, "returns last": last}
        lines += [f"{what} {', '.join(map(_shown, p))}" for what, p in parts.items() if p]
        return "\n".join(lines)

    def on_step(
        self,
        inputs: Sequence[Tensor],
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        sizes: Sequence[Any],
    ) -> list[fx.Node]:
        """The calls of one step, with metadata for operands of these kinds (fake tensors)."""
        first = [x.select(0, 0) for x in inputs]
        values = iter((*first, *state, *weights, *sizes))
        calls = []
        for node in self.graph.nodes:
            if node.op == "placeholder":
                node.meta["val"] = next(values)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
                if isinstance(node.target, torch._ops.OpOverload):
                    calls.append(node)
        return calls

    def text(self) -> str:
        """The cell as text, which `read` takes.

        Raises:
            ArtifactError: naming what a cell may not call or hold.
        """
        given = len(self.graph.find_nodes(op="placeholder"))
        following, outputs, last = self.results
        how = [[c.how, c.dim, c.reverse] for c in self.collected]
        data = {
            "inputs": list(self.reverse),
            "state": self.states,
            "weights": given - len(self.reverse) - self.states - self.sizes,
            "sizes": self.sizes,
            "nodes": [_written(n) for n in self.graph.nodes if n.op == "call_function"],
            "next": [n.name for n in following],
            "collected": [[n.name, *h] for n, h in zip(outputs, how, strict=True)],
            "last": [n.name for n in last],
        }
        return json.dumps(data, separators=(",", ":"))

    @staticmethod
    def read(text: str, device: str = "cpu") -> Cell:
        """The cell that a text stands for.

        Args:
            text: as `text` wrote it.
            device: where operators that make tensors put them.

        Raises:
            ArtifactError: it is no cell, or calls what no artifact may call.
        """
        return _read(text, device)


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_shown, value))}]"
    return f"%{value.name}" if isinstance(value, fx.Node) else str(value)


def _written(node: fx.Node) -> list[Any]:
    kwargs = {name: encode_value(value) for name, value in node.kwargs.items()}
    target = target_name(node.target)
    check_call(target_named(target), node.args, node.kwargs, False)
    return [node.name, target, [encode_value(argument) for argument in node.args], kwargs]


@functools.lru_cache(maxsize=256)
def _read(text: str, device: str) -> Cell:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"the cell {text!r:.60} is damaged: {error}") from error
    inputs, states, weights, sizes, nodes, following, collected, last = fields(
        data, _FIELDS, "the cell"
    )
    graph, known = fx.Graph(), {}
    counts = {"x": len(inputs), "h": states, "w": weights, "s": sizes}
    for name in (f"{kind}{index}" for kind, count in counts.items() for index in range(count)):
        known[name] = graph.placeholder(name)
    for entry in nodes:
        name, target, args, kwargs = parts(entry, (str, str, list, dict), "a node of the cell")
        call = target_named(target)
        args = decode_value({"tuple": args}, known, lambda _kind: torch.device(device))
        kwargs = {
            identifier(key, name): decode_value(value, known, lambda _kind: torch.device(device))
            for key, value in kwargs.items()
        }
        check_call(call, args, kwargs, False)
        known[name] = graph.create_node("call_function", call, args, kwargs, identifier(name, ""))
    named = [parts(entry, (str, str, int, bool), "an output") for entry in collected]
    if any(how not in ("stack", "cat") for _, how, _, _ in named) or states != len(following):
        raise ArtifactError(f"the cell {text!r:.60} is damaged: its outputs are none")
    try:
        results = [[known[name] for name in names] for names in (following, _names(named), last)]
    except KeyError as error:
        raise ArtifactError(f"the cell has no value {error}") from error
    graph.output(tuple(tuple(nodes) for nodes in results))
    how = tuple(Collected(*rest) for _, *rest in named)
    return Cell(graph, tuple(bool(flag) for flag in inputs), states, sizes, how)


def _names(collected: Sequence[Sequence[Any]]) -> list[str]:
    return [name for name, *_ in collected]


@functools.lru_cache(maxsize=256)
def _compiled(text: str, device: str) -> tuple[Cell, Callable[..., Any]]:
    """The cell, and a Python function that runs one step of it."""
    cell = Cell.read(text, device)
    step: Callable[..., Any] = fx.GraphModule(nn.Module(), cell.graph).forward
    return cell, step


def _run(
    inputs: Sequence[Tensor],
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    sizes: Sequence[Any],
    steps: Any,
    cell: str,
) -> list[Tensor]:
    """The loop, or its metadata on tensors without contents."""
    tensors = [*inputs, *state, *weights]
    # A tensor that counts the steps may lie on the CPU beside others.
    device = next((t.device.type for t in tensors if t.device.type != "cpu"), "cpu")
    graph, step = _compiled(cell, device)
    if any(isinstance(t, FakeTensor) for t in tensors):
        return _metadata(graph, step, inputs, state, (*weights, *sizes), steps)
    at_step = [x.unbind(0) for x in inputs]
    read = [xs[::-1] if back else xs for xs, back in zip(at_step, graph.reverse, strict=True)]
    outputs: list[list[Tensor]] = [[] for _ in graph.collected]
    last: Sequence[Tensor] = ()
    for t in range(steps):
        state, collected, last = step(*(xs[t] for xs in read), *state, *weights, *sizes)
        for values, value in zip(outputs, collected, strict=True):
            values.append(value)
    joined = [how.join(values) for how, values in zip(graph.collected, outputs, strict=True)]
    return [*joined, *last]


def _metadata(
    cell: Cell,
    step: Callable[..., Any],
    inputs: Sequence[Tensor],
    state: Sequence[Tensor],
    shared: Sequence[Any],
    steps: Any,
) -> list[Tensor]:
    """Shapes after two steps: from then on they stay as they are."""
    first = [x.select(0, 0) for x in inputs]
    state, *_ = step(*first, *state, *shared)
    _, collected, last = step(*first, *state, *shared)
    blanks = [how.blank(v, steps) for how, v in zip(cell.collected, collected, strict=True)]
    return [*blanks, *last]


_library = torch.library.Library("fxpress", "FRAGMENT")
_library.define(
    "recurrence(Tensor[] inputs, Tensor[] state, Tensor[] weights, SymInt[] sizes, SymInt steps,"
    " str cell) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("recurrence", _run, "CompositeImplicitAutograd")


def recurrence(
    cell: Cell | str,
    inputs: Sequence[Tensor],
    state: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
    steps: int | None = None,
) -> list[Tensor]:
    """Run a cell over time.

    Args:
        cell: one step.
        inputs: each (T, ...), one slice a step.
        state: before the first step.
        weights: what every step reads.
        sizes: numbers that every step reads.
        steps: T; needed where there are no inputs.

    Returns:
        What is collected over time, then what the last step returns.

    Raises:
        ValueError: the inputs differ in length, or are fewer or more than the cell reads.
    """
    text = cell if isinstance(cell, str) else cell.text()
    known = Cell.read(text)
    if (len(inputs), len(state)) != (len(known.reverse), known.states):
        raise ValueError(
            f"the cell reads {len(known.reverse)} inputs and {known.states} states, "
            f"got {len(inputs)} and {len(state)}"
        )
    lengths = {len(x) for x in inputs} | ({steps} if steps is not None else set())
    if len(lengths) != 1:
        raise ValueError(f"the inputs have {sorted(lengths)} steps: give them one length")
    results: list[Tensor] = torch.ops.fxpress.recurrence(
        list(inputs), list(state), list(weights), list(sizes), lengths.pop(), text
    )
    return results
