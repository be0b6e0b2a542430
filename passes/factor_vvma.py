"""`factor-vvma`: linear maps in a form of fewer multiply-adds and bytes.

    linear(x, W, b)  ->  vvma_linear(x, M, v, b, act, m)        W_ij ~ sum_t M_t diag(v_tij)
                     or  low_rank_linear(x, D, U, b, act)       W ~ U D

An activation that alone reads the result is folded in. Which form, and whether any, is decided by
what it loses on calibration data at what modelled cost (`factor_ladder`); a map that no form makes
cheaper is declined with the arithmetic. Sources: Khoury et al. 2020 (arXiv 2010.08412) for the
vector-vector-matrix form; activation-weighted truncated decomposition for low rank.

Exactness: APPROXIMATES(budget), held by the judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxpress.cost import hardware_of
from fxpress.errors import PassError
from fxpress.ops import low_rank_linear  # noqa: F401 - defines the operator
from fxpress.ops.vvma_linear import lay_out
from fxpress.passes.contractions import Bank
from fxpress.passes.dataflow import argument
from fxpress.passes.factor_forms import Form, Place, dense_cost
from fxpress.passes.factor_ladder import propose_forms
from fxpress.passes.factor_settings import FactorVvmaConfig
from fxpress.passes.factored_banks import factored_bank
from fxpress.passes.sites import FACTORED_BANK, LinearSite, linear_sites
from fxpress.planning import PlanContext, PlannedPass, Proposal
from fxpress.program import Program, alias_parameter, attribute, module_path
from fxpress.rewrite import Applied, Decline, PassContext, PassRecord, provide
from fxpress.testing import APPROXIMATES, Exactness

__all__ = ["FactorVvma", "FactorVvmaConfig"]

aten = torch.ops.aten

_ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}
_KEYS = {True: ("core", "vectors"), False: ("down", "up")}  # by whether the form is vvma
_RULES = ("factor-vvma", FACTORED_BANK)
_NO_ROOM = "max_divergence=0 allows no rounding: no factored map answers bit for bit as its weight"
_GELU: dict[Any, str] = {"none": "gelu", "tanh": "gelu_tanh"}


class FactorVvma(PlannedPass):
    """Replaces linear maps by factored ones, as decided."""

    name: ClassVar[str] = "factor-vvma"
    phase: ClassVar[str] = "rewrite"
    after: ClassVar[Mapping[str, str]] = {
        "normalize-linear": "every product with a weight is a linear map by then",
        "prune-attention": "what attention spends of the quality budget is known by then",
    }
    exactness: ClassVar[Exactness] = APPROXIMATES(0.0)
    config_type: ClassVar[type | None] = FactorVvmaConfig

    def sites(self, program: Program) -> dict[str, dict[str, Any]]:
        """Every linear map by a weight of the model."""
        return {
            s.name: {"kind": s.kind, "path": module_path(s.node), "shape": list(s.shape)}
            for s in linear_sites(program)
        }

    def propose(self, ctx: PlanContext) -> list[Proposal]:
        """The stated forms, or a ladder of choices by what they lose at what cost.

        Raises:
            PassError: forms are stated for some modules and left open for others.
        """
        configs: dict[str, FactorVvmaConfig] = {}
        sites: list[tuple[Program, LinearSite]] = []
        for region, program in ctx.captured.programs.items():
            for site in linear_sites(program):
                path = f"{region}.{module_path(site.node)}".strip(".")
                if ctx.enabled(path):
                    sites.append((program, site))
                    configs[site.name] = ctx.settings(path)
                else:
                    reason = "left out by the configuration"
                    ctx.record.declined.append(Decline(reason, site.node, site.name))
        if not sites:
            return []
        stated = [config.is_stated for config in configs.values()]
        if any(stated) and not all(stated):
            raise PassError("factor-vvma: give terms= or rank= for all modules, or for none")
        reason = ""
        if ctx.forced and not any(stated):
            reason = "judge='off' applies what the configuration states: no terms= or rank="
        elif ctx.exact:
            reason = _NO_ROOM
        if reason:
            ctx.record.declined += [Decline(reason, site.node, site.name) for _, site in sites]
            return []
        return propose_forms(ctx, sites, configs, hardware_of(_device(sites[0][0])))

    def trainable(self, program: Program) -> dict[tuple[str, str], nn.Parameter]:
        """The factors."""
        held: dict[str, list[nn.Parameter]] = {}
        for node in program.graph.nodes:
            made = node.meta.get("provenance")
            if node.op == "get_attr" and made is not None and made.rule in _RULES:
                parameter = attribute(program.graph_module, str(node.target))
                held.setdefault(made.site, []).append(parameter)
        found = {}
        for site, factors in held.items():
            is_vvma = factors[1].dim() >= 4  # vectors of a bank or not; up has fewer dimensions
            for key, parameter in zip(_KEYS[is_vvma], factors, strict=True):
                found[site, key] = parameter
        return found

    def run(self, program: Program, ctx: PassContext) -> PassRecord:
        """Apply `ctx.decisions`: site -> `{"form", "core", "vectors"}` or `{..., "down", "up"}`."""
        record = PassRecord(self.name, self.exactness)
        for site in linear_sites(program):
            decision = ctx.decisions.get(site.name)
            path = module_path(site.node)
            if decision is None or not ctx.enabled(path):
                continue
            if (reason := _unfit(site, decision)) is not None:
                record.declined.append(Decline(reason, site.node, site.name))
                continue
            if not ctx.fuel.burn():
                break
            record.ledger[site.name] = _ledger(program, site, decision)
            detail = {"form": str(_form(decision)), "error": decision["error"]}
            record.rewrites.append(Applied(self.name, site.node.name, path, site.name, detail))
            self._rewrite(program, site, decision)
        program.finish()
        return record

    def _rewrite(self, program: Program, site: LinearSite, decision: Mapping[str, Any]) -> None:
        is_vvma, is_bank = decision["form"] != "low-rank", site.experts is not None
        last, activation = (site.node, None) if is_bank else _activation(site.node)
        keys, device = _KEYS[is_vvma], _device(program)
        tensors = [decision[key].to(device) for key in keys]
        if is_vvma and not is_bank:
            tensors = list(lay_out(*tensors))

        def factored(x: fx.Node) -> fx.Node:
            factors = [
                program.graph.get_attr(_register(program, f"{site.name}_{key}", tensor))
                for key, tensor in zip(keys, tensors, strict=True)
            ]
            if is_bank:
                return _of_bank(x, factors, tensors, site)
            bias = argument(site.node, 2, "bias")
            args: tuple[Any, ...] = (x, *factors, bias, activation)
            if not is_vvma:
                return x.graph.call_function(torch.ops.fxpress.low_rank_linear.default, args)
            return x.graph.call_function(
                torch.ops.fxpress.vvma_linear.default, (*args, site.shape[0])
            )

        def build() -> fx.Node:
            return site.replaced(factored)

        folded = [site.node] if last is not site.node else []
        rule = FACTORED_BANK if is_bank else self.name
        provide(program, last, rule, build, site.name, folded)


def _of_bank(
    x: fx.Node, factors: Sequence[fx.Node], tensors: Sequence[Tensor], site: LinearSite
) -> fx.Node:
    assert isinstance(site.cut, Bank)
    ranks = [tensor.dim() for tensor in tensors]
    sizes = (*site.shape, tensors[1].shape[-1])
    return factored_bank(x, factors, ranks, sizes, site.cut.is_shared)


def _activation(node: fx.Node) -> tuple[fx.Node, str | None]:
    """The node to replace: the map, or the activation that alone reads it, and its name."""
    if len(node.users) != 1:
        return node, None
    (user,) = node.users
    name = _ACTIVATIONS.get(user.target)
    if user.target is aten.gelu.default:
        name = _GELU[user.kwargs.get("approximate", "none")]
    return (user, name) if name else (node, None)


def _register(program: Program, name: str, tensor: Tensor) -> str:
    """Register a factor as a parameter; a core that is there already is shared."""
    for have, parameter in program.graph_module.named_parameters(recurse=False):
        if have.endswith("_core") and name.endswith("_core") and _equal(parameter, tensor):
            return have
    # The plan holds the same storage: training what a program holds leaves the plan as it is.
    return program.register(name, alias_parameter(tensor, requires_grad=True))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())


def _device(program: Program) -> torch.device:
    for tensor in program.tensors().values():
        return tensor.device
    return torch.device("cpu")


def _form(decision: Mapping[str, Any]) -> Form:
    if decision["form"] == "low-rank":
        return Form(rank=decision["down"].shape[-2])
    (terms, _, _, block), core = decision["vectors"].shape[-4:], decision["core"]
    rowwise = core.dim() - (decision["vectors"].dim() - 4) == 4
    return Form(block, terms, share="row" if rowwise else "matrix")


def _unfit(site: LinearSite, decision: Mapping[str, Any]) -> str | None:
    m, n = site.shape
    if decision["form"] == "low-rank":
        last = decision["up"]
        fits = (last.shape[-2], decision["down"].shape[-1]) == (m, n)
        experts = last.shape[:-2]
    else:
        last = decision["vectors"]
        *experts, _, p, q, block = last.shape
        fits = (-(-m // block), -(-n // block)) == (p, q)
    given = () if site.experts is None else (site.experts,)
    return None if fits and (*experts,) == given else f"the factors do not fit {_sizes(site)}"


def _sizes(site: LinearSite) -> str:
    of = "" if site.experts is None else f"{site.experts} experts, each "
    return f"{of}a weight of {site.shape}"


def _ledger(program: Program, site: LinearSite, decision: Mapping[str, Any]) -> dict[str, Any]:
    weight = attribute(program.graph_module, site.weight)
    form, (m, n) = _form(decision), site.shape
    place = Place.of(site, weight.dtype, hardware_of(weight.device))
    tokens, dense = site.tokens * place.experts, m * n * place.experts
    numbers = form.parameters(site.shape) * place.experts
    return {
        "kind": site.kind,
        "form": str(form),
        "relative_error": decision["error"],
        "arithmetic": form.arithmetic(site.shape),
        "multiply_adds": {
            "before": m * n * tokens,
            "after": form.multiply_adds(site.shape) * tokens,
        },
        "parameters": {"before": dense, "after": numbers},
        "bytes": {"before": dense * weight.itemsize, "after": numbers * weight.itemsize},
        "modelled_ms": {
            "before": dense_cost(place, "latency"),
            "after": form.cost(place, "latency"),
        },
    }
