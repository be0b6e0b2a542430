"""MiniLM with a head that classifies texts: all of it is tuned, or its biases only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fxpress.zoo import minilm
from fxpress.zoo.encoder import bytes_of_texts
from fxpress.zoo.registry import create_model, model

__all__ = ["MiniLMClassifier"]


class MiniLMClassifier(nn.Module):
    """A BERT encoder, the mean of its states, a linear head.

    Args:
        bert: transformers' BertModel.
        width: of its states, d.
        classes: C.
        dropout: in training, of the mean.
    """

    def __init__(self, bert: nn.Module, width: int, classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.bert, self.dropout = bert, nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, C) of texts: tokens (B, N) of MiniLM's, and a mask (B, N), 1 for each."""
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        logits: Tensor = self.head(self.dropout(minilm.embed(states, mask)))
        return logits


TUNED: dict[str, Callable[[str], bool]] = {
    "all": lambda _name: True,
    # BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): a thousandth of the weights.
    "biases": lambda name: name.endswith("bias") or name.startswith("head."),
}


@model(
    "minilm-classifier",
    description="MiniLM with a head for classes, which is untrained",
    license="none",
    source="Wang et al. 2020, arXiv 2002.10957",
    calibration=bytes_of_texts,  # any tokens will do for random weights
    has_weights=False,
)
def minilm_classifier(
    pretrained: bool = False, *, classes: int = 2, tuned: str = "all", **sizes: Any
) -> nn.Module:
    """`MiniLMClassifier` on BertModel.

    Args:
        pretrained: the encoder has the trained weights of MiniLM (the head has none).
        classes: C.
        tuned: what is trained: "all", or the "biases" and the head.
        **sizes: fields of BertConfig, for an encoder with random weights.

    Raises:
        ValueError: `tuned` is neither.
        PretrainedError: the trained weights cannot be had.
    """
    if tuned not in TUNED:
        raise ValueError(f"tuned is {tuned!r}: give one of {', '.join(TUNED)}")
    bert: Any = create_model("minilm", pretrained, **sizes)
    bert.pooler = None  # it reads the first state only; the head takes the mean
    classifier = MiniLMClassifier(bert, bert.config.hidden_size, classes)
    for name, weight in classifier.named_parameters():
        weight.requires_grad_(TUNED[tuned](name))
    return classifier.eval()
