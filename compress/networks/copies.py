"""Copies of networks as people have them in the middle of training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from compress.errors import ModelError, first_sentence


def copied(model: nn.Module, device: str | None = None) -> nn.Module:
    """Return a copy of a network that shares nothing with it, where it lies or on a device.

    A tensor that forward has kept on a module comes without what it was computed from, which
    ``copy.deepcopy`` refuses to copy.

    Raises:
        ModelError: a module cannot be copied, or holds a function that holds the network.
    """
    _require_own_functions(model)
    kept = {
        id(tensor): tensor.detach().clone()
        for held in map(vars, model.modules())
        for tensor in pytree.tree_leaves(held)
        if isinstance(tensor, torch.Tensor) and not tensor.is_leaf
    }
    try:
        found = copy.deepcopy(model, dict(kept))
        return found if device is None else found.to(device)
    except Exception as error:  # the user's modules may hold anything
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {first_sentence(error)}"
        ) from error


def _require_own_functions(model: nn.Module) -> None:
    """Refuse functions that a copy of the network would share, and run the original's layers."""
    modules, own = dict(model.named_modules()), {id(module) for module in model.modules()}
    for name, module in modules.items():
        for attribute in vars(module).keys() - vars(nn.Module()).keys():
            functions = pytree.tree_leaves(vars(module)[attribute])
            if any(id(value) in own for f in functions for value in _closed_over(f)):
                where = f"{name}.{attribute}" if name else attribute
                raise ModelError(
                    f"{type(model).__name__} holds in {where} a function that uses the network, as "
                    "a lambda that uses self, and a copy of it would run the original: make it a "
                    "method"
                )


def _closed_over(function: Any) -> Iterator[Any]:
    """Yield what a function holds; nothing for what is none."""
    if not isinstance(function, FunctionType):
        return
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty yet
            continue
    yield from function.__defaults__ or ()
