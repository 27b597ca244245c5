"""JSON that is not what it should be: one line that names the file and the place."""

import pytest

import convbasis as cb
from convbasis.report.file import read_report
from convbasis.strict_json import read_json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "only the beginning of a file.*line 1, column"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"a": NaN}', "holds NaN"),
        (b"1" * 5000, "is not a thing"),
        (b"[" * 200_000, "is not a thing"),
    ],
    ids=["truncated", "bytes", "twice", "NaN", "digits", "deep"],
)
def test_what_is_refused(tmp_path, content, message):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(cb.FileFormatError, match=message) as caught:
        read_json(file, "a thing", lambda parsed: parsed)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_what_is_read_goes_through_the_builder(tmp_path):
    file = tmp_path / "file.json"
    file.write_text('{"a": [1, 2.5, null]}', encoding="utf-8")
    assert read_json(file, "a thing", lambda parsed: parsed["a"]) == [1, 2.5, None]


@pytest.mark.parametrize("read", [cb.Plan.load, read_report])
def test_numbers_of_too_many_digits_are_damage(tmp_path, read):
    file = tmp_path / "file.json"
    file.write_bytes(b'{"format": ' + b"1" * 5000 + b"}")
    with pytest.raises(cb.FileFormatError, match=r"is not a (plan|report)"):
        read(file)
