"""Small tensors that depend on numbers alone: made once, shared by all who ask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from .workers import watched

_Function = TypeVar("_Function", bound=Callable[..., Any])


def kept(maxsize: int) -> Callable[[_Function], _Function]:
    """Keep the latest results of a function of hashable arguments; nobody may write to them.

    They are no inference tensors, so that later calls can record gradients, and none of a mode's or a
    transform's tensors are kept.
    """

    def wrap(function: _Function) -> _Function:
        make = torch.inference_mode(False)(function)
        known = functools.lru_cache(maxsize)(make)

        @functools.wraps(function)
        def find(*args: Any, **options: Any) -> Any:
            use = function if watched() or torch.compiler.is_compiling() else known
            return use(*args, **options)

        return cast(_Function, find)

    return wrap
