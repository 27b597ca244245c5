"""Every option of every command has a test that it changes something; one without is found here."""

import ast
from pathlib import Path

import pytest
from typer.main import get_command

from convbasis.cli.app import app

FOLDER = Path(__file__).parent
ANALYZE = "test_analyze.py::test_every_option_changes_the_result"
CALIBRATE = "test_calibrate_command.py::test_every_option_changes_the_plan"
COMPARE = "test_compare_command.py::test_every_option_changes_the_result"
GENERATE = "test_generate_command.py::test_every_option_changes_the_result"
BENCH = "test_bench_and_doctor.py::test_every_option_changes_what_is_measured"
TUNE = "test_bench_and_doctor.py::test_every_option_of_tune_changes_what_is_measured"
DEMO = "test_cli.py::test_demo_end_to_end"
GIVEN = "test_results.py::test_commands_of_others_get_their_options"
RUN = "conftest.py::run"  # every test that looks at a result reads its JSON

# Option, by one of its names, to the test that shows its effect.
TESTS = {
    "": {
        "--version": "test_cli.py::test_version",
        "--debug": "test_results.py::test_failures_are_one_line_and_a_code",
        "--install-completion": "test_results.py::test_completion_knows_the_commands",
        "--show-completion": "test_results.py::test_completion_knows_the_commands",
    },
    "demo": {
        **dict.fromkeys(["--output", "--length", "--layers", "--json"], DEMO),
        **dict.fromkeys(
            ["--text", "--seed"], "test_cli.py::test_text_and_seed_change_what_the_demo_finds"
        ),
    },
    "tune": {
        **dict.fromkeys(["--output", "--repeats", "--longest"], TUNE),
        "--threads": "test_cli.py::TestTune::test_it_measures_writes_and_says_where",
        "--device": "test_cli.py::TestTune::test_an_unusable_device_is_one_line",
        "--json": RUN,
    },
    "doctor": {"--device": "test_bench_and_doctor.py::test_doctor_runs_on_the_device", "--json": RUN},
    "analyze": {
        **dict.fromkeys(["--text", "--length", "--layers", "--tolerance", "--seed"], ANALYZE),
        "--report": "test_analyze.py::test_a_page_is_asked_for",
        "--json": RUN,
    },
    "calibrate": {
        **dict.fromkeys(
            ["--output", "--text", "--length", "--tolerance", "--margin", "--budget", "--seed"],
            CALIBRATE,
        ),
        "--report": "test_calibrate_command.py::test_a_page_is_asked_for",
        "--json": RUN,
    },
    "compare": {
        **dict.fromkeys(
            [
                "--text", "--length", "--scored", "--repeats", "--min-length", "--no-fallback",
                "--report",
            ],
            COMPARE,
        ),
        "--plan": "test_compare_command.py::test_input_that_cannot_be_used",
        "--json": RUN,
    },
    "generate": {
        **dict.fromkeys(
            ["--plan", "--max-new-tokens", "--exact", "--against-exact", "--min-length"], GENERATE
        ),
        "--prompt-file": "test_generate_command.py::test_the_prompt_is_another_text",
        "--json": RUN,
    },
    "bench": {
        **dict.fromkeys(
            ["--lengths", "--bases", "--heads", "--head-dim", "--repeats", "--threads", "--report"],
            BENCH,
        ),
        "--json": RUN,
    },
    "decompose": dict.fromkeys(["--tol", "--key", "-o", "--json", "--report"], GIVEN),
    "report": dict.fromkeys(["-o", "--json"], GIVEN),
}  # fmt: skip


def options(command):
    """The names of each option of a command."""
    return [
        {*parameter.opts, *parameter.secondary_opts}
        for parameter in command.params
        if parameter.param_type_name == "option"
    ]


def words_of(test):
    """The words in the texts of a test."""
    file, *names = test.split("::")
    node = ast.parse((FOLDER / file).read_text())
    for name in names:
        (node,) = [child for child in node.body if getattr(child, "name", None) == name]
    texts = (own.value for own in ast.walk(node) if isinstance(own, ast.Constant))
    return {word for text in texts if isinstance(text, str) for word in text.split()}


@pytest.mark.parametrize("command", TESTS)
def test_every_option_is_in_the_test_that_is_said_to_show_its_effect(command):
    whole = get_command(app)
    found = options(whole if command == "" else whole.commands[command])
    for names in found:
        assert len(names & set(TESTS[command])) == 1, f"{command} {names}: which test shows its effect?"
    assert len(TESTS[command]) == len(found)
    for option, test in TESTS[command].items():
        assert option in words_of(test), f"{command} {option} is not in {test}"


def test_no_command_is_left_out():
    assert set(TESTS) == {"", *get_command(app).commands}
