"""What is known by name: our own, and what third parties add by entry points. Nothing is imported until asked for."""

from __future__ import annotations

import importlib
import logging
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from laconic.ir.errors import UsageError, did_you_mean

log = logging.getLogger(__name__)


class Registry:
    """Names of one kind of thing (`pass`, `metric`), ours in `builtin` as "module:attribute", others from an entry
    point group. A name given twice is an error; a plugin that cannot be loaded is reported by name and skipped."""

    def __init__(self, kind: str, group: str, builtin: dict[str, str]) -> None:
        self.kind, self.group, self.builtin = kind, group, builtin

    @cached_property
    def table(self) -> dict[str, str]:
        """Name to "module:attribute". Raises UsageError for a name given twice."""
        table = dict(self.builtin)
        for point in entry_points(group=self.group):
            if point.name in table:
                plural = f"{self.kind}es" if self.kind.endswith("s") else f"{self.kind}s"
                raise UsageError(
                    f"two {plural} are named {point.name!r}",
                    where=f"{table[point.name]} and {point.value}",
                    hint="uninstall one of them",
                )
            table[point.name] = point.value
        return table

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self.table)

    def load(self, name: str, others: tuple[str, ...] = ()) -> Any:
        """What stands behind a name; `others` are further names that a hint may mention.

        Raises UsageError for an unknown name or a plugin that cannot be imported.
        """
        if name not in self.table:
            raise UsageError(f"there is no {self.kind} {name!r}", hint=did_you_mean(name, [*self.names(), *others]))
        module, _, attribute = self.table[name].partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as problem:
            raise UsageError(f"the {self.kind} {name!r} cannot be loaded from {module}", why=str(problem)) from problem

    def load_all(self) -> list[Any]:
        """All that can be loaded; broken plugins are logged by name."""
        found = []
        for name in self.names():
            try:
                found.append(self.load(name))
            except UsageError as problem:
                log.warning("%s", problem)
        return found
