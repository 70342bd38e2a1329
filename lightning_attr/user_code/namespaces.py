"""What code keeps by name: attributes of objects and slots, class variables, enclosed variables, global variables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import CellType, CodeType, FunctionType, GetSetDescriptorType, MemberDescriptorType
from typing import Any


class Namespace(ABC):
    """Names with values, which can be set and removed."""

    @abstractmethod
    def values(self) -> dict[str, Any]:
        """Name -> value, those that are set."""

    @abstractmethod
    def put(self, name: str, value: Any) -> None:
        """Set a name."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a name."""


@dataclass(frozen=True)
class Attributes(Namespace):
    """The attributes of an object.

    Args:
        own: its ``__dict__``.
    """

    own: dict[str, Any]

    def values(self) -> dict[str, Any]:
        """Name -> value."""
        return dict(self.own)

    def put(self, name: str, value: Any) -> None:
        """Set an attribute, past what the object's class does about it."""
        self.own[name] = value

    def remove(self, name: str) -> None:
        """Remove an attribute."""
        del self.own[name]


@dataclass(frozen=True)
class Slots(Namespace):
    """The attributes of an object that has no ``__dict__``.

    Args:
        owner: the object.
        names: of its slots.
    """

    owner: Any
    names: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """Name -> value, those that are set."""
        return {name: getattr(self.owner, name) for name in self.names if hasattr(self.owner, name)}

    def put(self, name: str, value: Any) -> None:
        """Set a slot."""
        setattr(self.owner, name, value)

    def remove(self, name: str) -> None:
        """Leave a slot without a value."""
        delattr(self.owner, name)


@dataclass(frozen=True)
class ClassVariables(Namespace):
    """What a class keeps for all of its objects, without its functions.

    Args:
        kind: the class.

    Example:
        >>> class Counting:
        ...     count = 3
        ...     def step(self): ...
        >>> ClassVariables(Counting).values()
        {'count': 3}
    """

    kind: type

    def values(self) -> dict[str, Any]:
        """Name -> value."""
        own = vars(self.kind)
        return {name: value for name, value in own.items() if name[:2] != "__" and not isinstance(value, _CODE)}

    def put(self, name: str, value: Any) -> None:
        """Set a variable."""
        setattr(self.kind, name, value)

    def remove(self, name: str) -> None:
        """Remove a variable."""
        delattr(self.kind, name)


@dataclass(frozen=True)
class Enclosed(Namespace):
    """The variables of the function around a function.

    Args:
        cells: name -> where the variable is kept.
    """

    cells: dict[str, CellType]

    @classmethod
    def by(cls, function: FunctionType) -> Enclosed:
        """Give those that a function uses."""
        return cls(dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)))

    def values(self) -> dict[str, Any]:
        """Name -> value, those that are set."""
        return {name: cell.cell_contents for name, cell in self.cells.items() if cell != _UNSET}

    def put(self, name: str, value: Any) -> None:
        """Set a variable."""
        self.cells[name].cell_contents = value

    def remove(self, name: str) -> None:
        """Leave a variable without a value."""
        del self.cells[name].cell_contents


@dataclass(frozen=True)
class GlobalVariables(Namespace):
    """The global variables that functions use.

    Args:
        own: the ``__dict__`` of a module.
        names: of the variables.
    """

    own: dict[str, Any]
    names: set[str] = field(default_factory=set)

    def values(self) -> dict[str, Any]:
        """Name -> value, those that are set."""
        return {name: self.own[name] for name in self.names if name in self.own}

    def put(self, name: str, value: Any) -> None:
        """Set a variable."""
        self.own[name] = value

    def remove(self, name: str) -> None:
        """Remove a variable."""
        del self.own[name]


def builtin_kind(container: Any) -> Any:
    """Give the class whose functions read and fill a container, past what a class of the user's makes of them.

    Returns ``OrderedDict``, ``dict``, ``list``, ``deque``, ``set`` or ``tuple``; None for what is none of these.

    Example:
        >>> class Doubled(list):
        ...     def __getitem__(self, row):
        ...         return 2 * super().__getitem__(row)
        >>> numbers = Doubled([1, 2])
        >>> numbers[1], builtin_kind(numbers).__getitem__(numbers, 1)
        (4, 2)
    """
    return next((kind for kind in (OrderedDict, dict, list, deque, set, tuple) if isinstance(container, kind)), None)


def functions_of(kind: type) -> Iterator[FunctionType]:
    """Give the functions that a class defines itself: methods, properties, and what decorators wrap.

    Example:
        >>> class Step:
        ...     @property
        ...     def size(self): ...
        ...     @staticmethod
        ...     def run(): ...
        >>> [function.__name__ for function in functions_of(Step)]
        ['size', 'run']
    """
    for value in vars(kind).values():
        for name in ("", "fget", "__func__", "func", "__wrapped__"):
            found = getattr(value, name, None) if name else value
            if isinstance(found, FunctionType):
                yield found
                break


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """Give the names that a piece of code uses which are none of its own variables: global ones, and attributes.

    Example:
        >>> sorted(names_in((lambda x: [y.a for y in numbers(x)]).__code__))
        ['a', 'numbers']
    """
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


_UNSET = CellType()
_CODE = (FunctionType, classmethod, staticmethod, property, GetSetDescriptorType, MemberDescriptorType)
