"""LSTM, GRU and RNN with their usual activations, as torch's fused ones: gates change places, nothing else."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from laconic.ir.onnx.table import Refused, op

Direction = Literal["forward", "reverse", "bidirectional"]
Names = tuple[str, ...]


def _expect(given: Names | None, usual: list[str], direction: str) -> None:
    """Refuse activations other than the usual ones."""
    wanted = usual * (2 if direction == "bidirectional" else 1)
    if given and [name.lower() for name in given][: len(wanted)] != wanted:
        raise Refused(f"its activations are {', '.join(given)}, and {', '.join(usual)} are read")


def _reordered(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The gates along axis 0 in another order."""
    gates = x.chunk(len(order), 0)
    return torch.cat([gates[k] for k in order], 0)


def _parameters(w: Tensor, r: Tensor, b: Tensor | None, order: tuple[int, ...]) -> list[Tensor]:
    """Torch's flat list of weights: input, recurrent and two biases of each direction."""
    flat: list[Tensor] = []
    for direction in range(w.shape[0]):
        parts = [w[direction], r[direction], *([] if b is None else b[direction].chunk(2, 0))]
        flat += [_reordered(part, order) for part in parts]
    return flat


def _run(
    function: Any,
    x: Tensor,
    states: list[Tensor | None],
    weights: list[Tensor],
    *,
    biased: bool,
    hidden: int,
    direction: str,
    layout: int,
    lengths: Tensor | None,
    outputs: int,
) -> tuple[Tensor, ...]:
    """Call `function`, one of torch's; x: [sequence, batch, features], or batch first with layout 1."""
    if lengths is not None:
        raise Refused("it has sequences of different lengths (sequence_lens)")
    count = 2 if direction == "bidirectional" else 1
    if layout:
        x, states = x.transpose(0, 1), [s if s is None else s.transpose(0, 1) for s in states]
    if direction == "reverse":
        x = x.flip(0)
    given = [torch.zeros([count, x.shape[1], hidden], dtype=x.dtype) if s is None else s for s in states]
    first = given if len(given) > 1 else given[0]
    y, *last = function(x, first, weights, biased, 1, 0.0, False, count == 2, False)
    if direction == "reverse":
        y = y.flip(0)
    y = y.reshape([y.shape[0], y.shape[1], count, hidden]).transpose(1, 2)
    if layout:
        y, last = y.permute(2, 0, 1, 3), [s.transpose(0, 1) for s in last]
    return (y, *last)[:outputs]


@op("LSTM")
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    activations: Names | None = None,
    direction: Direction = "forward",
    hidden_size: int | None = None,
    input_forget: Literal[0] = 0,
    layout: Literal[0, 1] = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    if peepholes is not None:
        raise Refused("it has peephole weights")
    _expect(activations, ["sigmoid", "tanh", "tanh"], direction)
    weights = _parameters(w, r, b, (0, 2, 3, 1))  # input, output, forget, cell -> input, forget, cell, output
    return _run(
        torch.lstm,
        x,
        [h, c],
        weights,
        biased=b is not None,
        hidden=r.shape[2],
        direction=direction,
        layout=layout,
        lengths=lengths,
        outputs=outputs,
    )


@op("GRU")
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    *,
    activations: Names | None = None,
    direction: Direction = "forward",
    hidden_size: int | None = None,
    layout: Literal[0, 1] = 0,
    linear_before_reset: Literal[0, 1] = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    if not linear_before_reset:
        raise Refused("it applies the reset gate before the product (linear_before_reset=0), which torch does not")
    _expect(activations, ["sigmoid", "tanh"], direction)
    weights = _parameters(w, r, b, (1, 0, 2))  # update, reset, hidden -> reset, update, new
    return _run(
        torch.gru,
        x,
        [h],
        weights,
        biased=b is not None,
        hidden=r.shape[2],
        direction=direction,
        layout=layout,
        lengths=lengths,
        outputs=outputs,
    )


@op("RNN")
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    *,
    activations: Names | None = None,
    direction: Direction = "forward",
    hidden_size: int | None = None,
    layout: Literal[0, 1] = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    _expect(activations, ["tanh"], direction)
    return _run(
        torch.rnn_tanh,
        x,
        [h],
        _parameters(w, r, b, (0,)),
        biased=b is not None,
        hidden=r.shape[2],
        direction=direction,
        layout=layout,
        lengths=lengths,
        outputs=outputs,
    )
