"""The report as a page, parsed: every section, every site, every picture."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from models import Branching, batches, stack

import fxpress

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page taken apart: headings, tables, pictures, text; tags have to close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.pictures: dict[str, str] = {}
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            given = dict(attrs)
            self.pictures[given["alt"] or ""] = given["src"] or ""

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in ("h1", "h2"):
            self.headings.append(data)
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data

    def table(self, first: str) -> list[dict[str, str]]:
        """Rows of the table whose first column has this title, by column."""
        titles, *rows = next(t for t in self.tables if t and t[0] and t[0][0] == first)
        return [dict(zip(titles, row, strict=True)) for row in rows]


def test_every_section_is_there(tmp_path: Path) -> None:
    config = {"prune-attention": {"pruned": 0.5, "block": 16}, "1*": {"enable": False}}
    o = fxpress.optimize(
        stack(),
        [(x, torch.zeros(2)) for x in batches()],
        judge="modelled",
        max_divergence=5.0,
        config=config,
    )
    page = Page(o.report.to_html(tmp_path / "deep" / "report.html"))
    assert page.headings == ["fxpress report", "Sites", "Masks", "Passes", "Notes"]
    assert all(name in page.text for name in o.passes)
    rows = {row["site"]: row for row in page.table("site")}
    assert rows["0"]["outcome"] == "rewritten"
    assert set(rows) == {"0"}
    assert "1 × self declined: left out by the configuration" in page.text
    layout = o.passes["prune-attention"].masks["0"]
    assert rows["0"]["live"] == f"{100 * layout.live_density:.1f} %"
    assert page.table("tried")[0]["tried"] == "50 % pruned"
    assert "does not take item 1" in page.text


def test_a_picture_shows_the_mask(tmp_path: Path) -> None:
    config = {"prune-attention": {"pruned": 0.5, "block": 16}}
    o = fxpress.optimize(stack(), batches(), judge="off", config=config)
    page = Page(o.report.to_html(tmp_path / "report.html"))
    assert set(page.pictures) == {"attention mask of 0", "attention mask of 1"}
    for site, layout in o.passes["prune-attention"].masks.items():
        address = page.pictures[f"attention mask of {site}"]
        png = base64.b64decode(address.removeprefix("data:image/png;base64,"))
        pixels = image.imread(io.BytesIO(png))[..., :3].reshape(48 * 48, 3)
        share = layout.to_dense().float().mean(0).flatten().numpy()
        colors = [{tuple(p) for p in pixels[share == s]} for s in np.unique(share)]
        assert all(len(same) == 1 for same in colors)
        assert len(set.union(*colors)) == len(colors)


def test_a_page_of_a_run_that_changed_nothing_says_so(tmp_path: Path) -> None:
    o = fxpress.optimize(stack(), batches(), max_divergence=0.0)
    page = Page(o.report.to_html(tmp_path / "report.html"))
    assert "Nothing was changed" in page.text
    assert "Masks" not in page.headings
    assert page.table("rolled back")[0]["rolled back"] == "the whole pass"
    assert "no proposal keeps the quality budget" in page.table("rolled back")[0]["why"]


def test_regions_that_stay_python_are_listed(tmp_path: Path) -> None:
    o = fxpress.optimize(Branching(), batches(), judge="off")
    page = Page(o.report.to_html(tmp_path / "report.html"))
    listed = {row["module"]: row["captured"] for row in page.table("module")}
    assert listed == {"first": "yes", "second": "yes", "the root": "no"}
    assert "stays Python: the root" in str(o.report)


def test_names_are_escaped(tmp_path: Path) -> None:
    report = fxpress.optimize(stack(), batches(), judge="off").report
    report.facts["notes"].append("<script>alert(1)</script>")
    text = report.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_there_are_no_generated_sources() -> None:
    config = {"prune-attention": {"pruned": 0.5, "block": 16}}
    o = fxpress.optimize(stack(), batches(), judge="off", config=config)
    assert o.passes["prune-attention"].rewrites
    assert dict(o.sources) == {}
