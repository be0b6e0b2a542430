"""Pruned attention inside a transformers model, `generate()` and its key/value cache included.

transformers lets a model's attention function be exchanged by name. `attach` names one that finds
a static mask beside the attention module: there attention runs under it, elsewhere as the model had
it. The row of the mask is the position of the query, which the cache tells before each call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxpress.errors import LoweringError, PlanError
from fxpress.ops.mask_layout import MaskLayout, compile_mask
from fxpress.ops.sparse_attention import sparse_attention
from fxpress.plan import Plan

__all__ = ["attach"]

_PRUNING = "prune-attention"
_PREFIX = "fxpress_"
_SITE, _HOOK = "_fxpress_site", "_fxpress_hook"
_CROSS = ("key_value_states", "encoder_hidden_states")  # what cross-attention attends to
_CHANGES_SCORES = ("position_bias", "s_aux", "softcap")


@dataclass
class _Site:
    """The mask of one attention module, and the row of it that the next query has."""

    layout: MaskLayout
    first_row: int = 0

    def covers(self, queries: int, keys: int) -> bool:
        _, rows, columns = self.layout.shape
        return self.first_row + queries <= rows and keys <= columns


def attach(model: nn.Module, plan: Plan) -> nn.Module:
    """Make a transformers model run the pruned attention of a plan; returns the model.

    The model's own code stays in charge (`generate`, caches, beams); only its attention function
    is exchanged, in this very model. A call beyond the mask's rows or keys runs dense. Attention
    that is not pruned stays "eager" where it was, and is "sdpa" otherwise. Move the model to its
    device first, and do not pad on the left. Attach a plan without decisions to undo.

    Args:
        model: a transformers `PreTrainedModel`, or a module that holds some.
        plan: from `optimize` on this model; sites are matched by module path.

    Raises:
        PlanError: a site of the plan names no module of the model, or `model` holds none of
            transformers' models.
        ImportError: transformers is not installed.
    """
    sites = {path: _Site(layout) for path, layout in _layouts(model, plan)}
    _detach(model)
    for path, site in sites.items():
        module = model.get_submodule(path)
        module.__dict__[_SITE] = site
        module.__dict__[_HOOK] = module.register_forward_pre_hook(_find_row, with_kwargs=True)
    _exchange(model, attached=bool(sites))
    return model


def _layouts(model: nn.Module, plan: Plan) -> Iterator[tuple[str, MaskLayout]]:
    for path, decision in plan.standing(_PRUNING).items():
        if "#" in path:
            raise PlanError(f"site {path!r} is a repeated call of one module: use the graph itself")
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            raise PlanError(
                f"the plan does not fit this model: it has no module {path!r}"
            ) from error
        device = next((p.device for p in module.parameters()), "cpu")
        yield path, compile_mask(decision["mask"], device=device)


def _detach(model: nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop(_SITE, None)
        if (hook := module.__dict__.pop(_HOOK, None)) is not None:
            hook.remove()


def _exchange(model: nn.Module, *, attached: bool) -> None:
    """Let every model inside name our attention function, or its own again."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = [c for c in configs if getattr(c, "_attn_implementation", None)]
    if not configs:
        raise PlanError("the model has no transformers attention to attach to")
    for config in configs:
        own = config._attn_implementation.removeprefix(_PREFIX)
        config._attn_implementation = _register(own) if attached else own


def _register(own: str) -> str:
    """The name of our attention function over the model's own one."""
    from transformers import AttentionInterface, AttentionMaskInterface

    own = own if own == "eager" else "sdpa"
    name = f"{_PREFIX}{own}"
    # Without a mask function of its name, transformers would drop the padding mask.
    AttentionMaskInterface.register(name, AttentionMaskInterface()[own])
    AttentionInterface.register(name, partial(_attention, own))
    return name


def _find_row(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Note the position of the call's first query: how many tokens its cache holds before it."""
    cache = kwargs.get("past_key_values")
    length = int(cache.get_seq_length(module.layer_idx)) if cache is not None else 0
    if length and any(kwargs.get(name) is not None for name in _CROSS):
        # Cross-attention: the layer's self-attention has put the call's tokens there already.
        states: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        length -= states.shape[1]
    module.__dict__[_SITE].first_row = length


def _attention(
    own: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls: pruned where the module has a mask."""
    site: _Site | None = module.__dict__.get(_SITE)
    if site is None or not site.covers(query.shape[2], key.shape[2]):
        return _dense(own, module)(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, **options
        )
    if changes := [name for name in _CHANGES_SCORES if options.get(name) is not None]:
        raise LoweringError(
            f"{type(module).__name__} passes {', '.join(changes)}, which pruned attention does "
            "not take: run the optimized module itself"
        )
    if site.first_row == 0 and attention_mask is not None:
        _refuse_left_padding(attention_mask)
    out = sparse_attention(
        query,
        key,
        value,
        site.layout,
        attention_mask[..., : key.shape[2]] if attention_mask is not None else None,
        options.get("dropout", 0.0),
        scale=options.get("scaling"),
        q_offset=site.first_row,
    )
    return out.transpose(1, 2).contiguous(), None


def _refuse_left_padding(mask: Tensor) -> None:
    """The first key must be open to the first query: positions are rows and columns of the mask."""
    first = mask[..., 0, 0]
    is_open = first if first.dtype is torch.bool else first > torch.finfo(first.dtype).min / 2
    if not bool(is_open.all()):
        raise LoweringError(
            "the batch is padded on the left, which shifts positions against a static mask: pad on "
            "the right, or generate for prompts of one length at a time"
        )


def _dense(own: str, module: nn.Module) -> Any:
    from transformers import AttentionInterface

    if own == "eager":  # each of transformers' modules has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[own]
