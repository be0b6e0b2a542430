"""`fxpress bench`: figures of the artifact and of what it was made from; no time is asserted."""

from __future__ import annotations

from typing import Any

Run = Any  # conftest.Run


def test_an_artifact_beside_its_model(run: Run, artifact: str) -> None:
    arguments = ("bench", artifact, "--against", "attend:model", "--rounds", "4", "--threads", "1")
    facts = run(*arguments, "--json").json
    assert (facts["device"], facts["dtype"], facts["threads"]) == ("cpu", ["float32"], 1)
    (call,) = facts["calls"]
    assert call["call"] == "0: float32[8, 8, 32]"
    assert list(call["ms"]) == ["original", "dense", "artifact"]
    for ms in call["ms"].values():
        assert len(ms["samples"]) == 4
        assert ms["lower"] <= ms["median"] <= ms["upper"]
    assert set(call["speedup"]) == {"original", "dense"}


def test_the_text_states_device_dtype_threads_and_baseline(run: Run, artifact: str) -> None:
    text = run("bench", artifact, "--against", "attend:model", "--rounds", "3").out
    assert text.startswith("cpu, float32, ")
    assert "dense: its best dense form" in text
    alone = run("bench", artifact, "--rounds", "3").out
    assert "no baseline: give the model with --against" in alone
