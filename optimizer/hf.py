"""Pruned attention inside a transformers model, `generate()` and its key/value cache included.

transformers lets a model's attention function be exchanged by name. `attach` registers one that
looks the module up in a plan: where the plan prunes it, attention runs under the static mask (row
of the mask = position of the query), elsewhere as the model had it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fxpress.errors import PlanError
from fxpress.ops.mask_layout import MaskLayout, compile_mask
from fxpress.ops.sparse_attention import sparse_attention
from fxpress.plan import Plan

__all__ = ["attach"]

_PRUNING = "prune-attention"
_serial = itertools.count()


def attach(model: nn.Module, plan: Plan) -> nn.Module:
    """Make a transformers model run the pruned attention of a plan; returns the model.

    The model's own code stays in charge (`generate`, caches, beams); only its attention function
    is exchanged. It is the model passed in that changes; attach a plan without decisions to undo.

    Args:
        model: a transformers `PreTrainedModel`, or a module that holds some.
        plan: from `optimize` on this model; sites are matched by module path.

    Raises:
        PlanError: a site of the plan names no module of the model.
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface

    layouts: dict[int, MaskLayout] = {}
    for site, decision in plan.standing(_PRUNING).items():
        path, _, repeat = site.partition("#")
        if repeat:
            raise PlanError(f"site {site!r} is a repeated call of one module: use the graph itself")
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            raise PlanError(
                f"the plan does not fit this model: it has no module {path!r}"
            ) from error
        device = next((p.device for p in module.parameters()), None)
        layouts[id(module)] = compile_mask(decision["mask"], device=device or "cpu")
    name = f"fxpress_{next(_serial)}"
    own = _own_implementation(model)
    AttentionInterface.register(name, _attention(layouts, own))
    for part in model.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = name
            part.__dict__.setdefault("_fxpress_attention", own)
    return model


def _own_implementation(model: nn.Module) -> str:
    for part in model.modules():
        if own := part.__dict__.get("_fxpress_attention"):
            return str(own)
        config = getattr(part, "config", None)
        if implementation := getattr(config, "_attn_implementation", None):
            return str(implementation)
    raise PlanError("the model has no transformers attention to attach to")


def _attention(layouts: dict[int, MaskLayout], own: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        from transformers import AttentionInterface

        layout = layouts.get(id(module))
        fits = layout is not None and key.shape[2] <= layout.shape[2]
        if layout is None or not fits:
            return AttentionInterface()[own](  # type: ignore[no-any-return]
                module, query, key, value, attention_mask, **options
            )
        causal = layout.facts.causal
        offset = key.shape[2] - query.shape[2] if causal else 0
        mask = attention_mask[..., : key.shape[2]] if attention_mask is not None else None
        out = sparse_attention(
            query, key, value, layout, mask, scale=options.get("scaling"), q_offset=offset
        )
        return out.transpose(1, 2).contiguous(), None

    return attention
