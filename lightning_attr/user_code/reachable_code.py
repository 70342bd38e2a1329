"""What code keeps: variables of classes, defaults and enclosed variables of functions, global ones that they name."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType
from typing import Any

from lightning_attr.user_code.namespaces import ClassVariables, Enclosed, GlobalVariables, functions_of, names_in

# Objects of these packages are not looked into: they are no part of a step's state, and large.
CLOSED = frozenset(
    {*sys.stdlib_module_names, "numpy", "pandas", "PIL", "matplotlib", "pyarrow", "h5py", "tokenizers", "omegaconf"}
    | {"wandb", "tensorboard", "mlflow", "tqdm", "rich", "lightning", "lightning_fabric", "lightning_utilities"}
    | {"pytorch_lightning", "lightning_attr"}
)
# Those of these are, where data are read with them.
CLOSED_TO_STEPS = frozenset({"scipy", "sklearn", "datasets", "transformers"})


class ReachableCode:
    """Functions and classes that wait to be looked into, and what is found in them.

    Args:
        roots: the objects that all is reached from; code of their packages is the user's own.
        seen: ids of what was looked at, shared with who looks at objects.
        containers: gathers ``(name, container)``.
        pending: gathers ``(name, value)``.
    """

    def __init__(
        self,
        roots: Mapping[str, object],
        seen: dict[int, object],
        containers: list[tuple[str, Any]],
        pending: deque[tuple[str, object]],
    ) -> None:
        self.waiting: deque[Any] = deque()
        self._seen = seen
        self._containers = containers
        self._pending = pending
        self._globals: dict[int, GlobalVariables] = {}
        self._packages = {package_of(kind) for root in roots.values() for kind in _code_of(root)}

    def look_into(self, code: Any) -> None:
        """Find the variables of a function, or of a class and those that it inherits from."""
        if isinstance(code, FunctionType):
            self._look_into_function(code)
            return
        for kind in code.__mro__:
            if id(kind) not in self._seen and not is_closed_package(kind):
                self._seen[id(kind)] = kind
                variables = ClassVariables(kind)
                self._containers.append((kind.__name__, variables))
                self._pending.extend((f"{kind.__name__}.{name}", value) for name, value in variables.values().items())
                if self._is_own(kind):
                    self.waiting.extend(functions_of(kind))

    def _look_into_function(self, function: FunctionType) -> None:
        enclosed = Enclosed.by(function)
        if enclosed.cells:
            self._containers.append(("", enclosed))
            self._pending.extend(enclosed.values().items())
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        self._pending.extend((f"default of `{function.__name__}`", value) for value in defaults)
        if not self._is_own(function):
            return
        variables = self._globals.get(id(function.__globals__))
        if variables is None:
            variables = self._globals[id(function.__globals__)] = GlobalVariables(function.__globals__)
            self._containers.append(("", variables))
        names = names_in(function.__code__).intersection(function.__globals__) - variables.names
        variables.names.update(names)
        for name in sorted(names):
            value = function.__globals__[name]
            if isinstance(value, (type, FunctionType)):
                if self._is_own(value) and id(value) not in self._seen:
                    self.waiting.append(value)
            else:
                self._pending.append((name, value))

    def _is_own(self, code: Any) -> bool:
        """Whether code is the user's, or of the packages that the roots are of."""
        if package_of(code) in self._packages:
            return True
        if is_closed_package(code):
            return False
        place = getattr(sys.modules.get(code.__module__ or ""), "__file__", None) or ""
        return "site-packages" not in place and "dist-packages" not in place


def package_of(code: Any) -> str:
    """Name the package that code or an object is of."""
    return (getattr(code, "__module__", None) or "").split(".", 1)[0]


def is_closed_package(code: Any) -> bool:
    """Whether code is of a package that is not looked into."""
    package = package_of(code)
    return package == "torch" or package in CLOSED or package in CLOSED_TO_STEPS


def _code_of(root: Any) -> Iterator[Any]:
    """The classes or the function that a root is of, without those that everybody uses."""
    while isinstance(root, partial):
        root = root.func
    found = [root] if isinstance(root, FunctionType) else type(root).__mro__
    return (code for code in found if not is_closed_package(code))
