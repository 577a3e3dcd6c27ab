"""Which VLM layers a fusion head lives on, as numbers: the analyses behind the paper's Fig. 6, 7, 8 and 18.

B batch, T tokens, L tapped layers, E VLM width, H heads, M tokens of a chunk. `states` are what enters LAP: the VLM's
own, or those of a refiner that stands before LAP. Everything is computed in chunks and returned as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditioning.hidden_states import Span, SpanKind
from ..conditioning.lap import LayerwiseAttentionPooling
from ..layers import TransformerBlock

CHUNK_SIZE = 256  # tokens; of 40 layers, 3,840 wide: some hundred MB
TINY = 1e-12


class LayerWeights(NamedTuple):
    """The pooling FC: `raw` [L] with sign, and `share` [L] = |raw| / sum |raw|, which adds up to 1 (or is all 0)."""

    raw: Tensor
    share: Tensor


def layer_weights(lap: LayerwiseAttentionPooling) -> LayerWeights:
    """Reads the weight that the pooling FC gives to each tapped layer; 1 / L each at the start of training.

    Paper: Fig. 7. Departs: it does not say how the weights are scaled; we give them raw and as shares. They weigh what
    leaves LAP's blocks, which is no longer purely that layer's; `dropout_effect` includes the size of what they weigh.
    """
    raw = lap.projector.weight.detach()[0].float()
    return LayerWeights(raw, raw.abs() / raw.abs().sum().clamp_min(TINY))


@torch.no_grad()
def attention_norms(lap: LayerwiseAttentionPooling, states: Tensor, block: int = 0) -> Tensor:
    """Measures what each layer adds to LAP's attention at each token.

    With weights a[q, l] of query layer q on key layer l, values v[l] and output gates g[q], the entry of l is the mean
    over q of the L2 norm of g[q] * a[q, l] * v[l] over all channels of all heads. Those vectors, summed over l, are
    what enters the output projection. Padding, whose states are zero, has norm zero.

    Args:
        states: [..., L, E] in the dtype and on the device of `lap`.
        block: of LAP. In block 0 keys and values are each layer's own; later ones see layers already mixed.
    Returns:
        [..., L]
    Raises:
        ValueError: L or E is not the spec's, or no such block.
    Paper: Fig. 18. Departs: the text speaks of query-key norms, the caption of key-value norms, and no formula is
    given; this one holds queries, keys and values. Tokens are not averaged over words.
    """
    if not 0 <= block < len(lap.blocks):
        raise ValueError(f"block must lie in 0..{len(lap.blocks) - 1}, got {block}")

    def norms(x: Tensor) -> Tensor:
        for earlier in lap.blocks[:block]:
            x = earlier(x)
        return _attention_norms(lap.blocks[block], x)

    return _in_chunks(lap, states, norms)


def adjacent_similarity(
    states: Tensor, mask: Tensor, spans: Sequence[Sequence[Span]] | None = None
) -> dict[str, Tensor]:
    """Compares each tapped layer with the next by the cosine of a token's two states, averaged over tokens.

    Args:
        states: [B, T, L, E]. mask, spans: as `by_kind`.
    Returns:
        Per kind of span, and for "all": [L - 1], in -1..1. A zero state counts as cosine 0.
    Paper: Fig. 6. Departs: the paper compares neighbours among all layers; here they are neighbouring taps, three
    layers apart by default. Tap every layer to see the paper's.
    """
    cosines = [
        F.cosine_similarity(states[:, :, i].float(), states[:, :, i + 1].float(), dim=-1)
        for i in range(states.shape[2] - 1)
    ]
    return by_kind(torch.stack(cosines, dim=-1) if cosines else states.new_zeros(*mask.shape, 0), mask, spans)


@torch.no_grad()
def dropout_effect(
    lap: LayerwiseAttentionPooling, states: Tensor, mask: Tensor, spans: Sequence[Sequence[Span]] | None = None
) -> dict[str, Tensor]:
    """Measures how far a pooled token moves when one layer's pooling weight is zeroed: |p - p'| / |p|, over tokens.

    p' is `lap(states, drop_layers=(layer,))`. 0 says that the layer does not matter, 1 that the move is as long as the
    token; it can exceed 1 where layers cancel.

    Args:
        states: [B, T, L, E] in the dtype and on the device of `lap`. mask, spans: as `by_kind`.
    Returns:
        Per kind of span, and for "all": [L], from 0 up.
    Raises:
        ValueError: L or E is not the spec's.
    Paper: Fig. 8. Departs: the paper shows the pictures that come out; this is the cause of their change, before
    refiner and DiT. For the pictures, pool with `drop_layers`.
    """
    weight = layer_weights(lap).raw

    def moves(x: Tensor) -> Tensor:
        for block in lap.blocks:
            x = block(x)
        parts = x.float() * weight[:, None]  # [M, L, E]; zeroing one weight takes one part away
        return parts.norm(dim=-1) / parts.sum(1).norm(dim=-1, keepdim=True).clamp_min(TINY)

    return by_kind(_in_chunks(lap, states, moves), mask, spans)


def by_kind(values: Tensor, mask: Tensor, spans: Sequence[Sequence[Span]] | None = None) -> dict[str, Tensor]:
    """Averages values [B, T, ...] over the real tokens of each kind of span, and over "all" of them.

    Args:
        mask: [B, T] bool, True where a real token stands.
        spans: per row; None: "all" alone. Markers of the chat template belong to no span and count only in "all".
    Returns:
        Kinds without a real token are absent, so a batch of padding alone gives an empty dict.
    """
    chosen = {"all": mask}
    for kind in get_args(SpanKind) if spans is not None else ():
        chosen[kind] = torch.zeros_like(mask)
        for row, row_spans in enumerate(spans):
            for span in row_spans:
                if span.kind == kind:
                    chosen[kind][row, span.start : span.stop] = mask[row, span.start : span.stop]
    return {kind: values[where].mean(0) for kind, where in chosen.items() if bool(where.any())}


def _attention_norms(block: TransformerBlock, x: Tensor) -> Tensor:
    """One block of LAP over layers x [M, L, E] → [M, L]."""
    attn, x = block.attn, block.norm1(x)
    q, k, v, gate = (
        project(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)  # [M, H, L, K]
        for project in (attn.to_q, attn.to_k, attn.to_v, attn.to_gate)
    )
    q, k = attn.norm_q(q), attn.norm_k(k)
    k, v = k.repeat_interleave(attn.group_size, dim=1), v.repeat_interleave(attn.group_size, dim=1)
    weights = (q.float() @ k.float().mT * attn.head_dim**-0.5).softmax(-1)  # [M, H, L queries, L keys]
    gated = torch.sigmoid(gate.float()).square() @ v.float().square().mT  # squared norms, over a head's channels
    return (weights.square() * gated).sum(1).sqrt().mean(1)


def _in_chunks(lap: LayerwiseAttentionPooling, states: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies a function of [M, L, E] → [M, L] to states [..., L, E]."""
    sizes = (lap.spec.num_layers, lap.spec.width)
    if states.shape[-2:] != sizes:
        raise ValueError(f"states must be [..., {sizes[0]} layers, {sizes[1]} wide], got {list(states.shape)}")
    tokens = states.reshape(-1, *sizes)
    if not len(tokens):
        return states.new_zeros(states.shape[:-1], dtype=torch.float32)
    return torch.cat([function(chunk) for chunk in tokens.split(CHUNK_SIZE)]).unflatten(0, states.shape[:-2])
