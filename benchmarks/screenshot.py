"""A picture of a report, taken with the Chromium that is on PATH.

python benchmarks/screenshot.py report.html docs/report.png [--size 1440x900] [--dark] [--whole]
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--size", default="1440x900", help="of the window, in pixels (%(default)s)")
    parser.add_argument("--dark", action="store_true", help="in the dark theme")
    parser.add_argument("--whole", action="store_true", help="the whole page, not what fits the window")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"none of {', '.join(BROWSERS)} is on PATH")
    width, _, height = options.size.partition("x")
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page(
            viewport={"width": int(width), "height": int(height)}, color_scheme="dark" if options.dark else "light"
        )
        page.goto(options.report.resolve().as_uri())
        page.wait_for_selector(".js-plotly-plot .main-svg")
        page.screenshot(path=options.picture, full_page=options.whole)


if __name__ == "__main__":
    main()
