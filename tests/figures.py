"""Drills of `make test-faults`, and the figures that they print."""

import os

import pytest

FULL = os.environ.get("FAULTS") == "full"
only_full = pytest.mark.skipif(not FULL, reason="one of `make test-faults`")


def tally(figure):
    """A fixture: a list for a module's tests to note what happened, counted at the end."""

    @pytest.fixture(scope="module")
    def noted():
        seen = []
        yield seen
        report(f"{figure}, of {len(seen)}", sum(seen))

    return noted


def report(figure, value):
    """A line that tells what a drill has measured."""
    print(f"\n[figure] {figure}: {value}")
