"""What an artifact may say: a closed set of values, sizes, structures and signatures.

Each `encode_*` turns a value into plain JSON or refuses it; each `decode_*` is its inverse and
refuses everything else. No text is ever evaluated, and no name is looked up outside a closed list.

| value | JSON |
|---|---|
| None, bool, int, finite float, str | itself |
| float that JSON lacks | `{"float": "nan" / "inf" / "-inf"}` |
| complex | `{"complex": [re, im]}` |
| list, tuple | `[...]`, `{"tuple": [...]}` |
| dtype, device, layout, memory format | `{"dtype": "float32"}` and so on |
| node | `{"node": name}` |
"""

from __future__ import annotations

import collections
import importlib
import inspect
import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxpress.errors import ArtifactError
from fxpress.signature import Signature

__all__ = [
    "DTYPES",
    "decode_signature",
    "decode_size",
    "decode_structure",
    "decode_value",
    "encode_signature",
    "encode_size",
    "encode_structure",
    "encode_value",
    "fields",
    "identifier",
    "parts",
    "plain_dtype",
]


def _constants(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(torch).items() if isinstance(value, kind)}


DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype for dtype in _constants(torch.dtype).values()
}
_LAYOUTS = _constants(torch.layout)
_MEMORY_FORMATS = _constants(torch.memory_format)
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_INT_BITS = 64
# The modules of transformers that define the outputs of models, and nothing else of it.
_OUTPUT_CLASS = re.compile(
    r"(?P<module>transformers\.(modeling_outputs|models\.\w+\.modeling_\w+))\.(?P<name>[A-Z]\w*)",
    re.ASCII,
)


def fields(record: Any, kinds: Mapping[str, type], where: str) -> tuple[Any, ...]:
    """The values of a record that has exactly these fields of these types, in their order."""
    if not isinstance(record, dict) or set(record) != set(kinds):
        raise ArtifactError(f"{where} is damaged: a record of {', '.join(kinds)} was expected")
    for name, kind in kinds.items():
        if kind is not object and type(record[name]) is not kind:
            raise ArtifactError(f"{where} is damaged: {name} is {record[name]!r:.60}")
    return tuple(record[name] for name in kinds)


def parts(record: Any, kinds: Sequence[type], where: str) -> tuple[Any, ...]:
    """The items of a list that has exactly these types."""
    if not isinstance(record, list) or [type(item) for item in record] != list(kinds):
        raise ArtifactError(f"{where} is damaged: {record!r:.60}")
    return tuple(record)


def identifier(text: Any, where: str) -> str:
    """A text that is a plain name: the only kind that may become part of generated Python."""
    if not (isinstance(text, str) and text.isascii() and text.isidentifier()):
        raise ArtifactError(f"{where}: {text!r:.60} is no plain name")
    if keyword.iskeyword(text):
        raise ArtifactError(f"{where}: {text!r} is a word of Python, no plain name")
    return text


def plain_dtype(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


# Values


def encode_value(value: Any) -> Any:
    """A value of the closed set as JSON.

    Raises:
        ArtifactError: the value is not of the set.
    """
    if _is_plain(value):
        return value
    if isinstance(value, list):
        return [encode_value(item) for item in value]
    if type(value) in (tuple, torch.Size):
        return {"tuple": [encode_value(item) for item in value]}
    return _encode_tagged(value)


def _is_plain(value: Any) -> bool:
    """Whether JSON holds a value as it is."""
    if type(value) is int:
        return bool(value.bit_length() < _INT_BITS)
    return value is None or type(value) in (bool, str) or _is_finite(value)


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _encode_tagged(value: Any) -> dict[str, Any]:
    text = str(value).removeprefix("torch.")
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if type(value) is float:
        return {"float": text}
    if type(value) is complex:
        return {"complex": [encode_value(value.real), encode_value(value.imag)]}
    return _encode_constant(value, text)


def _encode_constant(value: Any, text: str) -> dict[str, Any]:
    if isinstance(value, torch.dtype):
        return {"dtype": text}
    if isinstance(value, torch.device):
        return {"device": value.type}  # all of a program is on one device of a type
    if isinstance(value, torch.layout):
        return {"layout": text}
    if isinstance(value, torch.memory_format):
        return {"memory_format": text}
    raise ArtifactError(f"a {type(value).__name__} ({value!r:.60}) cannot be saved")


def decode_value(data: Any, nodes: Mapping[str, fx.Node], device: Callable[[str], Any]) -> Any:
    """The value that JSON stands for.

    Args:
        data: what `encode_value` returned.
        nodes: the nodes that may be referred to.
        device: type of a device, as saved -> the device to use.

    Raises:
        ArtifactError: the data is no value of the set.
    """
    if _is_plain(data):
        return data
    if isinstance(data, list):
        return [decode_value(item, nodes, device) for item in data]
    if isinstance(data, dict) and len(data) == 1:
        tag, content = next(iter(data.items()))
        if tag in ("tuple", "complex") and isinstance(content, list):
            items = tuple(decode_value(item, nodes, device) for item in content)
            return items if tag == "tuple" else _complex(items)
        tables: dict[str, Mapping[str, Any]] = {
            "float": _FLOATS,
            "node": nodes,
            "dtype": DTYPES,
            "layout": _LAYOUTS,
            "memory_format": _MEMORY_FORMATS,
        }
        if tag == "device" and content in ("cpu", "cuda"):
            return device(content)
        if tag in tables and isinstance(content, str) and content in tables[tag]:
            return tables[tag][content]
    raise ArtifactError(f"{data!r:.80} is no value that an artifact may hold")


def _complex(parts: tuple[Any, ...]) -> complex:
    if len(parts) != 2 or any(type(part) is not float for part in parts):
        raise ArtifactError(f"{parts!r:.80} is no complex number")
    return complex(*parts)


# Sizes


def encode_size(size: Any) -> Any:
    """A size as an expression tree: an int, a symbol by name, or `[operator, left, right]`."""
    if isinstance(size, int):
        return size
    return _encode_expression(size.node.expr)


def _encode_expression(expression: Any) -> Any:
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return str(expression)
    name = _EXPRESSIONS.get(type(expression).__name__)
    if name is None:
        raise ArtifactError(f"the size {expression} cannot be saved: give that dimension one size")
    first, *rest = [_encode_expression(argument) for argument in expression.args]
    for operand in rest:
        first = [name, first, operand]
    return first


_EXPRESSIONS = {
    "Add": "add",
    "Mul": "mul",
    "FloorDiv": "floordiv",
    "CleanDiv": "floordiv",
    "Mod": "mod",
    "PythonMod": "mod",
}
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
}


def decode_size(data: Any, symbols: Mapping[str, Any]) -> Any:
    """The int or symbolic int that an expression tree stands for."""
    if type(data) is int and data.bit_length() < _INT_BITS:
        return data
    if isinstance(data, str) and data in symbols:
        return symbols[data]
    if isinstance(data, list) and len(data) == 3 and data[0] in _ARITHMETIC:
        left, right = (decode_size(part, symbols) for part in data[1:])
        return _ARITHMETIC[data[0]](left, right)
    raise ArtifactError(f"{data!r:.80} is no size")


# Structures of arguments and results


def encode_structure(spec: Any) -> Any:
    """A pytree structure as JSON: null for a leaf, else type, keys and children.

    Raises:
        ArtifactError: a container that is no tuple, list, dict or output class of transformers.
    """
    if spec.is_leaf():
        return None
    children = [encode_structure(child) for child in spec.children()]
    if spec.type in (tuple, list):
        return {"type": spec.type.__name__, "children": children}
    if spec.type in (dict, collections.OrderedDict):
        kind = "dict" if spec.type is dict else "ordered_dict"
        return {"type": kind, "keys": _keys(spec.context), "children": children}
    name = f"{spec.type.__module__}.{spec.type.__qualname__}"
    _output_class(name)
    return {"type": name, "keys": _keys(spec.context), "children": children}


def _keys(context: Any) -> list[Any]:
    if not isinstance(context, list) or any(type(key) not in (str, int, bool) for key in context):
        raise ArtifactError(f"the keys {context!r:.80} of a dict are neither text nor numbers")
    return list(context)


def decode_structure(data: Any) -> Any:
    """The pytree structure that JSON stands for."""
    if data is None:
        return pytree.tree_structure(0)
    if not isinstance(data, dict):
        raise ArtifactError(f"{data!r:.80} is no structure of arguments")
    kind, children = data.get("type"), data.get("children")
    if not isinstance(kind, str) or not isinstance(children, list):
        raise ArtifactError(f"{data!r:.80} is no structure of arguments")
    specs = [decode_structure(child) for child in children]
    if kind in ("tuple", "list"):
        return pytree.TreeSpec(tuple if kind == "tuple" else list, None, specs)
    keys = _keys(data.get("keys"))
    if len(keys) != len(specs) or len(set(keys)) < len(keys):
        raise ArtifactError(f"the keys {keys!r:.80} do not name {len(specs)} children")
    mappings: dict[str, type] = {"dict": dict, "ordered_dict": collections.OrderedDict}
    return pytree.TreeSpec(mappings.get(kind) or _output_class(kind), keys, specs)


def _output_class(name: str) -> type:
    """A class of model outputs by its full name; the one thing that is looked up by name.

    Only modules of transformers that define model outputs are imported, and only a subclass of its
    `ModelOutput` that lies there is returned.
    """
    found = _OUTPUT_CLASS.fullmatch(name)
    if found is None:
        raise ArtifactError(
            f"a {name} among arguments or results cannot be saved: return a tuple, a list, a dict "
            "or a ModelOutput of transformers (for a cache: call with use_cache=False)"
        )
    try:
        from transformers.utils import ModelOutput

        kind = vars(importlib.import_module(found["module"])).get(found["name"])
    except ImportError as error:
        raise ArtifactError(f"the result is a {name}: install transformers ({error})") from error
    if not (isinstance(kind, type) and issubclass(kind, ModelOutput)):
        raise ArtifactError(f"{name} is no output class of this version of transformers")
    return kind


# Signatures


def encode_signature(signature: Signature) -> Any:
    """The parameters of `forward` with their plain defaults, and the structure of the call."""
    parameters = []
    for parameter in signature.python.parameters.values():
        entry: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
        if parameter.default is not inspect.Parameter.empty:
            plain = parameter.default is None or type(parameter.default) in (bool, int, float, str)
            # A default that nobody can spell out needs to be there, not to be known.
            entry["default"] = [encode_value(parameter.default)] if plain else []
        parameters.append(entry)
    return {"parameters": parameters, "structure": encode_structure(signature.structure)}


def decode_signature(data: Any) -> Signature:
    """The signature that JSON stands for."""
    parameters, structure = fields(data, {"parameters": list, "structure": dict}, "the signature")
    try:
        python = inspect.Signature([_parameter(entry) for entry in parameters])
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"the signature is damaged: {error}") from error
    return Signature(python, decode_structure(structure))


def _parameter(entry: Any) -> inspect.Parameter:
    name, kind = identifier(entry["name"], "a parameter"), inspect._ParameterKind[entry["kind"]]
    if "default" not in entry:
        return inspect.Parameter(name, kind)
    value = [decode_value(item, {}, torch.device) for item in entry["default"]]
    return inspect.Parameter(name, kind, default=value[0] if value else object())
