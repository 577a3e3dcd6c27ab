"""What the frontend writes on the pack's nodes in a saved workflow, so that others are told what to install."""

from __future__ import annotations

import re

from .server import REPO


def pack_properties() -> dict[str, str]:
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")  # tomllib is not in Python 3.10
    name, version = (re.search(rf'^{key} = "([^"]+)"', text, re.MULTILINE)[1] for key in ("name", "version"))
    return {"cnr_id": name, "ver": version}
