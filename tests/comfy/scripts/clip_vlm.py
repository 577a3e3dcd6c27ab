"""VLMs made of CLIPs: their states, what they cost, and whose weights they run. Facts as `main` returns them."""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))

LAYERS = (0, 1, 3, 5, 7)  # embeddings, where DeepStack adds, and the end before the norm
NEW = 6


def main(pack, folder) -> dict:
    import numpy as np
    import tiny_clips
    from PIL import Image

    tiny_clips.shrink_cores_classes()
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in ((90, 140), (70, 60))]
    facts = {
        kind: Family(pack, kind, pictures).facts() for kind in ("qwen3vl", "qwen25vl", "gemma3", "gemma3 4b", "qwen3")
    }
    facts["head"] = head_of_the_file(pack, pictures, folder)
    facts["krea2"] = like_krea2(pack)
    facts["weights"] = whose_weights(pack)
    facts["refused"] = refusals(pack)
    facts["nodes"] = nodes(pack, pictures)
    return facts


def small(vlm):
    """The same VLM with tiles of 4 x 4 tokens."""
    if hasattr(vlm, "unit"):
        vlm.tile_side, vlm.tile_size = 4, 4 * vlm.unit
    return vlm


def gap(a, b) -> float:
    """Largest difference of one token's states, relative to their norm."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-9)).max())


class Family:
    def __init__(self, pack, kind, pictures):
        import tiny_clips

        self.verifi = pack.module("unifusion_core.conditioning.verifi")
        self.vlms = pack.module("unifusion_core.conditioning.vlm")
        self.kind, self.clip = kind, tiny_clips.make(kind, **({"hidden_size": 256} if kind == "qwen25vl" else {}))
        self.vlm = small(pack.module("nodes.clip_vlm").vlm_from_clip(self.clip).ready().tapping(LAYERS))
        Request = self.vlms.Request
        self.cases = {"text": [Request("a big red heart")]}
        if self.vlm.tile_size:
            self.cases["image"] = [Request("a big red heart", pictures[:1], max_tiles=2)]
        if self.vlm.tile_size and kind != "gemma3 4b":  # the same code as gemma3
            self.cases |= {
                "whole image": [Request("a big red heart", pictures[:1], max_tiles=1)],
                "two images": [Request("a big réd heart", pictures, max_tiles=2)],
                "batch": [Request("a big red heart", pictures[:1], max_tiles=1), Request("the star")],
            }

    def facts(self) -> dict:
        facts = {"notes": list(self.vlm.notes), "cases": {}, "core": self.like_core()}
        for name, requests in self.cases.items():
            facts["cases"][name] = self.single_pass(requests)
        if self.kind in ("qwen3vl", "qwen25vl", "gemma3"):
            facts["transformers"] = self.like_transformers()
        facts["cancel leaves no hook"] = self.cancel()
        return facts

    def write(self, vlm, requests):
        """States and tokens of NEW written tokens, whatever they say."""
        prompts = vlm.prepare(requests, room=NEW + 1)
        written = [[] for _ in requests]

        def after_step(tokens):
            for row, token in zip(written, tokens, strict=True):
                row.append(token)
            return [False] * len(tokens)

        choose = self.verifi.seeded_choice([3] * len(requests), 1.0, 1.0)
        taps = vlm.generate(prompts, NEW + 1, choose=choose, after_step=after_step)
        return vlm.collect(prompts, [row[:NEW] for row in written], taps), [row[:NEW] for row in written]

    def single_pass(self, requests) -> dict:
        import torch

        calls = {"decoder": 0, "eyes": 0}
        transformer = self.vlm.transformer
        eyes = getattr(transformer, "visual", getattr(transformer, "vision_model", None))
        watched = {"decoder": transformer.model} | ({"eyes": eyes} if eyes is not None else {})
        handles = [
            module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
            for name, module in watched.items()
        ]
        kept, ids = self.write(self.vlm, requests)
        for handle in handles:
            handle.remove()
        again = self.vlm.encode(requests, ids)
        alone = [self.vlm.encode([request], [row]) for request, row in zip(requests, ids, strict=True)]
        same_rows = max(gap(again.states[i, again.mask[i]], each.states[0]) for i, each in enumerate(alone))
        return {
            "gap": gap(kept.states, again.states),
            "as alone": same_rows,
            "finite": bool(torch.isfinite(kept.states).all()),
            "different tokens": len(set(ids[0])),
            "calls": calls,
            "pictures": sum(span.kind in ("image", "thumbnail") for span in kept.spans[0]),
            "every token named": sum(map(len, kept.spans[0])) == int(kept.mask[0].sum()),
        }

    def like_core(self) -> float:
        """Text through core's own forward of the same class."""
        prompts = self.vlm.prepare(self.cases["text"])
        layers = [i for i in LAYERS if i < self.vlm.num_layers]
        embeds = self.vlm.decoder.embed_tokens(prompts.ids, out_dtype=self.vlm.dtype)
        _, states = self.vlm.transformer(
            None, None, embeds=embeds, intermediate_output=layers, final_layer_norm_intermediate=False, embeds_info=[]
        )[:2]
        ours = self.vlm.encode(self.cases["text"]).states[0, :, : len(layers)]
        return float((ours.transpose(0, 1) - states[0]).abs().max())

    def like_transformers(self, head=None) -> dict:
        from hf_twins import twin

        classes = {"qwen3vl": "qwen_vl.Qwen3VL", "qwen25vl": "qwen_vl.Qwen25VL", "gemma3": "gemma3.Gemma3"}
        module, name = classes[self.kind].split(".")
        family = getattr(sys.modules[f"{self.vlms.__name__}.{module}"], name)
        theirs = small(family(twin(self.kind, self.vlm.transformer, head), self.vlm.tokenizer, layers=LAYERS))
        theirs.chat_template = self.vlm.chat_template
        facts = {"same identity": theirs.identity == self.vlm.identity, "same words": True, "gaps": {}}
        for case, requests in self.cases.items():
            facts["gaps"][case] = gap(self.vlm.encode(requests).states, theirs.encode(requests).states)
            facts["same words"] &= self.write(self.vlm, requests)[1] == self.write(theirs, requests)[1]
        return facts

    def cancel(self) -> bool:
        class Cancelled(Exception):
            pass

        def stop(*_):
            raise Cancelled

        try:
            self.verifi.rewrite(self.vlm, self.cases["text"], temperature=1.0, on_token=stop)
        except Cancelled:
            modules = (self.vlm.decoder.norm, *self.vlm.decoder.layers)
            return not any(module._forward_pre_hooks for module in modules)
        return False


def head_of_the_file(pack, pictures, folder) -> dict:
    """Qwen2.5-VL's lm_head, which core drops, from the file that core's loader remembers."""
    import comfy.sd
    import torch
    from safetensors.torch import save_file

    family = Family(pack, "qwen25vl", pictures)
    head = torch.randn(family.vlm.decoder.vocab_size, 256, generator=torch.Generator().manual_seed(5))
    path = os.path.join(folder, "qwen_2.5_vl.safetensors")
    save_file({"lm_head.weight": head, "model.norm.weight": torch.ones(256)}, path)
    family.clip.patcher.cached_patcher_init = comfy.sd.load_clip_model_patcher, ([path], None, None, {})
    family.vlm = small(pack.module("nodes.clip_vlm").vlm_from_clip(family.clip).ready().tapping(LAYERS))
    family.cases = {"image": family.cases["image"]}
    return {"notes": list(family.vlm.notes), "transformers": family.like_transformers(head)}


def like_krea2(pack) -> float:
    """A plain prompt of Krea 2: core's own conditioning against the states kept by that profile."""
    import tiny_clips

    Request = pack.module("unifusion_core.conditioning.vlm").Request
    profile = pack.module("unifusion_core.conditioning.profiles").PROFILES["krea2"]
    clip = tiny_clips.make("qwen3vl", num_hidden_layers=36)
    core = clip.encode_from_tokens(clip.tokenize("a big red heart"))
    vlm = pack.module("nodes.clip_vlm").vlm_from_clip(clip).ready().tapping(profile.layers)
    ours = vlm.encode([Request("a big red heart", template=profile.template)]).select(*profile.kinds)
    return float((ours.states.flatten(2) - core).abs().max())


def whose_weights(pack) -> dict:
    import comfy.model_management as management
    import tiny_clips
    import torch

    of = pack.module("nodes.clip_vlm").vlm_from_clip
    Request = pack.module("unifusion_core.conditioning.vlm").Request
    clip = tiny_clips.make("qwen3vl", dtype=torch.bfloat16)
    before = {parameter.data_ptr() for parameter in clip.cond_stage_model.parameters()}
    managed = of(clip)
    plain = managed.ready().encode([Request("a red heart")]).states
    after = {parameter.data_ptr() for parameter in managed.vlm.transformer.parameters()}
    patched = clip.clone()
    name = "qwen3vl_4b.transformer.model.layers.0.mlp.down_proj.weight"
    patched.add_patches({name: ("diff", (torch.ones(64, 96),))})
    changed = of(patched).ready().encode([Request("a red heart")]).states
    management.unload_all_models()
    eight = of(tiny_clips.make("qwen3vl", dtype=torch.float8_e4m3fn)).ready().encode([Request("a red heart")])
    facts = {
        "same decoder": managed.vlm.decoder is clip.cond_stage_model.qwen3vl_4b.transformer.model,
        "same patcher": managed.patcher is clip.patcher,
        "same parameters": after < before,
        "dtype of the pass": str(plain.dtype),
        "LoRA counts": gap(changed, plain),
        "LoRA leaves": gap(managed.ready().encode([Request("a red heart")]).states, plain),
        "loaded again": any(entry.model is clip.patcher for entry in management.current_loaded_models),
        "half": str(of(clip, torch.bfloat16).ready().encode([Request("a red heart")]).states.dtype),
        "fp8": bool(eight.states.isfinite().all()),
        "empty": list(managed.ready().encode_empty().states.shape[:2]),
        "ltx": of(tiny_clips.make("gemma3 of ltx")).vlm.notes[0],
    }
    ideogram = of(tiny_clips.make("ideogram", final_norm=False, lm_head=False)).ready()
    facts["cut down"] = list(ideogram.notes)
    facts["cut down encodes"] = list(ideogram.tapping((0, 7)).encode([Request("a red heart")]).states.shape[2:])
    facts["cut down writes"] = said(
        lambda: pack.module("unifusion_core.conditioning.verifi").rewrite(ideogram, [Request("a red heart")])
    )
    return facts


def refusals(pack) -> dict:
    import comfy.sd
    import comfy.sd1_clip

    class Target:
        params, clip, tokenizer = {}, comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer

    tiny = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    clip = comfy.sd.CLIP(Target, model_options={"clip_l_model_config": tiny})
    facts = {"sd1": said(lambda: pack.run("UniFusionVLMFromCLIP", clip=clip, dtype="default"))}
    import tiny_clips

    scheduled = tiny_clips.make("qwen3")
    scheduled.patcher.forced_hooks, scheduled.use_clip_schedule = object(), True
    facts["scheduled"] = said(lambda: pack.run("UniFusionVLMFromCLIP", clip=scheduled, dtype="default"))
    text = pack.module("nodes.clip_vlm").vlm_from_clip(tiny_clips.make("qwen3")).ready()
    module = pack.module("unifusion_core.conditioning.vlm")
    from PIL import Image

    facts["text only"] = said(lambda: text.encode([module.Request("a heart", (Image.new("RGB", (64, 64)),))]))
    return facts


def said(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def nodes(pack, pictures) -> dict:
    """The node, and UniFusion Rewrite behind it."""
    import tiny_clips
    import torch

    (vlm,) = pack.run("UniFusionVLMFromCLIP", clip=tiny_clips.make("qwen3vl"), dtype="default")
    small(vlm.vlm)
    picture = torch.rand(1, 80, 100, 3, generator=torch.Generator().manual_seed(1))
    facts = {}
    for name, images in (("text", {}), ("image", {"image0": picture})):
        for mode in ({"sampling": "random", "temperature": 1.0, "top_p": 0.9, "seed": 4}, {"sampling": "off"}):
            hidden, text = pack.run(
                "UniFusionRewrite",
                vlm=vlm,
                prompt="a big red heart",
                images=images,
                max_tiles=2,
                sampling=mode,
                max_new_tokens=5,
            )[:2]
            kinds = sorted({span.kind for span in hidden.spans[0]})
            facts[f"{name} {mode['sampling']}"] = {"kinds": kinds, "text": text, "width": hidden.states.shape[-1]}
    return facts
