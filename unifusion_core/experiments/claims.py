"""The paper's claims, one small declaration each. Of a difference at toy scale the direction counts, not the size."""

from __future__ import annotations

from collections.abc import Sequence

from .arms import Arm
from .claim import Claim, Curve, Row, Shipped
from .lineup import (
    BASE,
    BASE_LONGER,
    EDITED,
    EVERY,
    FROM_T5,
    KEYS,
    LAP,
    LAP_EVERY,
    LAP_PER_BLOCK,
    LAST,
    PENULTIMATE,
    PENULTIMATE_REFINED,
    REFINED,
    REFINED_BEFORE,
    REWRITTEN,
    STREAM,
    T5,
)
from .measure_pictures import SHARES
from .verdict import Above, Between, Same


def _rows(by: str, **arms: Arm | Shipped) -> tuple[Row, ...]:
    return tuple(Row(name=name.replace("_", " "), of=arm, by=by) for name, arm in arms.items())


CANDIDATES = Claim(
    name="conditioning",
    where="Fig. 4, Sec. 2.2",
    says="Of the ways to condition on a decoder-only model, LAP follows prompts best; T5 is still ahead of it.",
    rows=_rows(
        "prompts",
        T5=T5,
        last_layer=LAST,
        penultimate_layer=PENULTIMATE,
        key_value_fusion=KEYS,
        hidden_state_injection=STREAM,
        LAP=LAP,
    ),
    checks=(
        Above(better="LAP.following", worse="last layer.following"),
        Above(better="LAP.following", worse="penultimate layer.following"),
        Above(better="LAP.following", worse="key value fusion.following"),
        Above(better="LAP.following", worse="hidden state injection.following"),
        Above(better="T5.following", worse="LAP.following"),
    ),
    shown=("following", "exact", "shape", "color", "size", "position", "count"),
    notes="No arm has a refiner, as in the paper's Sec. 2. Key-value fusion and injection go through linears of their "
    "own instead of matching the VLM's widths. T5 is ours: tiny, trained on the micro-world's sentences by filling in "
    "blanks. The heads that stood in for the VLM's pretraining read the very four layers that LAP pools, so its layers "
    "between them are worth less than a real VLM's.",
)

TILES = Claim(
    name="tiles",
    where="Fig. 5, Sec. 2.2",
    says="Fine detail of a picture is kept better with every rise in the number of tiles.",
    rows=_rows("tiles", micro="micro"),
    checks=(
        Above(better="micro.192.4.psnr", worse="micro.192.1.psnr"),
        Above(better="micro.192.9.psnr", worse="micro.192.4.psnr"),
    ),
    shown=(*(f"192.{tiles}.{metric}" for metric in ("psnr", "marks") for tiles in (1, 4, 9)),),
    curves=(
        Curve(
            title="Reconstruction from image tokens alone",
            x_label="tiles (beyond one, with a thumbnail)",
            y_label="PSNR in dB",
            points=("1", "4", "9"),
            lines={"192 px": ("micro", "192.{}.psnr"), "128 px": ("micro", "128.{}.psnr")},
        ),
    ),
    notes="The shipped model; seeds draw other scenes. Judged at 192 px, where nine tiles hold more pixels than four. "
    "At 128 px four tiles hold them all and nine only enlarge them, which the model never learned to use (LOG.md); "
    "the verdict leaves that canvas out, and the table shows it.",
)

SIMILARITY = Claim(
    name="similarity",
    where="Fig. 6, Sec. 3",
    says="Adjacent layers of the VLM give highly similar features, so that taking every one is redundant.",
    rows=_rows("similarity", VLM="micro"),
    checks=(Between(value="VLM.adjacent", low=0.8), Above(better="VLM.adjacent", worse="VLM.apart")),
    shown=("adjacent", "apart", "ends"),
    curves=(
        Curve(
            title="Similarity of adjacent layers",
            x_label="layer of the VLM, compared with the next",
            y_label="cosine similarity",
            points=tuple(map(str, EVERY[:-1])),
            lines={
                "all tokens": ("VLM", "pair.{}"),
                "image": ("VLM", "image.pair.{}"),
                "instruction": ("VLM", "instruction.pair.{}"),
            },
        ),
    ),
    notes="The shipped VLM; seeds draw other prompts and pictures. `apart`: three layers. Highly similar is taken to "
    "mean a cosine above 0.8; the paper names no number.",
)

EVERY_THIRD = Claim(
    name="every-third",
    where="Fig. 7, Sec. 3",
    says="LAP over every third layer weighs its layers more uniformly than over all, and loses nothing by it.",
    rows=(
        *_rows("pooling weights", every_third=LAP, every_layer=LAP_EVERY),
        *_rows("prompts", every_third_drawn=LAP, every_layer_drawn=LAP_EVERY),
    ),
    checks=(
        Above(better="every third.uniformity", worse="every layer.uniformity"),
        Above(better="every third drawn.following", worse="every layer drawn.following", margin=0.01),
    ),
    shown=("uniformity", "largest", "following", "exact"),
    curves=(
        Curve(
            title="Weights of LAP's pooling layer",
            x_label="tapped layer of the VLM",
            y_label="|weight| / sum of |weights|",
            points=tuple(map(str, EVERY)),
            lines={"every third": ("every third", "share.{}"), "every layer": ("every layer", "share.{}")},
            low=0.0,
        ),
    ),
    notes="Uniformity is the number of layers whose weight the shares are worth, over the number of layers. At equal "
    "compute LAP over all layers takes fewer steps.",
)

DROPOUT = Claim(
    name="dropout",
    where="Fig. 8, Sec. 3",
    says="Without the first or last layers pictures stay as they are; without middle ones they deviate massively.",
    rows=_rows("dropout", every_third=REFINED, every_layer=LAP_EVERY, micro="micro"),
    checks=(
        Above(better="every third.lost.middle", worse="every third.lost.first"),
        Above(better="every third.lost.middle", worse="every third.lost.last"),
        Above(better="every layer.lost.middle", worse="every layer.lost.first"),
        Above(better="every layer.lost.middle", worse="every layer.lost.last"),
    ),
    shown=("kept", "lost.first", "lost.middle", "lost.last"),
    curves=(
        Curve(
            title="How far the pooled token moves without one layer",
            x_label="dropped layer of the VLM",
            y_label="|change| / |pooled token|",
            points=tuple(map(str, EVERY)),
            lines={name: (name, "moves.{}") for name in ("every third", "every layer", "micro")},
            low=0.0,
        ),
    ),
    notes="Lost: how much less of the prompt a picture follows once the pooling weight of a layer is zero. Of every "
    "third layer one is dropped at a time (the loss of the middle ones is averaged), of every layer three in a row. "
    "The row of the shipped model, whose seeds draw other prompts, which it was not trained on as they are, is not "
    "judged.",
)

REFINER = Claim(
    name="refiner",
    where="Fig. 22, Sec. 3, App. A.1.2",
    says="A bidirectional refiner cures the bias against what is mentioned late and closes the gap to T5; with it, LAP "
    "still beats the penultimate layer.",
    rows=_rows(
        "late",
        T5=T5,
        penultimate_and_refiner=PENULTIMATE_REFINED,
        LAP_alone=LAP,
        LAP_then_refiner=REFINED,
        refiner_then_LAP=REFINED_BEFORE,
    ),
    checks=(
        Above(better="LAP then refiner.last", worse="LAP alone.last"),
        Above(better="LAP alone.gap", worse="LAP then refiner.gap"),
        Above(better="LAP then refiner.following", worse="T5.following", margin=0.01),
        Above(better="LAP then refiner.following", worse="penultimate and refiner.following"),
    ),
    shown=("following", "first", "last", "gap", "exact"),
    notes="Prompts of three things in any order. A thing scores the share of its shape, colour and size that are right "
    "at its cell; the gap is that of the first mentioned less that of the last. Where the refiner stands (the paper's "
    "Sec. 3 says before LAP, its Sec. 4 after) is shown and not judged.",
)

VERIFI = Claim(
    name="verifi",
    where="Fig. 19, Sec. 3",
    says="VERIFI improves prompt following, on long and detailed prompts too.",
    rows=(
        *_rows("kinds, rewritten", with_VERIFI=REWRITTEN),
        *_rows("kinds, own words", without=REFINED),
    ),
    checks=(
        Above(better="with VERIFI.full", worse="without.full"),
        Above(better="with VERIFI.short", worse="without.short"),
    ),
    shown=("full", "short", "full.exact", "short.exact"),
    notes="Two arms of one architecture, trained on the same detailed prompts and pictures: one on the tokens of the "
    "rewrite, one on those of the prompt. Scores are shares of a prompt's wishes that are met. Short prompts leave "
    "attributes out, as those of training do not.",
)

REASONING = Claim(
    name="reasoning",
    where="Fig. 25, 26, Sec. 5",
    says="Through VERIFI the model draws what follows only by reasoning, though the DiT was never trained on it.",
    rows=(
        *_rows("kinds, rewritten", with_VERIFI=REWRITTEN),
        *_rows("kinds, own words", without=REFINED),
        *_rows("edits", edits=EDITED),
    ),
    checks=(
        Above(better="with VERIFI.indirect", worse="without.indirect"),
        Above(better="with VERIFI.count", worse="without.count"),
        Above(better="with VERIFI.relation", worse="without.relation"),
        Above(better="edits.indirect", worse="edits.direct", margin=0.1),
    ),
    shown=("indirect", "count", "relation", "indirect.exact", "count.exact", "relation.exact", "direct"),
    notes="The arms of the claim verifi, whose training holds plain descriptions only; the VLM knows such riddles. "
    "Indirect: things named by facts; count: sums and facts about numbers; relation: places by each other. Edits "
    "(the share that succeeds) that refer by facts must not fall more than 0.1 behind those that name things.",
)

INJECTION = Claim(
    name="injection",
    where="Fig. 21, App. A.1.1",
    says="One pooled representation at the DiT's input beats a LAP of its own for every layer of the DiT.",
    rows=_rows("prompts", at_the_input=LAP, LAP_per_layer=LAP_PER_BLOCK, hidden_state_injection=STREAM),
    checks=(Above(better="at the input.following", worse="LAP per layer.following"),),
    shown=("following", "exact", "shape", "color", "size", "position"),
    notes="Additions go through a linear that starts at zero, where the paper adds as it is. Five LAPs cost compute, "
    "so that arm takes fewer steps, as in the paper's compute-controlled comparison.",
)

EDIT_TRAINING = Claim(
    name="edit-training",
    where="Table 2, Sec. 5",
    says="Training on edits makes text-to-image better.",
    rows=_rows("rewrites", base=BASE, base_trained_on=BASE_LONGER, then_edits=EDITED),
    checks=(
        Above(better="then edits.following", worse="base.following"),
        Above(better="then edits.following", worse="base trained on.following"),
    ),
    shown=("following", "exact", "shape", "color", "size", "position"),
    notes="The first line is the paper's comparison, in which only one model was trained further. The second asks "
    "whether it was the edits: the same further compute on the base's own data.",
)

ZERO_SHOT_EDIT = Claim(
    name="zero-shot-edit",
    where="Fig. 15b, Sec. 5",
    says="A model that never saw text and picture together edits, given image tokens for the first 10-20 % of the "
    "steps and text tokens for the others.",
    rows=_rows("edits by share", base=BASE, micro_base="micro-base"),
    checks=(
        Above(better="base.window", worse="base.0.harmonic"),
        Above(better="base.window", worse="base.1.harmonic"),
        Between(value="base.best", low=0.1, high=0.2),
    ),
    shown=("best", "window", "0.harmonic", "1.harmonic"),
    curves=tuple(
        Curve(
            title=title,
            x_label="share of the steps that see image tokens, the first ones",
            y_label="share",
            points=tuple(f"{share:g}" for share in SHARES),
            lines={name: (row, f"{{}}.{name}") for name in ("success", "preserved", "harmonic")},
            low=0.0,
        )
        for row, title in (("base", "Zero-shot edits of the arms"), ("micro base", "... of the shipped base model"))
    ),
    notes="Success: all named attributes are the target's. Preserved: unnamed details of untouched things. Harmonic: "
    "the mean of both. The shipped base model saw descriptions of pictures beside the pictures, so it is shown and not "
    "judged.",
)

IMAGE_TO_IMAGE = Claim(
    name="image-to-image",
    where="Fig. 15a, Sec. 5",
    says="A model trained on text alone captures what a picture shows when it is given image tokens.",
    rows=_rows("image to image", trained_on_rewrites=REWRITTEN, trained_on_prompts=REFINED),
    checks=(
        Above(better="trained on rewrites.color", worse="trained on rewrites.chance.color"),
        Above(better="trained on rewrites.shape", worse="trained on rewrites.chance.shape"),
        Above(better="trained on rewrites.position", worse="trained on rewrites.chance.position"),
        Above(better="trained on rewrites.following", worse="trained on rewrites.chance.following"),
    ),
    shown=("following", "chance.following", "color", "chance.color", "shape", "chance.shape", "placeless.following"),
    notes="Chance: the same pictures against another source. Placeless: without the positions of image tokens, which "
    "an arm trained on text has never met.",
)

MULTI_REFERENCE = Claim(
    name="multi-reference",
    where="Fig. 10, Sec. 5",
    says="Trained on edits of one picture only, the model composes scenes from several.",
    rows=_rows("compositions", then_edits=EDITED, base=BASE),
    checks=(
        Above(better="then edits.preserved", worse="then edits.words.preserved"),
        Above(better="then edits.success", worse="then edits.words.success", margin=0.1),
        Above(better="then edits.harmonic", worse="base.harmonic"),
    ),
    shown=("success", "preserved", "harmonic", "words.success", "words.preserved", "found"),
    notes="Words: the rewrite's tokens alone, which say what to draw and nothing of unnamed details. Composing is "
    "taken to mean that these details come along and that the instruction is met no more than 0.1 less often.",
)

FROM_T5_CLAIM = Claim(
    name="from-t5",
    where="Fig. 23, App. A.1.3",
    says="A DiT that was trained on T5 for 40 % of the steps and on the VLM for the others ends where one trained on "
    "the VLM throughout does, and both beat T5.",
    rows=_rows("prompts", T5=T5, from_scratch=REFINED, continued_from_T5=FROM_T5),
    checks=(
        Same(one="continued from T5.following", other="from scratch.following", margin=0.02),
        Above(better="continued from T5.following", worse="T5.following"),
        Above(better="from scratch.following", worse="T5.following"),
    ),
    shown=("following", "exact", "shape", "color", "size", "position"),
    notes="The DiT goes over; LAP and refiner start anew. The same performance is taken to mean within 0.02.",
)

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        CANDIDATES,
        TILES,
        SIMILARITY,
        EVERY_THIRD,
        DROPOUT,
        REFINER,
        VERIFI,
        INJECTION,
        EDIT_TRAINING,
        ZERO_SHOT_EDIT,
        IMAGE_TO_IMAGE,
        MULTI_REFERENCE,
        FROM_T5_CLAIM,
        REASONING,
    )
}


def chosen(name: str) -> tuple[Claim, ...]:
    """The claim of a name, or all.

    Raises:
        ValueError: an unknown name.
    """
    if name == "all":
        return tuple(CLAIMS.values())
    if name not in CLAIMS:
        raise ValueError(f"claim {name!r}: expected all or one of {', '.join(CLAIMS)}")
    return (CLAIMS[name],)


def arms_of(claims: Sequence[Claim]) -> tuple[Arm, ...]:
    """The arms that claims need, and those they start from, each once, in an order in which they can be trained."""
    ordered: dict[Arm, None] = {}

    def add(arm: Arm) -> None:
        if arm.start is not None:
            add(arm.start)
        ordered[arm] = None

    for claim in claims:
        for arm in claim.arms:
            add(arm)
    return tuple(ordered)
