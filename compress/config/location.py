"""Where a data set lies: a folder, or a URL from which no secret can leak."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainValidator, ValidationInfo

from compress.errors import ConfigError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_COLLAPSED_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)(.+)", re.DOTALL)
_WITHOUT_HOST = ("file", "local")
_NAMED_ACCOUNT = ("abfs", "abfss", "wasb", "wasbs")
"""Schemes of Azure, in which the part before the @ is a container."""


def scheme_of(root: Path | str) -> str | None:
    """Return the scheme of a URL in small letters; None for a folder."""
    found = _URL.match(root) if isinstance(root, str) else None
    return found[1].lower() if found else None


def root_setting(given: Path) -> str:
    """Return the setting that a --data option stands for; as a path a URL has lost slashes."""
    url = _COLLAPSED_URL.fullmatch(str(given))
    if url is None:
        return f"data.root={given.expanduser().resolve()}"
    slashes = ":///" if url[1].lower() in _WITHOUT_HOST else "://"
    return f"data.root={url[1]}{slashes}{url[2]}"


def _location(value: Any) -> Path | str:
    """Return a path, or a URL as it is.

    Raises:
        ConfigError: a URL that holds a secret; it is not repeated, as other mistakes are.
    """
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("input is not a valid path")
    found = _URL.match(value)
    if found is None:
        return Path(value)
    scheme, rest = found[1].lower(), found[2]
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if (at and (":" in user or scheme not in _NAMED_ACCOUNT)) or "?" in rest or "#" in rest:
        raise ConfigError(
            f"data.root is a {scheme} URL with a user, a password or a query, which would be "
            "written to config.toml and to logs: leave it out, and give credentials in the "
            "environment, where the library for the scheme looks for them"
        )
    if "::" in value:
        raise ConfigError("data.root chains URLs by '::': name the shards by a single URL")
    return f"{scheme}://{rest.rstrip('/')}"


Location = Annotated[Path | str, PlainValidator(_location)]
"""A folder as a Path, a URL as a str."""


def _no_url(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, str) and "://" in value:
        raise ConfigError(f"data.{info.field_name} is a URL: only data.root may be one")
    return value


NoUrl = BeforeValidator(_no_url)
"""For values that name something on this machine."""
