"""Methods that judge whole states by how far the model's predictions move."""

from __future__ import annotations

from laconic.passes.drop_layers.influence import influence
from laconic.passes.drop_layers.task import Choice, DropTask


def search(task: DropTask) -> Choice:
    """Evolution, from states at random and that of least influence."""
    scores = influence(task)
    return Choice(task.searched("searching for layers to drop", [task.least(scores)]), scores)


def exhaust(task: DropTask) -> Choice:
    """The best of all states."""
    return Choice(task.best("trying what may be dropped"))


def descend(task: DropTask) -> Choice:
    """Layer by layer, each time the one without which the model loses least."""
    return Choice(task.descended())


def draw(task: DropTask) -> Choice:
    """Layers at random: what other methods are measured against."""
    return Choice(task.drawn())
