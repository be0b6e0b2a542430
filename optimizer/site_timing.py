"""Timing of rewritten sites in isolation, on the inputs that they get in a real call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxpress.capture import Call
from fxpress.profile import profile
from fxpress.program import Program, attribute
from fxpress.progress import Progress
from fxpress.regions import CapturedModel
from fxpress.timing import Timings, interleave

__all__ = ["time_sites"]


@dataclass
class _Recorder:
    """Keeps what a node was called with in the first call."""

    node: fx.Node
    values: dict[str, Any]

    def observe(self, inputs: Mapping[str, Any], _output: Any) -> None:
        self.values.update({k: v for k, v in inputs.items() if k not in self.values})


def time_sites(
    before: CapturedModel,
    after: CapturedModel,
    sites: Sequence[str],
    call: Call,
    *,
    cuda: bool = False,
    progress: Progress | None = None,
    time_left: Callable[[], float] = lambda: math.inf,
) -> dict[str, Timings]:
    """Time rewritten sites in isolation, on inputs recorded from one call.

    Args:
        before: the captured model before the pass.
        after: the same after it; its new nodes carry the site in their provenance.
        sites: which sites.
        call: the call to record.
        cuda: whether to synchronize a device.
        progress: told of every site.
        time_left: seconds; at 0 no further site is timed.

    Returns:
        Timings of `"before"` and `"after"` by site; sites that do equal work share theirs.
    """
    progress = progress or Progress()
    pairs = _pairs(before, after, sites)
    recorded: dict[str, dict[str, Any]] = {site: {} for site in pairs}
    recorders = [_Recorder(n, recorded[site]) for site, (_, old, _) in pairs.items() for n in old]
    profile(before, [call], recorders, Progress())
    times: dict[str, Timings] = {}
    known: dict[Any, Timings] = {}
    with progress.step("judge sites", len(pairs)) as advance:
        for site, (path, old, new) in pairs.items():
            values = recorded[site]
            key = _key(old, new, values)
            if key not in known:
                if time_left() <= 0:
                    continue
                known[key] = _time_site(after.programs[path], old, new, values, cuda)
            times[site] = known[key]
            advance()
    return times


def _pairs(
    before: CapturedModel, after: CapturedModel, sites: Sequence[str]
) -> dict[str, tuple[str, list[fx.Node], list[fx.Node]]]:
    """Site -> (region, the old nodes and the new ones, in order)."""
    found: dict[str, tuple[str, list[fx.Node], list[fx.Node]]] = {}
    for path, program in after.programs.items():
        old = {node.name: node for node in before.programs[path].graph.nodes}
        for node in program.graph.nodes:
            origin = node.meta.get("provenance")
            if origin is None or origin.site not in sites or origin.sources[0] not in old:
                continue
            replaced = [n for name, n in old.items() if name in origin.sources]
            entry = found.setdefault(origin.site, (path, replaced, []))
            entry[2].append(node)
    return found


def _key(old: Sequence[fx.Node], new: Sequence[fx.Node], values: Mapping[str, Any]) -> Any:
    """Equal sites do equal work: same operators, shapes and specs."""
    shapes = tuple(tuple(v.shape) if isinstance(v, Tensor) else v for v in values.values())
    plain = tuple(str(a) for n in new for a in n.args if isinstance(a, (str, int, float, bool)))
    targets = tuple(str(n.target) for n in (*old, *new) if n.op != "get_attr")
    sizes = tuple(tuple(n.meta["val"].shape) for n in new if n.op == "get_attr")
    return (targets, shapes, sizes, plain)


def _time_site(
    program: Program,
    old: Sequence[fx.Node],
    new: Sequence[fx.Node],
    values: Mapping[str, Any],
    cuda: bool,
) -> Timings:
    held = {n: attribute(program.graph_module, str(n.target)) for n in new if n.op == "get_attr"}
    inputs = {node.name: value for node, value in held.items()} | _renamed(new, values)

    def run_old() -> Any:
        return _evaluate(old, dict(values))

    def run_new() -> Any:
        return _evaluate([n for n in new if n.op != "get_attr"], dict(inputs))

    with torch.no_grad():
        return interleave({"before": run_old, "after": run_new}, rounds=7, seconds=2.0, cuda=cuda)


def _renamed(new: Sequence[fx.Node], values: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded values, also under the names of what took the place of their nodes.

    A site may read what another site of the same pass has replaced.
    """
    found = dict(values)
    for source in (s for n in new for s in n.all_input_nodes):
        origin = source.meta.get("provenance")
        if source.name not in found and origin is not None and origin.sources[0] in values:
            found[source.name] = values[origin.sources[0]]
    return found


def _evaluate(nodes: Sequence[fx.Node], env: dict[str, Any]) -> Any:
    result = None
    for node in nodes:
        args, kwargs = pytree.tree_map(
            lambda a: env[a.name] if isinstance(a, fx.Node) else a, (node.args, dict(node.kwargs))
        )
        result = env[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
    return result
