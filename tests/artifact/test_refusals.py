"""Whatever was altered is refused with `ArtifactError`, before anything of it is used or run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors

import fxpress
from fxpress.errors import ArtifactError

Altered = Any  # conftest.py


def refused(saved: Altered, match: str) -> None:
    """Loading is refused, by a message that names the artifact and says what is wrong."""
    with pytest.raises(ArtifactError, match=match) as found:
        fxpress.load(saved.path)
    assert str(saved.path) in str(found.value)


FLIPPED = "hash differs|is damaged"


def _flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit(saved: Altered, data: st.DataObject) -> None:
    files = [saved.path] if saved.is_zip else sorted(saved.path.iterdir())
    file = data.draw(st.sampled_from(files))
    untouched = file.read_bytes()
    _flip(file, data.draw(st.integers(0, len(untouched) - 1)), data.draw(st.integers(0, 7)))
    try:
        refused(saved, FLIPPED)
    finally:
        file.write_bytes(untouched)


def test_every_flipped_byte_of_the_manifest(saved: Altered) -> None:
    if saved.is_zip:  # its manifest lies somewhere in its middle, its directory at its end
        file, positions = saved.path, range(-1500, 0)
    else:
        file = saved.path / "manifest.json"
        positions = range(len(file.read_bytes()))
    for at in positions:
        _flip(file, at, at % 8)
        refused(saved, FLIPPED)
        _flip(file, at, at % 8)
    fxpress.load(saved.path)


def test_a_truncated_file(saved: Altered) -> None:
    file = saved.path if saved.is_zip else saved.path / "tensors.safetensors"
    whole = file.read_bytes()
    for length in (0, 1, 70, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(saved, "bytes where the manifest says|hash differs")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"does not exist: save one with optimized.save"):
        fxpress.load(tmp_path / "m")
    (tmp_path / "m").mkdir()
    with pytest.raises(ArtifactError, match=r"has no manifest.json: it is no fxpress artifact"):
        fxpress.load(tmp_path / "m")


def test_a_missing_file(saved: Altered) -> None:
    del saved.files["report.json"]
    saved.write()
    refused(saved, "holds .* where the manifest lists")
    saved.seal()
    refused(saved, "lists .*: an artifact holds")


@pytest.mark.parametrize("name", ["notes.txt", "sample_inputs.pt", "data.pkl"])
def test_an_unknown_file(saved: Altered, name: str) -> None:
    saved.files[name] = b""
    saved.write()
    refused(saved, "holds .* where the manifest lists")
    saved.seal()
    refused(saved, "lists .*: an artifact holds")


@pytest.mark.parametrize("name", ["../outside.json", "/tmp/outside.json", "sub/graph.json", ".."])
def test_a_path_out_of_the_folder(saved: Altered, name: str) -> None:
    outside = saved.path.parent / "outside.json"
    outside.write_bytes(saved.files["graph.json"])
    if saved.is_zip:
        saved.files[name] = saved.files["graph.json"]
        saved.write()
        refused(saved, "holds .* where the manifest lists")
    entries = saved.json("manifest.json")["files"]
    entries[name] = entries.pop("graph.json")
    saved.files.pop(name, None)
    saved.seal(files=entries)
    refused(saved, "lists .*: an artifact holds")


@pytest.mark.parametrize("kind", ["symlink", "folder", "pipe"])
@pytest.mark.parametrize("name", ["tensors.safetensors", "manifest.json"])
def test_what_is_no_plain_file(
    optimized: fxpress.OptimizedModule, tmp_path: Path, alter: Any, name: str, kind: str
) -> None:
    saved = alter(optimized.save(tmp_path / "m"))
    file = saved.path / name
    if kind == "symlink":
        file.rename(tmp_path / name)
        file.symlink_to(tmp_path / name)
    else:
        file.unlink()
        file.mkdir() if kind == "folder" else os.mkfifo(file)
    refused(saved, "plain file")


def test_a_link_or_a_compressed_file_in_a_zip(
    optimized: fxpress.OptimizedModule, tmp_path: Path, alter: Any
) -> None:
    for method, mode in ((zipfile.ZIP_STORED, 0o120777), (zipfile.ZIP_DEFLATED, 0o100644)):
        saved = alter(optimized.save(tmp_path / "m.zip"))
        with zipfile.ZipFile(saved.path, "w") as archive:
            for name, data in saved.files.items():
                info = zipfile.ZipInfo(name)
                info.compress_type, info.external_attr = method, mode << 16
                archive.writestr(info, data)
        saved.seal_zip()
        refused(saved, "is not stored as a plain file")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice(optimized: fxpress.OptimizedModule, tmp_path: Path, alter: Any) -> None:
    saved = alter(optimized.save(tmp_path / "m.zip"))
    with zipfile.ZipFile(saved.path, "w") as archive:
        for name, data in [*saved.files.items(), ("graph.json", b"{}")]:
            archive.writestr(name, data)
    saved.seal_zip()
    refused(saved, "holds .* where the manifest lists")


def test_a_key_twice(saved: Altered) -> None:
    saved.files["graph.json"] = b'{"device":"cuda",' + saved.files["graph.json"][1:]
    saved.seal()
    refused(saved, "a key is there twice")


@pytest.mark.parametrize("size", [-1, 1.5, "12", True, 1 << 62])
def test_a_declared_length_that_is_none(saved: Altered, size: Any) -> None:
    entries = saved.json("manifest.json")["files"]
    entries["tensors.safetensors"]["bytes"] = size
    saved.seal(files=entries)
    refused(saved, "that is no length|bytes where the manifest says")


def test_a_zip_that_declares_more_than_it_has(
    optimized: fxpress.OptimizedModule, tmp_path: Path, alter: Any
) -> None:
    """Both directories of the zip and the manifest agree on a terabyte: nothing of it is read."""
    saved = alter(optimized.save(tmp_path / "m.zip"))
    entries = saved.json("manifest.json")["files"]
    length = entries["tensors.safetensors"]["bytes"]
    claimed = (1 << 32) - 2
    entries["tensors.safetensors"]["bytes"] = claimed
    saved.seal(files=entries)
    data = saved.path.read_bytes()
    size = length.to_bytes(4, "little")
    assert data.count(size * 2) == 2  # stored and plain size, in the file's head and the directory
    saved.path.write_bytes(data.replace(size * 2, claimed.to_bytes(4, "little") * 2))
    saved.seal_zip()
    refused(saved, "declares more bytes than the zip has|is damaged")


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema(saved: Altered, schema: Any) -> None:
    saved.seal(schema=schema)
    refused(saved, "use the version that wrote it")


def test_a_manifest_that_is_huge_or_no_json(saved: Altered) -> None:
    for data in (b" " * (1 << 17), b"[" * 50_000, b"\xff", b"{}", b"[]", b"null"):
        saved.files["manifest.json"] = data
        saved.write()
        refused(saved, "manifest")


@pytest.mark.parametrize("name", ["graph.json", "plan.json", "report.json", "tensors.safetensors"])
@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"NaN", b"[" * 100_000, b"\x80\x04."])
def test_a_file_of_something_else(saved: Altered, name: str, data: bytes) -> None:
    saved.files[name] = data
    saved.seal()
    if (name, data) == ("report.json", b"{}"):
        assert not fxpress.load(saved.path).passes  # an empty report tells of no pass
    else:
        refused(saved, "damaged|no value|a record of")


# Planted code


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def _pickles(marker: Path) -> list[bytes]:
    buffer = io.BytesIO()
    torch.save(Planted(marker), buffer)
    found = [pickle.dumps(Planted(marker)), buffer.getvalue()]
    pickle.loads(found[0])
    assert marker.exists()  # so the trap works
    marker.unlink()
    return found


def test_planted_pickles_are_never_read(saved: Altered, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for planted in _pickles(marker):
        for name in ("sample_inputs.pt", "tensors.safetensors", "graph.json", "plan.safetensors"):
            original = dict(saved.files)
            saved.files[name] = planted
            saved.seal()
            refused(saved, "lists|damaged|data where no tensor has any")
            saved.files = original
    assert not marker.exists()


def test_a_planted_switch_is_no_field(saved: Altered) -> None:
    saved.seal(use_pickle=True)
    refused(saved, "manifest.json has the fields")
    saved.seal()
    fxpress.load(saved.path)
    saved.edit("graph.json", lambda graph: graph.update(use_pickle=True))
    refused(saved, "a record of device, programs")


Change = Callable[[dict[str, Any], str], None]


def _node(program: dict[str, Any], op: str, target: str = "") -> dict[str, Any]:
    nodes = [n for n in program["nodes"] if n["op"] == op and target in n.get("target", "")]
    return nodes[0]  # type: ignore[no-any-return]


def _call(program: dict[str, Any], target: str, *args: Any, **kwargs: Any) -> None:
    """Put another call in front of the output, whose result is not needed."""
    fresh: dict[str, Any] = {"name": "planted", "op": "call_function", "path": "", "target": target}
    fresh |= {"args": list(args), "kwargs": kwargs, "epilogue": False}
    program["nodes"].insert(-1, fresh)


def _rename_keyword(program: dict[str, Any], code: str) -> None:
    program["inputs"]["children"][1]["keys"] = [f"x': {code}, 'y"]


def _rename_tensor(program: dict[str, Any], code: str) -> None:
    node = _node(program, "get_attr")
    program["tensors"][f'a"+{code}+"'] = program["tensors"].pop(node["target"])
    node["target"] = f'a"+{code}+"'


PLANTED: dict[str, tuple[str, Change]] = {
    "node": ("no plain name", lambda p, code: _node(p, "call_function").update(name=f"x = {code}")),
    "input": ("no plain name", lambda p, code: _node(p, "placeholder").update(target=f"x={code}")),
    "argument": ("no plain name", lambda p, code: p.update(arguments=[f"x={code}"])),
    "keyword": ("no plain name", _rename_keyword),
    "tensor": ("no tensor of the artifact", _rename_tensor),
    "parameter": (
        "no plain name",
        lambda p, code: p["signature"]["parameters"][0].update(name=f"x={code}"),
    ),
    "size": (
        "is no size",
        lambda p, code: _node(p, "placeholder")["value"].update(shape=[code, 48, 32]),
    ),
    "symbol": ("no plain name", lambda p, code: p.update(symbols={code: [2, None, 4]})),
    "value": ("takes 3 arguments", lambda p, code: _node(p, "call_function")["args"].append(code)),
    "dtype": (
        "an input is damaged",
        lambda p, code: _node(p, "placeholder")["value"].update(dtype=code),
    ),
    "device": (
        "no value that an artifact may hold",
        lambda p, code: _call(p, "aten.zeros.default", [1], device={"device": code}),
    ),
    "tag": (
        "no value that an artifact may hold",
        lambda p, code: _call(p, "aten.zeros.default", [1], dtype={"eval": code}),
    ),
    "reference": (
        "no value that an artifact may hold",
        lambda p, code: _call(p, "aten.relu.default", {"node": code}),
    ),
    "option": (
        "no plain name",
        lambda p, code: _call(p, "aten.zeros.default", [1], **{f"dtype=None, x={code}": 1}),
    ),
    "class": (
        "among arguments or results",
        lambda p, code: p.update(outputs={"type": f"os.{code}", "keys": [], "children": []}),
    ),
    "module": (
        "among arguments or results",
        lambda p, code: p.update(
            outputs={
                "type": "transformers.commands.run.RunCommand",
                "keys": ["a"],
                "children": [None],
            }
        ),
    ),
    "spec": (
        "no word that spec may be",
        lambda p, code: _node(p, "call_function", "sparse").update(
            args=[*_node(p, "call_function", "sparse")["args"][:4], f"tiles;{code}"]
        ),
    ),
    "epilogue": (
        "writes into its input",
        lambda p, code: _call(p, "aten.add_.Tensor", {"node": "input_1"}, 1),
    ),
    "function": ("no operator that", lambda p, code: _call(p, "builtins.eval", code)),
    "system": ("no operator that", lambda p, code: _call(p, "os.system", code)),
    "load": ("no operator that", lambda p, code: _call(p, "torch.load", code)),
    "attribute": ("no operator that", lambda p, code: _call(p, "aten.__class__.mro")),
    "file": (
        "no word that filename may be",
        lambda p, code: _call(p, "aten.from_file.default", "MARKER", True, 1),
    ),
    "torchscript": (
        "no operator of torch",
        lambda p, code: _call(p, "aten.save.default", {"node": "input_1"}, "MARKER"),
    ),
    "seed": ("no operator of torch", lambda p, code: _call(p, "aten.manual_seed.default", 1)),
    "getattr": (
        "called with text",
        lambda p, code: _call(p, "operator.getitem", {"node": "input_1"}, code),
    ),
    "private": (
        "no operator that",
        lambda p, code: _call(p, "aten._nested_view_from_buffer.default"),
    ),
}


@pytest.mark.parametrize("place", PLANTED)
def test_planted_code_never_runs(saved: Altered, tmp_path: Path, place: str) -> None:
    match, change = PLANTED[place]
    marker = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    def plant(graph: dict[str, Any]) -> None:
        program = graph["programs"][0]
        change(program, code)
        text = json.dumps(program).replace('"MARKER"', json.dumps(str(marker)))
        graph["programs"][0] = json.loads(text)

    saved.edit("graph.json", plant)
    refused(saved, match)
    assert not marker.exists()


# Graphs that are none


def _out_of_order(program: dict[str, Any]) -> None:
    program["nodes"].insert(0, program["nodes"].pop(-2))


NOTHING: dict[str, Any] = {"type": "tuple", "children": []}


def _add_input(program: dict[str, Any]) -> None:
    program["nodes"].insert(0, _node(program, "placeholder") | {"name": "more"})


BROKEN: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "no output": ("it has not one output", lambda p: p["nodes"].pop()),
    "no nodes": ("it has not one output", lambda p: p["nodes"].clear()),
    "two outputs": ("there twice", lambda p: p["nodes"].append(p["nodes"][-1])),
    "out of order": ("no value that", _out_of_order),
    "a name twice": ("there twice", lambda p: p["nodes"].insert(1, p["nodes"][0])),
    "no input": ("no value that", lambda p: p["nodes"].remove(_node(p, "placeholder"))),
    "another shape": (
        "does not run",
        lambda p: _node(p, "placeholder")["value"].update(shape=[2, 48, 33]),
    ),
    "a size of nothing": (
        "is no size",
        lambda p: _node(p, "placeholder")["value"].update(shape=["s0", 48, 32]),
    ),
    "a size too large": (
        "is no size",
        lambda p: _node(p, "placeholder")["value"].update(shape=[1 << 70, 48, 32]),
    ),
    "no tensor": ("which it does not hold", lambda p: p["tensors"].popitem()),
    "another tensor": (
        "a record of tensor, persistent",
        lambda p: p["tensors"].update({"0.qkv.weight": {"tensor": "no"}}),
    ),
    "another operator": (
        "no operator of torch",
        lambda p: _node(p, "call_function").update(target="aten.lineal.default"),
    ),
    "another kind": (
        "none of the four kinds",
        lambda p: _node(p, "call_function").update(op="call_module"),
    ),
    "a range of nothing": ("no range and example", lambda p: p.update(symbols={"s0": [5, 3, 4]})),
    "a field too many": (
        "is no node",
        lambda p: _node(p, "call_function").update(use_pickle=True),
    ),
    "an input too many": ("inputs, not those of", _add_input),
    "an argument too few": ("its arguments", lambda p: p["arguments"].clear()),
    "a result too many": ("its results are not", lambda p: p.update(outputs=NOTHING)),
    "a division by zero": (
        "ZeroDivisionError",
        lambda p: _node(p, "placeholder")["value"].update(shape=[["mod", 1, 0], 48, 32]),
    ),
    "a size without end": (
        "OverflowError|RuntimeError|TypeError",
        lambda p: _node(p, "placeholder")["value"].update(shape=[["mul", 1 << 62, 4], 48, 32]),
    ),
    "too few arguments": ("does not run", lambda p: _node(p, "call_function").update(args=[])),
}


def test_a_graph_that_is_nested_too_deep(saved: Altered) -> None:
    saved.edit(
        "graph.json", lambda g: _node(g["programs"][0], "call_function")["args"].append("deep")
    )
    deep = b"[" * 100_000 + b"]" * 100_000  # written by hand: json would not write it either
    saved.files["graph.json"] = saved.files["graph.json"].replace(b'"deep"', deep)
    saved.seal()
    refused(saved, "recursion")


@pytest.mark.parametrize("name", BROKEN)
def test_a_graph_that_is_none(saved: Altered, name: str) -> None:
    match, change = BROKEN[name]
    saved.edit("graph.json", lambda graph: change(graph["programs"][0]))
    refused(saved, match)


TENSORS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "beyond its data": ("beyond its data", lambda t: t.update(offset=1 << 40)),
    "a stride beyond": ("beyond its data", lambda t: t.update(stride=[1 << 40, 1])),
    "below zero": ("beyond its data", lambda t: t.update(offset=-1)),
    "a negative stride": ("beyond its data", lambda t: t.update(stride=[-1, 1])),
    "a negative size": ("beyond its data", lambda t: t.update(shape=[-1, 32])),
    "of no dtype": ("its sizes or its dtype are none", lambda t: t.update(dtype="load")),
    "of a wider dtype": ("beyond its data", lambda t: t.update(dtype="float64")),
    "with a gradient of integers": ("has no gradient", lambda t: t.update(dtype="int32")),
    "of other data": ("in the graph or the file alone", lambda t: t.update(stored="no")),
    "of fewer dimensions": ("its sizes or its dtype are none", lambda t: t.update(shape=[32])),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_none(saved: Altered, name: str) -> None:
    match, change = TENSORS[name]
    saved.edit("graph.json", lambda graph: change(graph["tensors"]["0.qkv.weight"]))
    refused(saved, match)


REPORTS: list[dict[str, Any]] = [
    {"passes": 3},
    {"passes": [{}]},
    {"passes": [], "sites": [{}]},
    {"passes": [{"name": "a", "exactness": "APPROXIMATES(x)", "rewrites": []}]},
]


@pytest.mark.parametrize("facts", REPORTS)
def test_a_report_that_is_none(saved: Altered, facts: dict[str, Any]) -> None:
    saved.files["report.json"] = json.dumps(facts).encode()
    saved.seal()
    refused(saved, "TypeError|KeyError|ValueError")


def test_a_plan_that_is_none(saved: Altered) -> None:
    mask = {"tensor": {"dtype": "load", "shape": [1], "zlib": "eJxjAAAAAQAB"}}
    saved.edit("plan.json", lambda plan: plan.update(decisions={"a": {"b": {"mask": mask}}}))
    refused(saved, "plan.json is damaged: the plan is damaged")


def test_data_that_no_tensor_has(saved: Altered) -> None:
    saved.files["tensors.safetensors"] = safetensors({"planted": torch.ones(3)})
    saved.seal()
    refused(saved, "in the graph or the file alone")


def test_the_format_is_as_described(saved: Altered) -> None:
    """These tests seal by the description: what they write is what `save` wrote."""
    before = saved.files["manifest.json"]
    saved.seal()
    assert saved.files["manifest.json"] == before
    saved.edit("graph.json", lambda graph: None)
    assert saved.files["manifest.json"] == before
    assert re.fullmatch(r"[0-9a-f]{64}", saved.json("manifest.json")["sha256"])
