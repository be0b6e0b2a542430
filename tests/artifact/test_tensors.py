"""Tensors of every kind come back bit for bit, sharing what they shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fxpress.artifact_tensors import encode_tensors, load_tensors, write_tensors
from fxpress.errors import ArtifactError


def there_and_back(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    records, stored = encode_tensors(tensors)
    write_tensors(stored, folder / "t.safetensors")
    data = (folder / "t.safetensors").read_bytes()
    return load_tensors(records, data, torch.device("cpu"))


def bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


MADE = {
    "float32": torch.randn(3, 4),
    "nan and inf": torch.tensor([float("nan"), float("inf"), -0.0]),
    "float64": torch.randn(3, dtype=torch.float64),
    "bfloat16": torch.randn(5).bfloat16(),
    "float16": torch.randn(5).half(),
    "float8": torch.randn(5).to(torch.float8_e4m3fn),
    "complex": torch.randn(4, dtype=torch.complex128),
    "int64": torch.arange(5),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "empty beyond": torch.randn(4)[4:],
    "transposed": torch.randn(3, 4).t(),
    "expanded": torch.randn(3, 1).expand(3, 4),
    "part": torch.randn(100)[10:20],
    "every other": torch.randn(20)[1::2],
    "parameter": nn.Parameter(torch.randn(2)),
    "frozen": nn.Parameter(torch.randn(2), requires_grad=False),
}


@pytest.mark.parametrize("kind", MADE)
def test_each_kind(kind: str, tmp_path: Path) -> None:
    want = MADE[kind]
    got = there_and_back({"t": want}, tmp_path)["t"]
    assert (type(got), got.dtype, got.shape) == (type(want), want.dtype, want.shape)
    assert got.stride() == want.stride()
    assert got.requires_grad == want.requires_grad
    assert bits(got) == bits(want)


def test_all_kinds_at_once_are_apart(tmp_path: Path) -> None:
    got = there_and_back(MADE, tmp_path)
    full = [pointer(tensor) for tensor in got.values() if tensor.numel()]
    assert len(set(full)) == len(full)
    assert [bits(tensor) for tensor in got.values()] == [bits(tensor) for tensor in MADE.values()]


def test_only_the_part_that_is_seen_is_saved(tmp_path: Path) -> None:
    there_and_back({"t": torch.randn(1000)[10:20]}, tmp_path)
    assert load_file(tmp_path / "t.safetensors")["t"].shape == (10,)


def test_shared_memory_is_saved_once_and_shared_again(tmp_path: Path) -> None:
    whole = torch.randn(8, 4)
    tensors = {
        "rows": whole[2:4],
        "whole": nn.Parameter(whole),
        "columns": whole[:, 1],
        "turned": whole.t(),
        "bytes": whole.view(torch.uint8)[3],
    }
    got = there_and_back(tensors, tmp_path)
    assert [t.numel() for t in load_file(tmp_path / "t.safetensors").values()] == [8 * 4 * 4]
    with torch.no_grad():
        for tensor in (got["whole"], tensors["whole"]):
            tensor.mul_(2)
    for name, want in tensors.items():
        assert bits(got[name]) == bits(want), name


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.eye(3).to_sparse(), "it is sparse"),
        (torch.empty(3, device="meta"), "it is on the meta device"),
        (torch.randn(3, dtype=torch.complex64).conj(), "it is a lazy conjugate"),
        (torch.nn.UninitializedParameter(), "it is a UninitializedParameter"),
    ],
)
def test_what_cannot_be_saved(tensor: Tensor, reason: str) -> None:
    with pytest.raises(ArtifactError, match=f"tensor t cannot be saved: {reason}"):
        encode_tensors({"t": tensor})
