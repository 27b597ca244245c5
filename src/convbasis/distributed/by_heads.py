"""Any attention of queries, keys and values, in shares of heads or columns."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .call import Tokens
from .shares import Piece, Sizes, for_heads, shares
from .transport import Part, Roads, spread

# Attention of one piece, from queries, keys and values of all tokens.
Attend = Callable[[Piece, Tensor, Tensor, Tensor], Tensor]


def attend_by_heads(
    tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, layout: str, attend: Attend
) -> Tensor:
    """Return attention of this rank's tokens.

    Args:
        tokens: of all ranks.
        query: ``(B, H, m, d)``, of this rank.
        key: ``(B, H_kv, m, d)``.
        value: ``(B, H_kv, m, d_v)``.
        layout: see `shares`.
        attend: what is computed of a piece; keys and values are shared by all of its heads alike.
    """
    heads, kv_heads, width = query.shape[1], key.shape[1], value.shape[-1]
    pieces = shares(layout, Sizes(heads, kv_heads, width), tokens.ranks.size)
    every = slice(0, query.shape[-1])

    def wanted(piece: Piece) -> list[Part]:
        of_value = (2, piece.kv_heads, piece.columns)
        return [(0, piece.heads, every), (1, piece.kv_heads, every), of_value]

    parts = [[part for piece in own for part in wanted(piece)] for own in pieces]
    roads = Roads(tokens.ranks, tokens.lengths, parts, pieces, heads, width)

    def local(arrived: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        outputs = []
        for place, piece in enumerate(pieces[tokens.ranks.rank]):
            q, k, v = arrived[3 * place : 3 * place + 3]
            shared = (for_heads(piece, heads // kv_heads, x) for x in (k, v))
            outputs.append(attend(piece, q, *shared))
        return outputs

    return spread(roads, local, [query, key, value])
