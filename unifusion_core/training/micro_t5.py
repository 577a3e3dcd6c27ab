"""Recipe `micro-t5`: a tiny T5 that learns the micro-world's sentences; its encoder is the text baseline.

It fills in blanks: spans of a text are replaced by one sentinel each, and the decoder writes the sentinels with what
they hide (Raffel et al., "Exploring the limits of transfer learning", 2020, Sec. 3.1.4). And it is given tasks, as the
Flan-T5 that the paper cites: to write the caption of what a prompt asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, T5ForConditionalGeneration

from ..microworld.caption import caption
from ..microworld.edits import sample_edit
from ..microworld.prompts import sample_prompt
from ..presets import micro
from .loop import LoopSpec, fit
from .micro_vlm import TEXT_MIX, Collator, build_tokenizer

SENTINELS = 24  # stand behind the tokenizer's words in the table of embeddings
MASKED, LONGEST_SPAN = 0.25, 3  # share of the words, and words of one span
BLANK_SHARE = 0.3  # of the examples; the others are tasks
EDIT_SHARE = 0.1  # of the sentences with blanks
TASK_MIX = {**TEXT_MIX, "full": 0.6}

LOOP = LoopSpec(
    steps=1000,
    batch_size=48,
    rate=2e-3,
    muon_rate=4e-3,
    warmup=60,
    decay_fraction=0.5,
    ema_decay=0.998,
    save_minutes=3,
)


@dataclass(frozen=True)
class Examples:
    """What the encoder reads and what the decoder writes, right-padded."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def to(self, device: torch.device | str, **_) -> Examples:
        return Examples(*(getattr(self, field.name).to(device) for field in fields(self)))


class Trainee(nn.Module):
    """The T5 as `fit` asks for it."""

    def __init__(self, t5: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.t5 = t5

    def forward(self, examples: Examples) -> Tensor:
        return self.t5(input_ids=examples.ids, attention_mask=examples.mask, labels=examples.labels).loss


def build_model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """As wide as the micro VLM, whose states it is compared with; untrained."""
    width = micro().lap.width
    config = T5Config(
        vocab_size=len(tokenizer) + SENTINELS,
        d_model=width,
        d_kv=32,
        d_ff=2 * width,
        num_heads=4,
        num_layers=6,
        num_decoder_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        relative_attention_max_distance=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def example(rng: Random, collate: Collator, first: int) -> tuple[list[int], list[int]]:
    """What the encoder reads and the decoder writes: a text with blanks, or a prompt and its caption."""
    if rng.random() < BLANK_SHARE:
        return corrupt(collate.encode(sentence(rng)), rng, first, collate.end)
    prompt = sample_prompt(rng, rng.choices(tuple(TASK_MIX), tuple(TASK_MIX.values()))[0])
    return ([*collate.encode(text), collate.end] for text in (prompt.text, caption(prompt.scene)))


def sentence(rng: Random) -> str:
    """A prompt, a caption, or an edit."""
    if rng.random() < EDIT_SHARE:
        return sample_edit(rng).instruction
    prompt = sample_prompt(rng, rng.choices(tuple(TEXT_MIX), tuple(TEXT_MIX.values()))[0])
    return prompt.text if rng.random() < 0.5 else caption(prompt.scene)


def corrupt(words: Sequence[int], rng: Random, first: int, end: int) -> tuple[list[int], list[int]]:
    """Token ids → the text with blanks, and what the decoder writes; sentinels are numbered from `first`.

    At least one word is hidden, and never more spans than there are sentinels.
    """
    text, hidden, at, spans = [], [], 0, 0
    chance = MASKED / ((1 + LONGEST_SPAN) / 2)
    forced = rng.randrange(len(words))
    while at < len(words):
        if spans < SENTINELS and (rng.random() < chance or (at == forced and not spans)):
            length = rng.randint(1, LONGEST_SPAN)
            text.append(first + spans)
            hidden += [first + spans, *words[at : at + length]]
            at, spans = at + length, spans + 1
        else:
            text.append(words[at])
            at += 1
    return [*text, end], [*hidden, end]


def batch(step: int, seed: int, collate: Collator, first: int, size: int, shard: tuple[int, int] = (0, 1)) -> Examples:
    """One step's examples; `shard` = (process, processes) takes its share."""
    rng = Random(f"t5-{seed}-{step}")
    pairs = [tuple(example(rng, collate, first)) for _ in range(size)][shard[0] :: shard[1]]
    longest, most = (max(len(pair[i]) for pair in pairs) for i in (0, 1))
    return Examples(
        torch.tensor([text + [0] * (longest - len(text)) for text, _ in pairs]),
        torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text, _ in pairs]),
        torch.tensor([hidden + [-100] * (most - len(hidden)) for _, hidden in pairs]),
    )


def train(
    folder: Path,
    *,
    loop: LoopSpec = LOOP,
    device: str | None = None,
    report: Callable[[int, int], None] | None = None,
) -> T5ForConditionalGeneration:
    """Trains the T5; what `fit` keeps goes to `folder`. `report` is called with (steps done, of all) before each."""
    torch.manual_seed(loop.seed)
    tokenizer = build_tokenizer()
    collate, model = Collator(tokenizer), Trainee(build_model(tokenizer))

    def make(step: int, seed: int, shard: tuple[int, int]) -> Examples:
        if report:
            report(step, loop.steps)
        return batch(step, seed, collate, len(tokenizer), loop.batch_size, shard)

    fit(model, lambda model, examples: (model(examples), {}), make, loop, folder, device=device)
    return model.t5


def save(t5: T5ForConditionalGeneration, folder: Path) -> None:
    """Writes the folder that `conditioning.vlm.t5.load_t5` opens: the encoder alone, with the tokenizer."""
    encoder_of(t5).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def encoder_of(t5: T5ForConditionalGeneration) -> T5EncoderModel:
    """The encoder alone, with weights of its own."""
    encoder = T5EncoderModel(t5.config)
    encoder.load_state_dict({k: v for k, v in t5.state_dict().items() if k.startswith(("shared.", "encoder."))})
    return encoder.eval()
