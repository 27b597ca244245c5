"""The dense emulation of benchmarks/far_fields.py is what the library computes, where both exist."""

import importlib.util
from pathlib import Path

import pytest
import torch

import convbasis as cb

PLACE = Path(__file__).parent.parent.parent / "benchmarks" / "far_fields.py"
SPEC = importlib.util.spec_from_file_location("far_fields", PLACE)
far_fields = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(far_fields)

N, WINDOW = 1024, 100


@pytest.fixture
def head():
    g = torch.Generator().manual_seed(3)
    query, key, value = (1.5 * torch.randn(N, 16, generator=g) for _ in range(3))
    key[1] *= 3  # a few keys that all look at
    key[300] += query.mean(0) * 20
    return far_fields.Head(query, key, value, 0.25)


def library(head, **options):
    tensors = (x[None, None] for x in (head.query, head.key, head.value))
    output = cb.hybrid_attention(
        *tensors, window=WINDOW, sinks=4, columns=60, scale=head.scale, **options
    )
    return output[0, 0].double()


def merged(head, both):
    both = head.near + both
    return both[:, :-1] / both[:, -1:]


def test_exact_attention(head):
    exact = torch.nn.functional.scaled_dot_product_attention(
        head.query[None, None], head.key[None, None], head.value[None, None], is_causal=True, scale=0.25
    )
    torch.testing.assert_close(head.exact, exact[0, 0].double(), atol=1e-5, rtol=0)


def test_dropped_far_keys(head):
    head.cut(WINDOW)
    ours = merged(head, torch.zeros_like(head.near))
    torch.testing.assert_close(ours, library(head), atol=1e-5, rtol=0)


def test_true_weights_of_far_keys_give_exact_attention(head):
    head.cut(WINDOW)
    torch.testing.assert_close(merged(head, head.product(head.far)), head.exact, atol=1e-5, rtol=0)


def test_segments_with_key_weights(head):
    head.cut(WINDOW)
    ours = merged(head, far_fields.by_segments(head, *far_fields.segments(head)))
    wanted = library(head, far_field="segments", key_weights=True)
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=0)


def test_the_sampled_convolution(head):
    head.cut(WINDOW, 1)
    exact = far_fields.sampling.SampledRows(
        head.rows, head.weights[:, head.rows].T[None], head.lse[None, head.rows]
    )
    fit, _ = far_fields.scaled_conv._fit(head.seen[None], head.window, exact)
    matrix = head.laid_out(fit.lags.double().exp(), fit.columns[0].double().exp(), head.ranges(1))
    both = head.product(matrix)
    ours = merged(head, head.with_mass(both, far_fields.ridge_mass(head, both)))
    torch.testing.assert_close(ours, library(head, far_field="conv"), atol=1e-3, rtol=0)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_oracle_fits_reproduce_their_sums(head, count):
    head.cut(WINDOW)
    ranges = head.ranges(count)
    fit = far_fields.fitted(head, head.flat, ranges, 100)
    model = head.laid_out(fit.kernels, fit.columns, ranges).double() * fit.rows
    flat = torch.zeros(N * (N + 1), dtype=torch.float64)
    flat[: N * N] = model.flatten()
    for ours, wanted in (
        (model.sum(0), head.far.sum(0)),
        (model.sum(1), head.far.sum(1)),
        (head.by_lag(flat, ranges), head.by_lag(head.flat, ranges)),
    ):
        assert (ours - wanted).abs().sum() / wanted.sum() < 1e-3
    assert fit.off < 1e-3


@pytest.mark.parametrize("count", [1, 5, 16])
def test_oracle_fits_by_rows_reproduce_their_sums(head, count):
    head.cut(WINDOW)
    rows, columns = far_fields.fitted_rows(head, count, 100)
    lengths = torch.tensor([b - a for a, b in head.ranges(count)])
    opened = torch.arange(N) >= head.start[:, None]
    model = rows.repeat_interleave(lengths, 0) * columns[:, None] * opened
    assert (model.sum(0) - head.far.sum(0)).abs().sum() / head.far.sum() < 1e-4
    assert (model.sum(1) - head.far.sum(1)).abs().sum() / head.far.sum() < 1e-3
    torch.testing.assert_close(
        far_fields.by_segments(head, rows.repeat_interleave(lengths // 64, 0), columns),
        (model.T @ head.more.double()),
        atol=1e-6, rtol=1e-6,
    )  # fmt: skip


def test_a_planted_convolution_is_found(head):
    head.cut(WINDOW)
    g = torch.Generator().manual_seed(0)
    kernel, columns, rows = (torch.randn(N, generator=g, dtype=torch.float64).exp() for _ in range(3))
    planted = head.laid_out(kernel[None], columns, head.ranges(1)) * rows.float()
    flat = torch.cat([planted.flatten(), torch.zeros(N)])
    fit = far_fields.fitted(head, flat, head.ranges(1), 100)
    found = head.laid_out(fit.kernels, fit.columns, head.ranges(1)) * fit.rows.float()
    assert (found - planted).norm() / planted.norm() < 1e-3


def test_bands_that_are_exact_give_the_true_weights(head):
    head.cut(WINDOW)
    at = far_fields.pairs(head, 0, 3)
    assert at.tolist() == [0, 1, 2, 8, 9, 10]
    rest = far_fields.pairs(head, 3, 8)
    logits = sum(head.key[:, x] @ head.query[:, x].T for x in (at, rest)) * head.scale
    torch.testing.assert_close(head.hide((logits - head.lse).exp()), head.far, atol=1e-5, rtol=1e-3)


def test_a_band_that_depends_on_the_lag_alone_is_found_with_its_scale(head):
    turn = torch.arange(N) * 0.02
    for side in (head.query, head.key):
        side[:, 0], side[:, 8] = 2 * turn.cos(), 2 * turn.sin()
    head.cut(WINDOW)
    fit, mean = far_fields.band_parts(head, 0, 1)
    lags = torch.arange(WINDOW + 200, N - 8)  # the first keys are near
    wanted = (4 * head.scale * (0.02 * lags).cos()).double()
    torch.testing.assert_close(mean[lags], wanted, atol=1e-4, rtol=0)
    row, key = N - 1, N - 1 - lags
    far = ~head.seen[key]
    found = (fit.rows[row] * fit.columns[key] * fit.kernels[0, lags]).log()
    torch.testing.assert_close(found[far], wanted[far], atol=1e-3, rtol=0)
