"""What each verb of the command line does: parsed arguments in, a JSON-able report out."""

from .common import check_target
from .pictures import demo, generate, rewrite
from .scores import bench, evaluate_ab, evaluate_dpg, evaluate_micro, evaluate_reconstruction, evaluate_vqa, reproduce
from .train import LARGE, RECIPES, train

__all__ = [
    "LARGE",
    "RECIPES",
    "bench",
    "check_target",
    "demo",
    "evaluate_ab",
    "evaluate_dpg",
    "evaluate_micro",
    "evaluate_reconstruction",
    "evaluate_vqa",
    "generate",
    "reproduce",
    "rewrite",
    "train",
]
