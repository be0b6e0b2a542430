"""Every model of the zoo, optimized with no room for error: nothing is changed, and it says so.

Its attention is held against a count that knows nothing of graphs.
"""

from __future__ import annotations

import pytest
import torch

import fxpress
from fxpress.testing import assert_equivalent
from tests.models.samples import NAMES, build, sample
from tests.passes.attention_count import AttentionCount

ATTEND = {
    "austen-transformer",
    "bergamot-en-pt",
    "en-de-lstm",
    "en-de-transformer",
    "fashion-vit",
    "lstm-seq2seq",
    "minilm",
    "minilm-classifier",
    "prose-transformer",
    "prose-xl",
    "r8-encoder",
    "r8-minilm",
    "section-encoder",
    "smollm2",
    "text-encoder",
    "transformer-lm",
    "transformer-seq2seq",
    "transformer-xl",
    "vit",
    "whisper-tiny",
    "whisper-tiny-encoder",
}

KINDS = {"self", "causal", "cross"}
ADDITIVE = {"pointer-generator", "summary-lstm", "summary-rum"}  # no product of q and k: declined


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_changed_and_the_report_says_so(name: str) -> None:
    model = build(name)
    args, kwargs = sample(name)
    batch = kwargs or args
    with AttentionCount() as count, torch.no_grad():
        model(*args, **kwargs)
    o = fxpress.optimize(model, [batch], max_divergence=0.0)
    assert not o.report.as_dict()["changed"]
    assert "nothing was changed: the outputs are the original's" in str(o.report)
    approximating = [r for r in o.passes.values() if r.exactness.name.startswith("APPROXIMATES")]
    assert approximating
    assert not any(record.rewrites for record in approximating)
    attentions = [s for s in o.report.as_dict()["sites"] if s["kind"] in KINDS]
    declined = o.passes["fuse-attention"].declined
    assert len(attentions) + len(declined) == count.total
    assert bool(declined) == (name in ADDITIVE)
    assert (count.total > 0) == (name in ATTEND | ADDITIVE)
    assert bool(attentions) == bool(o.passes["prune-attention"].rolled_back)
    assert_equivalent(o, model, args, kwargs)


def test_the_command_line_runs_a_model_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    from fxpress.cli import main

    command = "optimize --model zoo:transformer-lm --batches 4 --judge off --json"
    with pytest.raises(SystemExit) as exit_:
        main(command.split())
    assert exit_.value.code == 0
    assert '"model": "TransformerLM"' in capsys.readouterr().out
