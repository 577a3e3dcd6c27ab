"""The Rewrite and LAP Encode nodes: records, saved workflows of the first version, profiles, what is remembered."""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(__file__))

SAMPLING = {"sampling": "random", "temperature": 1.2, "top_p": 0.9, "seed": 5}


def main(pack) -> dict:
    import comfy.model_management as management
    from common import Setting, worst

    setting = Setting(pack)

    def node(**changed) -> tuple:
        given = {
            "vlm": setting.vlm,
            "prompt": "paint the heart green",
            "images": {"image0": setting.picture},
            "max_tiles": 9,
            "sampling": SAMPLING,
            "max_new_tokens": 64,
        }
        return pack.run("UniFusionRewrite", **(given | changed))

    def refused(**changed) -> str:
        try:
            node(**changed)
        except ValueError as error:
            return str(error)
        return ""

    hidden, text, record = node()
    again, same_text, same_record = node(text=record, sampling={"sampling": "greedy"})
    edited, edited_text, no_record = node(text="a green heart")
    facts = {
        "record": json.loads(record)["text"] == text,
        "replayed": same_text == text and same_record == record and again.spans == hidden.spans,
        "replayed states": worst(again.states, hidden.states),
        "an edited text has no record": edited_text == "a green heart" and no_record == "",
        "another prompt": refused(text=record, prompt="paint it red"),
        "another picture": refused(text=record, images={"image0": 1 - setting.picture}),
        "a damaged record": refused(text=record.replace('"token_ids": [', '"token_ids": ["x", ')),
        "left out": refused(prompt='a sign that says "ZQX"', protect_quotes=True),
        "impossible budget": refused(token_budget=1),
        "empty prompt": refused(prompt=" "),
        "another model's profile": refused(profile="krea2"),
        "a number for a switch": refused(protect_quotes=2),
        "off has no record": node(sampling={"sampling": "off"})[2] == "",
    }

    looks = []
    hook = setting.vlm.vlm.model.base_model.vision_tower.register_forward_hook(lambda *_: looks.append(1))
    setting.vlm.vlm.prefix_cache.clear()
    for prompt in ("paint the heart green", "paint the star green"):
        node(prompt=prompt)
    facts["pictures are looked at"] = len(looks)
    facts["remembered"] = len(setting.vlm.vlm.prefix_cache)
    management.unload_all_models()
    facts["remembered after unloading"] = len(setting.vlm.vlm.prefix_cache)
    hook.remove()

    def picture_tokens(budget: int) -> int:
        large = setting.picture.repeat_interleave(3, 1).repeat_interleave(3, 2)
        few = node(images={"image0": large}, token_budget=budget, sampling={"sampling": "off"})[0]
        return sum(len(span) for span in few.spans[0] if span.image is not None)

    facts["within the budget"] = 0 < picture_tokens(90) <= 90 < picture_tokens(0)

    def pooled(tokens, **changed) -> int:
        (out,) = pack.run("UniFusionLAPEncode", fusion=setting.fusion, hidden=node(**changed)[0], tokens=tokens)
        return out[0][0].shape[1]

    facts["tokens"] = {
        mode: pooled(mode)
        for mode in ("rewrite", "image + rewrite", "user turn", "all", "think + rewrite", "everything")
    }
    facts["spans"] = count(hidden)
    return facts


def count(hidden) -> dict:
    kinds: dict[str, int] = {}
    for span in hidden.spans[0]:
        kinds[span.kind] = kinds.get(span.kind, 0) + len(span)
    return kinds
