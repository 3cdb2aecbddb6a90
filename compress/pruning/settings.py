"""The settings of ``[prune]`` as keyword arguments: the same names, defaults and mistakes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from compress.config import PruneConfig
from compress.files.documents import validated

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def prune_settings(settings: Mapping[str, Any], *, of: str) -> PruneConfig:
    """Check keyword arguments.

    Args:
        settings: fields of ``PruneConfig`` by name.
        of: what they were given to, for the message.

    Raises:
        ConfigError: an unknown name, which names the nearest, or a value that does not fit.
    """
    given = {n: tuple(v) if isinstance(v, (list, set)) else v for n, v in settings.items()}
    return validated(PruneConfig, given, source=of)


def takes_settings(function: FunctionT) -> FunctionT:
    """Let the signature of a function with ``**settings`` name them, with their defaults."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    named = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=str(field.default) if name == "budget" else field.default,
            annotation="str" if name == "budget" else field.annotation,
        )
        for name, field in PruneConfig.model_fields.items()
        if name not in signature.parameters
    ]
    wide = signature.replace(parameters=[*own, *named])
    setattr(function, "__signature__", wide)  # noqa: B010 (mypy knows no such attribute)
    return function
