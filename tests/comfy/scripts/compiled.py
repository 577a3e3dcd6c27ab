"""Core's TorchCompileModel on our MODEL."""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))


def main(pack) -> dict:
    from common import Setting, worst

    pack.load_core_extras()
    setting = Setting(pack)
    (compiled,) = pack.run("TorchCompileModel", model=setting.model, backend="inductor")
    return {
        "differs": worst(setting.sample(setting.prompt, compiled, steps=2), setting.sample(setting.prompt, steps=2))
    }
