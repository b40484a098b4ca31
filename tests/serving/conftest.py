"""Fixtures of the page's tests are in `browser.py`."""

from tests.serving.browser import chromium, open_page

__all__ = ["chromium", "open_page"]
