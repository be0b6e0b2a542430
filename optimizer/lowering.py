"""Lowerings: the ways an operator can run on a device, chosen by acceptance and cost.

A kernel module registers its lowerings when it is imported (`fxpress.kernels` imports them all);
an operator asks `choose` with a plain description of the call, its *site*, and falls back to its
portable implementation where none accepts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fxpress.rewrite import Decline

__all__ = ["Lowering", "choose", "declines", "register", "registered"]


@dataclass(frozen=True)
class Lowering:
    """One way to run an operator.

    Attributes:
        operator: full name, such as `fxpress::sparse_attention`.
        name: unique among the operator's lowerings.
        device_type: the device it runs on.
        accepts: site -> None where it can serve the site, else why not.
        cost: site -> estimated work; the cheapest that accepts is taken.
        run: called by the operator with the site and its own arguments.
        source: site -> the program text that would run.
    """

    operator: str
    name: str
    device_type: str
    accepts: Callable[[Any], Decline | None]
    cost: Callable[[Any], float]
    run: Callable[..., Any]
    source: Callable[[Any], str]


_REGISTERED: dict[tuple[str, str], Lowering] = {}


def register(lowering: Lowering) -> Lowering:
    """Make a lowering available; registering one again replaces it."""
    _REGISTERED[lowering.operator, lowering.name] = lowering
    return lowering


def registered(operator: str, device_type: str) -> list[Lowering]:
    """Return an operator's lowerings for a device, by name."""
    found = [low for low in _REGISTERED.values() if low.operator == operator]
    return sorted(
        (low for low in found if low.device_type == device_type), key=lambda low: low.name
    )


def choose(operator: str, device_type: str, site: Any) -> Lowering | None:
    """Return the cheapest lowering that accepts the site, or None."""
    found = [low for low in registered(operator, device_type) if low.accepts(site) is None]
    return min(found, key=lambda low: low.cost(site), default=None)


def declines(operator: str, device_type: str, site: Any) -> dict[str, Decline]:
    """Return, by name, why each lowering for the device does not accept the site."""
    answers = {low.name: low.accepts(site) for low in registered(operator, device_type)}
    return {name: decline for name, decline in answers.items() if decline is not None}
