"""Presses cancel at the third token of a rewrite, and counts the tokens that are still written."""

import comfy.model_management as management
import comfy.utils
from comfy_execution.utils import CurrentNodeContext
from server import PromptServer

PRESSED_AT = 3


def main(pack) -> dict:
    tokens = []

    def token_came(text, node, sid=None):
        tokens.append(text)
        if len(tokens) == PRESSED_AT:
            management.interrupt_current_processing(True)

    def hook(value, total, preview, prompt_id=None, node_id=None):  # as main.py has it
        management.throw_exception_if_processing_interrupted()

    comfy.utils.set_progress_bar_global_hook(hook)
    comfy.utils.PROGRESS_THROTTLE_MIN_INTERVAL = 1e9  # core passes on few updates; here none but the first and the last
    PromptServer.instance.send_progress_text = token_came
    (vlm,) = pack.run("UniFusionLoadVLM", vlm="micro (embedded)")
    interrupted = False
    try:
        with CurrentNodeContext("job", "1", 0):
            pack.run(
                "UniFusionRewrite",
                vlm=vlm,
                prompt="one big red circle",
                max_tiles=9,
                max_new_tokens=400,
                sampling={"sampling": "random", "temperature": 5.0, "top_p": 1.0, "seed": 1},
            )
    except management.InterruptProcessingException:
        interrupted = True
    return {"tokens": len(tokens), "interrupted": interrupted, "tokens_after": len(tokens) - PRESSED_AT}
