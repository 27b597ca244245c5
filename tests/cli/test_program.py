"""The program from its first moment: Ctrl-C while torch is imported, and afterwards."""

import os
import subprocess
import sys

import pytest

import convbasis as cb

START = (
    "import sys; sys.argv = ['convbasis', *sys.argv[1:]]\nfrom convbasis_program import main; main()"
)
# In the background of a shell Ctrl-C is ignored from the start.
HEARD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
STOP = "import os, signal; os.kill(os.getpid(), signal.SIGINT)\n"


def run(*words, before="", first=None):
    """Run the program, with another module of some name in front of the real one."""
    path = [*([str(first)] if first else []), *sys.path]
    return subprocess.run(
        [sys.executable, "-c", before + START, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("module", ["torch", "typer"])
def test_ctrl_c_while_it_is_imported_is_one_line(tmp_path, module):
    (tmp_path / f"{module}.py").write_text(f"{STOP}raise AssertionError('went on')\n")
    done = run("doctor", before=HEARD, first=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_is_pythons_own_again_when_a_command_runs():
    stop = f"def stop(*_):\n    {STOP}    raise SystemError\n"
    before = f"import convbasis.cli.doctor as doctor\n{stop}doctor.run_doctor = stop\n"
    done = run("doctor", before=HEARD + before)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_an_ignored_ctrl_c_stays_ignored():
    before = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    check = "import atexit; atexit.register(lambda: print(signal.getsignal(2) is signal.SIG_IGN))\n"
    done = run("--version", before=before + check)
    assert (done.returncode, done.stdout.split()) == (0, [cb.__version__, "True"])
