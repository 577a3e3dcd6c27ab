"""A script, run by `unifusion bench --comfy` in ComfyUI's Python: our MODEL under core's KSampler, as a ratio.

Its arguments are COMFYUI PACK STEPS REPEATS; the last line of stdout is the result as JSON.
"""

import asyncio
import json
import sys
import time


def main(comfy: str, pack: str, steps: int, repeats: int) -> dict:
    sys.path[0] = comfy
    sys.argv = ["main.py", "--cpu", "--disable-api-nodes"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import execution  # noqa: F401  (before nodes, as in main.py)
    import server
    import torch

    import nodes

    torch.set_num_threads(1)
    server.PromptServer(asyncio.new_event_loop())
    asyncio.run(nodes.load_custom_node(pack))

    def run(kind: str, **inputs):
        return nodes.NODE_CLASS_MAPPINGS[kind].PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**inputs).args

    with torch.inference_mode():
        (vlm,) = run("UniFusionLoadVLM", vlm="micro (embedded)")
        model, fusion, _ = run("UniFusionLoadModel", model="micro (embedded)", dtype="default")
        (positive,) = run("UniFusionEmptyConditioning", vlm=vlm, fusion=fusion)
        (latent,) = run("UniFusionEmptyLatent", model=model, width=64, height=64, batch_size=1)
        forwards = [0.0]
        inside = model.model.diffusion_model.forward

        def timed(*args, **kwargs):
            start = time.process_time()
            out = inside(*args, **kwargs)
            forwards[0] += time.process_time() - start
            return out

        model.model.diffusion_model.forward = timed
        best = None
        for seed in range(repeats + 1):  # the first warms up
            forwards[0], start = 0.0, time.process_time()
            nodes.KSampler().sample(model, seed, steps, 2.5, "euler", "simple", positive, positive, latent, 1.0)
            ratio = (time.process_time() - start) / forwards[0]
            best = ratio if seed and (best is None or ratio < best) else best
    return {"ksampler_overhead": best}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:3], *map(int, sys.argv[3:]))), flush=True)
