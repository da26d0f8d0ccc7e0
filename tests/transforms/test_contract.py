# SPDX-License-Identifier: Apache-2.0
"""What every transform promises (see FlowTransform), checked at random parameters for every public transform."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from torch import Tensor

import pyro_flows.transforms as T
from pyro_flows.transforms import FlowTransform
from tests.common import trained


def hierarchy(input_dim: int) -> FlowTransform:
    """Priors two levels deep: each coordinate but the last two follows the one after the next, which is drawn first."""
    known = torch.arange(input_dim) < max(1, input_dim - 2)
    slope = torch.randn(2, input_dim, input_dim) * (
        torch.eye(input_dim).roll(min(2, input_dim - 1), -1) * known[:, None]
    )
    return T.MultilevelHead(known, slope.flatten(0, 1), torch.randn(2 * input_dim))


def likelihood_head(input_dim: int, kind: type[T.LinearMixedHead]) -> FlowTransform:
    """Known priors of the last half, two of which are correlated where there are five coordinates and matrices."""
    count = (input_dim + 1) // 2
    known = torch.arange(input_dim) >= input_dim - count
    free = input_dim - count
    slope = torch.zeros(2 * input_dim, input_dim)
    slope[known.repeat(2), :free] = 0.3 * torch.randn(2 * count, free)
    given = known, slope, torch.randn(2 * input_dim)
    if kind is T.FullPrecisionHead and input_dim >= 5:
        head: T.LinearMixedHead = T.FullPrecisionHead(*given, [T.Correlated(free + 1, num=1, size=2, factor_offset=0)])
    else:
        head = kind(*given)
    if free:
        root = torch.randn(count, count)
        precision = root @ root.mT + 0.1 * torch.eye(count)
        where = torch.randn(free), torch.rand(free) + 0.5
        head.set_likelihood(where, torch.randn(count), precision, torch.randn(count, free), 0.2 * torch.randn(free))
    return head


class Kernel:
    """A prior with a location and a covariance that follow the first coordinate."""

    def __init__(self, count: int) -> None:
        self.root = torch.arange(count**2).sin().reshape(count, count)

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor]:
        root = self.root.to(y)
        covariance = root @ root.mT * y[..., :1, None].exp() + 0.3 * torch.eye(len(root)).to(y)
        return y[..., :1].sin().expand(*y.shape[:-1], len(root)), torch.linalg.cholesky(covariance)


def covariance_head(input_dim: int, *, full: bool) -> FlowTransform:
    """A multivariate normal prior of the last half, with all of it in use or its marginals."""
    count = input_dim // 2
    free = input_dim - count
    known = torch.arange(input_dim) >= free
    slope = torch.zeros(2, input_dim, input_dim)
    slope[:, known, 0] = 0.3
    group = T.Covariance(free, 1, count, Kernel(count))
    head = T.CovarianceHead(known, slope.flatten(0, 1), torch.zeros(2 * input_dim), covariances=[group])
    head.initialize(torch.randn(input_dim), torch.rand(input_dim) + 0.5, 0.5)
    if full:
        root = torch.randn(count, count)
        where = torch.randn(free), torch.rand(free) + 0.5
        precision = root @ root.mT + 0.1 * torch.eye(count)
        head.set_likelihood(where, torch.randn(count), precision, torch.randn(count, free), 0.2 * torch.randn(free))
    return head


class AffineFunctions:
    """Predictors with offsets and slopes that follow the first coordinate."""

    def __init__(self, num: int, count: int) -> None:
        self.slope = torch.arange(num * count).cos().reshape(num, count)

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor]:
        slope = self.slope.to(y) * y[..., :1, None].exp()
        return y[..., :1].sin().expand(*y.shape[:-1], len(self.slope)), slope


def predictor_head(input_dim: int, *, full: bool) -> FlowTransform:
    """Standard normals as the last half, with one predictor more, in use or not."""
    count = input_dim // 2
    free = input_dim - count
    predictor = T.LinearPredictor(slice(free, input_dim), count + 1, AffineFunctions(count + 1, count))
    head = T.LinearPredictorHead(input_dim, predictor)
    head.initialize(torch.randn(input_dim), torch.rand(input_dim) + 0.5, 0.5)
    if full:
        where = torch.randn(free), torch.rand(free) + 0.5
        head.set_factors(where, 0.5 * torch.randn(2, count + 1), 0.2 * torch.randn(2, count + 1, free))
        head.set_skew(torch.randn(free), torch.randn(count + 1))
    return head


class States:
    """An autoregression whose coefficient, scale and drift follow the first coordinate."""

    def __init__(self, count: int) -> None:
        self.pattern = torch.arange(count).cos()

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pattern, first = self.pattern.to(y), y[..., :1]
        return first.sin() * pattern, torch.tanh(first + pattern), (0.3 * first).exp() * (pattern + 2.0)


def chain_head(input_dim: int, *, full: bool, is_skewed: bool = False) -> FlowTransform:
    """Innovations after the first coordinates, before the last one where there are three, in use or not."""
    count = input_dim // 2
    free = input_dim - count
    start = min(free, max(1, input_dim - count - 1))
    head = T.ChainHead(input_dim, T.StateChain(slice(start, start + count), States(count)))
    head.initialize(torch.randn(input_dim), torch.rand(input_dim) + 0.5)
    if full:
        where = torch.randn(free), torch.rand(free) + 0.5
        head.set_factors(where, 0.5 * torch.randn(2, count), 0.2 * torch.randn(2, count, free))
    if is_skewed:
        head.set_skew(torch.randn(free), torch.randn(count))
    return head


def skewed(head: FlowTransform) -> FlowTransform:
    """A head with a skewed likelihood factor."""
    assert isinstance(head, T.FullPrecisionHead)
    head.set_skew(torch.randn(head.count_free), torch.randn(head.input_dim - head.count_free))
    return head


def preconditioner(input_dim: int) -> FlowTransform:
    transform = T.FullRankPreconditioner(input_dim)
    transform.set(torch.randn(input_dim), torch.randn(input_dim, input_dim).tril() + 3.0 * torch.eye(input_dim))
    return transform


def low_rank_preconditioner(input_dim: int) -> FlowTransform:
    """Of its directions, one is not in use where there are more than two coordinates."""
    rank = min(input_dim, 3)
    transform = T.LowRankPreconditioner(input_dim, rank)
    used = min(rank, 2)
    directions = torch.linalg.qr(torch.randn(input_dim, used)).Q
    transform.set(torch.randn(input_dim), torch.rand(input_dim) + 0.5, directions, 2.0 * torch.rand(used) + 0.2)
    return transform


def leaf_preconditioner(input_dim: int) -> FlowTransform:
    """With as many products as there are free coordinates."""
    leaves, free = (input_dim + 1) // 2, input_dim // 2
    transform = T.LeafPreconditioner(input_dim, leaves, free)
    factor = 0.3 * torch.randn(free, free).tril(-1) + torch.diag(torch.rand(free) + 0.5)
    transform.set(torch.randn(input_dim), factor, torch.randn(leaves, free), torch.rand(leaves) + 0.5)
    transform.bend_leaves(
        torch.randn(leaves),
        torch.randn(leaves, free),
        torch.rand(leaves) + 0.5,
        0.2 * torch.randn(leaves, free),
        torch.randn(free, free),
        torch.randn(free, free),
        torch.randn(leaves, free),
    )
    transform.skew_leaves(0.5 * torch.randn(leaves))
    return transform


def noncentering(input_dim: int) -> FlowTransform:
    """Of the last coordinates, given the first ones; at least two in all."""
    rows = torch.arange(input_dim)[(input_dim + 1) // 2 :]
    slope = torch.randn(2, len(rows), input_dim)
    slope[..., rows] = 0.0
    return T.NonCentering(rows, slope.flatten(0, 1))


def item_couplings(input_dim: int, *, num_items: int) -> FlowTransform:
    """Two items of two coordinates each, or one of three, and one that they share, where there are as many; else one
    item."""
    items, shared = ([[4, 0], [1, 3]] if num_items == 2 else [[4, 0, 1]], [2]) if input_dim == 5 else ([[1, 0]], [])
    return T.ItemCouplings(input_dim, torch.tensor(items), torch.tensor(shared), num_transforms=5)


def directed_couplings(input_dim: int, context_dim: int) -> FlowTransform:
    """More directions than coordinates, and fewer than units."""
    transform = T.DirectedCouplings(input_dim, context_dim, num_transforms=5, hidden_dims=(16,), num_parts=3)
    transform.point(torch.nn.functional.normalize(torch.randn(7, input_dim), dim=-1))
    return transform


BASES = {
    "AffineHead",
    "ConditionalGaussianHead",
    "FlowTransform",
    "Head",
    "LinearMixedHead",
    "OrderedHead",
    "Preconditioner",
}  # Not transforms of their own.
# Name -> constructor (input_dim, context_dim) of every public transform.
TRANSFORMS: dict[str, Callable[[int, int], FlowTransform]] = {
    name: getattr(T, name)
    for name in T.__all__
    if isinstance(getattr(T, name), type) and issubclass(getattr(T, name), FlowTransform) and name not in BASES
}
# Those that take other arguments, small networks, or several forms.
TRANSFORMS |= {
    "AffineAutoregressive": lambda d, c: T.AffineAutoregressive(d, c, hidden_dims=(16, 16)),
    "AffineAutoregressive (reversed)": lambda d, c: T.AffineAutoregressive(d, c, order=range(d - 1, -1, -1)),
    "AffineCouplings": lambda d, c: T.AffineCouplings(d, c, hidden_dims=(16,)),
    "BlockAutoregressive": lambda d, c: T.BlockAutoregressive(d, c, hidden_factors=(4, 3)),
    "BlockAutoregressive (one layer)": lambda d, c: T.BlockAutoregressive(d, c, hidden_factors=(5,)),
    "DirectedCouplings": lambda d, c: directed_couplings(d, c),
    "Chain": lambda d, c: T.Chain([T.Spline(d, c), T.AffineAutoregressive(d, c), T.DiagonalAffine(d, c)]),
    "ChainHead": lambda d, c: chain_head(d, full=True),
    "ChainHead (skewed)": lambda d, c: chain_head(d, full=True, is_skewed=True),
    "ChainHead (mean-field)": lambda d, c: chain_head(d, full=False),
    "Householder": lambda d, c: T.Householder(d, c, num_reflections=4),
    "Inverse": lambda d, c: T.Inverse(T.AffineAutoregressive(d, c)),
    "Inverse (spline)": lambda d, c: T.Inverse(T.Spline(d, c)),
    "ItemCouplings": lambda d, c: item_couplings(d, num_items=2),
    "ItemCouplings (one item)": lambda d, c: item_couplings(d, num_items=1),
    "Leading": lambda d, c: T.Leading(d, T.AffineAutoregressive((d + 1) // 2, hidden_dims=(8,))),
    "LeafPreconditioner": lambda d, c: leaf_preconditioner(d),
    "LowRankAffine": lambda d, c: T.LowRankAffine(d, c, rank=min(d, 2)),
    "LowRankPreconditioner": lambda d, c: low_rank_preconditioner(d),
    "NonCentering": lambda d, c: noncentering(d),
    "NeuralAutoregressive": lambda d, c: T.NeuralAutoregressive(d, c, hidden_dims=(16,), num_units=4),
    "PlateHead": lambda d, c: T.PlateHead(d, parent_dim=c, feature_dim=2),
    "PlateHead (prior)": lambda d, c: T.PlateHead(d, parent_dim=c, feature_dim=2, known=torch.arange(d) % 2 == 0),
    "PyroTransform": lambda d, c: T.PyroTransform(pyro_transforms.spline(d), d, c),
    "DiagonalPrecisionHead": lambda d, c: likelihood_head(d, T.DiagonalPrecisionHead),
    "FullPrecisionHead": lambda d, c: likelihood_head(d, T.FullPrecisionHead),
    "FullPrecisionHead (skewed)": lambda d, c: skewed(likelihood_head(d, T.FullPrecisionHead)),
    "CovarianceHead": lambda d, c: covariance_head(d, full=True),
    "CovarianceHead (skewed)": lambda d, c: skewed(covariance_head(d, full=True)),
    "CovarianceHead (marginals)": lambda d, c: covariance_head(d, full=False),
    "MultilevelHead": lambda d, c: hierarchy(d),
    "LinearPredictorHead": lambda d, c: predictor_head(d, full=True),
    "LinearPredictorHead (marginals)": lambda d, c: predictor_head(d, full=False),
    "SiteOrderedAffine": lambda d, c: T.SiteOrderedAffine(d, c, block_sizes=(1,) if d == 1 else (1, d - 1)),
    "SiteOrderedAffine (rank 1)": lambda d, c: T.SiteOrderedAffine(d, c, block_sizes=(1,) * d, rank=1),
    "SplineAutoregressive": lambda d, c: T.SplineAutoregressive(d, c, hidden_dims=(16,), count_bins=4),
    "SplineCouplings": lambda d, c: T.SplineCouplings(d, c, hidden_dims=(16,), count_bins=4),
    "Sylvester": lambda d, c: T.Sylvester(d, c, num_ortho=3),
    "FullRankPreconditioner": lambda d, c: preconditioner(d),
}
TWO_DIMENSIONS = {
    "AffineCouplings",
    "ChainHead",
    "ChainHead (mean-field)",
    "ChainHead (skewed)",
    "DiagonalPrecisionHead",
    "CovarianceHead",
    "CovarianceHead (marginals)",
    "CovarianceHead (skewed)",
    "DirectedCouplings",
    "FullPrecisionHead",
    "FullPrecisionHead (skewed)",
    "ItemCouplings",
    "ItemCouplings (one item)",
    "LeafPreconditioner",
    "MultilevelHead",
    "NonCentering",
    "LinearPredictorHead",
    "LinearPredictorHead (marginals)",
    "SplineCouplings",
}
IGNORE_CONTEXT = {
    "ChainHead",
    "ChainHead (mean-field)",
    "ChainHead (skewed)",
    "MultilevelHead",
    "DiagonalPrecisionHead",
    "CovarianceHead",
    "CovarianceHead (marginals)",
    "CovarianceHead (skewed)",
    "FullPrecisionHead",
    "FullPrecisionHead (skewed)",
    "FullRankPreconditioner",
    "ItemCouplings",
    "ItemCouplings (one item)",
    "Leading",
    "LeafPreconditioner",
    "LowRankPreconditioner",
    "NonCentering",
    "Permutation",
    "LinearPredictorHead",
    "LinearPredictorHead (marginals)",
    "PyroTransform",
}
CASES = [
    pytest.param(name, input_dim, context_dim, id=f"{name}-{input_dim}d" + ("-context" if context_dim else ""))
    for name in TRANSFORMS
    for input_dim in (1, 2, 5)
    for context_dim in (0, 3)
    if input_dim >= (2 if name in TWO_DIMENSIONS else 1)
]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(name: str, input_dim: int, context_dim: int) -> tuple[FlowTransform, Tensor, Tensor | None]:
    """A transform with random parameters, a batch of inputs and a context for each."""
    transform = TRANSFORMS[name](input_dim, context_dim)
    with torch.no_grad():
        for parameter in trained(transform):
            parameter.add_(0.15 * torch.randn_like(parameter))
    context = torch.randn(6, transform.context_dim) if transform.context_dim else None
    return transform, torch.randn(6, input_dim), context


def batch_jacobian(y: Tensor, x: Tensor) -> Tensor:
    """``(batch, D, D)`` for a map that acts on every row by itself."""
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(y.shape[-1])]
    return torch.stack(rows, -2)


@pytest.mark.parametrize("name, input_dim, context_dim", CASES)
def test_ladj_is_that_of_the_map(name: str, input_dim: int, context_dim: int) -> None:
    transform, x, context = make(name, input_dim, context_dim)
    x.requires_grad_()
    y, ladj = transform.forward_and_ladj(x, context)
    assert y.shape == x.shape
    assert ladj.shape == x.shape[:-1]
    expected = torch.linalg.slogdet(batch_jacobian(y, x)).logabsdet
    torch.testing.assert_close(ladj.detach(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name, input_dim, context_dim", CASES)
def test_inverse(name: str, input_dim: int, context_dim: int) -> None:
    transform, x, context = make(name, input_dim, context_dim)
    y, ladj = transform.forward_and_ladj(x, context)
    if not transform.has_inverse:
        with pytest.raises(NotImplementedError, match="has_inverse"):
            transform.inverse_and_ladj(y, context)
        return
    y = y.detach().requires_grad_()
    back, inverse_ladj = transform.inverse_and_ladj(y, context)
    torch.testing.assert_close(back.detach(), x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(inverse_ladj.detach(), -ladj.detach(), rtol=1e-6, atol=1e-6)
    # Gradients through the inverse are right too, and in the log-determinant's sign.
    expected = torch.linalg.slogdet(batch_jacobian(back, y)).logabsdet
    torch.testing.assert_close(inverse_ladj.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name, input_dim, context_dim", CASES)
def test_score_and_graph(name: str, input_dim: int, context_dim: int) -> None:
    transform, x, context = make(name, input_dim, context_dim)
    if not getattr(transform, "has_score", True):
        pytest.skip("has no score")
    x = x.requires_grad_() * 1.0  # A layer's input is the output of the one before, not a leaf.
    score = torch.randn_like(x).detach()
    y, ladj, score_y = transform.forward_with_score(x, score, context)
    assert not score_y.requires_grad
    gradient = torch.zeros_like(x)
    if ladj.requires_grad:
        (gradient,) = torch.autograd.grad(ladj.sum(), x, retain_graph=True, allow_unused=True, materialize_grads=True)
    right = (score - gradient).unsqueeze(-1)
    expected = torch.linalg.solve(batch_jacobian(y, x).mT, right).squeeze(-1)
    torch.testing.assert_close(score_y, expected, rtol=1e-7, atol=1e-7)

    # The map, and its gradient in the parameters, are those of the plain call.
    y_plain, ladj_plain = transform.forward_and_ladj(x, context)
    torch.testing.assert_close(y, y_plain)
    torch.testing.assert_close(ladj, ladj_plain)
    parameters = trained(transform)
    if parameters:
        weight = torch.randn_like(y)
        found = torch.autograd.grad((weight * y).sum() + ladj.sum(), parameters)
        plain = torch.autograd.grad((weight * y_plain).sum() + ladj_plain.sum(), parameters)
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name, input_dim, context_dim", CASES)
def test_every_parameter_learns(name: str, input_dim: int, context_dim: int) -> None:
    transform, x, context = make(name, input_dim, context_dim)
    y, ladj = transform.forward_and_ladj(x, context)
    loss = (torch.randn_like(y) * y).sum() + (torch.randn_like(ladj) * ladj).sum()
    if not trained(transform):
        return
    loss.backward()
    for parameter in trained(transform):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name, input_dim, context_dim", CASES)
def test_float32_and_copies(name: str, input_dim: int, context_dim: int) -> None:
    transform, x, context = make(name, input_dim, context_dim)
    y, ladj = transform.forward_and_ladj(x, context)
    for module in transform.modules():
        kept = [key for key, value in vars(module).items() if isinstance(value, Tensor) and value.grad_fn is not None]
        assert not kept, (type(module).__name__, kept)
    copies = [copy.deepcopy(transform), pickle.loads(pickle.dumps(transform)), TRANSFORMS[name](input_dim, context_dim)]
    copies[-1].load_state_dict(transform.state_dict())
    for other in copies:
        torch.testing.assert_close(other.forward_and_ladj(x, context), (y, ladj), rtol=0.0, atol=0.0)

    single = copies[0].float()
    y_single, ladj_single = single.forward_and_ladj(x.float(), None if context is None else context.float())
    assert y_single.dtype == ladj_single.dtype == torch.float32
    torch.testing.assert_close(y_single.double(), y, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ladj_single.double(), ladj, rtol=1e-3, atol=1e-3)
    if single.has_inverse:
        back, _ = single.inverse_and_ladj(y_single, None if context is None else context.float())
        assert back.dtype == torch.float32
        # In y, since where the map is flat a rounding of y is a long way in x.
        again, _ = single.forward_and_ladj(back, None if context is None else context.float())
        torch.testing.assert_close(again, y_single, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch_shape", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_batch_shapes(name: str, context_dim: int, batch_shape: tuple[int, ...]) -> None:
    transform, _, _ = make(name, 3, context_dim)
    x = torch.randn(*batch_shape, 3)
    context = torch.randn(transform.context_dim) if transform.context_dim else None  # One for the whole batch.
    y, ladj = transform.forward_and_ladj(x, context)
    assert y.shape == (*batch_shape, 3)
    assert ladj.shape == batch_shape
    if context is None:
        return
    full = context.expand(*batch_shape, transform.context_dim)
    torch.testing.assert_close(transform.forward_and_ladj(x, full), (y, ladj))
    if name not in IGNORE_CONTEXT:
        assert not torch.equal(transform.forward_and_ladj(x, context + 1.0)[0], y)
