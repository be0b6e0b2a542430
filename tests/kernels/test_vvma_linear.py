"""The generated kernels of `vvma_linear` without a GPU: text, refusals, compilation."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fxpress import lowering
from fxpress.kernels.vvma_linear import VvmaKernel, emit, kernel_of, parameters
from fxpress.ops.vvma_linear import VvmaSite

PLAIN = VvmaSite(torch.bfloat16, 1, 64, 1, (64, 64), (4096, 4096))
SITES = {
    "plain": PLAIN,
    "rows": replace(PLAIN, batch=8, bias=True, activation="gelu"),
    "grouped": replace(PLAIN, batch=8, terms=4, tiles=(64, 32), features=(4096, 2048)),
    "three_terms": replace(PLAIN, batch=4, terms=3, tiles=(20, 20), features=(1280, 1280)),
    "terms": replace(PLAIN, batch=8, terms=16, bias=True, activation="silu"),
    "ragged": replace(PLAIN, batch=32, tiles=(3, 141), features=(180, 9000), activation="relu"),
    "own_cores": replace(PLAIN, terms=4, shared=False),
    "wide": replace(PLAIN, tiles=(32, 64), features=(8192, 16384), block=256, activation="tanh"),
}
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SHARED_MEMORY = 64 * 1024  # so that three programs fit on a multiprocessor


@pytest.mark.parametrize("name", list(SITES))
def test_source(name: str, golden: Callable[[str, str], None]) -> None:
    source = emit(kernel_of(SITES[name], overlap=name == "terms"))
    golden(source.text, f"kernels/vvma_linear_{name}.txt")
    assert source == emit(kernel_of(SITES[name], overlap=name == "terms"))


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Registers spilled to the stack, per thread, as the driver's tool reports them."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", report)
    return int(stack)


def compile_for_sm_90(s: VvmaKernel) -> object:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = emit(s)
    types = {name: f"*{TYPES[s.dtype]}" if name.isupper() else "i32" for name in parameters(s)}
    aligned = [
        i
        for i, name in enumerate(types)
        if name.isupper() or name in ("x_row", "core_term", "core_row", "core_piece")
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    options = {"num_warps": s.warps, "num_stages": s.stages}
    if s.overlap:
        options["launch_pdl"] = True
    return triton.compile(
        ASTSource(source.load().kernel, signature=types, attrs=attributes),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", list(SITES))
def test_compiles_for_sm_90(name: str, overlap: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    s = kernel_of(replace(SITES[name], dtype=dtype), overlap=overlap)
    compiled: object = compile_for_sm_90(s)
    assert compiled.metadata.shared <= SHARED_MEMORY  # type: ignore[attr-defined]
    code = compiled.asm  # type: ignore[attr-defined]
    assert stack_bytes(code["cubin"], tmp_path) == 0
    assert ("griddepcontrol.wait" in code["ptx"]) == s.overlap
    assert ("bulk.prefetch.L2" in code["ptx"]) == s.overlap


def test_reads_are_wide() -> None:
    """Vectors, cores and x are read sixteen bytes at a time."""
    s = kernel_of(PLAIN)
    ptx = compile_for_sm_90(s).asm["ptx"]  # type: ignore[attr-defined]
    assert set(re.findall(r"ld\.global\S*", ptx)) == {"ld.global.v4.b32"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "float32, float16 or bfloat16"),
        ({"block": 48}, "a power of two from 16 to 256"),
        ({"block": 512}, "a power of two from 16 to 256"),
        ({"block": 256, "shared": False}, "do not fit in registers"),
        ({"batch": 0}, "more than 32 rows"),
    ],
)
def test_declines(changes: dict[str, object], reason: str) -> None:
    site = replace(PLAIN, **changes)  # type: ignore[arg-type]
    found = lowering.declines("fxpress::vvma_linear", "cuda", site)
    assert reason in found["triton-small-batch"].reason
    assert lowering.choose("fxpress::vvma_linear", "cuda", site) is None


@pytest.mark.parametrize("name", list(SITES))
def test_accepts_and_shows_its_source(name: str) -> None:
    chosen = lowering.choose("fxpress::vvma_linear", "cuda", SITES[name])
    assert chosen is not None
    assert chosen.source(SITES[name]).count("def kernel(") == 1
    assert chosen.cost(SITES[name]) > 0


def test_few_terms_take_one_launch() -> None:
    stages = {t: kernel_of(replace(PLAIN, terms=t)).stage for t in (1, 16)}
    assert stages == {1: "whole", 16: "sums"}


def test_launches_overlap_but_where_reads_would_compete() -> None:
    kernels = [kernel_of(SITES[name], overlap=True) for name in ("plain", "terms", "wide")]
    assert [(s.stage, s.overlap) for s in kernels] == [
        ("whole", True),
        ("sums", True),
        ("sums", False),
    ]
