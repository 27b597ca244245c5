"""Masks of every kind, with what they are densely, made without the library."""

from __future__ import annotations

import random

import torch

from convbasis import lowrank


def dense_rows(n, sees):
    """Return bool ``(n, n)`` where row i sees the keys that sees(i) gives."""
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        mask[i, list(sees(i))] = True
    return mask


def _changes(n, seed):
    """Return additions, removals and the keys that each row sees."""
    choose = random.Random(seed)
    visible, additions, removals, rows = set(), [], [], []
    for i in range(n):
        gone = [j for j in sorted(visible) if choose.random() < 0.1]
        hidden = [j for j in range(max(0, i - 40), i + 1) if j not in visible]
        new = choose.sample(hidden, min(len(hidden), choose.randint(0, 3)))
        visible = (visible - set(gone)) | set(new)
        additions.append(new)
        removals.append(gone)
        rows.append(set(visible))
    return additions, removals, rows


def random_changes(n, seed=0):
    """Return additions, removals and the dense mask that they make."""
    additions, removals, rows = _changes(n, seed)
    return additions, removals, dense_rows(n, lambda i: rows[i])


def random_intervals(n, seed=0):
    """Return ends of intervals, many of them empty, some looking ahead."""
    generator = torch.Generator().manual_seed(seed)
    lower, upper = torch.randint(0, n, (2, n), generator=generator)
    return lower, upper


def document_lengths(n, seed=0):
    choose, lengths = random.Random(seed), []
    while sum(lengths) < n:
        lengths.append(min(choose.randint(1, max(1, n // 3)), n - sum(lengths)))
    return lengths


# Each of the following returns a mask, and a function that gives the keys that a row sees.


def causal(n):
    return lowrank.CausalMask(n), lambda i: range(i + 1)


def window(n):
    tokens = max(1, n // 5)
    return lowrank.SlidingWindowMask(n, tokens), lambda i: range(max(0, i - tokens + 1), i + 1)


def far(n):
    tokens = max(1, n // 5)
    mask = lowrank.IntervalMask(torch.zeros(n, dtype=torch.int64), torch.arange(n) - tokens)
    return mask, lambda i: range(max(0, i - tokens + 1))


def intervals(n):
    lower, upper = random_intervals(n)
    return lowrank.IntervalMask(lower, upper), lambda i: range(int(lower[i]), int(upper[i]) + 1)


def documents(n):
    lengths = document_lengths(n)
    begin = [sum(lengths[:d]) for d, length in enumerate(lengths) for _ in range(length)]
    return lowrank.DocumentMask(lengths), lambda i: range(begin[i], i + 1)


def groups(n):
    size = max(1, n // 4)

    def begin(i):
        return max(0, (i - size // 2) // size * size + size // 2)

    return lowrank.ShiftedGroupMask(n, size), lambda i: range(begin(i), i + 1)


def changes(n):
    additions, removals, own = _changes(n, 0)
    return lowrank.RowChangeMask(additions, removals), lambda i: own[i]


def _few(n):
    generator = torch.Generator().manual_seed(n)
    return torch.rand(3, n, generator=generator) > 0.5, torch.randint(0, 3, (n,), generator=generator)


def rows(n):
    few, of = _few(n)
    return lowrank.DistinctRowsMask(few, of), lambda i: few[of[i]].nonzero()[:, 0].tolist()


def columns(n):
    few, of = _few(n)
    return lowrank.DistinctColumnsMask(few.mT, of), lambda i: few[of, i].nonzero()[:, 0].tolist()


SEES = {
    make.__name__: make
    for make in (causal, window, far, intervals, documents, groups, changes, rows, columns)
}


def _with_dense(make):
    def made(n):
        mask, sees = make(n)
        return mask, dense_rows(n, sees)

    return made


KINDS = {name: _with_dense(make) for name, make in SEES.items()}
