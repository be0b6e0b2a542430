"""Convolutions over windows that do not overlap: linear maps for what factors them."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import fxpress
from fxpress.capture import capture
from fxpress.cost import hardware_of
from fxpress.passes.factor_forms import Form, Place, dense_cost
from fxpress.passes.factor_settings import FactorVvmaConfig
from fxpress.passes.factor_vvma import FactorVvma
from fxpress.passes.low_rank_fit import fit_low_rank
from fxpress.passes.normalize_linear import NormalizeLinear
from fxpress.passes.patches import Patches, patches_of
from fxpress.passes.sites import linear_sites
from fxpress.program import Program
from fxpress.rewrite import PassContext
from fxpress.testing import BITWISE, assert_equivalent
from fxpress.verify import verify

N, M = 6, 10

CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "words of a spectrogram": (nn.Conv1d(N, M, 4, stride=4), (2, N, 22)),
    "an image, as ViT has it": (nn.Conv2d(N, M, 3, stride=3), (2, N, 9, 12)),
    "an image without a batch": (nn.Conv2d(N, M, (2, 3), stride=(2, 3)), (N, 4, 6)),
    "a video": (nn.Conv3d(N, M, 2, stride=2, bias=False), (2, N, 4, 4, 6)),
    "width one": (nn.Conv2d(N, M, 1), (2, N, 3, 4)),
    "width one that strides": (nn.Conv2d(N, M, 1, stride=2), (2, N, 5, 7)),
    "windows apart": (nn.Conv1d(N, M, 2, stride=3), (2, N, 11)),
    "no padding by name": (nn.Conv1d(N, M, 2, stride=2, padding="valid"), (2, N, 8)),
}


class Embedding(nn.Module):
    """Patches of an image, with an activation, as tokens."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(self.convolution(x))
        return y.view(*y.shape[:-1], -1)  # counts on a contiguous result


def exactly(program: Program) -> PassContext:
    """Decisions that factor every site without loss: its whole rank."""
    decisions = {}
    for site in linear_sites(program):
        fit = fit_low_rank(site.matrix(program).detach(), min(site.shape))
        factors = {"down": fit.down, "up": fit.up}
        decisions[site.name] = {"form": "low-rank", "error": 0.0, **factors}
    return PassContext(FactorVvmaConfig(), decisions)


def factored(program: Program) -> Program:
    before = program.copy()
    assert FactorVvma().run(program, exactly(program)).rewrites
    verify(program, "factor-vvma", before)
    return program


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_of_patches_is_a_site_that_can_be_factored(name: str) -> None:
    convolution, size = CONVOLUTIONS[name]
    model, x = Embedding(convolution), torch.randn(size)
    program = capture(model, (x,))
    before = str(program)
    record = NormalizeLinear().run(program, PassContext())
    assert (record.rewrites, record.declined, str(program)) == ([], [], before)
    (site,) = linear_sites(program)
    weight = convolution.weight
    assert (site.name, site.kind, site.weight) == ("convolution", "patches", "convolution.weight")
    assert site.shape == tuple(weight.flatten(1).shape)
    assert site.tokens == model(x).numel() // M
    factored(program)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("fxpress.low_rank_linear.default") == 1
    assert not linear_sites(program)
    assert not {"aten.relu.default", "aten.conv2d.default"} & {*targets}  # folded; gone
    assert_equivalent(program, model, (x,))


def test_gradients_of_the_input_pass_through_the_patches(assert_same_gradients: Any) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, N, 3, padding=1)
            self.embedding = Embedding(nn.Conv2d(N, M, 2, stride=2))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.embedding(self.first(x))
            return y

    model, x = Deep(), torch.randn(2, 3, 5, 6)
    program = factored(capture(model, (x,)))
    assert_same_gradients(program.graph_module, model, (x,), None)


def test_a_dynamic_batch_and_length() -> None:
    model, x = Embedding(nn.Conv1d(N, M, 3, stride=3)), torch.randn(2, N, 12)
    sizes = {0: torch.export.Dim("b", min=2, max=9), 2: torch.export.Dim("t", min=6, max=90)}
    program = factored(capture(model, (x,), dynamic_shapes={"x": sizes}))
    for batch, length in ((2, 12), (5, 31), (3, 8)):
        assert_equivalent(program, model, (torch.randn(batch, N, length),))


sizes = st.integers(1, 3)


@given(st.lists(st.tuples(sizes, sizes, st.integers(0, 4)), min_size=1, max_size=3), sizes, sizes)
@settings(max_examples=60)
def test_patches_are_what_a_convolution_multiplies(
    dims: list[tuple[int, int, int]], batch: int, channels: int
) -> None:
    """Window width, what lies between two windows, what lies behind the last."""
    generator = torch.Generator().manual_seed(batch)
    widths = tuple(width for width, _, _ in dims)
    strides = tuple(width + gap - 1 for width, gap, _ in dims)
    spatial = [w + s + rest for w, s, (*_, rest) in zip(widths, strides, dims, strict=True)]
    x = torch.randn(batch, channels, *spatial, generator=generator, dtype=torch.float64)
    weight = torch.randn(M, channels, *widths, generator=generator, dtype=torch.float64)
    function = getattr(nn.functional, f"conv{len(dims)}d")

    def by_patches(x: Tensor) -> Tensor:
        y = nn.functional.linear(Patches(widths, strides).cut(x), weight.flatten(1).to(x.dtype))
        return y.movedim(-1, 1)

    class Convolution(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = function(x, weight.to(x.dtype), stride=strides)
            return y

    assert_equivalent(by_patches, Convolution(), (x,))


@pytest.mark.parametrize("convolution", [nn.Conv1d(N, M, 3), nn.Conv1d(N, M, 4, stride=2)])
def test_windows_that_overlap_are_no_patches(convolution: nn.Module) -> None:
    program = capture(convolution, (torch.randn(2, N, 9),))
    assert not linear_sites(program)
    assert [patches_of(node) for node in program.graph.nodes] == [None] * len(program.graph.nodes)


def test_the_copy_of_patches_is_part_of_what_a_form_costs() -> None:
    hardware, form = hardware_of(torch.device("cpu")), Form(rank=16)
    alike = Place((64, 48), 1000, torch.float32, hardware)
    copied = Place((64, 48), 1000, torch.float32, hardware, copied=True)
    assert form.cost(copied, "latency") > form.cost(alike, "latency")
    assert dense_cost(copied, "latency") == dense_cost(alike, "latency")
    assert form.cost(copied, "memory") == form.cost(alike, "memory")


def test_a_run_learns_from_the_patches_and_explain_lists_them() -> None:
    torch.manual_seed(0)
    model = Embedding(nn.Conv2d(3, 64, 8, stride=8)).eval()
    images = [torch.randn(2, 3, 32, 32) for _ in range(3)]
    (site,) = fxpress.explain(model, (images[0],)).matmuls
    assert (site.kind, site.recognised, site.shape) == ("patches", True, (64, 192))
    wish = {"factor-vvma": {"rank": 48}, "recover": False}
    o = fxpress.optimize(model, images, config=wish, judge="off")
    assert [r.site for r in o.passes["factor-vvma"].rewrites] == ["convolution"]
    again = fxpress.optimize(model, None, plan=o.plan)
    assert_equivalent(again, o, (images[0],), exactness=BITWISE)
