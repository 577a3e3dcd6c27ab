"""The widgets in a real browser against the running server, in both renderers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = Path(__file__).parent / "browser"
DEADLINE = 900  # s; a minute and a half on an idle machine


@pytest.fixture(scope="module")
def node():
    found = shutil.which("node")
    playwright = Path(os.environ.get("PLAYWRIGHT_CORE") or Path.home() / ".cache" / "unifusion-js" / "node_modules")
    chromium = os.environ.get("CHROMIUM") or "/usr/bin/chromium"
    if found is None or not playwright.exists() or not Path(chromium).exists():
        pytest.skip("no node, playwright-core (PLAYWRIGHT_CORE) or Chromium (CHROMIUM): the widgets are not tested")
    return found


@pytest.mark.parametrize("script", ["timeline.mjs", "rewrite.mjs"])
def test_the_widget_in_both_renderers(node, server, tmp_path, script):
    command = [node, str(BROWSER / script), f"http://{server.address}", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert len(list(tmp_path.glob("*.png"))) >= 2
