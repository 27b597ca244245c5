"""What commands have in common: exit codes, messages, JSON, pages, help."""

import errno
import json
import shlex
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import convbasis as cb
from convbasis.cli.app import EXAMPLE, app
from convbasis.cli.exits import EXIT_CODES, Exit
from convbasis.cli.interruption import checkpoint_of, keeping
from convbasis.cli.results import check_outputs, deliver, provenance, report_json, shown
from convbasis.cli.words import in_words, numbers
from convbasis.plan import HeadSetting
from convbasis.report.content import Report, Table

runner = CliRunner()
COMMANDS = [
    "demo", "tune", "doctor", "analyze", "calibrate", "compare", "generate", "bench", "decompose",
    "report",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_shows_an_example(command):
    result = runner.invoke(app, [command, "--help"], env={"COLUMNS": "80"})
    lines = result.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert f"Example: convbasis {command}" in result.stdout


def test_help_names_commands_and_exit_codes():
    result = runner.invoke(app, ["--help"], env={"COLUMNS": "80"})
    words = " ".join(result.stdout.split())
    assert EXIT_CODES in words
    assert all(str(int(code)) in EXIT_CODES for code in Exit)
    assert all(f" {command} " in words for command in COMMANDS)
    assert EXAMPLE in words
    result = runner.invoke(app, [*shlex.split(EXAMPLE)[2:3], "--help"])
    assert all(word in result.stdout for word in shlex.split(EXAMPLE) if word.startswith("-"))


NAMED = "import sys; sys.argv = ['convbasis']\nfrom convbasis.cli import main; main()"


def test_completion_knows_the_commands(monkeypatch):
    done = subprocess.run(
        [sys.executable, "-c", NAMED],
        env={
            "_CONVBASIS_COMPLETE": "complete_bash", "COMP_WORDS": "convbasis do", "COMP_CWORD": "1",
            "PYTHONPATH": ":".join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["doctor"], done.stderr
    # Which shell runs the tests is not asked.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    shown_script = runner.invoke(app, ["--show-completion", "bash"])
    assert "--install-completion" in runner.invoke(app, ["--help"]).stdout
    assert "COMP_WORDS" in shown_script.output


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (cb.InputError("wrong"), 1, "error: wrong"),
        (cb.MissingExtraError("this", "hf", ImportError("x")), 1, "error: this needs the extra [hf]"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "error: No space left on device"),
        (PermissionError(13, "Permission denied", "/f"), 3, "error: Permission denied: '/f'"),
        (ZeroDivisionError("by zero\nor so"), 4, "error: unexpected ZeroDivisionError: by zero or so"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("half is kept"), 130, "interrupted; half is kept"),
        (cb.InputError("\x1b[31mred\x1b[0m [bold]"), 1, "error:  [31mred [0m [bold]"),
    ],
)
def test_failures_are_one_line_and_a_code(monkeypatch, error, code, message):
    def raise_it(*_):
        raise error

    monkeypatch.setattr("convbasis.cli.doctor.run_doctor", raise_it)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == code
    assert result.stderr.strip().startswith(message)
    assert len(result.stderr.strip().splitlines()) == 1
    if isinstance(error, Exception):
        again = runner.invoke(app, ["--debug", "doctor"])
        assert again.exit_code == code
        assert again.stderr.startswith("Traceback")
        assert (
            f"\n{type(error).__module__}.{type(error).__name__}: ".replace("builtins.", "")
            in again.stderr
        )


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(monkeypatch):
    def warn(*_):
        warnings.warn("take care\nof this", cb.ConvBasisWarning, stacklevel=1)

    monkeypatch.setattr("convbasis.cli.doctor.run_doctor", warn)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert result.stderr == "warning: take care of this\n"


def test_wrong_options_are_exit_code_2():
    assert runner.invoke(app, ["bench", "--heads", "0"]).exit_code == Exit.USAGE
    assert runner.invoke(app, ["calibrate", "smollm2"]).exit_code == Exit.USAGE


def report(**changes):
    where = provenance(model="<script>", command="convbasis x")
    return Report("[bold]title", where, **{"summary": (("a", 1.5), ("b", None)), **changes})


def test_a_result_is_printed_without_its_markup(capsys):
    table = Table("[red]t", ("n", "[x]"), ((1234, "[/]"), (None, "w")))
    deliver(report(tables=(table,), notes=("[blue]note",)), Console(width=70), None, None)
    printed = capsys.readouterr().out
    for word in ("[bold]title", "[red]t", "[x]", "[/]", "[blue]note", "1,234", "1.5"):
        assert word in printed


def test_json_is_strict_and_complete(tmp_path, capsys):
    made = report()
    deliver(made, Console(stderr=True), tmp_path / "r.json", None)
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["provenance"]["versions"]["convbasis"] == cb.__version__
    assert content["summary"] == [["a", 1.5], ["b", None]]
    deliver(made, Console(stderr=True), Path("-"), None)
    assert json.loads(capsys.readouterr().out) == content
    with pytest.raises(cb.InputError, match=r"summary\[0\]\[1\] is nan; every number must be finite"):
        report_json(report(summary=(("a", float("nan")),)))


def test_a_page_is_written_by_the_report_package(tmp_path, monkeypatch):
    written = []
    module = types.ModuleType("convbasis.report.html")
    module.write_report = lambda *given: written.append(given)
    monkeypatch.setitem(sys.modules, "convbasis.report.html", module)
    made = report()
    deliver(made, Console(stderr=True), None, tmp_path / "r.html")
    assert written == [(made, tmp_path / "r.html")]


def test_files_are_written_before_anything_is_printed(tmp_path, pages):
    class Closed(Console):
        def print(self, *_, **__):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        deliver(report(), Closed(), tmp_path / "r.json", tmp_path / "r.html")
    assert (tmp_path / "r.json").is_file()
    assert [place for _, place in pages] == [tmp_path / "r.html"]


def test_the_command_can_be_pasted_into_a_shell(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/convbasis", "analyze", "my model", "--text", "it's $1.txt"])
    assert shlex.split(provenance().command) == ["convbasis", *sys.argv[1:]]
    assert "'my model'" in provenance().command


def test_outputs_are_checked_before_the_work(tmp_path, monkeypatch):
    check_outputs(Path("-"), tmp_path / "fine", None)
    with pytest.raises(cb.MissingPathError, match="there is no folder"):
        check_outputs(tmp_path / "no" / "file")
    with pytest.raises(cb.InputError, match="is a folder; name a file in it"):
        check_outputs(tmp_path)
    with pytest.raises(cb.InputError, match="two outputs cannot go to one file"):
        check_outputs(tmp_path / "one", tmp_path / "." / "one")
    with pytest.raises(cb.InputError, match="two outputs cannot go to one file"):
        check_outputs(tmp_path / "one", tmp_path / "no" / ".." / "one")
    for files, page in (([Path("-")], None), ([], Path("-"))):
        with pytest.raises(cb.InputError, match="'-' stands for standard output in --json alone"):
            check_outputs(None, *files, page=page)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(cb.MissingExtraError, match=r"an HTML page needs the extra \[report\]"):
        check_outputs(None, page=tmp_path / "page")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="no permission to write into"):
        check_outputs(tmp_path / "file")


OUTPUTS = {
    "calibrate model.gguf --text text.txt -o": ["model.gguf", "text.txt"],
    "calibrate smollm2 --text text.txt -o plan --report": ["text.txt", "-"],
    "calibrate smollm2 -o": ["-"],
    "compare smollm2 --plan plan.json --text a.txt --text text.txt --json": ["plan.json", "text.txt"],
    "compare smollm2 --plan plan.json --report": ["plan.json", "-"],
    "generate smollm2 --plan plan.json --prompt-file text.txt --json": ["plan.json", "text.txt"],
    "analyze smollm2 --text text.txt --json": ["text.txt", "link.txt"],
    "analyze smollm2 --text text.txt --report": ["text.txt", "-"],
    "decompose m.npy -o": ["m.npy", "-"],
    "decompose m.npy --json": ["m.npy"],
    "report r.json -o": ["r.json", "-"],
    "tune --output": ["-", "folder", "no/file"],
    "demo --output": ["-", "text.txt"],
    "demo --text folder/results.json --output": ["folder"],
}


@pytest.mark.parametrize(
    ("words", "output"), [(words, output) for words, outputs in OUTPUTS.items() for output in outputs]
)
def test_no_command_writes_over_its_input_or_into_a_file_named_dash(
    words, output, tmp_path, monkeypatch, fail, pages
):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    names = ["model.gguf", "text.txt", "plan.json", "m.npy", "r.json", "folder/results.json"]
    for name in names:
        Path(name).write_text("kept")
    Path("link.txt").symlink_to("text.txt")
    before = sorted(Path().rglob("*"))
    line = fail(*words.split(), output)
    told = {
        ("tune --output", "folder"): "is a folder; name a file in it",
        ("tune --output", "no/file"): "there is no folder",
        (words, "-"): "'-' stands for standard output in --json alone; name a file",
        ("demo --output", output): "is no folder; name one",
    }
    assert told.get((words, output), "is an input; name another file to write") in line
    assert sorted(Path().rglob("*")) == before
    assert all(Path(name).read_text() == "kept" for name in names)


def test_a_full_disk_leaves_an_older_file_and_nothing_else(tmp_path, monkeypatch, fail):
    place = tmp_path / "d.json"
    place.write_text("older")

    def full(self, text, encoding):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("convbasis.cli.doctor.doctor_report", lambda device: report())
    monkeypatch.setattr("pathlib.Path.write_text", full)
    line = fail("doctor", "--json", place, code=Exit.SYSTEM)
    assert line == "error: No space left on device"
    assert place.read_text() == "older"
    assert list(tmp_path.iterdir()) == [place]


def test_a_checkpoint_is_kept_until_the_end(tmp_path):
    output = tmp_path / "out.json"
    place = checkpoint_of(output)
    assert place.parent == tmp_path
    with keeping(Path("-"), None, output) as given:
        assert given == place
        place.write_text("kept")
    assert not place.exists()
    with keeping(Path("-"), None) as given:
        assert given is None

    def stopped():
        with keeping(output):
            place.write_text("kept")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"kept in '.*out.json.checkpoint'; the same command"):
        stopped()
    assert place.read_text() == "kept"


def test_a_stop_before_anything_was_measured_says_nothing_of_it(tmp_path):
    def stopped():
        with keeping(tmp_path / "out.json"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        stopped()


def test_numbers_and_cells():
    assert numbers("layers", "3,0-2, 2", 0, 5) == [0, 1, 2, 3]
    for wrong in ("", "a", "1,,2", "1-2-3", "-1", "6", "2-1", "0-9", "²"):
        with pytest.raises(cb.InputError, match="layers="):
            numbers("layers", wrong, 0, 5)
    with pytest.raises(cb.InputError, match="63 is not among those from 64 on"):
        numbers("lengths", "63", 64)
    assert [shown(cell) for cell in (None, "a", 12345, 0.123456)] == ["", "a", "12,345", "0.1235"]
    setting = HeadSetting(64, 4, 8, 2, "segments", True)
    assert in_words(setting, 100) == "window 64, 8 columns, 2 blocks, weighed segments"
    assert in_words(HeadSetting(64, 4, 0), 32) == "window 32"
    assert in_words(HeadSetting(64, 4, 0, correction=True), 100) == "window 64, correction"
    assert in_words(None, 32) == "exact"


def test_commands_of_others_get_their_options(tmp_path, monkeypatch):
    called = []
    for name in ("decompose", "report"):  # imported when they run
        module = types.ModuleType(f"convbasis.cli.{name}")
        setattr(module, f"run_{name}", lambda *given: called.append(given))
        monkeypatch.setitem(sys.modules, f"convbasis.cli.{name}", module)
    words = ["decompose", "m.npz", "--tol", "0.5", "--key", "a", "-o", "b", "--json", "c"]
    words += ["--report", "d"]
    assert runner.invoke(app, words).exit_code == 0
    assert called[0][:-1] == (Path("m.npz"), Path("b"), 0.5, "a", Path("c"), Path("d"))
    assert runner.invoke(app, ["decompose", "m.npy"]).exit_code == 0
    assert called[1][:-1] == (Path("m.npy"), None, 0.0, None, None, None)
    words = ["report", "r.json", "-o", "r.html", "--json", "told.json"]
    assert runner.invoke(app, words).exit_code == 0
    assert called[2][:-1] == (Path("r.json"), Path("r.html"), Path("told.json"))
    assert all(isinstance(given[-1], Console) for given in called)
