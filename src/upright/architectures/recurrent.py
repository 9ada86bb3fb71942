"""Recurrent networks (Elman 1990; LSTM: Hochreiter, Schmidhuber 1997; GRU: Cho et al. 2014, arXiv:1406.1078).

The idea: a state accumulates information from row to row; after the last row it represents the image.

Differences from the papers: an image becomes a sequence (pixel by pixel: Le et al. 2015, arXiv:1504.00941), and only
the last state is classified. The cells are PyTorch's: the LSTM has the forget gate of Gers et al. 2000, the GRU resets
after its matrix product, and every gate has two biases.

A layer with g gates (rnn 1, gru 3, lstm 4), h hidden units, n inputs and d directions has d * g * h * (n + h + 2)
parameters; the output has K * (d * h + 1). The first layer reads the image. Each other layer reads the states of the
layer before.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from upright.architectures.layers import check_choice

Cell = Literal["lstm", "gru", "rnn"]
Order = Literal["rows", "columns", "pixels"]

CELLS: dict[Cell, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def to_sequence(images: Tensor, order: Order) -> Tensor:
    """Convert ``(B, C, H, W)`` to a sequence ``(B, T, D)`` that starts at the top left."""
    if order == "rows":
        return images.transpose(1, 2).flatten(2)  # (B, H, C * W)
    if order == "columns":
        return images.permute(0, 3, 1, 2).flatten(2)  # (B, W, C * H)
    return images.flatten(2).transpose(1, 2)  # (B, H * W, C)


class Recurrent(nn.Module):
    """A recurrent network over the image, and a linear layer on its last state.

    Args:
        cell: kind of the cell. The LSTM and the GRU are one node of an ONNX graph; the plain cell is unrolled to about
            six nodes per step.
        order: part of the image that is read at each step, with all its channels.
        hidden: units of the state.
        layers: number of recurrent layers; each reads the states of the one before.
        bidirectional: read backwards too; the last states of both directions are classified.
        dropout: share of the values that are dropped between two layers, and before the linear layer.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        cell: Cell = "lstm",
        order: Order = "rows",
        hidden: int = 128,
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        inputs: dict[Order, int] = {"rows": channels * width, "columns": channels * height, "pixels": channels}
        check_choice("cell", cell, CELLS)
        check_choice("order", order, inputs)
        self.order = order
        self.directions = 2 if bidirectional else 1
        self.recurrent = CELLS[cell](
            inputs[order],
            hidden,
            layers,
            batch_first=True,
            bidirectional=bidirectional,
            # PyTorch's dropout is only between layers, and warns if there is one layer.
            dropout=dropout if layers > 1 else 0.0,
        )
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.directions * hidden, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        _, state = self.recurrent(to_sequence(images, self.order))
        # The LSTM's state is a pair: hidden state and cell state.
        hidden = state if isinstance(state, Tensor) else state[0]  # (layers * directions, B, hidden)
        last = torch.cat(hidden[-self.directions :].unbind(), dim=1)  # (B, directions * hidden)
        logits: Tensor = self.classifier(last)
        return logits
