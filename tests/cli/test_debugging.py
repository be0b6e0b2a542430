"""`FXPRESS_DEBUG` and `FXPRESS_DUMP`, as `environment.py` documents them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fxpress import environment, lowering
from fxpress.errors import ArtifactError
from fxpress.lowering import Lowering

Run = Any  # conftest.Run
OPTIMIZE = ("optimize", "--model", "attend:model", "--calib", "x.npy", "--judge", "off")


@pytest.fixture
def _kernel_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lowering with a source for this device, as CUDA has; it is not run."""
    monkeypatch.setattr(lowering, "_REGISTERED", dict(lowering._REGISTERED))
    lowering.register(
        Lowering(
            operator="fxpress::sparse_attention",
            name="shown",
            device_type="cpu",
            accepts=lambda _site: None,
            cost=lambda _site: 0.0,
            run=lambda *_: pytest.fail("only its source is wanted"),
            source=lambda site: f"# head_dim = {site.head_dim}\n",
        )
    )


@pytest.mark.usefixtures("_kernel_on_cpu")
def test_a_dump_holds_graphs_and_kernels(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXPRESS_DUMP", str(tmp_path))
    assert run(*OPTIMIZE, "--config", "half.yaml").code == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"prune-attention.before.txt", "prune-attention.after.txt"}
    assert (tmp_path / "kernel.0.py").read_text() == "# head_dim = 16\n"


SHOWN = {
    1: ["fxpress report: Sequential"],
    2: ["prune-attention: {'prune-attention': 2}"],
    3: ["after prune-attention:"],
    4: ["kernel of 0:\n# head_dim = 16"],
}


@pytest.mark.usefixtures("_kernel_on_cpu")
@pytest.mark.parametrize("level", [0, 1, 2, 3, 4])
def test_each_level_adds_to_the_log(
    run: Run, level: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FXPRESS_DEBUG", str(level))
    assert run(*OPTIMIZE, "--config", "half.yaml").code == 0
    for needed, texts in SHOWN.items():
        assert all((text in caplog.text) == (level >= needed) for text in texts)


def test_fuel_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXPRESS_FUEL", raising=False)
    with environment.limited_fuel(3):
        assert environment.fuel() == 3
        with environment.limited_fuel(1):
            assert environment.fuel() == 1
        assert environment.fuel() == 3
    assert "FXPRESS_FUEL" not in os.environ


def test_an_error_has_its_traceback_at_level_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("inspect", "absent").code == 2
    monkeypatch.setenv("FXPRESS_DEBUG", "1")
    with pytest.raises(ArtifactError):
        run("inspect", "absent")
