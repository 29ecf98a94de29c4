"""What a group's donor holds, and what a block that reads another's weights adds of its own: merges and corrections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from laconic.ir.data import flat_inputs
from laconic.ir.interpret import Interpreter, Tap
from laconic.ir.quality import named_results
from laconic.ir.statistics.base import Statistics, Sums
from laconic.ir.statistics.moments import Covariance
from laconic.passes.deciding import ENTRY
from laconic.passes.low_rank import Correction, correction_of
from laconic.passes.merging import Members, merge
from laconic.passes.products import Product, products_of
from laconic.passes.share_layers.task import ShareTask, Sharing

#: Operators that merge what has one ancestor: for blocks, which have none, the donor stands for it.
_OF_DELTAS = ("breadcrumbs", "dare", "pcb", "ties")


def groups_of(sharing: Sharing) -> dict[int, list[int]]:
    """The blocks that read each donor's weights, itself among them, in order; donors that are alone are left out."""
    found: dict[int, list[int]] = {}
    for block, donor in enumerate(sharing):
        found.setdefault(donor, []).append(block)
    return {donor: sorted(blocks) for donor, blocks in found.items() if len(blocks) > 1}


def elected(sharing: Sharing, which: str) -> Sharing:
    """The same groups with the first or the middle block as the donor; `own` leaves the method's."""
    found = list(sharing)
    for blocks in groups_of(sharing).values() if which in ("first", "middle") else ():
        for block in blocks:
            found[block] = blocks[0] if which == "first" else blocks[len(blocks) // 2]
    return tuple(found)


@dataclass
class Inputs:
    """The covariances of what matrices multiply, gathered once for all that ask: of the program as it is."""

    task: ShareTask
    _found: Statistics | None = field(default=None, repr=False)

    def product(self, row: str) -> Product | None:
        """The product of `forward` with a row, if there is one, of a matrix, and that is all the row is read by."""
        uses, alone = products_of(self.task.program, row)
        own = [use for use in uses if use.entry.name == ENTRY and use.matrix]
        return own[0] if alone and len(own) == 1 and all(use.matrix for use in uses) else None

    def gather(self, rows: Iterable[str]) -> None:
        """Gather those of these rows."""
        uses = [use for row in rows if (use := self.product(row)) is not None]
        asked = [Covariance(use.data.name) for use in uses]
        self._found = self.task.data.statistics(self.task.program, asked) if asked else None

    def of(self, row: str) -> Sums | None:
        """The sums of the covariance of a row's inputs; None if they are not known."""
        use = self.product(row)
        if use is None or self._found is None:
            return None
        return self._found[Covariance(use.data.name)]


def merged_rows(task: ShareTask, sharing: Sharing, operator: str, inputs: Inputs) -> dict[str, torch.Tensor]:
    """What the donors' matrices become: for each row the merge of the group's. What is no product with a matrix is
    averaged where the operator is one of products."""
    slots = _slots(task, sharing)
    squares = _squares(task, {row for rows in slots.values() for row in rows}) if operator == "fisher" else {}
    found = {}
    for donor, rows in slots.items():
        chosen, more = operator, dict[str, Any]()
        values = [task.program.weights[row].value.detach() for row in rows]
        use = inputs.product(donor)
        turned = use is not None and not use.outputs_first
        if operator == "regmean":
            known = [inputs.of(row) for row in rows]
            if use is None or None in known:
                chosen, turned = "average", False
            else:
                more = {"covariances": tuple(each["products"] / each["rows"] for each in known if each is not None)}
        elif operator == "fisher":
            more = {"squares": tuple(squares[row] for row in rows)}
        elif operator in _OF_DELTAS:
            more = {"base": values[0]}
        if operator == "regmean" and turned:
            values = [value.T for value in values]
        seed = task.calibration.seed if task.calibration is not None else 0
        made = merge(chosen, Members(tuple(values), seed=seed, **more))
        found[donor] = made.T.contiguous() if operator == "regmean" and turned else made
    return found


def _slots(task: ShareTask, sharing: Sharing) -> dict[str, list[str]]:
    """For each row of a donor those that it stands for, itself among them."""
    found: dict[str, list[str]] = {}
    for donor, blocks in groups_of(sharing).items():
        for block in blocks:
            for row, other in task.shared(block, donor).items() if block != donor else ():
                found.setdefault(other, [other]).append(row)
    return found


def _squares(task: ShareTask, rows: set[str]) -> dict[str, torch.Tensor]:
    """The squared gradient of each row's elements, summed over batches: of -log p of labels drawn from the model's own
    predictions, which is what Fisher's information is of."""
    program, data = task.program, task.data.data
    nodes = program.entries[ENTRY].weight_nodes()
    leaves = {row: program.weights[row].value.detach().clone().requires_grad_() for row in sorted(rows)}

    def tap(row: str) -> Tap:
        return Tap((nodes[row].name,), lambda value: leaves[row], replaces=True)

    run = Interpreter(program, [tap(row) for row in leaves])
    draw = torch.Generator().manual_seed(task.data.seed)
    found = {row: torch.zeros(leaf.shape, dtype=torch.float64) for row, leaf in leaves.items()}
    told, count = task.progress("gathering squared gradients"), task.batches(32768)
    for k in range(count):
        batch = data.batch(k)
        outcome = run(flat_inputs(program, batch, data.place(k)), gradients=True)
        logits = next(iter(named_results(run.entry, outcome.results).values())).float()
        logits = logits[batch.mask] if batch.mask is not None and logits.dim() == 3 else logits.flatten(0, -2)
        logs = logits.log_softmax(-1)
        labels = torch.multinomial(logs.detach().exp(), 1, generator=draw)
        for row, gradient in zip(
            leaves, torch.autograd.grad(-logs.gather(1, labels).sum(), list(leaves.values())), strict=True
        ):
            found[row] += gradient.double().square() / len(labels)
        told(k + 1, count)
    return found


def corrections(
    task: ShareTask, sharing: Sharing, merged: Mapping[str, torch.Tensor], inputs: Inputs
) -> dict[str, Correction]:
    """For each row that stands for nothing any more, and for donors that were merged, what it misses, by the task's
    rank."""
    program, found = task.program, {}
    pairs = {row: other for k, d in enumerate(sharing) if k != d for row, other in task.shared(k, d).items()}
    pairs |= {row: row for row in merged}
    for row, other in pairs.items():
        use, known = inputs.product(row), inputs.of(row)
        if use is None or known is None:
            continue
        now = merged.get(other, program.weights[other].value.detach())
        missing = program.weights[row].value.detach().double() - now.double()
        if bool((missing == 0).all()):
            continue
        found[row] = correction_of(use, missing, known, task.rank, program.weights[row].value.dtype)
    return found
