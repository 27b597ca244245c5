"""The choice of a backend: the model, its rates, the file they are kept in, and the fit."""

import json

import pytest
import torch

import convbasis as cb
from convbasis.convolve.choice import (
    Amounts,
    Work,
    candidates,
    choose,
    cost,
    direct_amounts,
    fft_amounts,
    partitioned_amounts,
)
from convbasis.convolve.rates import Rates, rates, rates_file, read_rates, write_rates
from convbasis.tune import fit_rates, tune


def work(n, k, columns=65, heads=1, device="cpu", longest=None):
    return Work(n, k, columns, 64, longest or -(-n // k), heads, torch.float32, device)


class TestChoose:
    @pytest.mark.parametrize("backend", ["reference", "direct", "fft", "partitioned"])
    def test_a_request_is_obeyed(self, backend):
        assert choose(backend, work(1000, 7)).backend == backend

    def test_short_sequences_are_direct_and_long_ones_partitioned(self):
        assert choose("auto", work(100, 4)).backend == "direct"
        for n in (4096, 65_536, 1 << 20):
            for k in (1, 4, 16, 64, 256):
                assert choose("auto", work(n, k)).backend == "partitioned"

    def test_the_least_cost_is_chosen(self):
        table = rates("cpu", torch.get_num_threads())
        for n in (300, 1000, 5000):
            for k in (1, 9, 50):
                given = work(n, k)
                chosen = choose("auto", given)
                costs = [cost(partitioned_amounts(given, s), table) for s in candidates(given)]
                costs += [cost(direct_amounts(given), table), cost(fft_amounts(given), table)]
                amounts = {
                    "direct": lambda w: direct_amounts(w),
                    "fft": lambda w: fft_amounts(w),
                    "partitioned": lambda w: partitioned_amounts(w, chosen.sizes),  # noqa: B023
                }[chosen.backend](given)
                assert cost(amounts, table) == min(costs)

    def test_rates_decide(self, monkeypatch):
        given = work(4096, 16)
        slow = Rates(*(0.0,) * 7, 1e6, 0.0, 0.0)  # laying out is all that costs
        monkeypatch.setattr("convbasis.convolve.choice.rates", lambda *_: slow)
        assert choose("auto", given).backend != "direct"
        free = Rates(*(1.0,) * 7, 0.0, 1.0, 1.0)._replace(flops=0.0)
        monkeypatch.setattr("convbasis.convolve.choice.rates", lambda *_: free)
        assert choose("auto", given).backend == "direct"

    @pytest.mark.parametrize("n", [1, 2, 3, 5, 33, 1000, 1_000_000])
    @pytest.mark.parametrize("longest", [1, 2, 7, 100_000_000])
    def test_every_candidate_fits(self, n, longest):
        found = candidates(work(n, 1, longest=min(n, longest)))
        assert found
        for sizes in found:
            assert 1 <= sizes.piece <= sizes.block
            assert sizes.transform == sizes.piece + sizes.block
            assert sizes.piece == min(n, longest) or sizes.piece == sizes.block

    def test_the_reason_says_what_was_chosen(self):
        q, k, v = torch.randn(3, 1, 1, 20_000, 8).unbind()
        cb.conv_basis_attention(q, k, v, segment_length=1000)
        assert "n = 20000, k = 20; pieces of 1000, transforms of" in cb.last_dispatch().reason
        cb.conv_basis_attention(q, k, v, segment_length=1000, backend="partitioned")
        assert "requested" in cb.last_dispatch().reason

    def test_few_columns_do_not_make_quadratic_work_free(self):
        for n in (3000, 20_000):
            given = Work(n, 1, 2, 0, n, 1, torch.float64)
            assert choose("auto", given).backend != "direct"

    def test_rates_and_amounts_have_the_same_fields(self):
        assert Rates._fields == Amounts._fields

    def test_work_of_heads_adds_up(self):
        one, four = (direct_amounts(work(500, 3, heads=h)) for h in (1, 4))
        assert four == pytest.approx(tuple(4 * amount for amount in one))


class TestRates:
    def test_built_in_rates_are_there_for_every_device(self):
        for device in ("cpu", "cuda", "mps", "meta"):
            assert all(rate >= 0 for rate in rates(device, 3))

    def test_written_and_read_back_for_each_device_and_thread_count(self, tmp_path, monkeypatch):
        path = tmp_path / "deep" / "rates.json"
        monkeypatch.setenv("CONVBASIS_RATES", str(path))
        rates.cache_clear()
        before = rates("cpu", 1)
        one, two = Rates(*range(10)), Rates(*range(1, 11))
        write_rates(rates_file(), {"cpu-1": one})
        write_rates(rates_file(), {"cpu-2": two})
        assert rates("cpu", 1) == one != before
        assert rates("cpu", 2) == two
        assert rates("cpu", 3) == before
        assert list(path.parent.iterdir()) == [path]

    def test_default_place(self, monkeypatch, tmp_path):
        monkeypatch.delenv("CONVBASIS_RATES", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert rates_file() == tmp_path / "convbasis" / "rates.json"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert rates_file().parts[-3:] == (".cache", "convbasis", "rates.json")

    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", '{"format": "x", "rates": {}}', '{"format": "convbasis-rates"}',
         '{"format": "convbasis-rates", "rates": {"cpu-1": [1]}}',
         '{"format": "convbasis-rates", "rates": {"cpu-1": [1, 2, 3, 4, 5, 6, 7, 8, 9, NaN]}}',
         '{"format": "convbasis-rates", "rates": {"cpu-1": [1, 2, 3, 4, 5, 6, 7, 8, 9, -1]}}'],
    )  # fmt: skip
    def test_a_damaged_file_counts_as_none(self, tmp_path, content):
        path = tmp_path / "rates.json"
        path.write_text(content)
        assert read_rates(path) == {}


class TestFit:
    def test_known_rates_are_found(self):
        generator = torch.Generator().manual_seed(0)
        amounts = torch.rand(60, 4, generator=generator, dtype=torch.float64) * torch.tensor(
            [1e9, 1e6, 1e3, 1.0], dtype=torch.float64
        )
        true = torch.tensor([1e-9, 3e-6, 0.0, 0.2], dtype=torch.float64)
        found = fit_rates(amounts, amounts @ true)
        assert (found >= 0).all()
        assert ((amounts @ found) / (amounts @ true) - 1).abs().max() < 1e-3

    def test_tune_measures_writes_and_reports(self, tmp_path):
        path = tmp_path / "rates.json"
        seen = []
        done = tune(path=path, lengths=(256, 512), repeats=1, progress=seen.append)
        assert seen[-1] == 1.0
        assert seen == sorted(seen)
        assert read_rates(path)[f"cpu-{torch.get_num_threads()}"] == done.rates
        assert json.loads(path.read_text())["format"] == "convbasis-rates"
        assert 1.0 <= done.loss <= done.worst_loss
        assert {m.choice.backend for m in done.measurements} == {"partitioned", "direct", "fft"}
        assert all(m.seconds > 0 and isinstance(m.amounts, Amounts) for m in done.measurements)
