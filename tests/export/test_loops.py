"""What ExecuTorch lacks is computed otherwise, to the same values for every length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from kd_lightning.export.formats.executorch import ExecutorchNetwork, _rows, check, open_program
from kd_lightning.export.loops import LoopedLSTM, in_kernels, with_loops
from kd_lightning.models.adapt import run_network
from kd_lightning.models.causal_lm import CausalLM, causal_lm_small
from kd_lightning.runtime.errors import ConfigError


def graph(network: nn.Module, x: Tensor, axis: int) -> torch.export.ExportedProgram:
    return torch.export.export(network, (x,), dynamic_shapes=({axis: Dim("length", min=1, max=16)},))


@pytest.mark.slow
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_loop_is_the_lstm_at_every_length(batch_first: bool) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=batch_first).eval()
    axis = 1 if batch_first else 0
    looped = graph(with_loops(nn.Sequential(lstm))[0], torch.randn(1, 5, 3).transpose(0, 1 - axis), axis).module()
    for length in (1, 5, 16):
        states = torch.randn(1, length, 3).transpose(0, 1 - axis)
        with torch.inference_mode():
            torch.testing.assert_close(looped(states)[0], lstm(states)[0], atol=1e-6, rtol=1e-6)


def test_lstms_that_are_not_loops_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"proj_size=2 has no graph for ExecuTorch: use onnx"):
        LoopedLSTM(nn.LSTM(3, 4, proj_size=2))
    with pytest.raises(ConfigError, match=r"starts from given states .* use onnx"):
        LoopedLSTM(nn.LSTM(3, 4))(torch.zeros(2, 1, 3), (torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)))


class Sorting(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        order = x.argsort(dim=1, descending=True, stable=True)
        rows = torch.stack([x, -x], dim=2).gather(1, order.unsqueeze(2).expand(-1, -1, 2))
        return order, *torch.sort(x, dim=1, stable=True), rows


def test_sorting_is_stable_and_rows_are_selected_without_either_operator() -> None:
    program = in_kernels(graph(Sorting(), torch.randint(0, 9, (1, 7)), 1))
    left = {str(node.target) for node in program.graph.nodes}
    assert not [name for name in left if "sort" in name]
    assert "aten.index_select.default" in left
    for length in (1, 7, 16):
        x = torch.randint(-3, 4, (1, length))  # with ties
        for found, expected in zip(program.module()(x), Sorting()(x), strict=True):
            assert torch.equal(found, expected)


def test_a_file_is_opened_for_its_author_alone(tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(b"whatever")
    with pytest.raises(ConfigError, match=r"may crash or take over the process .* add --trust"):
        open_program(tmp_path / "model.pte")


class Program:
    """A runtime whose graph doubles each token's number, or returns the length of a text."""

    def __init__(self, per_token: bool) -> None:
        self.per_token = per_token
        self.given: list[list[list[int]]] = []

    def load_method(self, name: str) -> Program:
        return self

    def execute(self, row: list[Tensor]) -> list[Tensor]:
        assert all(one.is_contiguous() for one in row)
        self.given.append([one[0].tolist() for one in row])
        ids = row[0]
        return [2.0 * ids.unsqueeze(2).expand(-1, -1, 2) if self.per_token else torch.tensor([[float(ids.shape[1])]])]


PADDED = {
    "input_ids": torch.tensor([[5, 6, 7], [8, 1, 1], [1, 3, 4], [1, 1, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]]),
}


@pytest.mark.parametrize("inputs", [["input_ids", "attention_mask"], ["input_ids"]])
def test_the_runtime_is_given_texts_without_their_batch_s_padding(inputs: list[str]) -> None:
    program = Program(per_token=False)
    found = run_network(ExecutorchNetwork(program, inputs), PADDED).logits
    assert [row[0] for row in program.given] == [[5, 6, 7], [8], [3, 4], [1, 1, 1]]  # of no tokens all are kept
    assert found.tolist() == [[3.0], [1.0], [2.0], [3.0]]
    assert [[one.tolist() for one in row] for row in _rows(PADDED, ["input_ids"])] == [
        [[[5, 6, 7]]], [[[8]]], [[[3, 4]]], [[[1, 1, 1]]],
    ]  # fmt: skip


def test_outputs_of_tokens_stand_at_their_places() -> None:
    found = run_network(ExecutorchNetwork(Program(per_token=True), ["input_ids"]), PADDED).logits
    assert found[..., 0].tolist() == [[10, 12, 14], [16, 0, 0], [0, 6, 8], [2, 2, 2]]
    assert found.shape == (4, 3, 2)


def test_images_have_no_padding() -> None:
    pixels = torch.rand(2, 1, 4, 4)
    assert [row[0].shape for row in _rows({"pixel_values": pixels}, ["pixel_values"])] == [(1, 1, 4, 4)] * 2


def test_language_models_are_refused() -> None:
    class Model:
        network = CausalLM(causal_lm_small(32, 16, hidden_size=8, num_layers=1, num_heads=1).network, 32)

    with pytest.raises(ConfigError, match=r"--format executorch: language models are not written; use gguf"):
        check(Model())  # type: ignore[arg-type]
