"""Models that people name: a folder, a GGUF file, a hub's name, or the packaged SmolLM2.

Weights are read from safetensors and GGUF files alone, and no code that comes with a model is run. Only
a hub's name uses the network.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ConvBasisError, FileFormatError, InputError, MissingExtraError, MissingPathError
from .smollm2 import NAME, load_smollm2

_PACKAGED = "smollm2"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Formats whose files can run code when they are read.
_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


class NamedModel(NamedTuple):
    """A causal language model in eval mode and float32, its tokenizer, and what to call it."""

    model: Any
    tokenizer: Any
    name: str


def load_model(name: str) -> NamedModel:
    """Load what a person names.

    Args:
        name: ``"smollm2"``, a folder with safetensors or one GGUF file, a GGUF file, or a hub's name
            ``owner/name``.

    Raises:
        MissingPathError: nothing is there.
        InputError: no causal language model, no tokenizer, or weights of a kind that is not read.
        FileFormatError: a file is damaged or not what its name says.
        MissingExtraError: transformers is not installed.
    """
    if name == _PACKAGED:
        return NamedModel(*load_smollm2(), NAME)
    path = Path(name)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path)
    if path.is_absolute() or name.startswith((".", "~")) or not _HUB_NAME.fullmatch(name):
        raise MissingPathError(
            f"there is no folder or file {name!r}; give one, 'smollm2', or a hub's name as owner/name"
        )
    return _load(name, name, {})


def _from_folder(folder: Path) -> NamedModel:
    ggufs = sorted(folder.glob("*.gguf"))
    weights = sorted(folder.glob("*.safetensors"))
    if len(ggufs) == 1 and not weights:
        return _from_file(ggufs[0])
    if not weights:
        unsafe = sorted(found.name for kind in _UNSAFE for found in folder.glob(kind))
        if unsafe:
            raise InputError(
                f"{str(folder)!r} has its weights in {unsafe[0]!r}, a kind of file that can run code "
                "when it is read; only safetensors and GGUF are read: convert it"
            )
        if len(ggufs) > 1:
            raise InputError(f"{str(folder)!r} has {len(ggufs)} GGUF files; name one of them")
        raise InputError(f"{str(folder)!r} is a folder without weights (safetensors or GGUF)")
    if not (folder / "config.json").is_file():
        raise InputError(f"{str(folder)!r} has no config.json, which says what model this is")
    for file in weights:
        _check_safetensors(file)
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise InputError(f"{str(folder)!r} has no tokenizer, such as tokenizer.json; save it there too")
    return _load(str(folder), folder.resolve().name, {"local_files_only": True})


def _from_file(path: Path) -> NamedModel:
    if path.suffix != ".gguf":
        raise InputError(
            f"{str(path)!r} is a {path.suffix or 'nameless'} file; give a GGUF file, or a folder with "
            "config.json, safetensors and a tokenizer"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise FileFormatError(f"{str(path)!r} is not a GGUF file, in spite of its name")
    options = {"local_files_only": True, "gguf_file": path.name}
    return _load(str(path.parent), path.stem, options)


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        raise FileFormatError(
            f"{str(path)!r} is damaged or not a safetensors file, in spite of its name: {error}"
        ) from None


def _load(place: str, name: str, options: dict[str, Any]) -> NamedModel:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("loading a model", "hf", error) from error
    options = {**options, "trust_remote_code": False}
    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(place, **options)
            _check_causal(name, config, transformers)
            if "gguf_file" not in options:
                options = {**options, "use_safetensors": True}
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.float32, output_loading_info=True, **options
            )
        except (ConvBasisError, MemoryError):
            raise
        except ImportError as error:
            raise MissingExtraError(f"loading {name!r}", "hf", error) from error
        except Exception as error:
            raise InputError(f"{name!r} cannot be loaded: {_first_line(error)}") from error
        missing = sorted(found["missing_keys"])
        if missing:
            raise InputError(
                f"{name!r} lacks {len(missing)} of the model's weights, the first {missing[0]!r}"
            )
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        except Exception as error:
            raise InputError(f"{name!r} has no usable tokenizer: {_first_line(error)}") from error
    return NamedModel(model.eval(), tokenizer, name)


def _check_causal(name: str, config: Any, transformers: Any) -> None:
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    built = getattr(config, "architectures", None) or []
    causal = not built or any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in built)
    if config.model_type not in known or not causal or getattr(config, "is_encoder_decoder", False):
        what = built[0] if built else config.model_type
        raise InputError(f"{name!r} is a {what}, not a causal language model")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Hold back what loading prints: errors say what matters."""
    log = transformers.utils.logging
    before = log.get_verbosity()
    log.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.set_verbosity(before)
