"""How the zoo builds a model of the transformers library, and feeds it text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxpress.zoo.pretrained import PretrainedError, require

__all__ = ["build_model", "load_tokenizer"]


def build_model(
    class_name: str,
    *,
    folder: Callable[[], Path] | None,
    small: dict[str, Any],
    sizes: dict[str, Any],
    attn_implementation: str,
) -> Any:
    """A model of transformers in eval mode.

    Args:
        class_name: such as ``"BertModel"``.
        folder: gives the folder with the trained weights; None: random weights.
        small: fields of the configuration for random weights.
        sizes: what the user would have otherwise among these.
        attn_implementation: "sdpa", "eager" or another that transformers knows.

    Raises:
        PretrainedError: transformers is missing, a field is unknown, or `sizes` would not fit the
            trained weights.
    """
    require("transformers")
    import transformers

    kind = getattr(transformers, class_name)
    if folder is None:
        if unknown := sorted(sizes.keys() - kind.config_class().to_dict().keys()):
            raise PretrainedError(f"{kind.config_class.__name__} has no {', '.join(unknown)}")
        config = kind.config_class(**small | sizes, attn_implementation=attn_implementation)
        return kind(config).eval()
    if sizes:
        raise PretrainedError(f"the trained weights fix the sizes: drop {', '.join(sorted(sizes))}")
    return kind.from_pretrained(
        folder(), attn_implementation=attn_implementation, local_files_only=True
    ).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies beside the weights."""
    require("transformers")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
