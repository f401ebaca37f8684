"""Skip what this machine has no tools for; in CI, where they are installed, fail instead."""

from __future__ import annotations

import os

import pytest


def need(missing: str | None) -> None:
    """Go on if `missing` is None, else skip with it as the reason."""
    if not missing:
        return
    if os.environ.get("CUPYBN_REQUIRE_CUDA_TOOLS", "0") not in ("", "0"):
        pytest.fail(f"CUPYBN_REQUIRE_CUDA_TOOLS is set, but: {missing}", pytrace=False)
    pytest.skip(missing)
