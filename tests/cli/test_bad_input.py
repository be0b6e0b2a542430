"""Every kind of bad input ends with exit code 2 and one line that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

Run = Any  # conftest.Run

MODEL = ("--model", "attend:model")
OPTIMIZE = ("optimize", *MODEL, "--judge", "off")
CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "an artifact that is not there": (("inspect", "absent.fxpress"), "absent.fxpress"),
    "no artifact": (("inspect",), "give an artifact, or --model"),
    "a file that is no artifact": (("bench", "x.npy"), "x.npy"),
    "no such pass": (("inspect", "model.fxpress", "--pass", "prune"), "'prune-attention'"),
    "no such view": (("inspect", "model.fxpress", "--graph", "sideways"), "before, after, diff"),
    "no such device": (("kernels", "--device", "abacus"), "give cpu or cuda"),
    "no such dtype": (("kernels", "--dtype", "float8"), "give one of float32"),
    "no such site": (("kernels", "model.fxpress", "--site", "9"), "no rewritten site '9'"),
    "too few rounds": (("bench", "model.fxpress", "--rounds", "1"), "--rounds"),
    "another model": (("bench", "model.fxpress", "--against", "zoo:gru-lm"), "another model"),
    "the plan of another": (
        ("optimize", "--model", "zoo:gru-lm", "--plan", "model.fxpress"),
        "the plan was made for another model",
    ),
    "no such model": (("zoo", "show", "rumm"), "did you mean 'rum-lm'"),
    "no model matches": (("zoo", "list", "zzz*"), "no model of the zoo matches"),
    "no script": (("bisect", "absent.py"), "absent.py: no such file"),
    "no script of Python": (("bisect", "x.npy"), "x.npy is no Python file"),
    "a script that raises": (("bisect", "raises.py"), "KeyError: 'nothing'"),
    "a script without a check": (("bisect", "attend.py"), "defines no function calib_data()"),
    "no such plan": ((*OPTIMIZE, "--plan", "absent"), "save a plan with"),
    "no such function": (("explain", "--model", "attend:absent"), "no attribute 'absent'"),
    "no such file": (("explain", "--model", "absent.py:model"), "absent.py: no such file"),
    "no such score": ((*OPTIMIZE, "--calib", "x.npy", "--validation-fn", "attend"), "give package"),
    "empty arrays": ((*OPTIMIZE, "--calib", "empty.npy"), "same number of rows"),
    "uneven arrays": ((*OPTIMIZE, "--calib", "uneven.npz"), "{'x': 8, 'y': 9}"),
    "a scalar": ((*OPTIMIZE, "--calib", "scalar.npy"), "same number of rows"),
    "objects": ((*OPTIMIZE, "--calib", "objects.npy"), "objects.npy holds no batches"),
    "no arrays": ((*OPTIMIZE, "--calib", "broken.npy"), "broken.npy holds no batches"),
    "no tensors": ((*OPTIMIZE, "--calib", "broken.safetensors"), "holds no batches"),
    "no batches": ((*OPTIMIZE, "--calib", "broken.json"), "broken.json holds no batches"),
    "a folder": ((*OPTIMIZE, "--calib", "."), "is a folder"),
    "no data to explain": (("explain", *MODEL, "--calib", "empty.jsonl"), "empty.jsonl is empty"),
    "a busy target": ((*OPTIMIZE, "--calib", "x.npy", "--out", "attend.py"), "attend.py"),
}


@pytest.fixture(scope="session")
def _broken(place: Path) -> None:
    np.save(place / "empty.npy", np.zeros((0, 8, 32), dtype="float32"))
    np.save(place / "scalar.npy", np.float32(1))
    np.save(place / "objects.npy", np.array([{"x": 1}], dtype=object))
    np.savez(place / "uneven.npz", x=np.zeros((8, 2)), y=np.zeros((9, 2)))
    for name in ("broken.npy", "broken.safetensors", "broken.json"):
        (place / name).write_text("[1, 2]")
    (place / "empty.jsonl").write_text("")
    (place / "raises.py").write_text("{}['nothing']")


@pytest.mark.usefixtures("_broken")
@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, run: Run, artifact: str) -> None:
    arguments, message = CASES[case]
    assert artifact == "model.fxpress"
    done = run(*arguments)
    (line,) = done.err.strip().splitlines()
    assert (done.code, done.out) == (2, "")
    assert line.startswith("error: ")
    assert message in line
