"""What a module computes, as steps; and what is left of it without some of its branches.

Pure data, which a recipe holds as JSON: a step calls a module of the module, or an operator of
torch that computes element by element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Operand = str | int | float | bool | None
"""``$0`` is the module's input and ``$n`` the result of step n; other texts are names of tensors
that the module itself holds, and numbers are numbers."""


@dataclass(frozen=True)
class Gate:
    """Weights that tell the gradient of a factor of what is behind them.

    Scaling a layer's weight and bias by z scales its result, so dL/dz at z = 1 is the sum of
    W dL/dW over them; where the result is read by layers on its way as well, as in squeeze and
    excitation, what goes through those is taken off.
    """

    weights: tuple[str, ...]
    less: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One call."""

    operands: tuple[Operand, ...]
    call: str | None = None
    """Name of the module that is called, in the module; ``conv.0`` may lie deeper."""
    op: str | None = None
    """Name and overload of the ATen operator that is called instead: ``add.Tensor``."""

    @property
    def reads(self) -> tuple[int, ...]:
        """Numbers of the values that it reads."""
        return tuple(number_of(o) for o in self.operands if is_value(o))

    def to_json(self) -> dict[str, Any]:
        """Return what ``of_json`` reads."""
        callee = {"call": self.call} if self.call is not None else {"op": self.op}
        return {**callee, "of": list(self.operands)}


@dataclass(frozen=True)
class Program:
    """Steps, and which value is the result: None is zero, which an addition takes for nothing."""

    steps: tuple[Step, ...]
    result: str | None

    @property
    def calls(self) -> tuple[str, ...]:
        """Names of the modules that are called."""
        return tuple(dict.fromkeys(s.call for s in self.steps if s.call is not None))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the module's own tensors that are read."""
        operands = (o for step in self.steps for o in step.operands)
        return tuple(dict.fromkeys(o for o in operands if isinstance(o, str) and not is_value(o)))

    def to_json(self) -> dict[str, Any]:
        """Return what ``of_json`` reads."""
        return {"steps": [step.to_json() for step in self.steps], "result": self.result}

    @staticmethod
    def of_json(document: Any) -> Program:
        """Read a program.

        Raises:
            ValueError: it is none; nothing of it was looked up or run.
        """
        if not isinstance(document, Mapping) or set(document) != {"steps", "result"}:
            raise ValueError("it has no steps or no result")
        listed, result = document["steps"], document["result"]
        if not isinstance(listed, Sequence) or isinstance(listed, str):
            raise ValueError("its steps are no list")
        steps = tuple(_step(item, number) for number, item in enumerate(listed))
        if result is not None and not (is_value(result) and number_of(result) <= len(steps)):
            raise ValueError(f"its result {result!r} is no value of it")
        return Program(steps, result)


NOTHING = Program((), None)
"""Of a module that is a whole branch: zero."""


@dataclass(frozen=True)
class Body:
    """All steps of a dense module in the order in which they run.

    Attributes:
        steps: a step may be None where no program can say it; it must not stay then.
        reads: numbers of the values that each step reads; -1 is another input than the first.
        result: the number of the value that the module returns.
        rectifies: steps that set what is negative to zero and do nothing else.
        positive: numbers of the values that are never negative.
    """

    steps: tuple[Step | None, ...]
    reads: tuple[tuple[int, ...], ...]
    result: int
    rectifies: frozenset[int] = frozenset()
    positive: frozenset[int] = frozenset()

    def without(self, additions: Mapping[int, int]) -> tuple[Program, frozenset[int]] | None:
        """Return what is left without some branches, and the numbers of the steps that stay.

        Args:
            additions: for each addition whose branch goes, by the number of its step, the number of
                the value that stays.

        Returns:
            None where no program can say it.
        """
        alias = dict(additions)
        for number in sorted(self.rectifies):  # what is never negative stays as it is
            read = self._resolved(self.reads[number - 1][0], alias)
            if read in self.positive and number not in alias:
                alias[number] = read
        result = self._resolved(self.result, alias)
        staying: set[int] = set()
        waiting = [result]
        while waiting:
            number = waiting.pop()
            if number < 0 or (number > 0 and self.steps[number - 1] is None):
                return None
            if number and number not in staying:
                staying.add(number)
                waiting += [self._resolved(n, alias) for n in self.reads[number - 1]]
        new = {0: 0, **{number: place + 1 for place, number in enumerate(sorted(staying))}}
        steps = []
        for number in sorted(staying):
            step = self.steps[number - 1]
            assert step is not None
            operands = (
                f"${new[self._resolved(number_of(o), alias)]}" if is_value(o) else o
                for o in step.operands
            )
            steps.append(replace(step, operands=tuple(operands)))
        return Program(tuple(steps), f"${new[result]}"), frozenset(staying)

    @staticmethod
    def _resolved(number: int, alias: Mapping[int, int]) -> int:
        while number in alias:
            number = alias[number]
        return number


def program_without(body: Body | None, additions: Mapping[int, int]) -> Program | None:
    """Return what is left of a module without branches, by their additions."""
    if body is None:
        return NOTHING
    left = body.without(additions)
    return left[0] if left else None


def is_value(operand: Any) -> bool:
    """Whether an operand is a value of the program."""
    return isinstance(operand, str) and operand.startswith("$") and operand[1:].isdecimal()


def number_of(value: Any) -> int:
    """Return the number of a value."""
    return int(str(value)[1:])


def _step(item: Any, before: int) -> Step:
    """Read a step that has so many before it."""
    if not isinstance(item, Mapping) or "of" not in item or len(item) != 2:
        raise ValueError(f"step {before + 1} is not understood")
    call, op, operands = item.get("call"), item.get("op"), item["of"]
    if not isinstance(call if call is not None else op, str) or not isinstance(operands, list):
        raise ValueError(f"step {before + 1} is not understood")
    for operand in operands:
        if not isinstance(operand, str | int | float | bool | None):
            raise ValueError(f"step {before + 1} reads {operand!r}")
        if is_value(operand) and number_of(operand) > before:
            raise ValueError(f"step {before + 1} reads {operand} before it is there")
    if call is not None and not (len(operands) == 1 and is_value(operands[0])):
        raise ValueError(f"step {before + 1} does not call {call!r} with one value")
    return Step(tuple(operands), call, op)
