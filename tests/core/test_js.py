"""The timeline's logic is tested in its own language."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_scripts_of_the_node_pack():
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on PATH: the timeline's logic (tests/js) is not tested")
    tests = sorted(str(path) for path in (ROOT / "tests" / "js").glob("*.test.mjs"))
    done = subprocess.run([node, "--test", *tests], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert tests and done.returncode == 0, done.stdout[-3000:]
