# SPDX-License-Identifier: Apache-2.0
"""A traced function does what it did: on other inputs, with fresh noise, with what it reads or changes elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyro_flows._recording import is_recording
from pyro_flows.compiled import known as known_values
from pyro_flows.compiled.known import KnownSettings
from pyro_flows.compiled.script import to_script
from pyro_flows.compiled.tracer import trace_operations

HELD_VECTOR = torch.zeros(3)
HELD_VIEW = HELD_VECTOR[0]
HELD = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
SCALE = nn.Parameter(torch.tensor(0.7))


def gradients(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Of a loss in its arguments, after the loss."""

    def both(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_() for value in inputs]
            value = loss(*leaves)
            return value.detach(), *torch.autograd.grad(value, leaves)

    return both


def products(x: Tensor, y: Tensor) -> Tensor:
    return ((HELD @ x).tanh() * SCALE).logsumexp(0) + (y.expand(4, 3) * HELD).softmax(-1).square().sum()


def pieces(x: Tensor, y: Tensor) -> Tensor:
    first, *rest = torch.cat([x, y]).split([1, 2, 3])
    chosen = torch.stack([part.sum() for part in rest]).gather(0, torch.tensor([1, 0, 1]))
    return (
        (first + chosen).pow(3).sum() + x[torch.tensor([0, 2])].prod() + torch.linalg.qr(torch.outer(x, y) + 1)[1].sum()
    )


def literals(x: Tensor, y: Tensor) -> Tensor:
    weight = torch.tensor(2.0) * torch.full((), 3.0)
    if weight.item() > 5.0:  # a number of the code's own, whatever the data
        x = x * weight
    return (torch.arange(3) * x + torch.zeros(3).fill_(0.5) * y).sum()


def in_place(x: Tensor, y: Tensor) -> Tensor:
    table = torch.zeros(3, 3)
    table[0] = x
    table[:, 1] += y
    table.diagonal().mul_(2.0)
    return table.square().sum()


def conjugated(x: Tensor, y: Tensor) -> Tensor:
    """A conjugate shares its memory, shape and strides with its number, and so does a negative imaginary part."""
    spectrum = torch.fft.rfft(x)
    return (spectrum * spectrum.conj()).real.sum() + (spectrum.conj().imag * y[:2]).sum() + (spectrum**3).real.sum()


def mapped(x: Tensor, y: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: torch.where(row > 0, row.exp() * x, y).sum())(HELD).sum()


def recomputed(x: Tensor, y: Tensor) -> Tensor:
    value: Tensor = checkpoint(lambda x: (x.sin() * y).sum(), x, use_reentrant=False)
    return value


@pytest.mark.parametrize("loss", [products, pieces, literals, in_place, conjugated, mapped, recomputed])
def test_loss_and_gradients_on_other_inputs(loss: Callable[..., Tensor]) -> None:
    function = gradients(loss)
    graph, captured, _ = trace_operations(function, [torch.randn(3), torch.randn(3)])
    others = [torch.randn(3), torch.randn(3)]
    for one, other in zip(graph(*others, *captured), function(*others), strict=True):
        torch.testing.assert_close(one, other)


def test_noise_is_drawn_afresh_by_the_same_functions() -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [x + torch.randn(3), torch.rand_like(x), torch.empty(3).exponential_(), torch.bernoulli(x.sigmoid())]

    x = torch.zeros(3)
    graph = trace_operations(function, [x]).graph
    torch.manual_seed(1)
    expected, again = function(x), function(x)
    torch.manual_seed(1)
    for numbers in (expected, again):
        for one, other in zip(graph(x), numbers, strict=True):
            assert torch.equal(one, other)


def test_tensors_that_it_holds_are_read_at_each_call_and_changed_in_place() -> None:
    norm = nn.BatchNorm1d(3)
    graph, captured, _ = trace_operations(lambda x: [norm(x)], [torch.randn(5, 3)])
    x, before = torch.randn(5, 3), norm.running_mean.clone()  # type: ignore[union-attr]
    with torch.no_grad():
        norm.weight.mul_(3.0)
        (found,) = graph(x, *captured)
    assert not torch.equal(norm.running_mean, before)  # type: ignore[arg-type]
    torch.testing.assert_close(found, norm(x))


def test_parts_of_a_vector_are_taken_from_it() -> None:
    vector = torch.randn(6)
    parts = [vector[:2], vector[2:].view(2, 2)]
    graph, captured, _ = trace_operations(lambda _: [parts[1] @ parts[0]], [vector], parts)
    other = torch.randn(6)
    assert not captured
    torch.testing.assert_close(graph(other)[0], other[2:].view(2, 2) @ other[:2])


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: 1 if x.sum() > 0 else 2,
        lambda x: torch.equal(x, 2 * x),
        lambda x: (torch.zeros(()) + x.sum()).item(),
    ],
)
def test_python_must_not_look_at_what_is_computed(look: Callable[[Tensor], float]) -> None:
    with pytest.raises(RuntimeError, match="item"):
        trace_operations(lambda x: [x * look(x * 1.0)], [torch.randn(3)])


def test_code_knows_that_it_is_recorded() -> None:
    seen = []
    trace_operations(lambda x: [seen.append(is_recording()) or x], [torch.randn(3)])
    assert seen == [True] and not is_recording()
    with pytest.raises(ZeroDivisionError):
        trace_operations(lambda x: [x / (1 // 0)], [torch.randn(3)])
    assert not is_recording()


def test_what_changes_nothing_is_left_out() -> None:
    graph = trace_operations(lambda x: [x.detach().view(3).expand(3) + 1.0], [torch.randn(3)]).graph
    assert sum(node.op == "call_function" for node in graph.graph.nodes) == 1


@pytest.mark.parametrize("scripted", [False, True])
def test_a_matrix_that_is_refused_costs_its_own_draw(scripted: bool) -> None:
    """The check is an operation without a result, which nobody needs: what it should have stopped was used."""

    def loss(x: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(torch.diag_embed(x) + 0.1)
        return torch.linalg.solve_triangular(factor, torch.ones(3, 1), upper=False).square().sum((-2, -1))

    def function(x: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        value = loss(leaf)
        return value.detach(), *torch.autograd.grad(value.sum(), leaf)

    graph, captured, _ = trace_operations(function, [torch.ones(4, 3)])
    inputs = [torch.rand(4, 3) + 0.5, *captured]
    run = to_script(graph, inputs) if scripted else graph
    for one, other in zip(run(*inputs), function(inputs[0]), strict=True):
        torch.testing.assert_close(one, other)
    inputs[0] = inputs[0].clone()
    inputs[0][2] = -1.0
    value, gradient = run(*inputs)
    refused = torch.tensor([False, False, True, False])
    assert torch.equal(value.isnan(), refused) and torch.equal(gradient.isnan().any(-1), refused)
    with pytest.raises(torch.linalg.LinAlgError):
        function(inputs[0])


def test_gradients_are_recorded_in_the_thread_that_records():
    """On a GPU, torch computes them in a thread of its own otherwise, in which nothing says that it records."""
    seen = []

    def loss(x: Tensor) -> Tensor:
        y = 2.0 * x
        y.register_hook(lambda gradient: seen.append((is_recording(), torch._C._is_multithreading_enabled())))
        return y.sum()

    before = torch._C._is_multithreading_enabled()
    trace_operations(gradients(loss), [torch.ones(3)])
    assert before and seen == [(True, False)]
    assert torch._C._is_multithreading_enabled()


def known(values: Tensor) -> list[Tensor]:
    """What follows from data in each of the ways in which Python reads it."""
    count = int(values.max()) + 1
    steps = torch.zeros(3)
    steps[1:] = 2.0
    complete = values.clone()
    complete[values == 4.0] = math.nan
    return [
        torch.full((int((~complete.isnan()).sum()),), 3.0),
        torch.full((count,), 2.0),
        torch.full((len(values[values > 0]),), 1.0),
        torch.full((2,), sum(values.tolist())),
        torch.full((2,), float(values.numpy()[0])),
        steps * int(steps.sum()),
    ]


@pytest.mark.parametrize("is_held", [False, True])
def test_python_may_read_what_follows_from_data(is_held: bool) -> None:
    values = torch.tensor([1.0, 4.0, 0.0])
    with pytest.raises(RuntimeError, match="item"):
        trace_operations(lambda x, y: known(y), [torch.zeros(2), values])  # an input that is no data
    data = [] if is_held else [values]
    graph, captured, read = trace_operations(
        lambda x, *given: [*known(*given or [values]), x + 1.0], [torch.zeros(2)], data=data
    )
    for found, expected in zip(graph(torch.zeros(2), *data, *captured), known(values), strict=False):
        assert torch.equal(found, expected)

    def holds(other: Tensor) -> bool:
        inputs = [torch.zeros(2), *data, *captured]
        return read.hold([other if each.data_ptr() == values.data_ptr() else each for each in inputs])

    assert holds(values)
    assert holds(values.clone())
    assert not holds(torch.tensor([1.0, 5.0, 0.0]))  # another number of groups
    assert not holds(torch.tensor([1.0, 4.0, 1.0]))  # another number of positive values
    assert not holds(torch.tensor([1.0, 0.0, 4.0]))  # another order


@pytest.mark.parametrize("max_elements", [0, 100])
def test_changes_in_place_are_seen(max_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_values, "SETTINGS", KnownSettings(max_elements))
    held = torch.tensor([0, 1, 1])
    _, captured, read = trace_operations(lambda x: [x + int(held.max())], [torch.zeros(2)])
    for value, holds in ((1, True), (3, False), (1, True)):
        held.fill_(value)
        assert [read.hold([torch.zeros(2), *captured]) for _ in range(2)] == [holds, holds]
    held.data = torch.tensor([0, 1, 2])  # a module that moves its buffers
    assert not read.hold([torch.zeros(2), held])


def written_by_what_is_computed(x: Tensor, y: Tensor) -> float:
    held = torch.zeros(2)
    held[0] = x.sum()
    return held.sum().item()


def written_into_data(x: Tensor, y: Tensor) -> float:
    y.add_(1.0)  # a counter of steps, say: to read it again would count again
    return y[0].item()


def written_under_another_name(x: Tensor, y: Tensor) -> float:
    HELD_VECTOR.copy_(x.detach())
    return float(HELD_VIEW)


def written_under_an_array(x: Tensor, y: Tensor) -> float:
    held = torch.zeros(3)
    array = held.numpy()
    held.copy_(x.detach())
    return float(torch.from_numpy(array)[0])


def number_of_computed(x: Tensor, y: Tensor) -> float:
    return float(len(x[x > 0.0]))


def list_of_computed(x: Tensor, y: Tensor) -> float:
    return float((x * 2.0).detach().tolist()[0])


def array_of_computed(x: Tensor, y: Tensor) -> float:
    return float((x * 2.0).detach().numpy()[0])


def at_random(x: Tensor, y: Tensor) -> float:
    return (torch.rand(3) * y).sum().item()


READS = [
    written_by_what_is_computed,
    written_into_data,
    written_under_another_name,
    written_under_an_array,
    number_of_computed,
    list_of_computed,
    array_of_computed,
    at_random,
]


def test_a_value_is_read_before_it_is_overwritten() -> None:
    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        largest = y.max()
        count = int(largest)
        largest.zero_()
        return [x + count + int(largest)]

    *_, read = trace_operations(function, [torch.zeros(2)], data=[torch.tensor([1.0, 4.0])])
    assert read.hold([torch.zeros(2), torch.tensor([1.0, 4.0])])
    assert not read.hold([torch.zeros(2), torch.tensor([-1.0, 0.0])])


@pytest.mark.parametrize("choose", [lambda x, mask: x[mask], lambda x, mask: x.masked_select(mask)])
def test_masks_of_data_choose_among_what_is_computed(choose: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Of a Cholesky factor's entries, say, or of means where nothing is missing."""

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        return [choose(x, y > 0.0)]

    graph, captured, read = trace_operations(function, [torch.ones(3)], data=[torch.tensor([1.0, 0.0, 2.0])])
    x, y = torch.randn(3), torch.tensor([0.0, 1.0, 1.0])
    assert read.hold([x, y, *captured]) and torch.equal(graph(x, y, *captured)[0], x[1:])
    assert not read.hold([x, torch.ones(3), *captured])


def test_what_is_written_later_does_not_make_a_read_another() -> None:
    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        table = torch.zeros(2)
        first = table[0]
        first.copy_(y.max())
        count = int(table[0])
        table[1] = x.sum()
        return [table + count]

    *_, read = trace_operations(function, [torch.zeros(2)], data=[torch.tensor([1.0, 4.0])])
    assert read.hold([torch.zeros(2), torch.tensor([0.0, 4.0])])
    assert not read.hold([torch.zeros(2), torch.tensor([0.0, 5.0])])


def test_literals_are_those_of_the_code_at_each_call() -> None:
    def function(x: Tensor) -> list[Tensor]:
        count = torch.tensor([0, 1])
        count += 1
        return [x * int(count.sum())]

    graph, captured, _ = trace_operations(function, [torch.ones(2)])
    assert all(torch.equal(graph(torch.ones(2), *captured)[0], torch.tensor([3.0, 3.0])) for _ in range(2))


def test_lengths_of_sequences_are_read() -> None:
    """torch reads them behind its own back."""

    def function(x: Tensor, lengths: Tensor) -> list[Tensor]:
        return [nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True).data.cumsum(0)]

    *_, read = trace_operations(function, [torch.randn(2, 3, 1)], data=[torch.tensor([3, 1])])
    assert read.hold([torch.zeros(2), torch.tensor([3, 1])])
    assert not read.hold([torch.zeros(2), torch.tensor([3, 2])])


@pytest.mark.parametrize("look", READS)
def test_python_must_not_read_what_is_data_no_more(look: Callable[[Tensor, Tensor], float]) -> None:
    with pytest.raises(RuntimeError, match="item"):
        trace_operations(lambda x, y: [x * look(x, y)], [torch.randn(3)], data=[torch.randn(3)])


def test_a_generator_of_the_code_is_refused_in_words() -> None:
    generator = torch.Generator()
    with pytest.raises(RuntimeError, match="generator of its own"):
        trace_operations(lambda x: [x + torch.randn(3, generator=generator)], [torch.zeros(3)])
