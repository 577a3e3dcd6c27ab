"""Fills the tables of docs/training.md from the plan: `python -m tests.core.make_training_page [--check]`."""

import re
import sys
from pathlib import Path

from unifusion_core.presets import PRESETS
from unifusion_core.training.plan import markdown, plan
from unifusion_core.training.plan_adapter import plan_adapter

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BLOCK = re.compile(r"(<!-- plan (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    return BLOCK.sub(lambda found: f"{found[1]}{_table(found[2])}\n{found[3]}", text)


def _table(name: str) -> str:
    return markdown(plan(PRESETS[name]()) if name in PRESETS else plan_adapter(name))


def main() -> int:
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv:
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
