"""Fixtures of the tests of kernels."""

import pytest

from tests.support.internals import replace_internal


@pytest.fixture(params=["in place", "the Function"])
def recomputed_both_ways(request, monkeypatch):
    """An x of any size is computed again, in each of the two ways to compute a call."""
    replace_internal(monkeypatch, "kept_below", 0)
    replace_internal(monkeypatch, "small_below", 1 << 40 if request.param == "in place" else 0)
