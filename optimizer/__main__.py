"""`python -m fxpress`."""

from __future__ import annotations

from fxpress.cli import main

main()
