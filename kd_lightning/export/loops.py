"""LSTMs and sorting in operations that ExecuTorch has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.export import ExportedProgram

from kd_lightning.runtime.errors import ConfigError


class LoopedLSTM(nn.Module):
    """An LSTM as a loop of one step a word, which a graph runs for a text of any length.

    The gates' products with all inputs are one matrix product before the loop; inside it is `h U`, with
    `i, f, g, o = x W + h U + b`, `c' = sigmoid(f) c + sigmoid(i) tanh(g)` and `h' = sigmoid(o) tanh(c')`.

    Args:
        lstm: What it computes as; its weights are copied.

    Raises:
        ConfigError: Its states are projected (`proj_size`).
    """

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        if lstm.proj_size:
            raise ConfigError(f"an LSTM of proj_size={lstm.proj_size} has no graph for ExecuTorch: use onnx")
        self.batch_first, self.hidden_size = lstm.batch_first, lstm.hidden_size
        ends = ["", "_reverse"] if lstm.bidirectional else [""]
        self.directions, self.inputs = len(ends), nn.ModuleList()
        for layer in range(lstm.num_layers):
            for end in ends:
                name, own = f"l{layer}{end}", dict(lstm.named_parameters())
                weight = own[f"weight_ih_{name}"].detach()
                line = nn.Linear(weight.shape[1], weight.shape[0], bias=lstm.bias)
                line.weight = nn.Parameter(weight)
                if lstm.bias:
                    line.bias = nn.Parameter((own[f"bias_ih_{name}"] + own[f"bias_hh_{name}"]).detach())
                # transposed once: ExecuTorch's product of a row and a matrix is several times faster this way round
                self.register_buffer(
                    f"recurrent_{len(self.inputs)}", own[f"weight_hh_{name}"].detach().t().contiguous()
                )
                self.inputs.append(line)

    def forward(self, states: Tensor, start: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, None]:
        """Return the states of all steps.

        Raises:
            ConfigError: It is given states to start from.
        """
        if start is not None:
            raise ConfigError("an LSTM that starts from given states has no graph for ExecuTorch: use onnx")
        states = states.transpose(0, 1) if self.batch_first else states
        for first in range(0, len(self.inputs), self.directions):
            ahead = self._run(first, states)
            if self.directions == 2:
                ahead = torch.cat([ahead, self._run(first + 1, states.flip(0)).flip(0)], dim=2)
            states = ahead
        return states.transpose(0, 1) if self.batch_first else states, None

    def _run(self, number: int, states: Tensor) -> Tensor:
        """Return the states `(L, B, H)` of one direction of one layer."""
        recurrent: Tensor = getattr(self, f"recurrent_{number}")

        def step(carry: list[Tensor], gates: Tensor) -> tuple[list[Tensor], Tensor]:
            hidden, cell = carry
            enter, forget, new, leave = (gates + hidden @ recurrent).chunk(4, 1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            hidden = leave.sigmoid() * cell.tanh()
            return [hidden, cell], hidden.clone()  # what is carried and what is kept may not be one tensor

        zeros = states.new_zeros(states.shape[1], self.hidden_size)
        gates = self.inputs[number](states.transpose(0, 1)).transpose(0, 1)
        return scan(step, [zeros, zeros.clone()], gates)[1]  # type: ignore[no-any-return]


def with_loops(network: nn.Module) -> nn.Module:
    """Return a copy of a network with each LSTM as a loop."""
    network = copy.deepcopy(network).eval()
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.LSTM):
            network.set_submodule(name, LoopedLSTM(layer))
    return network


def in_kernels(program: ExportedProgram) -> ExportedProgram:
    """Return a graph of one example without sorting, which ExecuTorch lacks, that gathers whole rows."""
    aten: Any = torch.ops.aten
    table: dict[Any, Callable[..., Any]] = {
        aten.sort.default: lambda x, dim=-1, descending=False: _sorted(x, dim, descending),
        aten.sort.stable: lambda x, *, stable=False, dim=-1, descending=False: _sorted(x, dim, descending),
        aten.argsort.default: lambda x, dim=-1, descending=False: _sorted(x, dim, descending, order_only=True),
        aten.argsort.stable: lambda x, *, stable=False, dim=-1, descending=False: _sorted(x, dim, descending, True),
    }
    _by_rows(program)
    return cast(ExportedProgram, program.run_decompositions(table))


def _sorted(x: Tensor, dim: int, descending: bool, order_only: bool = False) -> Any:
    """Return `(values, order)` of whole numbers, or the order alone; stable.

    An entry's place is how many are before it: each of L is compared with each other, O(L^2). Numbers times L must fit
    64 bits.
    """
    if x.is_floating_point() or x.ndim == 0:
        return NotImplemented
    size = x.shape[dim]
    place = torch.arange(size, device=x.device)
    keys = x.movedim(dim, -1).long() * (-size if descending else size) + place
    rank = (keys.unsqueeze(-2) < keys.unsqueeze(-1)).sum(-1)
    order = torch.zeros_like(rank).scatter(-1, rank, place.expand_as(rank)).movedim(-1, dim)
    return order if order_only else (x.gather(dim, order), order)


def _by_rows(program: ExportedProgram) -> None:
    """Select whole rows where a repeated index gathers them: ExecuTorch gathers entry by entry."""
    aten: Any = torch.ops.aten
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is not aten.gather.default:
            continue
        x, dim, index = node.args[:3]
        if index.target not in (aten.expand.default, aten.expand_as.default):
            continue
        size, source = x.meta["val"].shape, index.args[0].meta["val"].shape
        if dim == 1 and len(size) == 3 and size[0] == source[0] == source[2] == 1:
            with graph.inserting_before(node):
                flat = graph.call_function(aten.reshape.default, (index.args[0], [-1]))
                rows = graph.call_function(aten.index_select.default, (x, 1, flat))
            node.replace_all_uses_with(rows)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
