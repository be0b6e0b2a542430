"""Models, tasks, data and training recipes.

`list_models` and `create_model` are the door; what needs transformers is imported when it is built.
"""

from __future__ import annotations

from fxpress.zoo.registry import create_model, list_models

__all__ = ["create_model", "list_models"]
