"""The VLM and the fusion head under ComfyUI's memory management."""

import gc
import os
import sys
import weakref

sys.path.insert(0, os.path.dirname(__file__))


def main(pack) -> dict:
    import comfy.model_management as management
    from common import Setting, worst

    setting = Setting(pack)
    vlm, fusion = setting.vlm, setting.fusion
    (again,) = pack.run("UniFusionLoadVLM", vlm="micro (embedded)")
    before = setting.pool("a red heart")

    def loaded() -> list[bool]:
        patchers = [entry.model for entry in management.current_loaded_models]
        return [any(patcher is part.patcher for patcher in patchers) for part in (vlm, fusion)]

    facts = {"two loaders share one": again is vlm, "loaded": loaded()}
    management.unload_all_models()
    facts["after unload models"] = loaded()
    facts["the same afterwards"] = worst(setting.pool("a red heart")[0][0], before[0][0])
    facts["loaded again"] = loaded()
    facts["refiner runs for three schedules"] = refiner_runs(setting)
    dropped = fusion.without((1,))
    facts["dropout shares the weights"] = dropped.lap is fusion.lap and dropped.patcher is fusion.patcher
    facts["known by its patcher"] = vlm.patcher.model_size() > 0 and not isinstance(
        vlm.patcher.model, type(vlm.vlm.model)
    )
    model = weakref.ref(vlm.vlm.model)
    setting.vlm = vlm = again = None
    management.unload_all_models()
    gc.collect()
    facts["gone when no graph holds it"] = model() is None
    return facts


def refiner_runs(setting) -> int:
    """How often the refiner runs when only the schedule over a pooled conditioning changes: once for each track."""
    runs = []
    hook = setting.fusion.refiner.register_forward_hook(lambda *_: runs.append(1))
    for text in ("image:0-0.15, text:0.15-1", "image:0-0.5, text:0.5-1", "text:0-0.3 > image:0.6-1"):
        setting.schedule(text, a=setting.pooled)
    hook.remove()
    return len(runs)
