"""Which functions a saved graph may call: a closed list of operators.

- `aten`: what the dispatcher runs on tensors and numbers. Operators of TorchScript alone (files,
  global seeds) have no kernel there and are refused; private operators are refused but those that
  capture makes; operators that write into an input are refused but the epilogue's `copy_`.
- `fxpress`: the operators of this package.
- arithmetic on sizes, and `getitem`.

Text is accepted only as the few arguments that have it, with the few words that they know.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxpress.errors import ArtifactError

__all__ = ["check_call", "target_name", "target_named"]

_OPERATOR = re.compile(r"(?P<space>aten|prims|fxpress)\.(?P<name>\w+)\.(?P<overload>\w+)", re.ASCII)
_PLAIN = re.compile(r"[\w.,:;|=+\-]*", re.ASCII)
_EQUATION = re.compile(r"[A-Za-z ,.]*(->[A-Za-z .]*)?")

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            *("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_"),
        )
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite")
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}

# Private operators that export makes of public calls.
_PRIVATE = {
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_assert_scalar", "_assert_async"),
    *("_cdist_forward", "_conj", "_convolution", "_embedding_bag", "_euclidean_dist"),
    *("_fft_c2c", "_fft_c2r", "_fft_r2c", "_log_softmax", "_native_batch_norm_legit_no_training"),
    *("_prelu_kernel", "_softmax", "_to_copy", "_trilinear", "_unsafe_index", "_unsafe_view"),
    *("_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d"),
    *("_weight_norm", "_weight_norm_interface", "_transformer_encoder_layer_fwd"),
    *("__and__", "__or__", "__xor__", "__lshift__", "__rshift__"),
}
_PRIMS = {"convert_element_type", "broadcast_in_dim", "device_put"}

_ANY_TEXT = re.compile(r".*", re.DOTALL)
_WORDS: dict[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "approximate": "none|tanh",
        "indexing": "ij|xy",
        "mode": "constant|reflect|replicate|circular",
        "norm": "forward|backward|ortho",
        "ord": "fro|nuc",
        "pad_mode": "constant|reflect|replicate|circular",
        "padding": "same|valid",
        "reduce": "sum|prod|mean|amax|amin",
        "rounding_mode": "floor|trunc",
        "side": "left|right",
    }.items()
} | {"equation": _EQUATION, "assert_msg": _ANY_TEXT, "cell": _ANY_TEXT}
# A cell is read by its operator as a saved graph is: `Cell.read` calls what is listed here alone.


def target_name(target: Any) -> str:
    """The name of a function that a saved graph may call.

    Raises:
        ArtifactError: it is not on the list.
    """
    name = _NAMES.get(target, str(target)) if callable(target) else str(target)
    if not isinstance(target, torch._ops.OpOverload) and name not in _FUNCTIONS:
        raise ArtifactError(f"a call of {name} cannot be saved: it is no operator on the list")
    target_named(name)
    return name


def target_named(name: Any) -> Callable[..., Any]:
    """The function of a name.

    Raises:
        ArtifactError: the name is not on the list, or this torch has no such operator.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = _OPERATOR.fullmatch(name) if isinstance(name, str) else None
    if parts is None or not _is_listed(parts["space"], parts["name"]):
        raise ArtifactError(f"{name!r:.80} is no operator that an artifact may call")
    packet = getattr(getattr(torch.ops, parts["space"]), parts["name"], None)
    found = getattr(packet, parts["overload"], None)
    if not isinstance(found, torch._ops.OpOverload) or not _has_kernel(found):
        raise ArtifactError(f"{name!r} is no operator of torch {torch.__version__}")
    if found._schema.is_mutable and found is not torch.ops.aten.copy_.default:
        raise ArtifactError(f"{name!r} writes into its input: an artifact may not call it")
    return found


def _is_listed(space: str, name: str) -> bool:
    if space == "prims":
        return name in _PRIMS
    return not name.startswith("_") or (space == "aten" and name in _PRIVATE)


def _has_kernel(found: torch._ops.OpOverload) -> bool:
    """Whether the dispatcher runs it: operators of TorchScript alone may write files."""
    schema = found._schema
    dot = "." if schema.overload_name else ""
    return bool(torch._C._dispatch_has_kernel(f"{schema.name}{dot}{schema.overload_name}"))


def check_call(
    target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], epilogue: bool
) -> None:
    """Check the text among the arguments of a call, and that only an epilogue writes.

    Raises:
        ArtifactError: text where none belongs, or a word that the argument does not know.
    """
    if not isinstance(target, torch._ops.OpOverload):
        if _texts([args, kwargs]):
            raise ArtifactError(f"{_NAMES[target]} is called with text: it takes numbers")
        return
    if target._schema.is_mutable and not epilogue:
        raise ArtifactError(f"{target} writes into its input outside of the epilogue")
    names = [argument.name for argument in target._schema.arguments]
    if len(args) > len(names):
        raise ArtifactError(f"{target} takes {len(names)} arguments, not {len(args)}")
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        pattern = _WORDS.get(name, _PLAIN if target.namespace == "fxpress" else None)
        for text in _texts(value):
            if pattern is None or not pattern.fullmatch(text):
                raise ArtifactError(f"{target}: {text!r:.60} is no word that {name} may be")


def _texts(value: Any) -> list[str]:
    """Every text in a nested argument."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts(item)]
    return []
