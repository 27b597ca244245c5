"""Captured heads: what the model's attention really sees; and the system on real heads."""

import math

import pytest
import reference
import tiny_models
import torch
from comparison import assert_close
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import convbasis as cb
from convbasis.integrations.capture import (
    CapturedLayer,
    cached_layers,
    capture_layers,
    default_cache,
)
from convbasis.integrations.smollm2 import sample_text, token_ids, weights_file
from convbasis.storage import save_tensors


@pytest.fixture(scope="module")
def tiny():
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ids(n=40):
    return torch.randint(0, 50, (1, n), generator=torch.Generator().manual_seed(0))


class TestCapture:
    def test_shapes_and_restoration(self, tiny):
        before = tiny.config._attn_implementation
        seen = []
        found = capture_layers(tiny, ids(), [0, 2], progress=seen.append)
        assert list(found) == [0, 2]
        assert seen == [0, 1, 2]
        assert found[0].query.shape == (1, 4, 40, 8)
        assert found[0].key.shape == found[0].value.shape == (1, 2, 40, 8)
        assert found[0].scale == pytest.approx(1 / math.sqrt(8))
        assert tiny.config._attn_implementation == before

    def test_first_layer_equals_projections_after_rope(self, tiny):
        base, tokens = tiny.model, ids()
        with torch.no_grad():
            hidden = base.layers[0].input_layernorm(base.embed_tokens(tokens))
            attention = base.layers[0].self_attn
            query = attention.q_proj(hidden).view(1, 40, 4, 8).transpose(1, 2)
            key = attention.k_proj(hidden).view(1, 40, 2, 8).transpose(1, 2)
            value = attention.v_proj(hidden).view(1, 40, 2, 8).transpose(1, 2)
            cos, sin = base.rotary_emb(hidden, torch.arange(40)[None])
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
        found = capture_layers(tiny, tokens, [0])[0]
        for expected, got in zip((query, key, value), found[:3], strict=True):
            assert torch.allclose(expected, got, atol=1e-6)

    def test_equal_positions_are_one_document(self, tiny):
        zeros = torch.zeros_like(ids())
        found = capture_layers(tiny, ids(), [1], position_ids=zeros)[1]
        changed = ids().clone()
        changed[0, 3] = (changed[0, 3] + 1) % 50
        other = capture_layers(tiny, changed, [1], position_ids=zeros)[1]
        moved = (found.query - other.query).abs().amax((0, 1, 3)) > 1e-7
        assert not moved[:3].any()
        assert moved[3:].all()  # later tokens see the changed one: attention is causal, not diagonal

    def test_model_output_is_unchanged_afterwards(self, tiny):
        with torch.no_grad():
            before = tiny(ids()).logits
            capture_layers(tiny, ids(), [1])
            assert torch.equal(before, tiny(ids()).logits)

    def test_implementation_is_restored_after_an_error(self, tiny):
        before = tiny.config._attn_implementation
        with pytest.raises(IndexError):
            capture_layers(tiny, torch.full((1, 4), 99), [0])
        assert tiny.config._attn_implementation == before

    @pytest.mark.parametrize(
        ("tokens", "layers", "message"),
        [
            (ids(), [3], r"0\.\.2"),
            (ids(), [], r"0\.\.2"),
            (ids()[0], [0], r"\(1, n\)"),
            (ids().expand(2, -1), [0], r"\(1, n\)"),
        ],
    )
    def test_errors(self, tiny, tokens, layers, message):
        with pytest.raises(cb.InputError, match=message):
            capture_layers(tiny, tokens, layers)

    def test_a_model_that_bypasses_the_interface_is_refused(self, tiny, monkeypatch):
        monkeypatch.setattr(tiny.model, "forward", lambda *args, **options: None)
        with pytest.raises(cb.InputError, match="attention interface"):
            capture_layers(tiny, ids(), [0, 1])


class TestCache:
    def test_second_call_reads_the_file(self, tiny, tmp_path):
        loads = []

        def load():
            loads.append(1)
            return tiny

        first = cached_layers(load, "tiny", ids(), [0, 1], folder=tmp_path / "new")
        second = cached_layers(load, "tiny", ids(), [0, 1], folder=tmp_path / "new")
        assert len(loads) == 1
        for layer in (0, 1):
            assert all(
                torch.equal(a, b) for a, b in zip(first[layer][:3], second[layer][:3], strict=True)
            )
            assert first[layer].scale == second[layer].scale
        assert len(list((tmp_path / "new").iterdir())) == 1

    def test_anything_that_matters_makes_another_file(self, tiny, tmp_path):
        options = {"folder": tmp_path}
        cached_layers(lambda: tiny, "tiny", ids(), [0], **options)
        cached_layers(lambda: tiny, "other", ids(), [0], **options)
        cached_layers(lambda: tiny, "tiny", ids(39), [0], **options)
        cached_layers(lambda: tiny, "tiny", ids(), [1], **options)
        cached_layers(lambda: tiny, "tiny", ids(), [0], position_ids=torch.zeros_like(ids()), **options)
        assert len(list(tmp_path.iterdir())) == 5

    @pytest.mark.parametrize("content", ["foreign", "damaged", "no scale"])
    def test_an_unusable_file_is_captured_again(self, tiny, tmp_path, caplog, content):
        first = cached_layers(lambda: tiny, "tiny", ids(), [0], folder=tmp_path)
        (place,) = tmp_path.iterdir()
        if content == "damaged":
            place.write_bytes(place.read_bytes()[:100])
        elif content == "foreign":
            save_tensors(place, {"x": torch.zeros(1)}, {"format": "other"})
        else:
            tensors = {f"0.{name}": getattr(first[0], name) for name in ("query", "key", "value")}
            save_tensors(place, tensors, {"format": "convbasis.captures"})
        again = cached_layers(lambda: tiny, "tiny", ids(), [0], folder=tmp_path)
        assert "capturing again" in caplog.text
        assert torch.equal(again[0].query, first[0].query)
        assert cached_layers(None, "tiny", ids(), [0], folder=tmp_path)[0].scale == first[0].scale

    def test_default_folder(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CONVBASIS_CACHE", str(tmp_path / "a"))
        assert default_cache() == tmp_path / "a"
        monkeypatch.delenv("CONVBASIS_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_cache() == tmp_path / "convbasis"


class TestText:
    def test_prose_of_the_standard_library(self):
        text = sample_text()
        assert len(text) > 300_000
        assert "The standard type hierarchy" in text

    def test_a_file(self, tmp_path):
        file = tmp_path / "t.txt"
        file.write_text("naïve text", encoding="utf-8")
        assert sample_text(file) == "naïve text"

    def test_unreadable_files(self, tmp_path):
        with pytest.raises(cb.InputError, match="cannot be read"):
            sample_text(tmp_path / "no")
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(cb.InputError, match="UTF-8"):
            sample_text(tmp_path / "binary")


@pytest.fixture(scope="module")
def layer(smollm2) -> CapturedLayer:
    tokens = token_ids(smollm2.tokenizer, sample_text(), 384)
    return capture_layers(smollm2.model, tokens, [14])[14]


class TestRealHeads:
    def test_the_weights_are_where_the_package_is(self):
        assert weights_file().is_file()

    def test_too_short_a_text(self, smollm2):
        with pytest.raises(cb.InputError, match=r"the text has \d+ tokens; 100 are wanted"):
            token_ids(smollm2.tokenizer, "short", 100)

    def test_capture_is_what_the_model_attends_with(self, layer, smollm2):
        assert layer.query.shape == (1, 9, 384, 64)
        assert layer.key.shape == layer.value.shape == (1, 3, 384, 64)
        # A trained model's attention has a sink: the first token draws much of the weight.
        shared = layer.key[0].repeat_interleave(3, 0)
        weights = (shared @ layer.query[0, :, -1, :, None] * layer.scale)[..., 0].softmax(-1)
        assert weights[:, 0].mean() > 0.2

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("backend", ["fft", "reference"])
    @pytest.mark.parametrize("options", [{"segment_length": 48}, {"num_bases": 8}], ids=str)
    def test_attention_equals_the_oracle(self, layer, dtype, backend, options):
        heads = [x.to(dtype) for x in layer[:3]]
        stats = cb.conv_basis_attention_stats(*heads, enable_gqa=True, backend=backend, **options)
        expected, lse = reference.conv_basis_attention(*heads, stats.basis.starts)
        whole = 1e-12 if dtype == torch.float64 else 1e-5
        for output in (
            stats.output,
            cb.conv_basis_attention(*heads, enable_gqa=True, backend=backend, **options),
        ):
            assert_close(expected, output, whole=whole, row=1e-9 if dtype == torch.float64 else 1e-4)
        assert (stats.lse.double() - lse).abs().max() < 1e-4

    def test_decomposition_is_exact_and_needs_every_column(self, layer):
        logits = (layer.query[0, :3] @ layer.key[0, :1].mT * layer.scale).tril()
        basis = cb.decompose(logits)
        assert torch.equal(basis.to_dense(), logits)
        assert basis.k == 384

    def test_the_plain_algorithm_fails_on_real_heads(self, layer):
        exact = reference.exact_attention(*(x[:, :3, :200] for x in layer[:3]))
        ours = cb.conv_basis_attention(*(x[:, :3, :200] for x in layer[:3]), num_bases=16)
        error = (ours - exact).norm() / exact.norm()
        assert error > 0.3


@pytest.mark.parametrize("backend", ["partitioned", "direct", "auto"])
@pytest.mark.parametrize("options", [{"segment_length": 16}, {"num_bases": 12}], ids=str)
def test_real_heads_equal_their_evaluation_in_float64(layer, options, backend):
    heads = (layer.query, layer.key, layer.value)
    stats = cb.conv_basis_attention_stats(*heads, enable_gqa=True, backend=backend, **options)
    exact, lse = reference.conv_basis_attention(*heads, stats.basis.starts)
    difference = torch.linalg.vector_norm(stats.output.double() - exact, dim=-1)
    assert (difference / torch.linalg.vector_norm(exact, dim=-1)).max() <= 1e-4
    assert (stats.lse.double() - lse).abs().max() <= 1e-4


@pytest.mark.parametrize(("family", "what"), [("gemma2", "soft-capped"), ("gpt_oss", "attention-sink")])
def test_attention_that_is_more_than_softmax_is_refused(family, what):
    model = tiny_models.build(family)
    with pytest.raises(cb.InputError, match=f"{what}.*; only plain softmax attention can be captured"):
        capture_layers(model, tiny_models.ids(), [0])
    assert model.config._attn_implementation == "eager"
