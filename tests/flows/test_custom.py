# SPDX-License-Identifier: Apache-2.0
"""A user's own transforms: adapted, checked, refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_flows import AutoFlowGuide, flows
from pyro_flows.flows.resolve import resolve
from pyro_flows.transforms import Permutation, Planar, PyroTransform
from tests.common import assert_no_graph, jacobian, randomize_parameters

RIGHT: dict[str, Callable[[int], Any]] = {
    "affine_autoregressive": T.affine_autoregressive,
    "affine_coupling": T.affine_coupling,
    "iterated": lambda d: T.iterated(2, partial(T.affine_autoregressive, d)),
    "planar": T.planar,
    "radial": T.radial,
    "householder": partial(T.householder, count_transforms=2),
    "spline": T.spline,
    "spline_autoregressive": T.spline_autoregressive,
    "spline_coupling": T.spline_coupling,
    "neural_autoregressive": T.neural_autoregressive,
    "block_autoregressive": partial(T.block_autoregressive, residual="gated"),
    "polynomial": T.polynomial,
    "mixed": lambda d: [T.affine_autoregressive(d), T.permute(d), Planar(d), T.ComposeTransform([T.planar(d)])],
    "plain": lambda d: T.AffineTransform(torch.arange(d, dtype=torch.float32), torch.full((d,), -2.0)),
    "independent": lambda d: T.IndependentTransform(T.spline(d), 1, cache_size=1),
    "inverse": lambda d: T.affine_autoregressive(d).inv,
    "inverse of several": lambda d: T.ComposeTransform([T.affine_autoregressive(d), T.spline(d)]).inv,
}


@pytest.mark.parametrize("function", RIGHT.values(), ids=RIGHT)
def test_density(function: Callable[[int], Any]) -> None:
    """The density is that of autograd's Jacobian; nothing is cached; copies draw the same; all parameters learn."""
    flow = resolve(function).build(4)
    randomize_parameters(flow, 0.2)
    for part in flow.transform.parts[:-1]:
        assert part.input_dim == 4
    eps = torch.randn(4)
    _, ladj = flow.transform.forward_and_ladj(eps)
    slogdet = torch.linalg.slogdet(jacobian(flow.transform, eps)).logabsdet
    torch.testing.assert_close(ladj, slogdet, atol=2e-3, rtol=2e-3)

    z, log_prob = flow().rsample_and_log_prob((6,))
    assert log_prob.shape == (6,)
    (log_prob + z.sin().sum(-1)).mean().backward()
    for key, parameter in flow.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    assert_no_graph(flow)
    draws = []
    for twin in (flow, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.manual_seed(7)
        draws.append(twin().rsample((3,)))
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    if flow.transform.has_inverse:
        z = z.detach().clone()
        torch.testing.assert_close(flow().log_prob(z), log_prob.detach(), atol=5e-3, rtol=5e-3)
    else:
        with pytest.raises(NotImplementedError, match=r"^\w+: expected an inverse"):
            flow().log_prob(z.detach().clone())


def test_stale_log_determinant_is_not_used() -> None:
    """Pyro's NeuralAutoregressive answers with the last call's log-determinant; wrapped, it answers with its own."""
    transform = T.neural_autoregressive(3)
    x, other = torch.randn(4, 3), torch.randn(4, 3)
    y = transform(x)
    right = transform.log_abs_det_jacobian(x, y).detach().clone()
    transform(other)
    assert not torch.allclose(transform.log_abs_det_jacobian(x, y), right)  # the pin of Pyro's defect
    wrapped = PyroTransform(transform, 3)
    wrapped.forward_and_ladj(other)
    torch.testing.assert_close(wrapped.forward_and_ladj(x)[1], right)


def test_gradients_are_ordinary() -> None:
    """Foreign parts have no score, so the entropy term is the ordinary, differentiable density."""
    flow = resolve(T.affine_autoregressive).build(3)
    assert not flow.transform.has_score
    q = flow()
    z = q.rsample((2,))
    parts = q.score_parts(z)
    assert parts.entropy_term is parts.log_prob
    own = resolve(lambda d: [Planar(d), Permutation(d)]).build(3)
    assert own.transform.has_score


def test_permutation_is_saved() -> None:
    """Pyro's Permute loses its permutation on save; here it travels."""
    first, second = (flows.CustomFlow(function=T.permute).build(30) for _ in range(2))
    eps = torch.randn(30)
    assert "permutation" not in str(list(T.ComposeTransformModule([T.permute(30)]).state_dict()))
    assert not torch.equal(first.transform(eps), second.transform(eps))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.transform(eps), second.transform(eps))


def test_plain_tensors_are_saved_and_moved() -> None:
    """Tensors of torch's own transforms are buffers: saved, and moved to another dtype."""
    first = flows.CustomFlow(function=lambda d: T.AffineTransform(torch.randn(d), torch.rand(d) + 0.5)).build(3)
    second = flows.CustomFlow(function=lambda d: T.AffineTransform(torch.randn(d), torch.rand(d) + 0.5)).build(3)
    second.load_state_dict(first.state_dict())
    eps = torch.randn(3)
    assert torch.equal(first.transform(eps), second.transform(eps))
    assert first.double()().rsample().dtype == torch.float64


def test_context_reaches_the_head() -> None:
    """With a context the foreign parts stay as they are and the head follows it."""
    flow = flows.CustomFlow(function=T.planar).build(3, context_dim=2)
    randomize_parameters(flow)
    q = flow(torch.randn(5, 2))
    z, log_prob = q.rsample_and_log_prob((7,))
    assert z.shape == (7, 5, 3) and log_prob.shape == (7, 5)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (T.sylvester, ValueError, r'Sylvester: .*log-determinant.*flow="sylvester"'),
        (T.matrix_exponential, ValueError, r"MatrixExponential: .*truncated.*Use flow="),
        (T.batchnorm, ValueError, r"BatchNorm: .*not a bijection while training.*Leave it out"),
        (lambda d: [T.planar(d), T.sylvester(d)], ValueError, r"Sylvester"),
        (lambda d: 3, TypeError, r"expected a torch.distributions Transform, but got int"),
        (lambda d: [torch.nn.Linear(d, d)], TypeError, r"but got Linear"),
        (lambda d: T.conditional_planar(d, 2), TypeError, r"but got ConditionalPlanar.*unconditional"),
        (lambda d: T.planar(d + 1), ValueError, r"Planar: expected a map of vectors of length 4.*got length 5"),
        (lambda d: T.radial(1), ValueError, r"Radial: expected a map of vectors of length 4.*got length 1"),
        (lambda d: T.affine_autoregressive(d + 1), ValueError, r"AffineAutoregressive: expected .* length 4"),
        (lambda d: T.permute(d + 1), ValueError, r"Permute: expected a map of vectors of length 4.*got length 5"),
        (lambda d: Planar(d + 1), ValueError, r"Planar: expected a map of vectors of length 4.*got length 5"),
        (lambda d: Planar(d, 3), ValueError, r"Planar: expected context_dim=0, but got 3"),
        (lambda d: T.SigmoidTransform(), ValueError, r"SigmoidTransform: expected a bijection of real vectors"),
        (lambda d: T.ExpTransform().inv, ValueError, r"ExpTransform: expected a bijection of real vectors"),
        (lambda d: T.AbsTransform(), ValueError, r"AbsTransform: .*codomain|AbsTransform: .*not bijective"),
        (lambda d: T.CatTransform([T.spline(d)], dim=-1), ValueError, r"holds a Spline that no optimizer would see"),
    ],
)
def test_refused(function: Callable[[int], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flows.CustomFlow(function=function).build(4)


def test_bounded_range_warns() -> None:
    """Pyro's default BlockAutoregressive cannot reach far values."""
    with pytest.warns(UserWarning, match="its range is bounded"):
        flows.CustomFlow(function=T.block_autoregressive).build(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flows.CustomFlow(function=partial(T.block_autoregressive, residual="gated")).build(3)


def test_float64_inverse_of_pyros_iaf_says_why() -> None:
    """Pyro's inverse makes float32 zeros; the error names the transform."""
    flow = flows.CustomFlow(function=T.affine_autoregressive).build(3).double()
    value = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"AffineAutoregressive: expected an inverse.*RuntimeError"):
        flow().log_prob(value)


def test_resolve() -> None:
    assert isinstance(resolve(T.planar), flows.CustomFlow)
    assert resolve("realnvp") == flows.RealNVP()
    spec = flows.PlanarFlow(num_transforms=2)
    assert resolve(spec) is spec
    with pytest.raises(TypeError, match=r"expected flow to be a name.*lambda input_dim"):
        resolve(T.planar(3))
    with pytest.raises(TypeError, match=r"got the class PlanarFlow. Write flow=PlanarFlow\(\)"):
        resolve(flows.PlanarFlow)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected function to be a function, but got 3"):
        flows.CustomFlow(function=3)  # type: ignore[arg-type]


def test_inside_a_guide() -> None:
    """A function as the guide's flow trains under plain SVI."""

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    guide = AutoFlowGuide(model, flow=lambda d: [T.affine_autoregressive(d), T.planar(d)])
    svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step() for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
