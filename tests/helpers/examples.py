"""How many examples a hypothesis test draws."""

from hypothesis import settings


def examples(n, **options):
    """Settings of n examples under `-m long`, and of at most 10 by default (the profiles of tests/conftest.py)."""
    return settings(max_examples=min(n, settings.default.max_examples), **options)
