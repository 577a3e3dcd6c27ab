"""LAP adapters before tiny random VLMs of core's own classes: listed, loaded, read through, freed."""

import gc
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))
import profiles

W, LAYERS = profiles.W, 36
PROMPT, TEXT = "a red fox in the snow", "A red fox stands in deep snow, seen from the side."
MINE = "lap"  # the names of all files begin so
ENCODERS = {
    "boogu": profiles.boogu,
    "ideogram4": profiles.ideogram,
    "klein-4b": lambda: profiles.klein("qwen3_4b"),
    "z-image": profiles.z_image,
}


def main(pack) -> dict:
    import torch

    torch.manual_seed(0)
    table = pack.module("unifusion_core.conditioning.profiles").PROFILES
    for name, profile in list(table.items()):
        table[name] = replace(profile, width=W)
    try:
        return checked(pack)
    finally:  # other scripts list what lies in these folders
        for file in (*folder().iterdir(), deep_vlm()):
            if file.is_file() and not file.is_symlink() and file.name.startswith(MINE):
                file.unlink()


def checked(pack) -> dict:
    cases = {name: Case(pack, name, encoder) for name, encoder in ENCODERS.items()}
    facts = {name: case.facts() for name, case in cases.items()}
    facts["listed"] = listed(pack)
    facts["refused"] = refusals(pack, cases)
    facts["from a file"] = from_a_file(pack)
    node = pack.core.NODE_CLASS_MAPPINGS["UniFusionEncodeForModel"]
    facts["inputs"] = [[field.id, bool(field.optional)] for field in node.define_schema().inputs]
    return facts


def folder() -> Path:
    import folder_paths

    return Path(folder_paths.models_dir) / "unifusion"


def deep_vlm() -> Path:
    return folder().parent / "text_encoders" / f"{MINE}-qwen3vl.safetensors"


class Case:
    """One profile: its VLM from a CLIP, an untrained adapter, one with random weights, and what the nodes make."""

    def __init__(self, pack, name, encoder):
        self.pack, self.name, self.run = pack, name, pack.run
        self.core = pack.module("unifusion_core.conditioning.adapter")
        self.profile = self.core.PROFILES[name]
        (self.vlm,) = self.run("UniFusionVLMFromCLIP", clip=profiles.small_clip(*encoder()), dtype="fp32")
        self.save("untrained")
        self.save("trained", std=0.2)
        self.tapped, self.adapter = self.load("untrained")
        self.trained = self.load("trained")[1]

    def file(self, kind: str) -> str:
        return f"{MINE}-{self.name}-{kind}.safetensors"

    def save(self, kind: str, std: float = 0.0, **changes) -> None:
        import torch

        spec = self.core.adapter_spec(self.name, LAYERS, W, heads=2, intermediate_size=48)
        adapter = self.core.LAPAdapter(replace(spec, **{"vlm": self.vlm.vlm.identity, **changes}))
        adapter.init_weights()
        with torch.no_grad():
            for weight in adapter.parameters() if std else ():
                weight.normal_(std=std)
        self.core.save_adapter(folder() / self.file(kind), adapter)

    def load(self, kind: str, vlm=None) -> tuple:
        return self.run("UniFusionLoadAdapter", vlm=vlm or self.vlm, adapter=self.file(kind))

    def states(self, vlm, text: str = "", profile: str | None = None):
        words = {"prompt": PROMPT, "max_tiles": 1, "sampling": {"sampling": "off"}, "max_new_tokens": 8, "text": text}
        return self.run("UniFusionRewrite", vlm=vlm, images={}, profile=profile or self.name, **words)[0]

    def encode(self, hidden, adapter=None, tokens="profile's own", **changes):
        """The one entry of the CONDITIONING, and what the node shows."""
        node = self.pack.core.NODE_CLASS_MAPPINGS["UniFusionEncodeForModel"]
        inputs = {"hidden": hidden, "profile": self.name, "tokens": tokens, "vlm": self.vlm, "adapter": adapter}
        out = node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**{**inputs, **changes})
        (entry,) = out.args[0]
        return entry, out.ui.as_dict()["text"][0]

    def directly(self, hidden, kinds):
        """What core's adapter makes of the states, without the nodes."""
        import torch

        adapter = self.core.load_adapter(folder() / self.file("trained"))
        norm = self.vlm.ready().final_norm if self.profile.post_norm else None
        with torch.inference_mode():
            return adapter(self.core.host_states(hidden.select(*kinds), self.profile, norm))

    def facts(self) -> dict:
        import torch

        plain, tapped = self.states(self.vlm), self.states(self.tapped)
        (host, host_words), _ = self.encode(plain)
        (untrained, words), shown = self.encode(tapped, self.adapter)
        (trained, _), _ = self.encode(tapped, self.trained)
        expected = self.directly(tapped, self.profile.kinds)
        written = self.states(self.tapped, TEXT)
        (host_rewrite, _), _ = self.encode(self.states(self.vlm, TEXT), tokens="rewrite")
        (rewrite, _), _ = self.encode(written, self.adapter, "rewrite")
        (trained_rewrite, _), _ = self.encode(written, self.trained, "rewrite")
        real, spec = expected.shape[1], self.adapter.adapter.spec
        return {
            "layers": [list(plain.layers), list(tapped.layers), list(spec.layers)],
            "own layers": list(self.states(self.tapped, profile="none").layers),
            "host's size": float(host.abs().mean()),
            "without the adapter": torch.equal(host, self.encode(tapped)[0][0]),
            "untrained": torch.equal(host, untrained) and torch.equal(host_rewrite, rewrite),
            "words": sorted(words) == sorted(host_words)
            and all(torch.equal(words[key], host_words[key]) for key in words),
            "trained differs": float((trained - host).abs().max()),
            "as core": torch.equal(trained[:, :real], expected) and not trained[:, real:].any(),
            "rewrite as core": torch.equal(
                trained_rewrite[:, : len(written.spans[0][-1])], self.directly(written, ("rewrite",))
            ),
            "rewrite is the last span": written.spans[0][-1].kind,
            "shown": shown,
            "no second VLM": self.tapped.patcher is self.vlm.patcher and self.tapped.vlm.model is self.vlm.vlm.model,
            "its own taps stay": list(self.vlm.vlm.layers),
        }


def listed(pack) -> dict:
    """Adapters whole and in shards are listed; models, folders and broken files are not, nor opened by name."""
    import torch

    files = pack.module("nodes.files")
    save = pack.module("unifusion_core.checkpoint").save_checkpoint
    spec = {"kind": "lap-adapter"}
    save(folder() / "lap-big.safetensors", {"a": torch.zeros(2), "b": torch.zeros(2)}, spec, max_shard_bytes=8)
    save(folder() / "lap-model.safetensors", {"a": torch.zeros(2)}, {"kind": "other"})
    (folder() / "lap-cut.safetensors").write_bytes(b"\xff" * 20)
    (folder() / "lap-odd.safetensors.index.json").write_text("[1, 2")
    (folder() / "lap-gone.safetensors.index.json").write_text('{"weight_map": {"a": "../none.safetensors"}}')
    (folder() / "lap-words.txt").write_text("lap-adapter")
    refused = {}
    for name in ("../../etc/passwd", "/etc/passwd", "lap-model.safetensors", "none.safetensors"):
        try:
            files.adapter_path(name)
        except ValueError as error:
            refused[name] = str(error)
    models = [name for name in files.list_models() if Path(name).name.startswith(MINE)]
    return {"adapters": sorted(files.list_adapters()), "models": models, "refused": refused}


def refusals(pack, cases) -> dict[str, str]:
    klein, image, boogu = cases["klein-4b"], cases["z-image"], cases["boogu"]
    image.save("of another VLM", vlm="qwen3-36x32-1")
    image.save("too wide", lap=replace(image.adapter.adapter.spec.lap, width=2 * W))
    boogu_states, image_states = boogu.states(boogu.tapped), image.states(image.tapped)
    said = {}
    for name, attempt in {
        "another profile": lambda: image.encode(image_states, klein.adapter),
        "not tapped": lambda: image.encode(image.states(image.vlm), image.adapter),
        "states of another VLM": lambda: image.encode(replace(image_states, vlm="qwen3-36x32-1"), image.adapter),
        "no VLM for its norm": lambda: boogu.encode(boogu_states, boogu.adapter, vlm=None),
        "another VLM for its norm": lambda: boogu.encode(boogu_states, boogu.adapter, vlm=image.vlm),
        "loaded with another VLM": lambda: image.load("of another VLM"),
        "loaded with a narrower VLM": lambda: image.load("too wide"),
        "loaded with the embedded VLM": lambda: image.load("untrained", micro(pack)),
        "a VLM as adapter": lambda: image.encode(image_states, image.tapped),
        "no such file": lambda: image.run("UniFusionLoadAdapter", vlm=image.vlm, adapter="none.safetensors"),
    }.items():
        try:
            attempt()
        except ValueError as error:
            said[name] = str(error)
    return said


def micro(pack):
    return pack.run("UniFusionLoadVLM", vlm="micro (embedded)")[0]


def from_a_file(pack) -> dict:
    """A VLM that is no CLIP's: one copy of it and of the adapter, moved off, brought back and freed together."""
    import comfy.model_management as management
    import torch
    from comfy.patcher_extension import CallbacksMP
    from vlm_options import save_qwen

    path = deep_vlm()
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(False):
        save_qwen(path, LAYERS)
    case = Case.__new__(Case)
    case.pack, case.name, case.run = pack, "krea2", pack.run
    case.core = pack.module("unifusion_core.conditioning.adapter")
    (case.vlm,) = pack.run("UniFusionLoadVLM", vlm=f"text_encoders/{path.name}")
    case.save("untrained")
    tapped, adapter = case.load("untrained")
    again, same = case.load("untrained")
    hidden = case.states(tapped)
    before, (host, _) = case.encode(hidden, adapter)[0][0], case.encode(case.states(case.vlm))[0]

    def loaded() -> list[bool]:
        patchers = [entry.model for entry in management.current_loaded_models]
        return [any(patcher is part.patcher for patcher in patchers) for part in (tapped, adapter)]

    facts = {
        "untrained": torch.equal(before, host),
        "one adapter": same is adapter,
        "one VLM": again.patcher is tapped.patcher is case.vlm.patcher,
        "told to forget once": len(tapped.patcher.get_all_callbacks(CallbacksMP.ON_DETACH)),
        "loaded": loaded(),
    }
    management.unload_all_models()
    facts["after unload models"] = loaded()
    facts["the same afterwards"] = torch.equal(case.encode(case.states(tapped), adapter)[0][0], before)
    facts["loaded again"] = loaded()
    gone = weakref.ref(adapter.adapter), weakref.ref(tapped.vlm.model)
    case.vlm = None
    gc.collect()
    facts["the VLM is shared by whoever loads it next"] = (
        pack.run("UniFusionLoadVLM", vlm=f"text_encoders/{path.name}")[0].patcher is tapped.patcher
    )
    adapter = same = tapped = again = None
    management.unload_all_models()
    gc.collect()
    facts["gone when no graph holds them"] = [part() is None for part in gone]
    return facts
