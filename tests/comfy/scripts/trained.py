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
        "odd": odd_sizes(pack, setting),
    }


def odd_sizes(pack, setting) -> dict:
    """Latents of 7 x 9, drawn, decoded and encoded again; and what tiles make of larger ones."""
    import torch

    vae, channels = setting.vae, setting.vae.latent_channels
    drawn = setting.sample(setting.prompt, latent={"samples": torch.zeros(1, channels, 7, 9)})
    (picture,) = pack.run("VAEDecode", vae=vae, samples={"samples": drawn})
    (again,) = pack.run("VAEEncode", vae=vae, pixels=picture)
    high, wide = (side * vae.downscale_ratio for side in again["samples"].shape[2:])
    top, left = (56 - high) // 2, (72 - wide) // 2
    (middle,) = pack.run("VAEEncode", vae=vae, pixels=picture[:, top : top + high, left : left + wide])
    (even,) = pack.run("VAEDecode", vae=vae, samples={"samples": drawn[..., [*range(7), 6], :][..., [*range(9), 8]]})
    tiles = {"vae": vae, "tile_size": 128, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    (tiled,) = pack.run("VAEDecodeTiled", samples={"samples": torch.zeros(1, channels, 21, 19)}, **tiles)
    (small,) = pack.run("VAEEncodeTiled", pixels=tiled, **tiles)
    try:
        pack.run("VAEEncode", vae=vae, pixels=torch.zeros(1, 7, 72, 3))
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {
        "picture": list(picture.shape),
        "finite": bool(tiled.isfinite().all() and small["samples"].isfinite().all()),
        "again": list(again["samples"].shape),
        "off centre": float((again["samples"] - middle["samples"]).abs().max()),
        "off its padding": float((picture - even[:, :56, :72]).abs().max()),
        "tiled": [list(tiled.shape), list(small["samples"].shape)],
        "refused": refused,
    }
