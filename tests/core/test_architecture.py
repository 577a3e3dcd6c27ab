"""The direction table of the design: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = "unifusion_core"

# Each line may import only what stands above it (and itself).
LINES = [
    {"condition", "files", "layers", "lora", "microworld", "quantized"},
    {"checkpoint"},
    {"conditioning", "diffusion"},
    {"presets"},
    {"fusion", "conditioning_choice"},
    {"krea2"},
    {"vaes"},
    {"pipeline"},
    {"evaluation", "training"},
    {"experiments"},
    {"demo"},
    {"verbs"},
    {"cli"},
    {"__main__"},
]
RANK = {unit: rank for rank, line in enumerate(LINES) for unit in line}
ONLY_IN = {
    "transformers": ("conditioning/vlm/", "training/", "conditioning/verifi.py", "evaluation/bench_"),
    "diffusers": ("diffusion/vae.py", "diffusion/vae_flux2.py", "training/host_files.py", "evaluation/bench_krea2.py"),
    "safetensors": ("checkpoint.py",),
    "accelerate": ("training/", "conditioning/vlm/"),
    "torchao": ("conditioning/vlm/",),
}
NODES_TAKE = {"transformers": ("nodes/gemma_tokens.py",)}  # which gives core's Gemma tokenizer transformers' face
VERIFI_TAKES = ("transformers.LogitsProcessor", "transformers.StoppingCriteria")
FOUNDATION = sys.stdlib_module_names | {"torch", "numpy", "PIL"}


def imported(path: str, source: str) -> list[tuple[bool, str]]:
    """(relative?, dotted name) of every import, wherever in the file it stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(False, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = path.split("/")[:-1]
            base = folder[: len(folder) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            found += [(node.level > 0, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found.append((False, ast.unparse(node.args[0]).strip("'\"")))
    return found


def violations(path: str, source: str) -> list[str]:
    top, inside = path.split("/", 1)
    unit = inside.split("/")[0].removesuffix(".py")
    found = []
    for relative, name in imported(path, source):
        package, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if relative and package == CORE and top == CORE:
            below = target != unit and RANK.get(target, 99) >= RANK.get(unit, -1)
            wrong = below or (inside == "diffusion/sampler.py" and rest.startswith("diffusion.schedule"))
        elif relative:
            wrong = top == CORE or (package == CORE and target in ("training", "verbs", "cli", "__main__"))
        elif top == CORE and RANK.get(unit) == 0 and package not in FOUNDATION:
            wrong = True
        elif package in ONLY_IN:
            allowed = inside.startswith(ONLY_IN[package]) if top == CORE else path in NODES_TAKE.get(package, ())
            wrong = not allowed
            wrong = wrong or (inside == "conditioning/verifi.py" and not name.startswith(VERIFI_TAKES))
        else:
            outside = package.startswith("comfy") or package in ("folder_paths", "nodes")
            wrong = package == CORE or (top == CORE and outside)
        if wrong:
            found.append(f"{path} imports {name}")
    return found


def test_every_import_follows_the_table():
    files = [file for top in (CORE, "nodes") for file in sorted((ROOT / top).rglob("*.py"))]
    assert files
    assert [v for f in files for v in violations(f.relative_to(ROOT).as_posix(), f.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("unifusion_core/pipeline.py", "from unifusion_core import presets"),
        ("unifusion_core/pipeline.py", "import unifusion_core.presets"),
        ("unifusion_core/pipeline.py", "import comfy.sd"),
        ("unifusion_core/pipeline.py", "from comfy_api.latest import io"),
        ("unifusion_core/pipeline.py", "import folder_paths"),
        ("unifusion_core/pipeline.py", "import nodes"),
        ("unifusion_core/pipeline.py", "from ..nodes import sockets"),
        ("unifusion_core/pipeline.py", "from .cli import main"),
        ("unifusion_core/pipeline.py", "from .training import loop"),
        ("unifusion_core/conditioning/lap.py", "from ..diffusion.dit import DiT"),
        ("unifusion_core/conditioning/lap.py", "from .. import diffusion"),
        ("unifusion_core/conditioning/vlm/base.py", "from ...diffusion import vae"),
        ("unifusion_core/diffusion/dit.py", "def late():\n    from ..conditioning import lap"),
        ("unifusion_core/diffusion/sampler.py", "from .schedule import Schedule"),
        ("unifusion_core/diffusion/sampler.py", "from . import schedule"),
        ("unifusion_core/conditioning/lap.py", "import transformers"),
        ("unifusion_core/conditioning/verifi.py", "from transformers import AutoModel"),
        ("unifusion_core/diffusion/dit.py", "from diffusers import AutoencoderKL"),
        ("unifusion_core/pipeline.py", "from safetensors.torch import load_file"),
        ("unifusion_core/pipeline.py", "importlib.import_module('safetensors')"),
        ("unifusion_core/evaluation/micro.py", "from accelerate import Accelerator"),
        ("unifusion_core/layers.py", "import tqdm"),
        ("unifusion_core/layers.py", "from .condition import Condition"),
        ("nodes/encode.py", "from ..unifusion_core.training import loop"),
        ("nodes/encode.py", "from ..unifusion_core import cli"),
        ("nodes/encode.py", "from unifusion_core import pipeline"),
        ("nodes/encode.py", "from safetensors.torch import load_file"),
    ],
)
def test_a_forbidden_import_is_found(path, source):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("unifusion_core/conditioning/vlm/base.py", "from transformers import AutoModel\nfrom ..lap import LAPSpec"),
        ("unifusion_core/conditioning/vlm/base.py", "from ...condition import Condition\nfrom . import tiling"),
        ("unifusion_core/conditioning/verifi.py", "from transformers import LogitsProcessorList, StoppingCriteria"),
        ("unifusion_core/diffusion/vae.py", "from diffusers import AutoencoderKL\nfrom .flow import velocity"),
        ("unifusion_core/layers.py", "import math\nimport torch.nn.functional as F\nfrom PIL import Image"),
        ("unifusion_core/training/loop.py", "from accelerate import Accelerator\nfrom ..pipeline import UniFusion"),
        ("unifusion_core/__main__.py", "from .cli import main"),
        ("nodes/encode.py", "import comfy.utils, nodes\nfrom . import sockets\nfrom ..unifusion_core import pipeline"),
    ],
)
def test_an_allowed_import_passes(path, source):
    assert violations(path, source) == []
