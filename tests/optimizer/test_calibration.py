"""Every form of calibration data comes to the same calls, and what is dropped is named."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pytest
import torch
from models import batches, stack
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

import fxpress
from fxpress.calibration import MAX_BATCHES, collect
from fxpress.errors import CalibrationError

X = batches(5)


class Named(nn.Module):
    """A model that is called by keywords, as those of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stack()

    def forward(self, hidden: Tensor, shift: Tensor | None = None) -> Tensor:
        """(B, N, 32), optionally shifted."""
        out: Tensor = self.inner(hidden if shift is None else hidden + shift)
        return out


def loop(model: nn.Module) -> None:
    """A loop of the user's own around the model."""
    for x in X:
        model(hidden=x)


def once() -> Iterator[Tensor]:
    """Batches that can be read one time."""
    yield from X


def rows() -> list[dict[str, Any]]:
    """The same tensors as rows of a table: two rows were one batch."""
    return [{"hidden": row.tolist(), "label": 1} for x in X for row in x]


FORMS: dict[str, Callable[[], Any]] = {
    "list of tensors": lambda: X,
    "tuples": lambda: [(x,) for x in X],
    "one-shot iterator": once,
    "loader": lambda: DataLoader(TensorDataset(torch.cat(X)), batch_size=2),
    "mappings": lambda: [{"hidden": x} for x in X],
    "mappings of another kind": lambda: [UserDict({"hidden": x}) for x in X],
    "encodings": lambda: [BatchEncoding({"hidden": x}) for x in X],
    "loop": lambda: loop,
}


def inputs(calls: list[Any]) -> Tensor:
    """All inputs of all calls, one after another."""
    return torch.cat([x for args, kwargs in calls for x in (*args, *kwargs.values())])


def assert_same_values(one: Tensor, other: Tensor) -> None:
    """Equal but for the order: those that are held out come last."""
    assert torch.equal(one.flatten().sort().values, other.flatten().sort().values)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_to_the_same_calls(form: str) -> None:
    data = collect(Named(), FORMS[form]())
    assert_same_values(inputs(data.calls), torch.cat(X))
    assert (len(data.profile), len(data.heldout)) == (3, 2)
    assert data.dropped == ()


def test_a_dataset_is_read_in_batches_and_its_labels_are_dropped() -> None:
    data = collect(Named(), datasets.Dataset.from_list(rows()))
    assert torch.equal(inputs(data.calls), torch.cat(X))
    assert data.dropped == ("label",)


def test_what_is_dropped_is_in_the_report() -> None:
    labelled = [{"hidden": x, "labels": torch.ones(2), "idx": 3} for x in X]
    o = fxpress.optimize(Named(), labelled, judge="modelled", max_divergence=0.0)
    assert o.report.as_dict()["dropped_inputs"] == ["idx", "labels"]
    assert "the model does not take idx, labels" in str(o.report)


def test_input_fn_picks_the_inputs() -> None:
    pairs = [{"text": "ignored", "features": {"deep": x}} for x in X]
    data = collect(Named(), pairs, input_fn=lambda batch: batch["features"]["deep"])
    assert_same_values(inputs(data.calls), torch.cat(X))


def test_an_endless_iterator_is_read_to_the_stated_limit() -> None:
    read = []

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(1)
            yield X[0]

    data = collect(Named(), endless())
    assert len(data.calls) == len(read) == MAX_BATCHES


def test_validation_data_leaves_all_the_rest_to_learn_from() -> None:
    data = collect(Named(), X[:3], validation_data=X[3:])
    assert torch.equal(inputs(data.profile), torch.cat(X[:3]))
    assert torch.equal(inputs(data.heldout), torch.cat(X[3:]))


def test_one_batch_is_judged_on_itself_and_that_is_said() -> None:
    data = collect(Named(), X[:1])
    assert data.profile == data.heldout
    assert "only one batch" in data.notes[0]


def test_every_fifth_batch_is_held_out() -> None:
    data = collect(Named(), [x + i for i in range(4) for x in X])
    assert (len(data.profile), len(data.heldout)) == (16, 4)


@pytest.mark.parametrize("lengths", [(3, 5), (3, 4, 5, 6), (6, 6, 5, 3, 7), (2, 3, 9, 4, 8, 1)])
def test_the_longest_batch_is_learned_from(lengths: tuple[int, ...]) -> None:
    batches = [torch.randn(2, length, 4) for length in lengths]
    data = collect(torch.nn.ReLU(), batches)
    profiled, held = ([x.shape[1] for (x,), _ in part] for part in (data.profile, data.heldout))
    assert max(lengths) in profiled
    assert sorted(profiled + held) == sorted(lengths)
    assert len(held) == (2 if len(lengths) > 3 else 1)


def broken(model: nn.Module) -> None:
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (broken, "forward_loop raised OSError: the disk is gone"),
        (lambda model: None, "calib_data is empty"),
        (iter(()), "calib_data is empty"),
        (datasets.Dataset.from_dict({"text": ["a"]}), r"has the keys \['text'\], none of which"),
    ],
)
def test_refusals(data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        collect(Named(), data)
