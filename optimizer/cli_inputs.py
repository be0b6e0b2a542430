"""What the command line reads: models, functions and scripts by name, calibration data from files.

Anything wrong with them is a `PlanError` or a `CalibrationError` of one line.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from fxpress.errors import CalibrationError, PlanError

__all__ = [
    "ARRAYS",
    "Reader",
    "Subject",
    "as_call",
    "from_config",
    "from_function",
    "import_file",
    "named",
    "read_arrays",
]

ARRAYS = (".json", ".npy", ".npz", ".safetensors")
"""Suffixes of files that hold inputs as they are, for any model."""

_ROWS = 8  # of an array in a batch
_BYTES = 64  # of a text in a batch, for a model without a tokenizer

Reader = Callable[[Path | None, int], list[Any]]
"""(file or folder, number of batches at most) -> batches."""


@dataclass(frozen=True)
class Subject:
    """A model that was named on the command line.

    Attributes:
        module: in evaluation mode.
        read_own: reads what is the model's own kind of data, such as texts or sound.
    """

    module: nn.Module
    read_own: Reader

    def read(self, path: Path | None, limit: int) -> list[Any]:
        """At most `limit` batches of a file or folder; of the model's own sample without one.

        Raises:
            CalibrationError: it is missing or malformed, or there is no sample.
        """
        if path is not None and not path.exists():
            raise CalibrationError(f"{path} does not exist: give a file or folder of model inputs")
        if path is not None and path.suffix in ARRAYS:
            return read_arrays(path)[:limit]
        return self.read_own(path, limit)


def as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as positional and keyword arguments."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


# --- models ---------------------------------------------------------------------------------


def from_function(module: str, function: str) -> Subject:
    """The model that `module:function`, or `file.py:function`, returns.

    Raises:
        PlanError: it cannot be imported or called, or returns no module.
    """
    build = named(f"{module}:{function}", "--model")
    with _blamed(f"--model {module}:{function} cannot be built"):
        built = build()
    if not isinstance(built, nn.Module):
        raise PlanError(f"--model {module}:{function} gave a {type(built).__name__}, no nn.Module")
    return Subject(built.eval(), _read_lines)


def from_config(path: Path) -> Subject:
    """A model with random weights, of a configuration of transformers.

    Its texts are read by the tokenizer that lies beside the configuration; without one, as bytes.

    Raises:
        PlanError: there is no such file, or transformers knows no model for it.
    """
    if not path.is_file():
        raise PlanError(f"--model hf-config:{path}: no such file")
    with _blamed(f"--model hf-config:{path}"):
        from transformers import AutoConfig, AutoModel

        built: nn.Module = AutoModel.from_config(AutoConfig.from_pretrained(path)).eval()
    has_tokenizer = (path.parent / "tokenizer.json").is_file()
    return Subject(built, _tokens_of(path.parent) if has_tokenizer else _read_bytes)


def named(name: str, option: str) -> Any:
    """What `package.module:attribute`, or `file.py:attribute`, names.

    Raises:
        PlanError: it cannot be imported, or has no such attribute; the message names the option.
    """
    module, _, attribute = name.partition(":")
    if not attribute:
        raise PlanError(f"{option} {name!r}: give package.module:function or file.py:function")
    with _blamed(f"{option} {name} cannot be built"), _importing_from(Path.cwd()):
        found = (
            import_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
        )
        return getattr(found, attribute)


def import_file(path: Path) -> ModuleType:
    """Run a Python file as a module.

    Raises:
        PlanError: there is none, or it raises.
    """
    if not path.is_file():
        raise PlanError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise PlanError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    with _blamed(f"{path} cannot be imported"), _importing_from(path.resolve().parent):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Turn whatever a user's code or file raises into one line."""
    try:
        yield
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(f"{what}: {type(error).__name__}: {error}") from error


# --- data -----------------------------------------------------------------------------------


def read_arrays(path: Path) -> list[Any]:
    """The batches of a file of arrays.

    A `.json` holds a list of batches, each a mapping of nested numbers. A `.safetensors` or `.npz`
    holds one array per keyword argument, a `.npy` the only argument; their first axis is cut into
    batches of 8 rows.

    Raises:
        CalibrationError: the file is malformed, or its arrays differ in length.
    """
    try:
        if path.suffix == ".json":
            return [_tensors(row) for row in json.loads(path.read_text(encoding="utf-8"))]
        arrays = _arrays(path)
    except (ValueError, TypeError, AttributeError, EOFError) as error:
        raise CalibrationError(f"{path} holds no batches of inputs: {error}") from error
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise CalibrationError(f"{path}: arrays need the same number of rows, but have {lengths}")
    cut = {name: array.split(_ROWS) for name, array in arrays.items()}
    if path.suffix == ".npy":
        return list(cut[""])
    return [dict(zip(cut, rows, strict=True)) for rows in zip(*cut.values(), strict=True)]


def _arrays(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(error) from error
    loaded = np.load(path, allow_pickle=False)
    arrays = {"": loaded} if path.suffix == ".npy" else dict(loaded)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _tensors(row: Any) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(value) for key, value in row.items()}


def _read_lines(path: Path | None, limit: int) -> list[Any]:
    """JSON lines, each a mapping of nested numbers."""
    if path is None:
        raise CalibrationError(
            "give --calib: a .jsonl (a mapping of inputs per line), .json, .npy or .safetensors"
        )
    if path.is_dir():
        raise CalibrationError(f"{path} is a folder: give a file of inputs")
    batches = []
    for number, line in enumerate(_lines(path)[:limit], 1):
        try:
            batches.append(_tensors(json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            raise CalibrationError(f"{path}:{number} is no mapping of inputs: {error}") from error
    return batches


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is no text: {error}") from error


def _read_bytes(path: Path | None, limit: int) -> list[Any]:
    """Token ids for a model without a tokenizer: bytes of a text, or a fixed sequence."""
    text = path.read_bytes() if path is not None else bytes(range(32, 127)) * 4
    ids = torch.tensor(list(text[: _BYTES * limit]))
    rows = ids[: len(ids) // _BYTES * _BYTES].view(-1, _BYTES)
    return [{"input_ids": row[None]} for row in rows]


def _tokens_of(folder: Path) -> Reader:
    """Reads lines of a text by the tokenizer of a folder, each cut to 64 tokens or left out."""

    def read(path: Path | None, limit: int) -> list[Any]:
        if path is None:
            return _read_bytes(None, limit)
        with _blamed(f"the tokenizer in {folder}"):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        cut = {"truncation": True, "max_length": _BYTES}
        ids = [tokenizer(line, **cut)["input_ids"] for line in _lines(path)]
        whole = [row for row in ids if len(row) == _BYTES]
        if not whole:
            raise CalibrationError(f"{path}: no line has {_BYTES} tokens")
        return [{"input_ids": torch.tensor([row])} for row in whole[:limit]]

    return read
