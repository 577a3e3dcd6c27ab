"""Load VLM's further sources and options: a single file of Qwen-VL, offloading, a package that is not there."""

from pathlib import Path


def main(pack, weights: str) -> dict:
    import folder_paths

    single = Path(folder_paths.models_dir) / "text_encoders" / "qwen3vl_tiny.safetensors"
    single.parent.mkdir(parents=True, exist_ok=True)
    save_qwen(single)
    # a schema is built when the server starts; the list is asked anew
    files = pack.module("nodes.files")
    (vlm,) = pack.run("UniFusionLoadVLM", vlm="text_encoders/qwen3vl_tiny.safetensors")
    hidden, text, _ = _rewrite(pack, vlm, {"sampling": "off"})

    (plain,) = pack.run("UniFusionLoadVLM", vlm="micro (embedded)")
    (spread,) = pack.run("UniFusionLoadVLM", vlm="micro (embedded)", offload=True)
    words = [_rewrite(pack, each, {"sampling": "greedy"})[1] for each in (plain, spread)]
    refused = {}
    for name, options in {
        "package": {"quantization": "bnb-4bit"},
        "name": {"quantization": "nonsense"},
    }.items():
        try:
            pack.run("UniFusionLoadVLM", vlm="micro (embedded)", **options)
        except ValueError as error:
            refused[name] = str(error)
    return {
        "listed": files.list_vlms(),
        "single": [vlm.vlm.family, vlm.vlm.num_layers, list(hidden.states.shape), text],
        "words": words,
        "same copy": plain is pack.run("UniFusionLoadVLM", vlm="micro (embedded)")[0],
        "own copy": plain is not spread,
        "patcher holds": [len(list(each.patcher.model.parameters())) > 0 for each in (plain, spread)],
        "refused": refused,
    }


def _rewrite(pack, vlm, sampling):
    return pack.run(
        "UniFusionRewrite",
        vlm=vlm,
        prompt="a big red heart",
        images={},
        max_tiles=1,
        sampling=sampling,
        max_new_tokens=40,
    )


def save_qwen(path: Path, layers: int = 4) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {
        "vocab_size": 151936,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 24,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig.from_dict({"text_config": text, "vision_config": vision, "tie_word_embeddings": True})
    )
    names = {"model.visual.": "visual.", "model.language_model.": "model."}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for old, new in names.items():
            if name.startswith(old):
                tensors[new + name[len(old) :]] = tensor.contiguous()
    save_file(tensors, path)
