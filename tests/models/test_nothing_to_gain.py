"""Every model of the zoo, optimized with no room for error: nothing is changed, and it says so."""

from __future__ import annotations

import pytest

import fxpress
from fxpress.testing import assert_equivalent
from tests.models.samples import NAMES, build, sample


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_changed_and_the_report_says_so(name: str) -> None:
    model = build(name)
    args, kwargs = sample(name)
    batch = kwargs or args
    o = fxpress.optimize(model, [batch], max_divergence=0.0)
    assert not o.report.as_dict()["changed"]
    assert "nothing was changed: the outputs are the original's" in str(o.report)
    approximating = [r for r in o.passes.values() if r.exactness.name.startswith("APPROXIMATES")]
    assert approximating
    assert not any(record.rewrites for record in approximating)
    kinds = {site["kind"] for site in o.report.as_dict()["sites"]}
    has_attention = bool(kinds & {"self", "causal", "cross"})
    assert has_attention == bool(o.passes["prune-attention"].rolled_back)
    assert_equivalent(o, model, args, kwargs)


def test_the_command_line_runs_a_model_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    from fxpress.cli import main

    command = "optimize --model zoo:transformer-lm --batches 4 --judge off --json"
    with pytest.raises(SystemExit) as exit_:
        main(command.split())
    assert exit_.value.code == 0
    assert '"model": "TransformerLM"' in capsys.readouterr().out
