"""The byte language models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxpress.testing import BITWISE, assert_equivalent
from fxpress.zoo import create_model
from fxpress.zoo.lm import RecurrentLM, TransformerLM, byte_windows

RECURRENT = ["gru-lm", "lstm-lm", "rnn-lm", "rum-lm"]
SMALL: dict[str, Any] = {"vocabulary": 20, "width": 16, "layers": 2, "heads": 2, "context": 12}


def ids(length: int = 12) -> torch.Tensor:
    return torch.randint(20, (2, length))


def test_both_spellings_of_attention_agree() -> None:
    sdpa, math = TransformerLM(**SMALL), TransformerLM(**SMALL, attention="math")
    math.load_state_dict(sdpa.state_dict())
    assert_equivalent(math, sdpa, (ids(),))


@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_no_position_sees_the_future(attention: Any) -> None:
    lm = TransformerLM(**SMALL, attention=attention)
    other = (x := ids()).clone()
    other[:, 7:] = 0
    assert_equivalent(lambda x: lm(x)[:, :7], lambda _: lm(other)[:, :7], (x,), exactness=BITWISE)
    assert not torch.equal(lm(x)[:, 7:], lm(other)[:, 7:])


def test_every_position_sees_the_past() -> None:
    lm = TransformerLM(**SMALL)
    other = (x := ids()).clone()
    other[:, 0] = (x[:, 0] + 1) % 20
    assert (lm(x) != lm(other)).any(-1).all()


@pytest.mark.parametrize("name", RECURRENT)
def test_advancing_in_pieces_makes_the_whole(name: str) -> None:
    lm = create_model(name, vocabulary=20, width=8)
    assert isinstance(lm, RecurrentLM)

    def pieces(x: torch.Tensor) -> torch.Tensor:
        first, state = lm.advance(x[:, :5])
        second, _ = lm.advance(x[:, 5:], state)
        return torch.cat([first, second], 1)

    assert_equivalent(pieces, lm, (ids(),))


def test_arguments_reach_the_layer() -> None:
    rum = create_model("rum-lm", width=8, num_layers=2, lambda_=1, eta=0.1)
    assert isinstance(rum, RecurrentLM)
    _, (h, R) = rum.advance(torch.zeros(3, 2, dtype=torch.long))
    assert h.shape == (2, 3, 8)
    assert R.shape == (2, 3, 8, 8)


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="width 10 is no multiple of 4"):
        TransformerLM(width=10, heads=4)
    with pytest.raises(ValueError, match="give one of sdpa, math"):
        TransformerLM(attention="flash")  # type: ignore[arg-type]


def test_byte_windows_are_the_text() -> None:
    texts = ["Ödipus", "ab"]
    windows = byte_windows(texts, 4, rows=1)
    assert bytes(torch.cat(windows).flatten().tolist()).decode() == "Ödipus\n"
    assert [tuple(w.shape) for w in byte_windows(["x" * 30], 10, rows=2)] == [(2, 10), (1, 10)]
    assert [tuple(w.shape) for w in byte_windows(["abc"], 10)] == [(1, 3)]
