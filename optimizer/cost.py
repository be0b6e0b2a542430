"""The cost model: milliseconds of an operator on a device, from its work.

    ms = sum over its calls of  call_ms + max(multiply-adds / rate, bytes / bandwidth)

The roofline of Williams et al. 2009 with a fixed price per call. It ranks forms of one site, and
says whether a form can pay at all; what a rewrite gains is measured. Constants are known for CPUs
and the H100; any other CUDA device is measured once and remembered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from fxpress.environment import cache_folder
from fxpress.timing import interleave

__all__ = [
    "Hardware",
    "Work",
    "attention_work",
    "dense_work",
    "hardware_of",
    "low_rank_work",
    "sparse_attention_work",
    "vvma_work",
]


@dataclass(frozen=True)
class Work:
    """What one call does.

    Attributes:
        multiply_adds: of its products.
        bytes: read and written, each tensor once.
        slowdown: how much longer it takes for its multiply-adds than one large matrix product.
        steps: calls that it is made of.
    """

    multiply_adds: float
    bytes: float
    slowdown: float = 1.0
    steps: float = 1.0


@dataclass(frozen=True)
class Hardware:
    """A device, as the cost model sees it.

    Attributes:
        name: of the device.
        kind: `"cpu"` or `"cuda"`.
        rates: multiply-adds per ms of a large matrix product, by dtype.
        bytes_per_ms: copied, read and written counted.
        call_ms: what a call costs by itself.
        factored: slowdown of the first stage of the vector-vector-matrix form.
        factored_steps: calls that each of its stages is made of.
        attention: slowdown of dense attention, for its exponentials.
        sparse_attention: the same under a static mask, per cell computed.
    """

    name: str
    kind: str
    rates: Mapping[str, float]
    bytes_per_ms: float
    call_ms: float
    factored: float = 3.0
    factored_steps: float = 4.0
    attention: float = 1.7
    sparse_attention: float = 2.5

    def ms(self, calls: list[Work], dtype: torch.dtype) -> float:
        """Milliseconds of some calls, one after another."""
        rate = self.rates.get(_dtype_name(dtype), min(self.rates.values()))
        return sum(
            w.steps * self.call_ms
            + max(w.multiply_adds * w.slowdown / rate, w.bytes / self.bytes_per_ms)
            for w in calls
        )


# --- work -----------------------------------------------------------------------------------


def dense_work(shape: tuple[int, int], tokens: int, itemsize: int) -> list[Work]:
    """A linear map of `tokens` vectors by a weight (m, n)."""
    m, n = shape
    return [Work(m * n * tokens, itemsize * (m * n + tokens * (m + n)))]


def low_rank_work(shape: tuple[int, int], rank: int, tokens: int, itemsize: int) -> list[Work]:
    """The same by the product of (m, rank) and (rank, n)."""
    m, n = shape
    return dense_work((rank, n), tokens, itemsize) + dense_work((m, rank), tokens, itemsize)


def vvma_work(
    shape: tuple[int, int],
    block: int,
    terms: int,
    tokens: int,
    itemsize: int,
    hardware: Hardware,
    cores: int = 1,
) -> list[Work]:
    """The same in vector-vector-matrix form: r (mn/k + mk) multiply-adds, in two stages.

    Args:
        shape: (m, n) of the weight.
        block: k.
        terms: r.
        tokens: vectors that one call maps.
        itemsize: bytes of a number.
        hardware: its matrix units hardly serve the first stage.
        cores: sets of r cores that are held, one per output piece with share="row".
    """
    m, n = shape
    p, q = -(-m // block), -(-n // block)
    vectors, sums = terms * p * q * block, tokens * terms * p * block
    core, steps = cores * terms * block * block, hardware.factored_steps
    read = itemsize * (vectors + tokens * n + sums)
    products = Work(sums * block, itemsize * (core + sums + tokens * m), steps=steps)
    return [Work(vectors * tokens, read, hardware.factored, steps), products]


def attention_work(
    shape: tuple[int, ...], is_causal: bool, itemsize: int, hardware: Hardware
) -> list[Work]:
    """Dense attention of shape (B, H, Hkv, Nq, Nk, D, Dv); causal kernels skip half."""
    batch, heads, kv_heads, queries, keys, width, value_width = shape
    cells = batch * heads * queries * keys * (0.5 if is_causal else 1.0)
    moved = heads * queries * (width + value_width) + kv_heads * keys * (width + value_width)
    return [Work(cells * (width + value_width), itemsize * batch * moved, hardware.attention)]


def sparse_attention_work(
    shape: tuple[int, ...], tile_density: float, itemsize: int, hardware: Hardware
) -> list[Work]:
    """The same under a static mask that computes a share of all cells."""
    (dense,) = attention_work(shape, False, itemsize, hardware)
    return [Work(dense.multiply_adds * tile_density, dense.bytes, hardware.sparse_attention)]


# --- devices --------------------------------------------------------------------------------

# Measured in November 2026 on an AMD EPYC, per thread, and on an H100.
_CPU_THREAD = Hardware(
    "cpu",
    "cpu",
    {"float32": 4.2e7, "float64": 2.1e7, "bfloat16": 4e6, "float16": 4e6},
    3.1e7,
    6e-3,
)
_H100 = Hardware(
    "NVIDIA H100 80GB HBM3",
    "cuda",
    {"bfloat16": 3.9e11, "float16": 3.9e11, "float32": 2.6e10},
    3.0e9,
    3.5e-3,
    factored=60.0,
    factored_steps=0.4,
)


def hardware_of(device: torch.device) -> Hardware:
    """The model of a device: known, or measured now and remembered in the cache folder."""
    if device.type != "cuda":
        return _cpu(torch.get_num_threads())
    name = torch.cuda.get_device_name(device)
    if name == _H100.name:
        return _H100
    path = cache_folder() / "devices" / (re.sub(r"\W+", "-", name).strip("-").lower() + ".json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(_measure(device, name))), encoding="utf-8")
    return Hardware(**json.loads(path.read_text(encoding="utf-8")))


def _cpu(threads: int) -> Hardware:
    rates = {dtype: rate * threads for dtype, rate in _CPU_THREAD.rates.items()}
    bandwidth = _CPU_THREAD.bytes_per_ms * min(threads, 4)  # a few threads saturate the memory
    one = _CPU_THREAD
    return Hardware(f"cpu, {threads} threads", "cpu", rates, bandwidth, one.call_ms)


def _measure(device: torch.device, name: str) -> Hardware:
    """Time a large product in each dtype, a large copy, and an operator of no work."""
    rates = {}
    side = 4096
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        rates[_dtype_name(dtype)] = side**3 / _time(lambda a=matrix: a @ a)  # type: ignore[misc]
    large = torch.empty(2**28, dtype=torch.uint8, device=device)
    other, small = torch.empty_like(large), large[:16]
    bandwidth = 2 * large.numel() / _time(lambda: other.copy_(large))
    call_ms = _time(lambda: [torch.neg(small) for _ in range(100)]) / 100
    return Hardware(name, "cuda", rates, bandwidth, call_ms, _H100.factored, _H100.factored_steps)


def _time(function: Callable[[], object]) -> float:
    return interleave({"": function}, rounds=9, cuda=True).median("")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
