"""The table of rules: which torch function does what to a lifted tensor, and the refusal of all others.

A rule is a function with the arguments of the torch function it stands for, that takes lifted tensors where that one
takes tensors. Nothing is guessed: a function without a rule, an argument that its rule does not know, a lifted tensor
where the rule expects a constant and a result that would mix rows are all :class:`NoRule`, by name. So a forward pass
that ends has the derivatives of the function that was called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch

__all__ = ["NoRule", "has_rule", "look_up", "name_of", "refuse", "register", "rule"]

F = TypeVar("F", bound=Callable[..., Any])


class NoRule(NotImplementedError):
    """The forward Laplacian has no rule for a torch function, or for the way it was called.

    Example:
        >>> raise NoRule("torch.sort")
        Traceback (most recent call last):
        pyro_gen.laplacians.rules.NoRule: the forward Laplacian has no rule for torch.sort: use method="reverse" or "vmap"
    """  # noqa: E501

    def __init__(self, name: str, why: str = "") -> None:
        self.name = name
        message = (
            f'the forward Laplacian has no rule for {name}{f" ({why})" if why else ""}: use method="reverse" or "vmap"'
        )
        super().__init__(name if name.startswith("the forward") else message)  # Pyro adds shapes and raises it anew


class Refusal(Exception):
    """Raised inside a rule by `refuse`; the table adds the function's name."""


def refuse(why: str) -> NoReturn:
    """Say, inside a rule, why it cannot be applied."""
    raise Refusal(why)


@dataclass(frozen=True)
class Rule:
    """A rule and what it accepts.

    Attributes:
        function: the rule.
        names: its keyword arguments; None where it takes any.
        positions: how many positional arguments it takes.
        lifted: how many leading arguments may be lifted; None where the rule looks itself.
    """

    function: Callable[..., Any]
    names: frozenset[str] | None
    positions: int
    lifted: int | None


TABLE: dict[Any, Rule] = {}
AS_NUMPY = {"axis": "dim", "keepdims": "keepdim"}  # torch takes both names


def register(function: Callable[..., Any], functions: Iterable[Any], lifted: int | None = 1) -> None:
    """Enter a rule for some torch functions."""
    kinds = inspect.signature(function).parameters.values()
    names = frozenset(p.name for p in kinds if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    anything = any(p.kind is p.VAR_KEYWORD for p in kinds)
    positions = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in kinds)
    if any(p.kind is p.VAR_POSITIONAL for p in kinds):
        positions = 1_000_000
    for each in functions:
        TABLE[each] = Rule(function, None if anything else names, positions, lifted)


def rule(*functions: Any, lifted: int | None = 1) -> Callable[[F], F]:
    """Decorate a rule with the torch functions that it stands for."""

    def enter(function: F) -> F:
        register(function, functions, lifted)
        return function

    return enter


def has_rule(function: Any) -> bool:
    """True if a torch function has a rule (which may still refuse the arguments of a call)."""
    return function in TABLE


def name_of(function: Any) -> str:
    """The public name of a torch function, as ``torch.nn.functional.relu``."""
    named = torch.overrides.resolve_name(function)
    return named or getattr(function, "__qualname__", None) or str(function)


def _holds(value: Any, kind: type) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds(v, kind) for v in value)
    return isinstance(value, kind)


def look_up(function: Any, kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply the rule of a torch function to a call with lifted arguments, of type ``kind``."""
    known = TABLE.get(function)
    if known is None:
        raise NoRule(name_of(function))
    if kwargs:
        kwargs = {k: v for k, v in kwargs.items() if k != "_stacklevel" and not (k == "out" and v is None)}
        if "input" in kwargs and known.lifted is not None:
            args = (kwargs.pop("input"), *args)
        if kwargs.pop("inplace", False):
            raise NoRule(name_of(function), "with inplace=True")
        if known.names is not None:
            kwargs = {AS_NUMPY.get(k, k) if k not in known.names else k: v for k, v in kwargs.items()}
        unknown = kwargs.keys() - known.names if known.names is not None else set()
        kwargs = {k: v for k, v in kwargs.items() if k not in unknown or v is not None}  # None: not given
        if unknown := unknown & kwargs.keys():
            raise NoRule(name_of(function), f"with the argument {min(unknown)}")
    if len(args) > known.positions:
        raise NoRule(name_of(function), f"with {len(args)} positional arguments")
    if known.lifted is not None and (_holds(args[known.lifted :], kind) or _holds(tuple(kwargs.values()), kind)):
        raise NoRule(name_of(function), "of an argument that depends on x")
    try:
        return known.function(*args, **kwargs)
    except Refusal as refusal:
        raise NoRule(name_of(function), str(refusal)) from None
