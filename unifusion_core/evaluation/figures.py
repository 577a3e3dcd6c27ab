"""The analyses of `layers` as pictures: the paper's Fig. 6, 7, 8 and 18 for one fusion head and its hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from ..conditioning.hidden_states import HiddenStates, Span
from ..conditioning.lap import LayerwiseAttentionPooling
from .charts import INK, Band, Series, bar_chart, heat_map, line_chart
from .layers import adjacent_similarity, attention_norms, dropout_effect, layer_weights

Figure = Literal["layer weights", "attention norms", "layer similarity", "dropout effect"]

LOOKS = {  # kind → name, colour, marker
    "all": ("all tokens", INK, "circle"),
    "system": ("system", (143, 120, 186), "square"),
    "image": ("image tile", (43, 122, 214), "diamond"),
    "thumbnail": ("thumbnail", (73, 191, 217), "down"),
    "instruction": ("instruction", (225, 121, 27), "up"),
    "rewrite": ("rewrite", (27, 146, 71), "circle"),
    "think": ("thinking", (199, 72, 120), "up"),
    "prefix": ("template before", (150, 150, 150), "square"),
    "marker": ("template markers", (110, 110, 110), "diamond"),
}
WRITTEN = ("rewrite", "instruction", "system")  # spans of words; the first that is there is written out
LONGEST = 15  # characters of a token's text


def figure(
    name: Figure,
    lap: LayerwiseAttentionPooling,
    hidden: HiddenStates,
    texts: Sequence[str] | None = None,
    *,
    row: int = 0,
) -> Image.Image:
    """Draws one analysis, 1024 px wide.

    Args:
        lap: for "layer similarity" also a rival of it.
        hidden: what enters LAP; moved to its device and dtype.
        texts: the T tokens of the row as texts, for "attention norms"; "" where unknown.
        row: of the batch, for "attention norms"; the other figures average over all rows.
    Raises:
        ValueError: an unknown figure, a row or texts that do not fit, states of another VLM or with NaN or infinity,
            no real token, or similarity with a single layer.
    """
    if name not in get_args(Figure):
        raise ValueError(f"unknown figure {name!r}; one of {', '.join(get_args(Figure))}")
    sizes = (lap.spec.num_layers, lap.spec.width)
    if hidden.states.shape[2:] != sizes:
        raise ValueError(
            f"LAP pools {sizes[0]} layers, {sizes[1]} wide, but the states are {list(hidden.states.shape)}"
        )
    if name == "layer weights":
        return weights_figure(lap, hidden.layers)
    if not bool(hidden.mask.any()):
        raise ValueError("the hidden states hold no real token, only padding")
    if not bool(torch.isfinite(hidden.states).all()):
        raise ValueError("the hidden states hold NaN or infinity; load the VLM in bfloat16 or float32")
    if name == "layer similarity":
        return similarity_figure(adjacent_similarity(hidden.states, hidden.mask, hidden.spans), hidden.layers)
    weight = lap.projector.weight
    hidden = hidden.to(weight.device, weight.dtype)
    if name == "attention norms":
        if not -len(hidden.mask) <= row < len(hidden.mask):
            raise ValueError(f"row {row}: there are {len(hidden.mask)}")
        norms = attention_norms(lap, hidden.states[row])
        return norms_figure(norms, hidden.mask[row], hidden.spans[row], hidden.layers, texts)
    return dropout_figure(dropout_effect(lap, hidden.states, hidden.mask, hidden.spans), hidden.layers)


def weights_figure(lap: LayerwiseAttentionPooling, layers: Sequence[int]) -> Image.Image:
    """Draws the share of each tapped layer in the pooling FC, with the sign of its weight (Fig. 7)."""
    raw, share = layer_weights(lap)
    return bar_chart(
        (share * raw.sign()).tolist(),
        [str(layer) for layer in layers],
        title="Layer weights of the pooling FC",
        x_label="tapped layer of the VLM",
        y_label="weight / sum of |weights|",
        reference=(1 / len(share), f"uniform 1/{len(share)}"),
        note=f"Raw weights run from {raw.min():.3g} to {raw.max():.3g}. They weigh what leaves LAP's attention blocks.",
    )


def norms_figure(
    norms: Tensor, mask: Tensor, spans: Sequence[Span], layers: Sequence[int], texts: Sequence[str] | None = None
) -> Image.Image:
    """Draws attention norms [T, L] of one row without its padding (Fig. 18), and again with texts where given.

    Args:
        mask: [T] bool. texts: as `figure`.
    Raises:
        ValueError: no real token, or not one text per token.
    """
    if texts is not None and len(texts) != len(mask):
        raise ValueError(f"{len(texts)} texts for {len(mask)} tokens")
    if not bool(mask.any()):
        raise ValueError("this row holds no real token, only padding")
    kept = mask.nonzero()[:, 0].tolist()
    place = mask.long().cumsum(0).tolist()  # how many real tokens lie up to and with each
    bands = [_band(span, place) for span in spans if bool(mask[span.start : span.stop].any())]
    zoom = None
    if texts is not None:
        pictured = {t for span in spans if span.image is not None for t in range(span.start, span.stop)}
        texts = ["" if token in pictured else _short(texts[token]) for token in kept]
        written = [next((b for b in bands if b.kind == LOOKS[kind][0]), None) for kind in WRITTEN]
        zoom = next(((band.start, band.stop) for band in written if band), None)
    return heat_map(
        norms[mask].float().cpu().numpy(),
        [str(layer) for layer in layers],
        bands,
        title="What each layer adds to LAP's attention at each token",
        x_label="token",
        y_label="tapped layer",
        value_label="norm",
        texts=texts,
        zoom=zoom,
        note="L2 norm of gate x attention weight x value over all heads, mean over query layers, first block of LAP.",
    )


def similarity_figure(similarity: dict[str, Tensor], layers: Sequence[int]) -> Image.Image:
    """Draws the cosine between the states of neighbouring tapped layers (Fig. 6), a line per kind of span."""
    if len(layers) < 2:
        raise ValueError("only one layer is tapped, so none has a neighbour")
    return line_chart(
        _series(similarity),
        [f"{one}-{other}" for one, other in zip(layers, layers[1:], strict=False)],
        title="Similarity of adjacent tapped layers",
        x_label="neighbouring tapped layers of the VLM",
        y_label="cosine similarity",
        note="Mean over tokens. All tokens: with the markers of the chat template.",
    )


def dropout_figure(effect: dict[str, Tensor], layers: Sequence[int]) -> Image.Image:
    """Draws how far pooled tokens move when one layer's weight is zeroed (beside Fig. 8), a line per kind of span."""
    return line_chart(
        _series(effect),
        [str(layer) for layer in layers],
        title="Layer dropout: how far the pooled token moves without one layer",
        x_label="dropped layer of the VLM",
        y_label="|change| / |pooled token|",
        low=0.0,
        note="Mean over tokens, before refiner and DiT. All tokens: with the markers of the chat template.",
    )


def _series(values: dict[str, Tensor]) -> list[Series]:
    return [
        Series(name, values[kind].tolist(), color, marker)
        for kind, (name, color, marker) in LOOKS.items()
        if kind in values
    ]


def _band(span: Span, place: Sequence[int]) -> Band:
    """A span over the tokens that are no padding; `place[t]` counts those up to and with token t."""
    kind, color, _ = LOOKS[span.kind]
    start = place[span.start - 1] if span.start else 0
    labels = [kind]
    if span.image is not None:
        what = "thumbnail" if span.tile is None else f"tile {span.tile + 1}"
        labels = [f"image {span.image + 1}, {what}", what, "thumb" if span.tile is None else str(span.tile + 1)]
    return Band(start, place[span.stop - 1], kind, labels, color)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
