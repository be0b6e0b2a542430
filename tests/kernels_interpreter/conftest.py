"""Let Triton's interpreter loop over loaded bounds: NumPy 2.4 no longer takes int() of one item."""

from __future__ import annotations

from typing import Any

import pytest
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def _loop_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
