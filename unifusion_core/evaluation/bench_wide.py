"""Speed and memory on a random VLM of a large one's proportions, where capture and loading can be seen at all.

Memory is a peak of resident pages, so each variant runs in a process of its own: `… -m …bench_wide VARIANT FOLDER`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from ..conditioning.lap import LAPSpec, LayerwiseAttentionPooling
from ..conditioning.verifi import rewrite
from ..conditioning.vlm import FrozenVLM, Request, load_vlm

WEIGHTS = Path(__file__).parents[1] / "weights" / "micro" / "vlm"
LAYERS, WIDTH, HEADS, INTERMEDIATE = 28, 448, 4, 2368  # InternVL3-8B's by eighths
FEW_AND_LARGE = 6, 16384  # layers and MLP of the file to load: the kernel maps some 64 kB of even the smallest tensor
TOKENS = 1500  # of the prompt whose states are captured
# an odd MLP leaves BLAS remainders, which round differently
LAP = LAPSpec(num_layers=10, width=512, num_heads=4, intermediate_size=1408)
LAP_TOKENS, LAP_CHUNK = 2860, 256  # the paper's longest condition
PICTURES, WORDS = 8, 8  # 8 pictures of 10 tiles before a short rewrite: what a prefix cache is for
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def capture_time(repeats: int) -> float:
    """A pass that keeps every third layer over one that keeps none."""
    vlm = _wide()
    prompts = vlm.prepare([_long_request()])

    def bare() -> None:
        vlm.model(input_ids=prompts.ids, attention_mask=prompts.mask.long(), use_cache=False, logits_to_keep=1)

    kept, plain = _cpu_seconds(lambda: vlm.encode([_long_request()]), bare, repeats=repeats)
    return kept / plain


def prefix_reuse(repeats: int) -> float:
    """A new instruction on the same pictures from scratch, over one that finds them read already."""
    vlm = _wide()
    pictures = tuple(
        Image.new("RGB", (192, 192), color) for color in ("red", "green", "blue", "gray") * (PICTURES // 4)
    )

    def ask(prompt: str) -> None:
        rewrite(vlm, [Request(prompt, pictures, grid=(3, 3))], max_new_tokens=WORDS)

    def fresh() -> None:
        vlm.prefix_cache.clear()
        ask("a red heart at top-left")

    def known() -> None:
        ask("a blue star at bottom-right")

    scratch, reused = _cpu_seconds(fresh, known, repeats=repeats, alternate=False)
    vlm.prefix_cache.clear()
    return scratch / reused


def capture_memory() -> float | None:
    """What keeping every third layer adds to the peak of a pass, over what keeping all of them adds."""
    bare, kept, every = (_peak(variant) for variant in ("pass", "pass-third", "pass-all"))
    return None if bare is None else (kept - bare) / (every - bare)


def lap_memory() -> float | None:
    """Peak of LAP by chunks over its peak at once; ValueError if the two differ in a bit."""
    chunked, naive = _peak("lap-chunked"), _peak("lap-naive")
    return None if chunked is None else chunked / naive


def load_memory() -> float | None:
    """Resident memory that loading adds before the first pass, over the size of the weights' file."""
    folder = _folder(*FEW_AND_LARGE)
    grown = _peak("load", folder)
    return None if grown is None else grown / (folder / "model.safetensors").stat().st_size


def _cpu_seconds(*sides: Callable[[], object], repeats: int, alternate: bool = True) -> list[float]:
    """As `bench`'s, on the one thread that the caller has set."""
    least = [float("inf")] * len(sides)
    with torch.no_grad():
        for turn in range(repeats + 1):
            for number in range(len(sides))[:: 1 if turn % 2 or not alternate else -1]:
                start = time.process_time()
                sides[number]()
                if turn:
                    least[number] = min(least[number], time.process_time() - start)
    return least


def _long_request() -> Request:
    return Request(" ".join(["a large red heart at the top"] * (TOKENS // 7)), system="")


@cache
def _folder(layers: int | None = None, intermediate: int | None = None) -> Path:
    """A folder with the random VLM, made once per process and removed when it ends."""
    from atexit import register

    from transformers import AutoConfig, InternVLForConditionalGeneration
    from transformers.utils import logging

    layers, intermediate = layers or LAYERS, intermediate or INTERMEDIATE
    logging.disable_progress_bar()

    folder = Path(tempfile.mkdtemp(prefix="unifusion-bench-"))
    register(shutil.rmtree, folder, ignore_errors=True)
    config = AutoConfig.from_pretrained(WEIGHTS, local_files_only=True)
    text = config.text_config
    text.hidden_size, text.num_hidden_layers, text.intermediate_size = WIDTH, layers, intermediate
    text.num_attention_heads, text.num_key_value_heads = HEADS, HEADS // 2
    text.layer_types = ["full_attention"] * layers
    text.max_position_embeddings = 8192
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="10GB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copy(WEIGHTS / name, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, "pad_token_id": 0}))
    return folder


@cache
def _wide() -> FrozenVLM:
    return load_vlm(_folder(), dtype=torch.float32)  # many CPUs have no fast bf16


def _peak(variant: str, folder: Path | None = None) -> int | None:
    """Bytes that a variant adds, measured in a fresh process; None where Linux's /proc is not there."""
    if not CLEAR.exists():
        return None
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",  # so that freed pages leave the resident set
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", f"{__package__}.bench_wide", variant, str(folder or _folder())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        raise ValueError(f"the measure {variant!r} failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def _resident(field: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(field))


def _grown(run: Callable[[], object], field: str = "VmHWM") -> int:
    before = _resident("VmRSS")
    CLEAR.write_text("5")  # sets the peak back to now
    kept = run()
    after = _resident(field)
    del kept
    return after - before


@torch.no_grad()
def _measure(variant: str, folder: str) -> int:
    torch.set_num_threads(1)
    if variant == "load":
        load_vlm(WEIGHTS)  # what is imported for the first load is not the model's
        return _grown(lambda: load_vlm(folder), "VmRSS")
    if variant.startswith("lap"):
        return _lap(LAP_CHUNK if variant == "lap-chunked" else None)
    vlm = load_vlm(folder, dtype=torch.float32)
    vlm.encode([Request("a red heart")])  # pages the weights in
    prompts = vlm.prepare([_long_request()])
    inputs = {"input_ids": prompts.ids, "attention_mask": prompts.mask.long(), "use_cache": False, "logits_to_keep": 1}
    runs = {
        "pass": lambda: vlm.model(**inputs),
        "pass-third": lambda: vlm.encode([_long_request()]),
        "pass-all": lambda: vlm.model(**inputs, output_hidden_states=True),
    }
    runs[variant]()
    return _grown(runs[variant])


def _lap(chunk: int | None) -> int:
    lap = LayerwiseAttentionPooling(LAP).eval()
    states = torch.randn(1, LAP_TOKENS, LAP.num_layers, LAP.width, generator=torch.Generator().manual_seed(0))
    if not torch.equal(lap(states, chunk_size=LAP_CHUNK), lap(states)):
        raise ValueError("LAP in chunks differs from LAP at once")
    return _grown(lambda: lap(states, chunk_size=chunk))


if __name__ == "__main__":
    print(_measure(*sys.argv[1:]))
