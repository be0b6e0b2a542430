"""The generated attention kernel without a GPU: its text, its refusals, and its compilation."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fxpress import lowering
from fxpress.errors import LoweringError
from fxpress.kernels import KernelSource
from fxpress.kernels.sparse_attention import AttentionKernel, emit, parameters
from fxpress.ops import AttentionSite, LayoutSpec

PLAIN = AttentionKernel("bfloat16", 64, 64, 128, 64)
KERNELS = {
    "plain": PLAIN,
    "blocks": replace(PLAIN, packed=False),
    "packed_only": replace(PLAIN, rows=64, full=False, empty=True),
    "padding": replace(PLAIN, mask="bool", group=3, empty=True),
    "bias": replace(PLAIN, rows=64, mask="float32", mask_per_row=True, empty=True),
    "prompt": replace(
        PLAIN,
        head_dim=80,
        value_dim=48,
        ragged=True,
        short=True,
        clipped=True,
        causal=True,
        empty=True,
    ),
    "wide": replace(PLAIN, head_dim=128, value_dim=128, warps=8),
}
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
SHARED_MEMORY = 227 * 1024
# float32 splits each operand in two (tf32x3), which takes more registers than there are.
MAX_STACK = {"float32": 320, "float16": 16, "bfloat16": 16}


@pytest.mark.parametrize("name", list(KERNELS))
def test_source(name: str, golden: Callable[[str, str], None]) -> None:
    source = emit(KERNELS[name])
    golden(source.text, f"kernels/sparse_attention_{name}.txt")
    assert source == emit(KERNELS[name])


def signature(kernel: AttentionKernel) -> dict[str, str]:
    """Triton's types of the kernel's parameters."""
    types = dict.fromkeys(["Q", "K", "V", "O"], f"*{TYPES[kernel.dtype]}")
    types["scale"] = "fp32"
    types["MASK"] = "*u8" if kernel.mask == "bool" else f"*{TYPES.get(kernel.mask)}"
    return {
        name: types.get(name, "*i32" if name.isupper() else "i32") for name in parameters(kernel)
    }


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Registers spilled to the stack, per thread, as the driver's tool reports them."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", report)
    return int(stack)


def compile_for_sm_90(kernel: AttentionKernel, **types: str) -> Any:
    """Compile a kernel; parameters have the types that `signature` gives unless stated."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source, types = emit(kernel), signature(kernel) | types
    aligned = [i for i, x in enumerate(types) if x.isupper() or re.match("[qkvo]_", x)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return triton.compile(
        ASTSource(source.load().kernel, signature=types, attrs=attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": source.warps, "num_stages": source.stages},
    )


def test_compiles_with_a_scale_in_float64() -> None:
    """As Inductor passes numbers."""
    assert compile_for_sm_90(PLAIN, scale="fp64").asm["cubin"]


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("name", list(KERNELS))
def test_compiles_for_sm_90(name: str, dtype: str, tmp_path: Path) -> None:
    kernel = replace(KERNELS[name], dtype=dtype).with_options()
    compiled = compile_for_sm_90(kernel)
    assert compiled.metadata.shared <= min(kernel.shared_bytes, SHARED_MEMORY)
    assert stack_bytes(compiled.asm["cubin"], tmp_path) <= MAX_STACK[dtype]
    products = 3 if dtype == "float32" else 1
    loops = kernel.full + kernel.packed
    assert compiled.asm["ttgir"].count("ttng.warp_group_dot ") == 2 * products * loops


def site(**changes: object) -> AttentionSite:
    facts = LayoutSpec("tiles", (2, 64, 64), (64, 64), 2, 1, 1, 1, full=True)
    plain = AttentionSite(facts, torch.float16, head_dim=64, value_dim=64, group=1)
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"facts": replace(site().facts, form="buckets")}, "the layout has buckets"),
        ({"dtype": torch.float64}, "float32, float16 or bfloat16"),
        ({"dtype": torch.float32, "head_dim": 256}, "bytes of shared memory"),
        ({"positive": False}, "the scale is not above 0"),
        ({"shifted": True}, "not the layout's first row"),
    ],
)
def test_declines(changes: dict[str, object], reason: str) -> None:
    found = lowering.declines("fxpress::sparse_attention", "cuda", site(**changes))
    assert reason in found["triton-tiles"].reason
    assert lowering.choose("fxpress::sparse_attention", "cuda", site(**changes)) is None


def test_accepts_and_shows_its_source() -> None:
    chosen = lowering.choose("fxpress::sparse_attention", "cuda", site())
    assert chosen is not None
    assert "def kernel(" in chosen.source(site())
    assert chosen.cost(site()) > 0


def test_the_cache_holds_what_was_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXPRESS_CACHE", str(tmp_path))
    source = KernelSource("sample", '"""A module."""\n\nANSWER = 41\n', 4, 2)
    path = tmp_path / "kernels" / f"sample_{source.digest[:20]}.py"
    path.parent.mkdir()
    path.write_text("ANSWER = 0\n")  # damaged, or left by somebody else
    assert source.load().ANSWER == 41
    assert path.read_text() == source.text
    assert source.load() is source.load()


def test_a_cache_that_others_can_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXPRESS_CACHE", str(tmp_path))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    with pytest.raises(LoweringError, match="FXPRESS_CACHE"):
        KernelSource("sample", "OTHER = 1\n", 4, 2).load()
