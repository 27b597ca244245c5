"""A headless Chromium that opens pages, and keeps what they complain of and ask for."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium was found; `make browser-deps` installs it"
)
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "is_mobile": True,
    "has_touch": True,
    "device_scale_factor": 2,
}


@contextmanager
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


def folder_for_shots(tmp_path_factory):
    """The folder for screenshots."""
    given = os.environ.get("CONVBASIS_SCREENSHOTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def watched(browser):
    """Yield a function that opens a page that is drawn.

    At the end nothing was complained of, and nothing asked for but the pages themselves.
    """
    complaints, requests, contexts, places = [], [], [], set()

    def go(place, **options):
        context = browser.new_context(**{**DESKTOP, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        places.add(place.as_uri())
        page.goto(place.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []
    assert set(requests) <= places


def head(page, layer, head, grid=0):
    return page.locator(f'[data-map="{grid}"] [data-layer="{layer}"][data-head="{head}"]')
