"""What graphs may hold: values, sizes, structures and operators, each kept exactly or refused."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import math
import operator
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxpress
from fxpress.artifact_graph import decode_program, encode_program
from fxpress.artifact_targets import target_name, target_named
from fxpress.artifact_values import (
    decode_signature,
    decode_structure,
    decode_value,
    encode_signature,
    encode_structure,
    encode_value,
)
from fxpress.errors import ArtifactError
from fxpress.signature import Signature
from fxpress.testing import BITWISE, assert_equivalent

CONSTANTS = [torch.float32, torch.bfloat16, torch.bool, torch.strided, torch.channels_last]
ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63) + 1, (1 << 63) - 1)
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=5)
    | st.sampled_from([*CONSTANTS, torch.device("cpu")])
)
VALUES = st.recursive(ATOMS, lambda v: st.lists(v, max_size=3) | st.tuples(v, v), max_leaves=8)


def here(kind: str) -> torch.device:
    return torch.device(kind)


@given(VALUES)
def test_values_come_back_as_they_were(value: Any) -> None:
    back = decode_value(encode_value(value), {}, here)
    assert repr(back) == repr(value)  # also for nan, and apart for 1, True and 1.0


@pytest.mark.parametrize("value", [object(), {1: 2}, 1 << 64, b"bytes", slice(1), torch.ones(1)])
def test_values_that_cannot_be_saved(value: Any) -> None:
    with pytest.raises(ArtifactError, match="cannot be saved"):
        encode_value(value)


class Function(nn.Module):
    """A function as a module with one weight."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        """The function of x @ weight, and y where it is given."""
        z = x @ self.weight
        return self.function(z) if y is None else self.function(z, y)


def reloaded(
    function: Callable[..., Any], batches: list[Any], at: Path
) -> tuple[fxpress.OptimizedModule, fxpress.OptimizedModule]:
    o = fxpress.optimize(Function(function).eval(), batches, judge="off")
    assert list(o.captured.programs) == [""]
    return o, fxpress.load(o.save(at / "m"))


def _infinite(z: Tensor) -> Tensor:
    return z.masked_fill(z > 0, -math.inf).nan_to_num(math.nan, 1.0, -2.0).to(torch.float64)


def _formats(z: Tensor) -> Tensor:
    image = z.reshape(-1, 1, 2, 2).contiguous(memory_format=torch.channels_last)
    return nn.functional.gelu(image, approximate="tanh").div(3, rounding_mode="floor")


def _fresh(z: Tensor) -> Tensor:
    made = torch.arange(z.shape[0], dtype=torch.int32, device=z.device)
    return z * made[:, None] + torch.full((4,), 0.5) + torch.einsum("ij,kj->ik", z, z).sum()


def _sizes(z: Tensor) -> tuple[Tensor, int]:
    half = z.shape[0] // 2
    return z[:half].reshape(-1, 2) * (z.shape[0] % 3), z.shape[0] * 2 + 1


@pytest.mark.parametrize("function", [_infinite, _formats, _fresh, _sizes])
def test_functions_come_back_as_they_were(function: Any, tmp_path: Path) -> None:
    data = [torch.randn(n, 4) for n in (4, 6, 8)]
    o, loaded = reloaded(function, data, tmp_path)
    for x in (*data, torch.randn(10, 4)):
        assert_equivalent(loaded, o, (x,), exactness=BITWISE)
        assert str(loaded(x)) == str(o(x))  # with what is no tensor


def test_sizes_that_follow_from_others(tmp_path: Path) -> None:
    data = [(torch.randn(2 * n, 4), torch.randn(n, 4)) for n in (3, 4, 5)]
    o, loaded = reloaded(lambda z, y: z + torch.cat([y, y]), data, tmp_path)
    assert "*s" in str(o.captured.programs[""])  # one input is twice the other
    assert_equivalent(loaded, o, (torch.randn(14, 4), torch.randn(7, 4)), exactness=BITWISE)


class Pair(typing.NamedTuple):
    a: Tensor
    b: Tensor


@dataclasses.dataclass
class Record:
    a: Tensor


torch.export.register_dataclass(Record)

RESULTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda z: z,
    "tuple": lambda z: (z, None, 3),
    "list": lambda z: [z, [z + 1, ()]],
    "dict": lambda z: {"b": z, "a": {1: z + 1}},
    "ordered": lambda z: collections.OrderedDict(b=z, a=z + 1),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results_of_each_structure(kind: str, tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    o, loaded = reloaded(RESULTS[kind], [x, x], tmp_path)
    structures = [pytree.tree_structure(module(x)) for module in (o, loaded)]
    assert structures[0] == structures[1]
    assert_equivalent(loaded, o, (x,), exactness=BITWISE)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda z: Pair(z, z),
            r"a collections.namedtuple among arguments or results cannot be saved",
        ),
        (Record, r"a .*Record among arguments or results cannot be saved"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_save(
    function: Any, reason: str, tmp_path: Path
) -> None:
    x = torch.randn(3, 4)
    o = fxpress.optimize(Function(function).eval(), [x, x], judge="off")
    with pytest.raises(ArtifactError, match=reason):
        o.save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_an_attribute_that_is_no_tensor_is_refused_by_save(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    o = fxpress.optimize(Function(lambda z: z + 1).eval(), [x, x], judge="off")
    program = o.captured.programs[""]
    program.register("source", torch.zeros(()))
    with program.graph.inserting_before(program.placeholders[0]):
        program.graph.get_attr("source")
    del program.graph_module.source
    program.graph_module.source = torch.Generator()  # type: ignore[assignment]
    with pytest.raises(ArtifactError, match="reads 'source', a Generator: only tensors under"):
        o.save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def _every_kind(
    a: Tensor, /, b: int = 2, *rest: Tensor, c: Any = torch.float32, d: str = "x", **more: Any
) -> None:
    """A signature with parameters of every kind."""


def test_signatures_come_back() -> None:
    leaf = torch.ones(1)
    structure = pytree.tree_structure(((leaf, 3), {"e": [leaf, {"f": leaf}]}))
    back = decode_signature(encode_signature(Signature(inspect.signature(_every_kind), structure)))
    assert back.structure == structure
    want = inspect.signature(_every_kind).parameters
    assert list(back.python.parameters) == list(want)
    for name, parameter in back.python.parameters.items():
        assert parameter.kind == want[name].kind
        if name != "c":  # a default that is no plain value is there, and nobody has it
            assert parameter.default == want[name].default
    assert back.python.parameters["c"].default is not inspect.Parameter.empty


@pytest.mark.parametrize(
    "data",
    [
        0,
        {"type": "dict", "keys": ["a"], "children": []},
        {"type": "dict", "keys": ["a", "a"], "children": [None, None]},
        {"type": "dict", "keys": [[1]], "children": [None]},
        {"type": "tuple"},
        {"type": "transformers.modeling_outputs.NoSuchOutput", "keys": [], "children": []},
        {"type": "transformers.modeling_outputs.Optional", "keys": [], "children": []},
    ],
)
def test_structures_that_are_none(data: Any) -> None:
    with pytest.raises(ArtifactError):
        decode_structure(data)


def test_leaves_and_nothing_are_apart() -> None:
    assert encode_structure(pytree.tree_structure(torch.ones(1))) is None
    assert decode_structure({"type": "tuple", "children": []}) == pytree.tree_structure(())


class Counter(nn.Module):
    """Multiplies by how often it was called."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * self.calls


def test_buffers_are_updated_at_the_end() -> None:
    program = fxpress.capture(Counter(), (torch.ones(2),))
    graph, held = program.graph, dict(program.graph_module.named_buffers())
    program.graph_module._non_persistent_buffers_set.add("calls")
    with graph.inserting_before(graph.output_node()):
        calls = next(iter(graph.find_nodes(op="get_attr")))
        more = graph.call_function(torch.ops.aten.add.Tensor, (calls, 1))
        graph.call_function(torch.ops.aten.copy_.default, (calls, more)).meta["epilogue"] = True
    program.refresh()
    program.graph_module.recompile()
    data = encode_program(program, lambda tensor, path: path)
    held = {name: buffer.clone() for name, buffer in held.items()}
    back = decode_program(data, held, "cpu", torch.device("cpu"))
    for _ in range(3):
        assert_equivalent(back, program, (torch.ones(2),), exactness=BITWISE)
    assert float(held["calls"]) == 4
    assert not back.graph_module.state_dict()
    next(n for n in data["nodes"] if n.get("epilogue"))["epilogue"] = False
    with pytest.raises(ArtifactError, match="writes into its input outside of the epilogue"):
        decode_program(data, held, "cpu", torch.device("cpu"))


ALLOWED = [
    torch.ops.aten.linear.default,
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten._softmax.default,
    torch.ops.prims.convert_element_type.default,
    torch.ops.fxpress.sparse_attention.default,
    operator.getitem,
    torch.sym_max,
    math.ceil,
]


@pytest.mark.parametrize("target", ALLOWED, ids=lambda t: getattr(t, "__name__", str(t)))
def test_operators_have_one_name(target: Any) -> None:
    assert target_named(target_name(target)) is target


@pytest.mark.parametrize(
    "target",
    [
        eval,
        torch.load,
        operator.call,
        operator.attrgetter,
        torch.relu,
        torch.ops.aten.add_.Tensor,
        torch.ops.aten.relu,
        torch.ops.aten.add.out,
        torch.ops.prims.exp.default,
        torch.ops.higher_order.cond,
        typing.cast,
        "aten.relu.default",
    ],
    ids=lambda t: getattr(t, "__name__", str(t)),
)
def test_operators_that_are_not_on_the_list(target: Any) -> None:
    with pytest.raises(ArtifactError):
        target_name(target)
