"""Pictures of a run's page for the documentation: its overview with curves, and its reader.

python -m tests.reporting.pictures RUN docs/img/report-demo      writes report-demo.png and report-demo-rollouts.png
"""

import os
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from r1zero.reporting import report
from tests.reporting.test_report_page import READY, chromium

WIDTH, OVERVIEW_HEIGHT, READER_HEIGHT = 1280, 1330, 860


def take(run: Path, stem: Path) -> None:
    """Write `stem`.png and `stem`-rollouts.png."""
    with tempfile.TemporaryDirectory() as aside, sync_playwright() as playwright:
        page_file = report.write([run], Path(aside) / "report.html").path
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        page = browser.new_page(viewport={"width": WIDTH, "height": OVERVIEW_HEIGHT}, reduced_motion="reduce")
        page.goto(page_file.as_uri())
        page.wait_for_selector(READY)
        page.screenshot(path=f"{stem}.png")
        page.set_viewport_size({"width": WIDTH, "height": READER_HEIGHT})
        page.evaluate("document.getElementById('rollouts').scrollIntoView()")
        page.screenshot(path=f"{stem}-rollouts.png")
        browser.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
