"""A model that `unifusion train generator` exported, opened and sampled by the nodes."""

import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))


def main(pack, folder: str) -> dict:
    import folder_paths
    from common import Setting

    name = Path(folder).parent.name  # several tests open theirs in one ComfyUI
    place = Path(folder_paths.models_dir) / "unifusion" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(folder, place)
    (vlm,) = pack.run("UniFusionLoadVLM", vlm=f"unifusion/{name}/vlm")
    setting = Setting(pack, model=f"unifusion/{name}/model.safetensors")
    latents = setting.sample(setting.prompt)
    (picture,) = pack.run("VAEDecode", vae=setting.vae, samples={"samples": latents})
    (again,) = pack.run("VAEEncode", vae=setting.vae, pixels=picture)
    return {
        "round trip": list(again["samples"].shape),
        "same VLM": vlm.vlm.identity == setting.fusion.spec.vlm,
        "picture": list(picture.shape),
        "spread": float(picture.std()),
        "latents": latents.flatten().tolist(),
    }
