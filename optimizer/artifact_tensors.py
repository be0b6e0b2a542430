"""The tensors of an artifact: each storage once in safetensors, each tensor a view of one.

Tensors that share memory share it again after loading, tied weights are one object again, and
strides are kept, so that every operator takes the path that it took before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxpress.artifact_values import DTYPES, fields, plain_dtype
from fxpress.errors import ArtifactError

__all__ = ["encode_tensors", "load_tensors", "write_tensors"]

# What safetensors knows in every version that is supported; anything else travels as bytes.
_STORED = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
}


def encode_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Records by name, and what is to be stored by the name of the first tensor that it serves.

    Raises:
        ArtifactError: a tensor has no plain data of its own (sparse, quantized, on `meta`).
    """
    shared: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if reason := _unstorable(tensor):
            raise ArtifactError(f"tensor {name} cannot be saved: {reason}")
        pointer = tensor.untyped_storage().data_ptr()
        shared.setdefault(pointer or name, []).append(name)
    records: dict[str, Any] = {}
    stored: dict[str, Tensor] = {}
    for names in shared.values():
        start, stored[names[0]] = _storage_of([tensors[name] for name in names])
        records |= {name: _record(tensors[name], names[0], start) for name in names}
    return records, stored


def _unstorable(tensor: Tensor) -> str:
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"it is a {type(tensor).__name__}; turn it into a plain tensor first"
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return "it is sparse or quantized; make it dense first"
    if tensor.is_meta:
        return "it is on the meta device and has no data"
    if tensor.is_conj() or tensor.is_neg():
        return "it is a lazy conjugate; call resolve_conj().resolve_neg() first"
    return ""


def _extent(shape: Iterable[int], stride: Iterable[int]) -> int:
    """Elements from the first to the last of a strided tensor, both counted; 0 if it is empty."""
    sizes = list(shape)
    if 0 in sizes:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(sizes, stride, strict=True))


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    start, width = int(tensor.storage_offset()), tensor.element_size()
    return start * width, (start + _extent(tensor.shape, tensor.stride())) * width


def _storage_of(tensors: list[Tensor]) -> tuple[int, Tensor]:
    """The bytes that tensors of one storage span: where they start, and the bytes as a tensor.

    A tensor that is alone and contiguous keeps its shape, for those who look into the file.
    """
    first = tensors[0]
    ranges = [_byte_range(tensor) for tensor in tensors]
    start, stop = min(low for low, _ in ranges), max(high for _, high in ranges)
    same = {tensor.dtype for tensor in tensors} == {first.dtype} and first.dtype in _STORED
    dtype = first.dtype if same else torch.uint8
    width = dtype.itemsize
    flat = torch.empty(0, dtype=dtype, device=first.device)
    flat.set_(first.untyped_storage(), start // width, ((stop - start) // width,), (1,))
    if len(tensors) == 1 and same and first.is_contiguous():
        flat = flat.view(first.shape)
    return start, flat.cpu()


def _record(tensor: Tensor, stored: str, start: int) -> dict[str, Any]:
    width = tensor.element_size()
    offset, odd = divmod(int(tensor.storage_offset()) * width - start, width)
    if odd:
        raise ArtifactError(f"tensor {stored} shares memory at an odd address; clone it first")
    return {
        "stored": stored,
        "dtype": plain_dtype(tensor.dtype),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": offset,
        "parameter": isinstance(tensor, nn.Parameter),
        "requires_grad": tensor.requires_grad,
    }


def write_tensors(stored: Mapping[str, Tensor], path: Path) -> None:
    """Write the stored tensors as one safetensors file."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach() for name, tensor in stored.items()}, path)
    # safetensors makes files for their owner alone: who may read the folder may read this one.
    path.chmod(path.parent.stat().st_mode & 0o666)


def load_tensors(records: Any, data: bytes, device: torch.device) -> dict[str, Tensor]:
    """The tensors that the records describe, on `device`.

    Raises:
        ArtifactError: records and data do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not isinstance(records, dict):
        raise ArtifactError("the table of tensors is damaged: it is no mapping")
    try:
        stored = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"the tensors are damaged: {error}") from error
    wanted = {str(record.get("stored")) for record in records.values() if isinstance(record, dict)}
    if wanted != set(stored):
        raise ArtifactError(f"{sorted(wanted ^ set(stored))[:3]}: in the graph or the file alone")
    # Copies: aligned as torch aligns, and each a storage of its own.
    bases = {name: stored.pop(name).to(device, copy=True) for name in list(stored)}
    return {name: _view(name, record, bases) for name, record in records.items()}


def _view(name: str, record: Any, bases: Mapping[str, Tensor]) -> Tensor:
    where = f"tensor {name}"
    known = {"stored": str, "dtype": str, "shape": list, "stride": list, "offset": int}
    flags = {"parameter": bool, "requires_grad": bool}
    stored, dtype, shape, stride, offset, parameter, grad = fields(record, known | flags, where)
    sizes = [*shape, *stride, offset]
    if dtype not in DTYPES or len(shape) != len(stride) or any(type(n) is not int for n in sizes):
        raise ArtifactError(f"{where} is damaged: its sizes or its dtype are none")
    storage, kind = bases[stored].untyped_storage(), DTYPES[dtype]
    last = (offset + _extent(shape, stride)) * kind.itemsize
    if min(sizes) < 0 or last > storage.nbytes():  # set_ would grow the storage
        raise ArtifactError(f"{where} is damaged: it reaches beyond its data")
    view = torch.empty(0, dtype=kind, device=storage.device)
    view.set_(storage, offset, shape, stride)
    if not parameter:
        return view
    if grad and not (kind.is_floating_point or kind.is_complex):
        raise ArtifactError(f"{where} is damaged: {dtype} has no gradient")
    return nn.Parameter(view, requires_grad=grad)
