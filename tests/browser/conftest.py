"""A Chromium for each file of panels' tests: while one is open, its loop runs in this thread, and none may follow."""

import pytest
from helpers import chromium


@pytest.fixture(scope="module")
def browser():
    chromium.need_chromium()
    with chromium.launched() as opened:
        yield opened


@pytest.fixture
def page(browser):
    """An empty page, which must neither complain nor ask for anything."""
    made = browser.new_page(viewport={"width": 1100, "height": 800})
    made.set_default_timeout(10_000)
    chromium.listen(made)
    made.set_content("<!doctype html><style>body { background: white }</style><body></body>")
    yield made
    complaints, asked = made.complaints, made.asked
    made.close()
    assert complaints == []
    assert asked == []
