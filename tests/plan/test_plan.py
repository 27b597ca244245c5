"""Plans: what they hold, their files, and what is refused."""

import dataclasses
import json
import os

import pytest
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

import convbasis as cb
from convbasis.plan import HeadPlan, HeadSetting, ModelShape, Size

SHAPE = ModelShape("tiny", "llama", layers=2, heads=4, kv_heads=2, head_dim=8)


def grown(far_field="none"):
    return HeadSetting(
        window=Size(32, length=512, power=0.5, multiple=16),
        sinks=4,
        columns=Size(8, length=512, power=0.25),
        blocks=0 if far_field == "conv" else 1,
        far_field=far_field,
        key_weights=far_field == "segments",
        correction=far_field == "none",
    )


def plan(**changes):
    heads = (
        (HeadPlan(grown(), 0.01, 0.2), HeadPlan(None), HeadPlan(HeadSetting(64), 0.05), HeadPlan(None)),
        tuple(HeadPlan(grown(far), 0.02, 0.25) for far in ("none", "segments", "conv", "none")),
    )  # fmt: skip
    fields = {
        "model": SHAPE, "texts_sha256": "0123456789abcdef" * 4, "tolerance": 0.1,
        "calibrated_length": 512, "min_length": 128, "heads": heads,
    }  # fmt: skip
    return cb.Plan(**{**fields, **changes})


@pytest.fixture
def file(tmp_path):
    place = tmp_path / "plan.json"
    plan().save(place)
    return place


def edited(file, edit):
    """Apply edit to the parsed file and write it back."""
    parsed = json.loads(file.read_text())
    edit(parsed)
    file.write_text(json.dumps(parsed))
    return file


class TestPlan:
    def test_repr_is_one_short_line(self):
        assert repr(plan()) == (
            "<Plan for 'tiny': 6 of 8 heads approximated, tolerance 0.1, calibrated at 512 tokens>"
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tolerance": 0}, "tolerance=0 allows no approximation"),
            ({"tolerance": float("inf")}, "tolerance=inf is not a finite number"),
            ({"texts_sha256": "abc"}, "texts_sha256='abc' is not a fingerprint"),
            ({"calibrated_length": 0}, "calibrated_length=0 is not a positive integer"),
            ({"calibrated_length": 600}, "window of layer 0, head 0 is stated for 512 tokens"),
            ({"min_length": -1}, "min_length=-1 is not an integer >= 0"),
            ({"predicted_kl": -0.1}, "predicted_kl=-0.1 is not a finite number >= 0"),
            ({"heads": ()}, "heads has 0 layers; the model has 2"),
            ({"heads": ((), ())}, "heads of layer 0 are 0; the model has 4 a layer"),
        ],
        ids=str,
    )
    def test_refusals(self, change, message):
        with pytest.raises(cb.InputError, match=message):
            plan(**change)

    def test_refusals_of_a_head(self):
        with pytest.raises(cb.InputError, match=r"error=-0.1 is not a finite number >= 0"):
            HeadPlan(None, error=-0.1)
        with pytest.raises(cb.InputError, match="setting is 'exact'; a HeadSetting or None is wanted"):
            HeadPlan("exact")


class TestFile:
    def test_round_trip(self, file):
        assert cb.Plan.load(file) == plan()
        assert cb.Plan.load(str(file)) == plan()
        planned = plan(predicted_kl=0.0012)
        planned.save(file)
        assert cb.Plan.load(file) == planned
        settings = [head.setting for head in cb.Plan.load(file).heads[1]]
        assert [setting.correction for setting in settings] == [True, False, False, True]

    def test_one_head_a_line(self, file):
        lines = file.read_text().splitlines()
        assert sum('"setting"' in line for line in lines) == 8
        assert max(map(len, lines)) < 250
        assert '"exact"' in file.read_text()

    def test_an_interrupted_write_leaves_the_older_file(self, file, monkeypatch):
        def fail(_):
            raise OSError("the disk is full")

        before = file.read_bytes()
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="the disk is full"):
            plan(tolerance=0.2).save(file)
        assert file.read_bytes() == before
        assert list(file.parent.iterdir()) == [file]

    def test_no_such_place(self, tmp_path):
        with pytest.raises(cb.MissingPathError, match="there is no folder"):
            plan().save(tmp_path / "none" / "plan.json")
        with pytest.raises(cb.MissingPathError, match="there is no file"):
            cb.Plan.load(tmp_path / "plan.json")
        with pytest.raises(cb.InputError, match="is a folder"):
            plan().save(tmp_path)

    def test_every_truncation_is_refused(self, file):
        small = dataclasses.replace(SHAPE, layers=1, heads=3, kv_heads=1)
        kinds = (HeadPlan(grown(), 0.01, 0.2), HeadPlan(None), HeadPlan(HeadSetting(64), 0.05))
        plan(model=small, heads=(kinds,)).save(file)
        text = file.read_text()
        for length in range(len(text.rstrip())):
            file.write_text(text[:length])
            with pytest.raises(
                cb.FileFormatError, match=r"not JSON, or only the beginning of a file.* line"
            ):
                cb.Plan.load(file)

    def test_not_text(self, file):
        file.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(cb.FileFormatError, match="is not UTF-8 text"):
            cb.Plan.load(file)

    @pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"format": "other"}'])
    def test_other_json(self, file, text):
        file.write_text(text)
        with pytest.raises(cb.FileFormatError, match=r"its format is .*; 'convbasis.plan' is wanted"):
            cb.Plan.load(file)

    @pytest.mark.parametrize("version", [2, "1", None, True])
    def test_unknown_versions(self, file, version):
        edited(file, lambda parsed: parsed.update(version=version))
        with pytest.raises(
            cb.FileFormatError, match=r"its version is .*; this release reads version 1"
        ):
            cb.Plan.load(file)

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (("tolerance",), "low", "tolerance='low' is not a finite number >= 0"),
            (("min_length",), 1.5, "min_length=1.5 is not an integer"),
            (("predicted_kl",), "low", "predicted_kl='low' is not a finite number >= 0"),
            (("calibrated_length",), True, "layer 0, head 0, setting, window: length=True is not"),
            (("texts_sha256",), None, "texts_sha256=None is not a fingerprint"),
            (("layers",), {}, "layers is a dict; a list is wanted"),
            (("layers", 1), "x", "layer 1 is 'x'; a list is wanted"),
            (("layers", 1), [], "heads of layer 1 are 0; the model has 4 a layer"),
            (("layers", 1, 2), 7, "layer 1, head 2 is 7; an object with setting, error, cost"),
            (("layers", 1, 2, "error"), -1, "layer 1, head 2: error=-1 is not a finite number"),
            (("layers", 1, 2, "cost"), "cheap", "layer 1, head 2: cost='cheap' is not a finite number"),
            (("layers", 1, 2, "color"), 1, "layer 1, head 2 has unknown 'color'; wanted are setting"),
            (("layers", 0, 1, "setting"), "fast", "layer 0, head 1: setting is 'fast'; 'exact' or an"),
            (("layers", 1, 2, "setting", "sinks"), 1.5, "layer 1, head 2, setting: sinks=1.5 is not"),
            (("layers", 1, 2, "setting", "far_field"), "x", "layer 1, head 2, setting: far_field='x'"),
            (("layers", 1, 2, "setting", "key_weights"), 0, "layer 1, head 2, setting: key_weights=0"),
            (("layers", 1, 2, "setting", "correction"), 1, "layer 1, head 2, setting: correction=1 is"),
            (
                ("layers", 1, 2, "setting", "window", "power"), [],
                "layer 1, head 2, setting, window: power=a list is not a finite number",
            ),
            (
                ("layers", 1, 2, "setting", "columns", "size"), None,
                "layer 1, head 2, setting, columns: size=None is not an integer",
            ),
            (("model", "heads"), 5, "model: heads=5 is not a multiple of kv_heads=2"),
            (("model", "type"), 5, "model: type=5 is not a string"),
            (("model", "layers"), 3, "heads has 2 layers; the model has 3"),
        ],
        ids=str,
    )  # fmt: skip
    def test_edits_are_refused_with_their_place(self, file, place, value, message):
        def edit(parsed):
            for key in place[:-1]:
                parsed = parsed[key]
            parsed[place[-1]] = value

        edited(file, edit)
        with pytest.raises(cb.FileFormatError, match=message) as caught:
            cb.Plan.load(file)
        assert str(file) in str(caught.value)

    @pytest.mark.parametrize(
        ("place", "message"),
        [
            (("min_length",), "the file lacks min_length"),
            (("predicted_kl",), "the file lacks predicted_kl"),
            (("model", "head_dim"), "model lacks head_dim"),
            (("layers", 1, 3, "error"), "layer 1, head 3 lacks error"),
            (("layers", 1, 3, "setting", "blocks"), "layer 1, head 3, setting lacks blocks"),
            (("layers", 1, 3, "setting", "correction"), "layer 1, head 3, setting lacks correction"),
            (("layers", 1, 3, "setting", "window", "power"), "head 3, setting, window lacks power"),
        ],
        ids=str,
    )
    def test_what_is_missing_is_named(self, file, place, message):
        def edit(parsed):
            for key in place[:-1]:
                parsed = parsed[key]
            del parsed[place[-1]]

        with pytest.raises(cb.FileFormatError, match=message):
            cb.Plan.load(edited(file, edit))

    def test_a_plan_that_does_not_tell_the_weights(self, file):
        known = plan(weights_sha256="ab" * 32)
        known.save(file)
        assert cb.Plan.load(file) == known
        assert cb.Plan.load(edited(file, lambda parsed: parsed.pop("weights_sha256"))) == plan()
        with pytest.raises(cb.InputError, match="weights_sha256='short' is not a fingerprint"):
            plan(weights_sha256="short")

    def test_numbers_that_are_not_finite(self, file):
        for number in ("NaN", "Infinity"):
            plan().save(file)
            file.write_text(file.read_text().replace('"tolerance": 0.1', f'"tolerance": {number}'))
            with pytest.raises(
                cb.FileFormatError, match=f"it holds {number}; every number must be finite"
            ):
                cb.Plan.load(file)

    def test_a_field_that_stands_twice(self, file):
        file.write_text(
            file.read_text().replace('"min_length": 128', '"tolerance": 1, "min_length": 128')
        )
        with pytest.raises(cb.FileFormatError, match="'tolerance' stands twice in one object"):
            cb.Plan.load(file)

    def test_nesting_without_end(self, file):
        file.write_text("[" * 100_000)
        with pytest.raises(cb.FileFormatError):
            cb.Plan.load(file)


class TestCheckModel:
    CONFIG = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip

    def model(self, **changes):
        return LlamaForCausalLM(LlamaConfig(**{**self.CONFIG.to_dict(), **changes}))

    def test_its_own_model(self):
        assert dataclasses.replace(ModelShape.of(self.model()), name="tiny") == SHAPE
        plan().check_model(self.model())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_hidden_layers": 3}, r"which has layers 3 \(the plan: 2\); calibrate this model"),
            ({"num_key_value_heads": 4}, r"kv_heads 4 \(the plan: 2\)"),
            ({"head_dim": 16}, r"head_dim 16 \(the plan: 8\)"),
        ],
        ids=str,
    )
    def test_another_shape(self, change, message):
        with pytest.raises(cb.InputError, match=message):
            plan().check_model(self.model(**change))

    def test_another_architecture(self):
        class Stub:
            config = GPT2Config(n_layer=2, n_head=4, n_embd=32)

        assert ModelShape.of(Stub()) == ModelShape("Stub", "gpt2", 2, 4, 4, 8)
        with pytest.raises(cb.InputError, match=r"type 'gpt2' \(the plan: 'llama'\), kv_heads 4"):
            plan().check_model(Stub())

    def test_not_a_model(self):
        with pytest.raises(cb.InputError, match="model is 3 whose shape cannot be read"):
            plan().check_model(3)
