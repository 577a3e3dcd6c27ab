"""Which files and folders the loader nodes list."""

import json
import os
from pathlib import Path


def main(pack, weights: str) -> dict:
    import folder_paths

    files = pack.module("nodes.files")
    models = Path(folder_paths.models_dir)
    mine = models / "unifusion" / "mine"
    mine.mkdir(parents=True, exist_ok=True)
    for name in ("base.safetensors", "vae.safetensors", "vlm"):
        os.symlink(Path(weights) / name, mine / name)
    (models / "unifusion" / "big.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"dit.time_mod_proj.weight": "big-00001-of-00002.safetensors"}})
    )
    os.symlink(Path(weights) / "base.safetensors", models / "unifusion" / "big-00001-of-00002.safetensors")
    (models / "unifusion" / "odd.safetensors.index.json").write_text("[1, 2")
    (models / "checkpoints" / "cut.safetensors").write_bytes(b"\xff" * 20)
    (models / "vlm" / "qwen").mkdir(parents=True)
    (models / "vlm" / "qwen" / "config.json").write_text("{}")
    for place in ("cache/latents/0a/0a1b.safetensors", "cache/states/0c.safetensors", "state/step-2/model.safetensors"):
        (mine / place).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(Path(weights) / "base.safetensors", mine / place)
    header = json.dumps({"__metadata__": {"unifusion_spec": json.dumps({"kind": "lap-adapter"})}}).encode()
    (mine / "lap.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused = {}
    for name in (
        "../../etc/passwd",
        "unifusion/../mine/base.safetensors",
        "/etc/passwd",
        "unifusion/nothing.safetensors",
    ):
        try:
            files.model_path(name)
        except ValueError as error:
            refused[name] = str(error)
    model, fusion, vae = pack.run("UniFusionLoadModel", model="unifusion/mine/base.safetensors", dtype="default")
    (vlm,) = pack.run("UniFusionLoadVLM", vlm="unifusion/mine/vlm")
    files._kind.cache_clear()
    opened, read = [], files._header
    files._header = lambda path: opened.append(path.relative_to(models).as_posix()) or read(path)
    listed = {"models": files.list_models(), "adapters": files.list_adapters()}
    files._header = read
    (mine / "lap.safetensors").unlink()  # other scripts list adapters too
    return listed | {
        "opened": opened,
        "vlms": files.list_vlms(),
        "refused": refused,
        "loads": [type(model.model).__name__, fusion.spec.name, vae.latent_channels, vlm.vlm.family],
    }
