"""The conv basis of attention logits from queries and keys, without the n×n matrix (F5)."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .basis import ConvBasis
from .checks import (
    check_alike,
    check_finite,
    check_float_tensor,
    check_nonnegative,
    check_positive_int,
    check_scale,
    compute_dtype,
)
from .convolve.segments import lag_mask
from .errors import ConvBasisWarning, InputError
from .logits import segment_logits
from .transforms import refuse_mapping

SEARCHES = ("linear", "binary")
_LANES = 16  # thresholds tried at once by the search for the largest one
_ROUNDS = 5  # each narrows the ratio of the bracket to its 16th root
_STEP = 0.7  # of a descent through thresholds that find equally many starts
_LEAST_STEPS = 2  # fewer are no sign of clear structure
_LEAST_CHUNK = 64  # columns looked at in one step of the linear scan


class SearchOptions(NamedTuple):
    """How segments are recovered; checked by `search_options`."""

    num_bases: int
    window: int
    delta: float | None
    epsilon: float
    search: str


def recover(
    q: Tensor,
    k: Tensor,
    *,
    num_bases: int,
    window: int = 1,
    delta: float | None = None,
    epsilon: float = 0.0,
    scale: float | None = None,
    search: str = "linear",
) -> ConvBasis:
    """Recover a conv basis of the logits ``scale · q_i·k_j`` from q and k alone.

    Column j starts a new segment when its first `window` entries at and below the diagonal differ, in
    the 1-norm, from those of the segment's first column by the threshold or more. The kernel of a
    segment is its first column: an entry (i, j) is replaced by the logit of query ``s + i - j`` and
    key s. On logits that are *(T, δ)-non-degenerate*, observed with errors of at most
    ``ε <= δ/(5T)``, the starts are found exactly. **Logits of trained attention are not**: there the
    result is still a valid basis that begins at column 0, with at most num_bases segments, but
    nothing bounds its error.

    Args:
        q: ``(..., n, d)`` queries, floating point.
        k: ``(..., n, d)`` keys, same shape, dtype and device.
        num_bases: the largest number K of segments, counted from the left.
        window: T, the number of lags compared, in tokens; 1..n. No start is found after column n - T.
        delta: δ, the least distance of two segments, in nats. It should exceed rounding, about
            ``T · eps · max |logit|``, or noise becomes starts; 0 makes every column a start. None
            takes the largest δ at which the linear scan finds K starts; or, where all down to half of
            it find no more, the least of those, so that noise does not shift the starts.
        epsilon: ε, a known bound on the errors of the logits, in nats. Given together with delta the
            threshold is the paper's, ``δ - 2Tε``, else ``δ/2``, which is right for every
            ``ε < δ/(4T)``. With ``delta=None`` the threshold stays above ``2Tε``.
        scale: factor of the logits; ``1/sqrt(d)`` by default.
        search: ``"linear"`` compares every column and needs only consecutive segments to differ;
            ``"binary"`` is the paper's search, needs delta, and needs every pair of segments to differ.

    Returns:
        A `ConvBasis` of the logits, dtype of q (float32 for half types), with `ConvBasis.ranks` <=
        num_bases; its first start is 0.

    Raises:
        InputError: shapes, dtypes, devices or options that do not fit; NaN or Inf in q or k.

    Warns:
        ConvBasisWarning: epsilon exceeds δ/(5T), so that the guarantee does not hold.

    Complexity:
        O(n T d + k n d) time for the linear scan, O(k n d + k T d log n) for the binary search;
        O(n T + k n) memory.

    Source:
        F5, F6; Conv-Basis (arXiv 2405.05219), Algorithms 2 and 3.

    Example:
        >>> import torch, convbasis as cb
        >>> planted = cb.planted_qk(64, 8, 2, generator=torch.Generator().manual_seed(1))
        >>> basis = cb.recover(planted.query, planted.key, num_bases=2)
        >>> bool((basis.to_dense() - planted.basis.to_dense()).abs().max() < 1e-9)
        True
    """
    check_float_tensor("q", q)
    check_float_tensor("k", k)
    check_alike(q=q, k=k)
    if q.ndim < 2 or q.shape != k.shape or q.numel() == 0:
        raise InputError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; both must be (..., n, d) with "
            "n, d >= 1; expand the heads of k where they are shared"
        )
    for name, tensor in (("q", q), ("k", k)):
        refuse_mapping("recover", tensor)
        check_finite(name, tensor)
    *batch, n, d = q.shape
    options = search_options(n, num_bases, window, delta, epsilon, search)
    factor = check_scale(scale, d)
    work = compute_dtype(q.dtype)
    query, key = q.to(work).reshape(-1, 1, n, d), k.to(work).reshape(-1, n, d)
    starts = find_starts(query, key, factor, options)
    kernels = segment_logits(query, key, starts, factor).masked_fill(~lag_mask(starts, n), 0.0)
    check_finite("the logits scale·q·k", kernels)
    rank = starts.shape[-1]
    return ConvBasis._trusted(kernels.view(*batch, rank, n), starts.view(*batch, rank))


def search_options(
    n: int,
    num_bases: object,
    window: object,
    delta: object,
    epsilon: object,
    search: object,
    warn: bool = True,
) -> SearchOptions:
    """Check the options of a recovery for a sequence of n tokens; with warn, warn of unwise ones."""
    bases = check_positive_int("num_bases", num_bases, "the largest number of segments")
    lags = check_positive_int("window", window, "a number of lags, in tokens")
    if lags > n:
        raise InputError(f"window={lags} lags do not fit into a sequence of {n} tokens")
    if search not in SEARCHES:
        raise InputError(f"search={search!r} is not known; use 'linear' or 'binary'")
    distance = None if delta is None else check_nonnegative("delta", delta)
    bound = check_nonnegative("epsilon", epsilon)
    if search == "binary" and distance is None:
        raise InputError(
            "search='binary' needs delta, the least distance of two segments; give it, or use "
            "search='linear', which can choose it"
        )
    if distance is not None and bound > 0:
        if distance - 2 * lags * bound <= 0:
            raise InputError(
                f"epsilon={bound} is too large for delta={distance} and window={lags}: the threshold "
                "delta - 2·window·epsilon must be positive"
            )
        if warn and bound > distance / (5 * lags) * (1 + 1e-12):
            warnings.warn(
                f"epsilon={bound} exceeds delta/(5·window) = {distance / (5 * lags)}: starts may be "
                "wrong",
                ConvBasisWarning,
                stacklevel=3,
            )
    return SearchOptions(bases, lags, distance, bound, str(search))


@torch.no_grad()
def find_starts(
    query: Tensor,
    key: Tensor,
    scale: float,
    options: SearchOptions,
    real: Tensor | None = None,
) -> Tensor:
    """Return the recovered starts, ``(P, R, k)`` with k <= num_bases, filled up with n.

    Args:
        query: ``(P, R, n, d)``.
        key: ``(P, n, d)``.
        scale: factor of the logits.
        options: how to search.
        real: bool ``(P, n)``, True for tokens that count: padding on the left and on the right is
            outside the matrix, and the first start is the first real token.
    """
    problems, sets, n, _ = query.shape
    groups = problems * sets
    first = torch.zeros(groups, dtype=torch.int64, device=query.device)
    stop = torch.full_like(first, n)
    if real is not None:
        tokens = torch.arange(n, device=query.device)
        first = torch.where(real, tokens, n).amin(-1).repeat_interleave(sets)
        stop = (torch.where(real, tokens, -1).amax(-1) + 1).repeat_interleave(sets)
    # Columns whose whole window lies inside the matrix.
    stop = (stop - options.window + 1).clamp(min=0)
    if options.search == "binary":
        starts = _binary_search(query, key, scale, options, first, stop)
    else:
        starts = _linear_search(_windows(query, key, scale, options.window), options, first, stop, n)
    k = max(1, int((starts < n).sum(-1).max()))
    return starts[:, :k].view(problems, sets, k)


def _windows(query: Tensor, key: Tensor, scale: float, window: int) -> Tensor:
    """Return ``W[g, j, t]``, the logit of query j + t and key j, ``(P·R, n - T + 1, T)``."""
    n = query.shape[-2]
    count = n - window + 1
    keys = key[:, None, :count] * scale
    lags = [(query[..., t : t + count, :] * keys).sum(-1) for t in range(window)]
    return torch.stack(lags, dim=-1).flatten(0, 1)


def _threshold(options: SearchOptions) -> float:
    """Return the threshold of the distance for a given delta, before `_with_slack`."""
    assert options.delta is not None
    if options.epsilon == 0:
        return options.delta / 2
    return options.delta - 2 * options.window * options.epsilon


def _with_slack(threshold: Tensor, reference: Tensor) -> Tensor:
    """Lower a threshold by the rounding of distances from a reference window ``(..., T)``.

    It looks at nothing but that window: what comes later must not move a threshold.
    """
    rounding = 4 * reference.shape[-1] * torch.finfo(reference.dtype).eps * reference.abs().amax(-1)
    return threshold * (1 - 1e-12) - torch.minimum(rounding, 0.1 * threshold)


def _linear_search(
    windows: Tensor, options: SearchOptions, first: Tensor, stop: Tensor, n: int
) -> Tensor:
    """Return starts ``(G, K)`` by linear scans, at the given delta or at the largest that finds K."""
    bases = min(options.num_bases, n)
    if options.delta is not None:
        threshold = windows.new_full((len(windows), 1), _threshold(options))
        return _scan(windows, threshold, bases, first, stop, n, options.epsilon > 0)[:, 0]

    # The largest threshold that still finds all starts, or as many as there are at the least one.
    wanted = torch.minimum(torch.full_like(first, bases), (stop - first).clamp(min=1))
    least = torch.full(
        (len(windows),),
        2 * options.window * options.epsilon,
        dtype=windows.dtype,
        device=windows.device,
    )
    starts = _scan(windows, least[:, None], bases, first, stop, n)[:, 0]
    short = (starts < n).sum(-1) < wanted
    every = wanted >= stop - first  # each column that can be a start must be one
    if bases == 1 or bool((short | every).all()):
        return starts
    tiny = torch.finfo(windows.dtype).tiny
    high = 2 * windows.abs().sum(-1).amax(-1).clamp(min=tiny)
    low = torch.maximum(least, high * torch.finfo(windows.dtype).eps ** 2).clamp(min=tiny)
    lanes = torch.arange(_LANES, device=windows.device, dtype=windows.dtype) / _LANES
    for _ in range(_ROUNDS):
        # Geometric steps from low on, high excluded: the first lane is low itself.
        trial = low[:, None] * (high / low)[:, None] ** lanes
        found = _scan(windows, trial, bases, first, stop, n)
        enough = (found < n).sum(-1) >= wanted[:, None]
        best = torch.where(enough, torch.arange(_LANES, device=windows.device), -1).amax(-1)
        index = best.clamp(min=0)[:, None]
        chosen = found.gather(1, index[..., None].expand(-1, 1, bases))[:, 0]
        starts = torch.where((best >= 0)[:, None], chosen, starts)
        upper = torch.cat([trial, high[:, None]], dim=-1).gather(1, index + 1)[:, 0]
        low, high = trial.gather(1, index)[:, 0], torch.where(best >= 0, upper, low)
        high = torch.maximum(high, low)
    # On clear structure much smaller thresholds find equally many starts. At the largest one noise
    # decides on which column a segment begins; lower down, above the noise, its first column does.
    # The threshold that is right for any noise up to δ/(5T) lies between 0.4 δ and 0.6 δ: steps of 0.7
    # cannot leap over it.
    trial = low[:, None] * _STEP ** torch.arange(_LANES, device=windows.device, dtype=windows.dtype)
    trial = torch.maximum(trial, least[:, None])
    found = _scan(windows, trial, bases + 1, first, stop, n)
    same = ((found < n).sum(-1) == wanted[:, None]).int().cumprod(-1).sum(-1)
    index = (same - 1).clamp(min=0)[:, None, None].expand(-1, 1, bases)
    settled = found[..., :bases].gather(1, index)[:, 0]
    return torch.where((same > _LEAST_STEPS)[:, None], settled, starts)


def _scan(
    windows: Tensor,
    thresholds: Tensor,
    bases: int,
    first: Tensor,
    stop: Tensor,
    n: int,
    slack: bool = False,
) -> Tensor:
    """Scan from the left for each threshold; return starts ``(G, L, K)`` filled up with n.

    Args:
        windows: ``(G, m, T)``.
        thresholds: ``(G, L)``.
        bases: K.
        first: ``(G,)`` first column, always a start unless it is n.
        stop: ``(G,)`` columns from here on are not looked at.
        n: the sequence length.
        slack: leave room for rounding below the thresholds.
    """
    groups, count, _ = windows.shape
    lanes = thresholds.shape[1]
    thresholds = thresholds.reshape(-1)
    stop = stop.repeat_interleave(lanes)
    owner = torch.arange(groups, device=windows.device).repeat_interleave(lanes)
    first = first.repeat_interleave(lanes)
    starts = torch.full((groups * lanes, bases), n, dtype=torch.int64, device=windows.device)
    starts[:, 0] = first
    reference = windows[owner, first.clamp(max=count - 1)]
    found = torch.ones_like(first)
    position = first + 1
    chunk = min(count, max(_LEAST_CHUNK, count // (bases * lanes)))
    offsets = torch.arange(chunk, device=windows.device)
    while True:
        active = ((found < bases) & (position < stop)).nonzero()[:, 0]
        if len(active) == 0:
            return starts.view(groups, lanes, bases)
        columns = position[active, None] + offsets
        block = windows[owner[active, None], columns.clamp(max=count - 1)]
        distance = (block - reference[active, None]).abs().sum(-1)
        limit = thresholds[active]
        if slack:
            limit = _with_slack(limit, reference[active])
        hit = (distance >= limit[:, None]) & (columns < stop[active, None])
        any_hit = hit.any(-1)
        where = hit.int().argmax(-1)
        position[active] += torch.where(any_hit, where + 1, chunk)
        hits = active[any_hit]
        starts[hits, found[hits]] = position[hits] - 1
        found[hits] += 1
        reference[hits] = block[any_hit, where[any_hit]]


def _binary_search(
    query: Tensor, key: Tensor, scale: float, options: SearchOptions, first: Tensor, stop: Tensor
) -> Tensor:
    """Return starts ``(G, K)`` by the paper's binary search, filled up with n."""
    problems, sets, n, d = query.shape
    window = options.window
    queries = query.reshape(problems * sets, n, d)
    group = torch.arange(problems * sets, device=query.device)
    lags = torch.arange(window, device=query.device)

    def window_at(column: Tensor) -> Tensor:
        rows = (column[:, None] + lags).clamp(max=n - 1)
        keys = key[group // sets, column.clamp(max=n - 1)]
        return (queries[group[:, None], rows] * (keys * scale)[:, None]).sum(-1)

    bases = min(options.num_bases, n)
    starts = torch.full((len(group), bases), n, dtype=torch.int64, device=query.device)
    starts[:, 0] = first
    reference = window_at(first)
    low = first + 1
    for r in range(1, bases):
        left, right = low.clone(), stop - 1
        threshold = reference.new_full((len(group),), _threshold(options))
        if options.epsilon > 0:
            threshold = _with_slack(threshold, reference)
        while bool((left < right).any()):
            middle = (left + right) // 2
            differs = (window_at(middle) - reference).abs().sum(-1) >= threshold
            open_ = left < right
            right = torch.where(open_ & differs, middle, right)
            left = torch.where(open_ & ~differs, middle + 1, left)
        # The search ends at one column whether it differs or not: test it once more.
        candidate = window_at(left)
        differs = (candidate - reference).abs().sum(-1) >= threshold
        success = differs & (left < stop) & (low <= left) & (starts[:, r - 1] < n)
        if not bool(success.any()):
            break
        starts[:, r] = torch.where(success, left, n)
        reference = torch.where(success[:, None], candidate, reference)
        low = torch.where(success, left + 1, n)
    return starts
