"""A report as JSON: the same after reading, and wrong files named in one line."""

import dataclasses
import json

import pytest
from report_samples import full_report, hostile_report, provenance

from convbasis.errors import FileFormatError, InputError, MissingPathError
from convbasis.report.content import Chart, HeadMap, HeadView, Line, Report, Table
from convbasis.report.file import read_report, report_json


@pytest.fixture
def path(tmp_path):
    return tmp_path / "report.json"


def read(path, text):
    path.write_text(text, encoding="utf-8")
    return read_report(path)


@pytest.mark.parametrize(
    "report", [full_report(), hostile_report(), Report("bare", provenance(model=None))]
)
def test_what_is_written_is_read(path, report):
    assert read(path, report_json(report)) == report


def test_it_says_what_it_is_and_keeps_every_digit():
    content = json.loads(report_json(full_report()))
    assert (content["format"], content["version"]) == ("convbasis.report", 1)
    assert content["provenance"]["sources"][0]["sha256"] == "ab" * 32
    assert content["tables"][0]["rows"][0][2] == 14.213
    assert content["maps"][0]["values"][3][2] == full_report().maps[0].values[3][2]


def test_kernels_alone_and_crossings_are_read(path):
    alone = HeadView(0, 1, "kernel", None, None, (0, 1), (0.5, 0.25))
    chart = Chart("c", "x", "y", (), crossings=((2.0, 1.0, "here"), (3.0, 1.0, "there")))
    report = Report("r", provenance(), heads=(alone,), charts=(chart,))
    assert read(path, report_json(report)) == report
    content = json.loads(report_json(report))
    del content["charts"][0]["crossings"]  # as an older release wrote it
    assert read(path, json.dumps(content)).charts[0].crossings == ()


def test_fields_with_a_default_may_be_absent(path):
    content = json.loads(report_json(full_report()))
    del content["notes"], content["charts"][0]["level"], content["provenance"]["model"]
    report = read(path, json.dumps(content))
    assert report.notes == ()
    assert report.charts[0].level is None
    assert report.provenance.model is None
    assert report.charts[1] == full_report().charts[1]


def test_whole_numbers_are_numbers(path):
    content = json.loads(report_json(full_report()))
    content["charts"][0]["level"][0] = 1
    value = read(path, json.dumps(content)).charts[0].level[0]
    assert (value, type(value)) == (1.0, float)


def change(*place, to):
    def apply(content):
        for step in place[:-1]:
            content = content[step]
        content[place[-1]] = to

    return apply


WRONG = {
    "format is 'convbasis.plan'; 'convbasis.report' is wanted": change("format", to="convbasis.plan"),
    "version is 2; this release reads version 1": change("version", to=2),
    "version is True": change("version", to=True),
    "version is 1.0": change("version", to=1.0),
    "title is 3; a string is wanted": change("title", to=3),
    "the file has unknown 'heading'": change("heading", to="x"),
    "provenance is a list; an object is wanted": change("provenance", to=[]),
    "provenance lacks command, created, versions, machine": change("provenance", to={"threads": 1}),
    "provenance.threads is True; a whole number is wanted": change("provenance", "threads", to=True),
    "provenance.versions['torch'] is 2; a string is wanted": change(
        "provenance", "versions", "torch", to=2
    ),
    "provenance.model is 4; a string is wanted": change("provenance", "model", to=4),
    "summary[0] has 1 entries; 2 are wanted": change("summary", 0, to=["alone"]),
    "summary[0][1] is a list; a string or a number or a whole number or null is wanted": change(
        "summary", 0, 1, to=[]
    ),
    "summary[0][1] is True": change("summary", 0, 1, to=True),
    "maps[0].values is 'none'; a list is wanted": change("maps", 0, "values", to="none"),
    "maps[0] 'Estimated error of each head' has 1 words beside 269 numbers": change(
        "maps", 0, "values", 0, 0, to="word"
    ),
    "maps[0] 'Estimated error of each head' has layers of [1, 9] heads": change(
        "maps", 0, "values", 0, to=[1.0]
    ),
    "heads[1].exact[2][3] is '0'; a number is wanted": change("heads", 1, "exact", 2, 3, to="0"),
    "heads[0].approximate has 1 rows of [48] columns; 48 by 48": change(
        "heads", 0, "approximate", to=[[0.0] * 48]
    ),
    "heads[0].lags[0] is 0.5; a whole number is wanted": change("heads", 0, "lags", 0, to=0.5),
    "heads shows one head twice": change("heads", 1, "head", to=0),
    "charts[0] 'Attention against exact attention': line 'plan' has 6 x, 1 y": change(
        "charts", 0, "lines", 0, "y", to=[1.0]
    ),
    "charts[1].marked has 2 entries; 3 are wanted": change("charts", 1, "marked", to=[1.0, 2.0]),
    "charts[1].x_log is 1; true or false is wanted": change("charts", 1, "x_log", to=1),
    "tables[0] 'Texts that the plan did not see': row 0 has 1 cells for 6 columns": change(
        "tables", 0, "rows", 0, to=["x"]
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_content_is_named_by_its_place(path, message):
    content = json.loads(report_json(full_report()))
    WRONG[message](content)
    with pytest.raises(FileFormatError) as error:
        read(path, json.dumps(content))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON, or only the beginning"),
        (report_json(full_report())[:500], "is not JSON, or only the beginning"),
        ("[]", "its format is a list"),
        ('{"format": "convbasis.report", "format": "x"}', "'format' stands twice"),
        ('{"format": "convbasis.report", "version": NaN}', "it holds NaN"),
        ("[" * 100_000, "is not"),
        ('{"format": ' + "9" * 5000 + "}", "is not a report"),
    ],
)
def test_what_is_no_report_is_one_line(path, text, message):
    with pytest.raises(FileFormatError) as error:
        read(path, text)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 400])
def test_numbers_beyond_all_bounds_are_refused(path, number):
    content = json.loads(report_json(full_report()))
    content["charts"][0]["level"][0] = "HERE"
    with pytest.raises(FileFormatError, match=r"charts\[0\]\.level\[0\] is .*finite"):
        read(path, json.dumps(content).replace('"HERE"', number))


def test_bytes_that_are_no_text(path):
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FileFormatError, match="is not UTF-8 text"):
        read_report(path)


def test_no_file(tmp_path):
    with pytest.raises(MissingPathError, match="there is no file"):
        read_report(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"summary": (("x", float("nan")),)}, r"summary\[0\]\[1\] is nan; every number must be finite"),
        ({"maps": (HeadMap("m", "", ()),)}, r"maps\[0\] 'm' has layers of \[\] heads"),
        ({"maps": (HeadMap("m", "", ((1.0, float("inf")),)),)}, r"maps\[0\]\.values\[0\]\[1\] is inf"),
        (
            {"heads": (HeadView(-1, 0, "", ((1.0,),), None, (), ()),)},
            r"heads\[0\] is layer -1, head 0; both count from 0",
        ),
        ({"heads": (HeadView(0, 0, "", (), None, (), ()),)}, r"heads\[0\]\.exact has no rows"),
        (
            {"heads": (HeadView(0, 0, "", ((1.0,),), None, (), (), first=-1, tile=0),)},
            r"heads\[0\] begins at token -1 with tiles of 0",
        ),
        ({"summary": (("x", 10**400),)}, r"summary\[0\]\[1\] is 1000.*every number must be finite"),
        (
            {"heads": (HeadView(0, 0, "", None, ((1.0,),), (), ()),)},
            r"heads\[0\]\.exact has no rows; None is wanted where a kernel alone is shown",
        ),
        (
            {"heads": (HeadView(0, 0, "", ((1.0,),), None, (0,), ()),)},
            r"heads\[0\] has 1 lags and 0 lag_weights",
        ),
        (
            {"charts": (Chart("c", "x", "y", (Line("l", (1.0,), (1.0,), ("a", "b")),)),)},
            "line 'l' has 1 x, 1 y and 2 labels",
        ),
        ({"tables": (Table("t", ("a",), ((1, 2),)),)}, "row 0 has 2 cells for 1 columns"),
    ],
)
def test_parts_that_do_not_agree_are_not_written(part, message):
    report = dataclasses.replace(full_report(), **part)
    with pytest.raises(InputError, match=message):
        report_json(report)
