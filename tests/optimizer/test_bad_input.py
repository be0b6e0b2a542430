"""Bad input is refused before work starts, with a typed error and one clear line."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batches, stack
from torch import Tensor, nn

import fxpress
from fxpress.cli import main
from fxpress.errors import CalibrationError, CaptureError, FxpressError, PlanError


class Raises(nn.Module):
    """A model that cannot run."""

    def forward(self, x: Tensor) -> Tensor:
        """Raise."""
        raise RuntimeError("the weights have gone missing")


NAN = torch.full((2, 48, 32), torch.nan)
BAD_DATA: list[tuple[Any, str]] = [
    ([], "is empty"),
    (None, "is None"),
    (torch.randn(2, 48, 32), "wrap it in a list"),
    ("texts", "wrap it in a list"),
    (3, "give an iterable"),
    ([*batches(2), torch.randn(2, 48)], r"calib_data\[2\].*shape \(2, 48\).*\(2, 48, 32\)"),
    ([*batches(2), torch.ones(2, 48, 32, dtype=torch.int64)], "dtype torch.int64"),
    ([*batches(2), torch.randn(2, 48, 31)], r"calib_data\[2\] does not fit.*48, 31.*48, 32"),
    ([{"x": batches(1)[0]}] * 2, "none of which the model takes"),
    ([*batches(2), NAN], r"calib_data\[2\], argument .*: holds NaN"),
    ([object()], "a batch is a tensor"),
]


@pytest.mark.parametrize(("data", "message"), BAD_DATA)
def test_bad_calibration_data(data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        fxpress.optimize(stack(), data)
    assert "\n" not in str(caught.value)


def test_a_model_that_raises() -> None:
    with pytest.raises(CalibrationError, match="the weights have gone missing"):
        fxpress.optimize(Raises(), batches())


# Tracing warns that TorchScript is deprecated, but people have such files.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("scripted", [True, False])
def test_what_is_no_module_of_python(scripted: bool) -> None:
    model: Any = torch.jit.script(torch.nn.ReLU()) if scripted else torch.relu
    reason = "give the nn.Module that it was made from" if scripted else "a model is an nn.Module"
    for use in (
        lambda: fxpress.optimize(model, batches()),
        lambda: fxpress.explain(model, (batches()[0],)),
        lambda: fxpress.capture(model, (batches()[0],)),
    ):
        with pytest.raises(CaptureError, match=reason):
            use()


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_divergence": -1.0}, "max_divergence is -1.0"),
    ({"max_divergence": float("nan")}, "max_divergence is nan"),
    ({"judge": "maybe"}, "judge is 'maybe'"),
    ({"objective": "speed"}, "objective is 'speed'"),
    ({"config": {"prune-atention": {}}}, "did you mean 'prune-attention'"),
    ({"config": {"prune-attention": {"prund": 0.5}}}, "did you mean 'pruned'"),
    ({"config": {"prune-attention": {"pruned": 1.5}}}, "pruned is 1.5"),
    ({"config": {"prune-attention": {"scope": "galaxy"}}}, "scope is 'galaxy'"),
    ({"config": {"layers.*": {"enable": False}}}, "no module matches 'layers.\\*'"),
    ({"config": {"judge_seconds": 0}}, "judge_seconds is 0"),
    ({"device": "abacus"}, "device 'abacus'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        fxpress.optimize(stack(), batches(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(PlanError, match="there is no CUDA device here"):
        fxpress.optimize(stack(), batches(), device="cuda")


def test_both_budgets_at_once() -> None:
    with pytest.raises(PlanError, match="not both"):
        fxpress.optimize(stack(), batches(), max_divergence=0.1, validation_fn=lambda m: 1.0)


@pytest.mark.parametrize("score", [float("nan"), "high"])
def test_a_validation_function_that_gives_no_number(score: Any) -> None:
    with pytest.raises(CalibrationError, match="validation_fn"):
        fxpress.optimize(stack(), batches(), validation_fn=lambda m: score)


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", '{"schema": 99}', '{"schema": 1}'])
def test_a_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError):
        fxpress.Plan.from_json(text)


def test_a_plan_of_another_model() -> None:
    half = {"prune-attention": {"pruned": 0.5}}
    plan = fxpress.optimize(stack(3), batches(), judge="off", config=half).plan
    with pytest.raises(PlanError, match="it has no site '2'"):
        fxpress.optimize(stack(2), None, plan=plan)


def test_a_plan_whose_calls_the_model_cannot_take() -> None:
    plan = fxpress.optimize(stack(), batches(), judge="off").plan
    with pytest.raises(PlanError, match="cannot be called alike; RuntimeError"):
        fxpress.optimize(nn.Linear(5, 5), None, plan=plan)


def test_a_plan_inflates_to_no_more_than_its_shapes() -> None:
    half = {"prune-attention": {"pruned": 0.5}}
    plan = fxpress.optimize(stack(), batches(), judge="off", config=half).plan
    data = json.loads(plan.to_json())
    mask = data["decisions"]["prune-attention"]["0"]["mask"]["tensor"]
    mask["zlib"] = base64.b64encode(zlib.compress(bytes(2**24))).decode()
    tracemalloc.start()
    with pytest.raises(PlanError, match="bytes has other data"):
        fxpress.Plan.from_json(json.dumps(data))
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_labels_are_dropped_and_named() -> None:
    data = [(x, torch.zeros(2)) for x in batches()]
    o = fxpress.optimize(stack(), data, judge="off", config={"prune-attention": {"pruned": 0.5}})
    assert o.report.as_dict()["dropped_inputs"] == ["item 1"]


MODELS = """
import torch
from torch import nn

class Attend(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)

class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("the weights have gone missing")

def cannot_build():
    raise KeyError("no such checkpoint")
"""
GOOD = json.dumps({"x": torch.ones(1, 1, 4, 2).tolist()})
ATTEND = ["optimize", "--model", "models_of_mine:Attend", "--calib", "rows.jsonl"]
BAD_COMMANDS: dict[str, tuple[list[str], dict[str, str], str]] = {
    "unknown command": (["frobnicate"], {}, "No such command"),
    "no model": (["optimize"], {}, "--model"),
    "unknown zoo model": (["optimize", "--model", "zoo:no-such"], {}, "no-such"),
    "no kind of model": (["explain", "--model", "nonsense"], {}, "give zoo:NAME"),
    "no such module": (["explain", "--model", "absent:build"], {}, "No module named 'absent'"),
    "builder raises": (
        ["optimize", "--model", "models_of_mine:cannot_build"],
        {},
        "cannot be built: KeyError: 'no such checkpoint'",
    ),
    "no model built": (["explain", "--model", "json:dumps"], {}, "cannot be built: TypeError"),
    "no configuration": (["explain", "--model", "hf-config:no.json"], {}, "no such file"),
    "broken configuration": (["explain", "--model", "hf-config:c.json"], {"c.json": "{"}, "c.json"),
    "missing data": (ATTEND, {}, "rows.jsonl does not exist"),
    "no data": (ATTEND[:3], {}, "give --calib"),
    "empty data": (ATTEND, {"rows.jsonl": ""}, "calib_data is empty"),
    "no mapping": (ATTEND, {"rows.jsonl": f"{GOOD}\n[1"}, "rows.jsonl:2 is no mapping"),
    "wrong shape": (ATTEND, {"rows.jsonl": f'{GOOD}\n{{"x": [1.0]}}'}, r"[1].*shape (1,)"),
    "wrong dtype": (ATTEND, {"rows.jsonl": f"{GOOD}\n{GOOD.replace('.0', '')}"}, "torch.int64"),
    "wrong key": (ATTEND, {"rows.jsonl": GOOD.replace("x", "y")}, "none of which the model takes"),
    "not a number": (ATTEND, {"rows.jsonl": GOOD.replace("1.0", "NaN")}, "holds NaN"),
    "model raises": (
        ["optimize", "--model", "models_of_mine:Raises", "--calib", "rows.jsonl"],
        {"rows.jsonl": GOOD},
        "the weights have gone missing",
    ),
    "budget": ([*ATTEND, "--max-divergence", "-1"], {"rows.jsonl": GOOD}, "max_divergence is -1"),
    "judge": ([*ATTEND, "--judge", "maybe"], {"rows.jsonl": GOOD}, "judge is 'maybe'"),
    "objective": ([*ATTEND, "--objective", "fun"], {"rows.jsonl": GOOD}, "objective is 'fun'"),
    "no device": ([*ATTEND, "--device", "abacus"], {"rows.jsonl": GOOD}, "device 'abacus'"),
    "unknown pass": (
        [*ATTEND, "--config", "c.yaml"],
        {"rows.jsonl": GOOD, "c.yaml": "prune-atention: {}"},
        "did you mean 'prune-attention'",
    ),
    "unknown module": (
        [*ATTEND, "--config", "c.yaml"],
        {"rows.jsonl": GOOD, "c.yaml": "'layers.*': {enable: false}"},
        "no module matches 'layers.*'",
    ),
    "no settings": ([*ATTEND, "--config", "no.yaml"], {"rows.jsonl": GOOD}, "no.yaml"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_the_command_line_ends_with_2_and_one_line(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, files, message = BAD_COMMANDS[case]
    for name, text in ({"models_of_mine.py": MODELS} | files).items():
        tmp_path.joinpath(name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "models_of_mine", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert line.startswith("error: ")
    assert all(part in line for part in message.split(".*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_process_itself_ends_with_2_and_one_line() -> None:
    arguments = ["optimize", "--model", "zoo:transformer-lm", "--device", "cuda"]
    command = [sys.executable, "-m", "fxpress", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "there is no CUDA device here" in line


def test_every_error_is_an_fxpress_error() -> None:
    names = [n for n in fxpress.errors.__all__ if n != "FxpressError"]
    assert all(issubclass(getattr(fxpress.errors, n), FxpressError) for n in names)
