"""Make trained convolutional networks small and fast, and prove it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.checkpoints.checkpoint import load_model

__all__ = ["__version__", "load_model"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load the public functions on first use, so that importing the package stays fast."""
    if name == "load_model":
        from compress.checkpoints.checkpoint import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
