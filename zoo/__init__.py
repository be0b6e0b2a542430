"""Models, tasks and data to try the compiler on.

`list_models` and `create_model` are the door; transformers is imported only where a model of it is
built. `RUM` and its baselines `LSTM`, `GRU` and `RNN` share one call convention.
"""

from __future__ import annotations

from fxpress.zoo import tasks
from fxpress.zoo.recurrent import GRU, LSTM, RNN
from fxpress.zoo.registry import create_model, list_models
from fxpress.zoo.rotations import rotation
from fxpress.zoo.rum import RUM

__all__ = ["GRU", "LSTM", "RNN", "RUM", "create_model", "list_models", "rotation", "tasks"]
