"""Blocks compiled as a whole: the same integers and gradients, one graph for blocks that differ in tensors alone."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import cpu_vec_isa

import lrquant
from lrquant import Recipe
from lrquant.architectures import family_of
from lrquant.calibration import capture
from lrquant.formats import kernels
from lrquant.formats.activation_quant import quantized_activations, route_attention
from lrquant.reconstruction.block_forward import BlockForward
from lrquant.reconstruction.block_parameters import freeze
from lrquant.reconstruction.block_preparation import linear_input_args
from lrquant.reconstruction.compiled_block import CompiledBlocks
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables import Start
from lrquant.reconstruction.learnables.clipping import Clipping
from lrquant.reconstruction.learnables.rotation_vector import RotationVector
from tests.tiny import write_tiny

CPU = torch.device("cpu")
needs_compiling = pytest.mark.skipif(not kernels.COMPILES_EXACTLY, reason="this PyTorch is not asked to compile")


class Line(nn.Module):
    """A block whose output on the identity is its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)


class Wayward(Line):
    """A block that no graph can hold."""

    def forward(self, hidden: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(hidden)


def random_learnables(fixed: BlockParameters, rotation: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = Start(Recipe.preset("lrquant+"))
    learnables = Clipping().start(fixed, start) | (RotationVector().start(fixed, start) if rotation else {})
    for name, tensor in learnables.items():
        if name.endswith(".rotation"):
            tensor.uniform_(0.8, 1.2, generator=generator)
        else:
            tensor.uniform_(-1, 4, generator=generator)
    return learnables


@needs_compiling
@pytest.mark.parametrize(
    ("storage", "numbers"),
    [
        (torch.float32, {"wbits": 3, "abits": 16, "group_size": 16}),
        (torch.bfloat16, {"wbits": 3, "abits": 16, "group_size": 16}),
        (torch.bfloat16, {"format": "nvfp4a16"}),
        (torch.bfloat16, {"format": "mxfp4a16", "rotation_vectors": False}),
    ],
    ids=str,
)
def test_a_graph_rounds_to_the_frozen_weights(storage: torch.dtype, numbers: dict[str, Any]) -> None:
    torch.manual_seed(0)
    recipe = Recipe.preset("lrquant+", **numbers, kernels="compiled", products="float32", loss="mse")
    graphs = CompiledBlocks(recipe, CPU)
    for _ in range(2):  # the second block lends the first one's graph its own tensors
        block = Line(64)
        fixed = BlockParameters.of(block, (), recipe.scheme, storage)
        learnables = {
            name: tensor.requires_grad_() for name, tensor in random_learnables(fixed, recipe.rotation_vectors).items()
        }
        graph = graphs.of(block, fixed)
        assert graph is not None
        stored = freeze(fixed, learnables).parameters(torch.float32)["linear.weight"].T[None]
        nearly = torch.where(stored == stored.max(), stored.nextafter(torch.tensor(9.0)), stored)
        for target, equal in ((stored, True), (nearly, False)):
            squared = graph(block, fixed, learnables, torch.eye(64)[None], {}, [target])
            assert squared is not None
            assert graph.works
            assert (squared == 0).all() == equal  # bit for bit
    assert len(graphs.known) == 1


@needs_compiling
def test_code_that_cannot_be_compiled_runs_as_it_is() -> None:
    recipe = Recipe.preset("lrquant", wbits=3, abits=16, kernels="compiled")
    block = Wayward(64)
    fixed = BlockParameters.of(block, (), recipe.scheme, torch.float32)
    graph = CompiledBlocks(recipe, CPU).of(block, fixed)
    assert graph is not None
    assert graph(block, fixed, random_learnables(fixed), torch.eye(64)[None], {}, [torch.eye(64)[None]]) is None
    assert not graph.works


@needs_compiling
def test_other_code_has_another_graph() -> None:
    recipe = Recipe.preset("lrquant", wbits=3, abits=16, kernels="compiled")
    graphs = CompiledBlocks(recipe, CPU)

    def graph_of(block: Any) -> Any:
        return graphs.of(block, BlockParameters.of(block, (), recipe.scheme, torch.float32))

    first, placed, windowed = Line(64), Line(64), Line(64)
    placed.layer_idx, windowed.window = 7, 128  # type: ignore[assignment]
    assert graph_of(first) is graph_of(placed)
    assert graph_of(first) is not graph_of(windowed)
    assert graph_of(first) is not graph_of(Line(32))


@needs_compiling
def test_gradients_agree_with_the_plain_call(tmp_path: Path) -> None:
    model = lrquant.load(str(write_tiny(tmp_path / "tiny"))).float()
    route_attention(model)
    family = family_of(model)
    blocks = model.get_submodule(family.blocks)
    recipe = Recipe.preset("lrquant+", wbits=4, abits=8, kernels="compiled", products="float32", batch_size=2)
    samples = [{"input_ids": torch.randint(0, 64, (1, 16)), "use_cache": False} for _ in range(2)]
    inputs = capture(model, blocks, samples)
    run = BlockForward(blocks[0], 0, inputs, CPU, 2)
    fixed = BlockParameters.of(blocks[0], (), recipe.scheme, torch.bfloat16)
    targets = [[torch.zeros_like(hidden) for hidden in inputs.hidden]]
    inputs_args = linear_input_args(blocks[0], recipe.scheme, set())
    with quantized_activations(blocks[0], inputs_args, recipe.scheme.attention_inputs), kernels.using("eager"):
        found = []
        for graph in (None, CompiledBlocks(recipe, CPU).of(blocks[0], fixed)):
            learnables = {name: tensor.requires_grad_() for name, tensor in random_learnables(fixed).items()}
            means = run.forward_function(fixed, inputs.hidden, targets, recipe=recipe, graph=graph)(learnables, [0, 1])
            means.sum().backward()
            found.append((means.detach(), {name: tensor.grad for name, tensor in copy.copy(learnables).items()}))
            assert graph is None or graph.works
    (plain, plain_gradients), (whole, whole_gradients) = found
    # Sums in another order can move an activation to the next of its 255 values.
    torch.testing.assert_close(whole, plain, rtol=0.01, atol=0.01 * float(plain.abs().max()))
    for name, expected in plain_gradients.items():
        assert expected is not None
        torch.testing.assert_close(whole_gradients[name], expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@needs_compiling
@pytest.mark.parametrize(("kernel", "asked"), [("compiled", 1), ("eager", 0)])
def test_the_compiler_is_asked_early_where_it_will_be_needed(
    kernel: str, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[threading.Thread] = []
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: calls.append(threading.current_thread()))
    CompiledBlocks(Recipe.preset("lrquant", kernels=kernel), CPU)
    for thread in [thread for thread in threading.enumerate() if thread.name == "lrquant probes the compiler"]:
        thread.join()
    assert len(calls) == asked
    assert threading.main_thread() not in calls
