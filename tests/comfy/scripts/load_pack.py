"""What loading the pack costs and brings with it."""

import sys


def main(pack) -> dict:
    return {
        "import_s": pack.import_s,
        "connections": pack.connections,
        "modules": sorted({name for name in sys.modules.keys() - pack.core_modules if not name.startswith("/")}),
    }
