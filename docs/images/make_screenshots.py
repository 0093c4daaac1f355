"""Take the pictures of the example reports, in both colour schemes.

It opens the files of docs/examples in an installed Chromium::

    python docs/images/make_screenshots.py docs/images
"""

from __future__ import annotations

import argparse
import shutil
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

SIZE = {"width": 1100, "height": 1130}
PICTURES = {"ethanol": "light", "germanium": "dark"}


def main() -> None:
    """Read the command line and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for the pictures")
    output = parser.parse_args().output
    folder = Path(__file__).resolve().parents[1] / "examples"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, scheme in PICTURES.items():
            context = browser.new_context(color_scheme=scheme, viewport=SIZE)
            page = context.new_page()
            page.goto((folder / f"{name}.html").as_uri())
            picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
            picture.save(output / f"report_{name}.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
