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
    result = browser.new_page(viewport={"width": 1100, "height": 800})
    result.set_default_timeout(10_000)
    chromium.listen(result)
    result.set_content("<!doctype html><style>body { background: white }</style><body></body>")
    yield result
    complaints, asked = result.complaints, result.asked
    result.close()
    assert complaints == []
    assert asked == []
