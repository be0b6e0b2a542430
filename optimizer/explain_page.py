"""The page of `explain`: a table of the sites, and the graph drawn by module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

from fxpress.program import format_node, module_path

if TYPE_CHECKING:
    from fxpress.explain import Explanation, Region

__all__ = ["Branch", "page", "tree"]


@dataclass
class Branch:
    """A module in the drawing.

    Attributes:
        name: last part of its path.
        ms: modelled milliseconds of all within.
        items: its nodes, as (text, milliseconds), and the modules within, as they come.
        children: the modules within, by name.
    """

    name: str
    ms: float = 0.0
    items: list[Branch | tuple[str, float]] = field(default_factory=list)
    children: dict[str, Branch] = field(default_factory=dict)

    def child(self, name: str) -> Branch:
        """The module of that name within, added where it is new."""
        if name not in self.children:
            self.children[name] = Branch(name)
            self.items.append(self.children[name])
        return self.children[name]


def tree(region: Region) -> Branch:
    """A graph as nested modules, each with its share of the time; weights are left out."""
    root = Branch(region.program.path or "the model")
    for node in region.program.graph.nodes:
        if node.op == "get_attr":
            continue
        ms = region.ms.get(node, 0.0)
        branch = root
        branch.ms += ms
        for name in filter(None, module_path(node).split(".")):
            branch = branch.child(name)
            branch.ms += ms
        branch.items.append((format_node(node).partition("  # ")[0], ms))
    return root


def page(explanation: Explanation) -> str:
    """One self-contained HTML page, without scripts.

    Raises:
        ImportError: jinja2 is missing: install `fxpress[report]`.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("HTML pages need jinja2: pip install 'fxpress[report]'") from error
    template = resources.files("fxpress").joinpath("explain.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    rows = [(what, site) for what, sites in explanation.groups.items() for site in sites]
    text: str = environment.from_string(template).render(
        found=explanation,
        rows=rows,
        trees=list(_trees(explanation)),
        total=explanation.modelled_ms or 1.0,
    )
    return text


def _trees(explanation: Explanation) -> Iterator[Branch]:
    return (tree(region) for region in explanation.graphs)
