"""Wheel and sdist: built, installed into a bare environment, imported and used there."""

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def closure(*requirements):
    """Return the distributions that the requirements need, of their extras only those in brackets."""
    found, waiting = {}, list(requirements)
    while waiting:
        name, extras = re.match(r"([A-Za-z0-9._-]+)(?:\[([a-z,]+)\])?", waiting.pop()).groups()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # wanted on other platforms only
        wanted = (extras or "").split(",")
        key = (re.sub(r"[-_.]+", "-", name).lower(), extras)
        if key in found:
            continue
        found[key] = distribution
        for requirement in distribution.requires or ():
            extra = re.search(r"extra == ['\"]([a-z0-9]+)['\"]", requirement)
            if extra is None or extra.group(1) in wanted:
                waiting.append(requirement)
    return found.values()


def link(distributions, site):
    """Link the files of installed distributions into another site-packages."""
    for distribution in distributions:
        for top in {file.parts[0] for file in distribution.files or ()}:
            source = Path(distribution.locate_file(top))
            if top not in ("..", "__pycache__") and source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the sdist, and the wheel from it, without network."""
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = target.glob("*.whl"), target.glob("*.tar.gz")
    return wheel, sdist


def install(package, folder, *tools):
    """Install a package into a new environment that has its dependencies and nothing else."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    link(closure("torch", "safetensors[numpy]", *tools), site)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    options = ["--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, *options, str(package)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return python


USE = """
import importlib.util, sys, tempfile, pathlib
for absent in ("transformers", "typer", "rich", "matplotlib", "plotly"):
    assert importlib.util.find_spec(absent) is None, absent
import torch, convbasis as cb
assert "site-packages" in cb.__file__
q, k, v = torch.randn(3, 1, 2, 300, 16).unbind()
assert cb.conv_basis_attention(q, k, v, num_bases=4).shape == v.shape
path = pathlib.Path(tempfile.mkdtemp()) / "b"
basis = cb.decompose(torch.ones(5, 5).tril())
basis.save(path)
assert torch.equal(cb.ConvBasis.load(path).to_dense(), basis.to_dense())
print(cb.__version__)
"""


def use(python):
    done = subprocess.run([str(python), "-c", USE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_is_pure_python_and_typed(built):
    wheel, _ = built
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "convbasis/py.typed" in names
    assert "convbasis/report/page/style.css" in names
    kinds = (".py", ".typed", ".css", ".js")
    assert all(name.endswith(kinds) or ".dist-info/" in name for name in names)
    metadata = next(n for n in names if n.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    required = re.findall(r"^Requires-Dist: (?!.*extra ==)([a-z]+(?:\[[a-z]+\])?)", text, re.MULTILINE)
    assert sorted(required) == ["safetensors[numpy]", "torch"]
    assert "Apache-2.0" in text


def test_sdist_holds_sources_and_tests(built):
    _, sdist = built
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    for wanted in ("src/convbasis/__init__.py", "tests/reference.py", "README.md", "LICENSE"):
        assert wanted in names
    assert not [name for name in names if ".venv" in name or "__pycache__" in name]


def test_wheel_works_in_a_bare_environment(built, tmp_path):
    assert use(install(built[0], tmp_path / "bare")) in built[0].name


def test_sdist_works_in_a_bare_environment(built, tmp_path):
    assert use(install(built[1], tmp_path / "bare", "hatchling")) in built[1].name


def test_constraints_pin_every_declared_dependency():
    pinned = set(
        re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    normal = {re.sub(r"[-_.]+", "-", name).lower() for name in pinned}
    project = (ROOT / "pyproject.toml").read_text()
    block = project[project.index("dependencies = [") : project.index("[project.scripts]")]
    declared = set(re.findall(r'"([a-z0-9-]+)(?:\[[a-z]+\])?>=', block))
    assert {"torch", "typer", "pytest"} <= declared
    assert declared <= normal


def test_skips_say_why(pytestconfig):
    assert "-rs" in pytestconfig.getini("addopts")
