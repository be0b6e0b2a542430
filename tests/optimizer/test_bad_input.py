"""Bad input is refused before work starts, with a typed error and one clear line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batches, stack
from torch import Tensor, nn

import fxpress
from fxpress.errors import CalibrationError, FxpressError, PlanError


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


def test_labels_are_dropped_and_named() -> None:
    data = [(x, torch.zeros(2)) for x in batches()]
    o = fxpress.optimize(stack(), data, judge="off", config={"prune-attention": {"pruned": 0.5}})
    assert o.report.as_dict()["dropped_inputs"] == ["item 1"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["optimize", "--model", "zoo:no-such-model"],
        ["optimize", "--model", "nonsense"],
        ["optimize", "--model", "zoo:transformer-lm", "--calib", "missing.txt"],
        ["optimize", "--model", "zoo:transformer-lm", "--judge", "maybe"],
        ["explain", "--model", "no_such_module:build"],
        ["optimize"],
        ["frobnicate"],
    ],
)
def test_the_command_line_ends_with_2_and_one_line(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fxpress", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_every_error_is_an_fxpress_error() -> None:
    names = [n for n in fxpress.errors.__all__ if n != "FxpressError"]
    assert all(issubclass(getattr(fxpress.errors, n), FxpressError) for n in names)
