"""Modules without some of their branches, and how a network gets them.

A shortened module is the same object with another forward: whoever holds it holds it still. What it
no longer calls is gone from it, under all other names everything stays.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress.networks.programs import Operand, Program, Step, is_value, number_of
from compress.networks.rules.pointwise import FURTHER


class Shortened(nn.Module):
    """A module that computes what a program says; made by ``shorten_``.

    Attributes:
        program: the steps.
    """

    program: Program

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Inputs of the module as it was; the first of them is read."""
        values = [args[0] if args else next(iter(kwargs.values()))]
        for step in self.program.steps:
            values.append(self._run(step, [self._operand(o, values) for o in step.operands]))
        result = self.program.result
        if result is None:
            return values[0].new_zeros(())
        return values[number_of(result)]

    def _run(self, step: Step, operands: list[Any]) -> torch.Tensor:
        if step.call is not None:
            return self.get_submodule(step.call)(*operands)
        assert step.op is not None
        return operator(step.op)(*operands)

    def _operand(self, operand: Operand, values: Sequence[torch.Tensor]) -> Any:
        if is_value(operand):
            return values[number_of(operand)]
        return getattr(self, operand) if isinstance(operand, str) else operand

    def extra_repr(self) -> str:
        """Show the steps."""
        return " -> ".join(str(step.call or step.op) for step in self.program.steps) or "identity"


def operator(name: str) -> Any:
    """Return the ATen operator of a step.

    Raises:
        ValueError: there is none of that name that computes element by element; a file may ask for
            no other.
    """
    base, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, base, None) if base.isidentifier() else None
    found = getattr(packet, overload, None) if overload in _overloads(packet) else None
    tags = getattr(found, "tags", ())
    if found is None or (torch.Tag.pointwise not in tags and base not in FURTHER):
        raise ValueError(f"there is no operator {name!r} that computes element by element")
    return found


def shorten_(
    model: nn.Module,
    programs: Mapping[str, Program],
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> None:
    """Take branches out of a network in place.

    Args:
        model: the network.
        programs: by the name of a module, what is left of it; modules may be shortened already, and
            lose more.
        optimizers: what trains it; they forget the parameters that are gone.

    Raises:
        ValueError: a program calls or reads what its module does not have; nothing is changed.
    """
    modules = dict(model.named_modules())
    held = programs_of(model)
    programs = {name: program for name, program in programs.items() if held.get(name) != program}
    for name, program in programs.items():
        require_runs(modules, name, program)
    before = list(model.parameters())
    for name, program in programs.items():
        _shorten_(modules[name], program)
    left = {id(parameter) for parameter in model.parameters()}
    gone = {id(parameter): parameter for parameter in before if id(parameter) not in left}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if id(p) not in gone]
        for parameter in gone.values():
            optimizer.state.pop(parameter, None)


def programs_of(model: nn.Module) -> dict[str, Program]:
    """Return the programs of all shortened modules of a network, by name."""
    return {n: m.program for n, m in model.named_modules() if isinstance(m, Shortened)}


def require_runs(modules: Mapping[str, nn.Module], name: str, program: Program) -> None:
    """Refuse a program that a network's module cannot run.

    Raises:
        ValueError: naming what is missing.
    """
    module = modules.get(name)
    if module is None or not name:
        raise ValueError(f"the network has no module {name!r}")
    for call in program.calls:
        if f"{name}.{call}" not in modules:
            raise ValueError(f"the network has no module '{name}.{call}'")
    for tensor in program.tensors:
        if not isinstance(getattr(module, tensor, None), torch.Tensor):
            raise ValueError(f"the network has no tensor '{name}.{tensor}'")
    for step in program.steps:
        if step.op is not None:
            operator(step.op)


def _shorten_(module: nn.Module, program: Program) -> None:
    staying = {call: module.get_submodule(call) for call in program.calls}
    vars(module).pop("forward", None)  # which somebody may have put in place of the class's
    module.__class__ = Shortened
    vars(module)["program"] = program
    module._modules.clear()
    for call, inner in sorted(staying.items()):  # a module comes before what lies in it
        owner, _, name = call.rpartition(".")
        holder = _holder(module, owner)
        if name not in holder._modules:
            holder.add_module(name, _not_in_place(inner) if _reads_input(program, call) else inner)
    for table in (module._parameters, module._buffers):
        for name in table.keys() - set(program.tensors):
            del table[name]


def _holder(module: nn.Module, path: str) -> nn.Module:
    """Return the module at a path, made of empty modules where there is none."""
    for name in filter(None, path.split(".")):
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module


def _reads_input(program: Program, call: str) -> bool:
    return any(step.call == call and "$0" in step.operands for step in program.steps)


def _not_in_place(module: nn.Module) -> nn.Module:
    """Return a module that leaves its input alone, which others may read, where it did not."""
    if getattr(module, "inplace", False) is not True:
        return module
    other = copy.copy(module)
    vars(other)["inplace"] = False
    return other


def _overloads(packet: Any) -> list[str]:
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return []
    return packet.overloads()  # type: ignore[no-untyped-call]
