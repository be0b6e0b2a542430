"""Profiling: run captured programs over calibration data, node by node, with observers.

An observer sees the inputs and the output of the nodes that it asked for, one call at a time, and
keeps only what it needs: nothing here holds activations longer than a call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from fxpress.capture import Call
from fxpress.program import Program
from fxpress.progress import Progress
from fxpress.regions import CapturedModel

__all__ = ["Observer", "profile", "run_observed"]


class Observer(Protocol):
    """Sees one node at work."""

    @property
    def node(self) -> fx.Node:
        """The node that is looked at."""

    def observe(self, inputs: Mapping[str, Any], output: Any) -> None:
        """Look at one call.

        Args:
            inputs: values of the node's inputs by node name.
            output: value of the node.
        """


class _ObservedRun(fx.Interpreter):
    def __init__(self, program: Program, observers: Iterable[Observer]) -> None:
        super().__init__(program.graph_module)
        self._observers: dict[fx.Node, list[Observer]] = {}
        for observer in observers:
            self._observers.setdefault(observer.node, []).append(observer)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and show it to its observers."""
        result = super().run_node(n)
        for observer in self._observers.get(n, ()):
            inputs = {source.name: self.env[source] for source in n.all_input_nodes}
            observer.observe(inputs, result)
        return result


def run_observed(program: Program, leaves: Sequence[Any], observers: Iterable[Observer]) -> Any:
    """Run a program on flat inputs, showing the observed nodes to their observers."""
    flat = _ObservedRun(program, observers).run(*leaves, enable_io_processing=False)
    return program.graph.process_outputs(flat)


def profile(
    captured: CapturedModel,
    calls: Sequence[Call],
    observers: Collection[Observer],
    progress: Progress,
) -> None:
    """Run every call once through the captured model.

    Args:
        captured: the model with its programs.
        calls: the calibration calls.
        observers: each sees its node, in whichever region that is.
        progress: told of every finished call.
    """

    def runner(program: Program, leaves: Sequence[Any]) -> Any:
        return run_observed(program, leaves, observers)

    module = captured.build(runner)
    with torch.no_grad(), progress.step("profile", len(calls)) as advance:
        for args, kwargs in calls:
            module(*args, **kwargs)
            advance()
