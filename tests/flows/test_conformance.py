# SPDX-License-Identifier: Apache-2.0
"""Every registered family, with and without a context, 1-D to 50-D, in both dtypes, at random parameters."""

from __future__ import annotations

import copy
import io
import pickle

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows import flows
from pyro_flows.flows import Flow, FlowSpec
from tests.common import assert_no_graph, jacobian, randomize_parameters, trained

DTYPES = (torch.float32, torch.float64)
# For log densities of a few coordinates; float32 sums over 50 coordinates get proportionally more.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-9}

# Other bases under a flow that has everything, one with a context in each part, one without layers, one that inverts in
# many passes, and one that does not invert.
BASES = [
    f"{name}/{base}"
    for name in ("auto", "spline_coupling", "diagonal_normal", "iaf", "neural_autoregressive")
    for base in ("student_t", "mixture")
]
families = pytest.mark.parametrize("name", [*flows.names(), *BASES])
context_dims = pytest.mark.parametrize("context_dim", (0, 3))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "float64"))


def _spec(name: str) -> FlowSpec:
    family, _, base = name.partition("/")
    return flows.get(family, base=base) if base else flows.get(family)


def _tolerance(dtype: torch.dtype, input_dim: int) -> float:
    return TOLERANCE[dtype] * max(1.0, input_dim / 5.0)


def _build(name: str, input_dim: int, context_dim: int, dtype: torch.dtype = torch.float32) -> tuple[FlowSpec, Flow]:
    spec = _spec(name)
    flow = spec.build(input_dim, context_dim).to(dtype)
    randomize_parameters(flow)
    return spec, flow


def _context(flow: Flow, *batch_shape: int) -> Tensor | None:
    reference = flow.head.raw.value
    return torch.randn(*batch_shape, flow.context_dim, dtype=reference.dtype) if flow.context_dim else None


def _small_dim(name: str) -> int:
    return max(2, _spec(name).min_dim)


@families
@context_dims
@dtypes
@pytest.mark.parametrize("input_dim", (1, 2, 5, 50))
def test_density(name: str, context_dim: int, dtype: torch.dtype, input_dim: int) -> None:
    """Shapes and dtype; log_prob of an own draw against autograd's Jacobian; the same at a value given from outside."""
    if input_dim < _spec(name).min_dim:
        with pytest.raises(ValueError, match=f"expected input_dim >= .*but got {input_dim}"):
            _spec(name).build(input_dim, context_dim)
        return
    spec, flow = _build(name, input_dim, context_dim, dtype)
    assert flow.transform.has_inverse == spec.has_inverse
    context = _context(flow)
    tolerance = _tolerance(dtype, input_dim)

    with torch.no_grad():
        eps = flow(context).base_dist.sample()
        z, ladj = flow.transform.forward_and_ladj(eps, context)
    assert z.shape == eps.shape == (input_dim,)
    assert ladj.shape == ()
    assert z.dtype == ladj.dtype == dtype
    slogdet = torch.linalg.slogdet(jacobian(flow.transform, eps, context)).logabsdet
    torch.testing.assert_close(ladj, slogdet, atol=tolerance, rtol=tolerance)

    with torch.no_grad():
        z, log_prob = flow(context).rsample_and_log_prob((3,))
        assert z.shape == (3, input_dim)
        assert log_prob.shape == (3,)
        assert z.isfinite().all() and log_prob.isfinite().all()
        if spec.has_inverse:
            foreign = flow(context).log_prob(z.clone())
            torch.testing.assert_close(foreign, log_prob, atol=tolerance, rtol=tolerance)
            eps, ladj = flow.transform.inverse_and_ladj(z, context)
            again, minus_ladj = flow.transform.forward_and_ladj(eps, context)
            torch.testing.assert_close(again, z, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(minus_ladj, -ladj, atol=tolerance, rtol=tolerance)
        else:
            with pytest.raises(NotImplementedError, match="inverse"):
                flow(context).log_prob(z.clone())


@families
@context_dims
@pytest.mark.parametrize("batch_shape", ((), (4,), (2, 3)), ids=str)
def test_batch_shapes(name: str, context_dim: int, batch_shape: tuple[int, ...]) -> None:
    """Batch shapes by the context, or by sample_shape without one; each member is what it is alone."""
    _, flow = _build(name, _small_dim(name), context_dim, torch.float64)
    context = _context(flow, *batch_shape)
    sample_shape = () if context_dim else batch_shape
    q = flow(context)
    with torch.no_grad():
        z, log_prob = q.rsample_and_log_prob(sample_shape)
        assert q.batch_shape == (batch_shape if context_dim else ())
        assert q.event_shape == (flow.input_dim,)
        assert z.shape == (*batch_shape, flow.input_dim)
        assert log_prob.shape == batch_shape
        assert q.rsample((5,)).shape == (5, *q.batch_shape, flow.input_dim)
        assert q.log_prob(q.sample((5,))).shape == (5, *q.batch_shape)
        eps = torch.randn(*batch_shape, flow.input_dim, dtype=torch.float64)
        together, _ = flow.transform.forward_and_ladj(eps, context)
        last = (-1,) * len(batch_shape)
        alone, _ = flow.transform.forward_and_ladj(eps[last], None if context is None else context[last])
    torch.testing.assert_close(together[last], alone)


@families
@context_dims
@pytest.mark.parametrize("input_dim", (1, 2, 5))
def test_path_gradient(name: str, context_dim: int, input_dim: int) -> None:
    """The entropy term is log q, and its gradient is (dz/dtheta)^T grad_z log q with grad_z from the full Jacobian."""
    if input_dim < _spec(name).min_dim:
        pytest.skip("below the family's minimum, which test_density checks")
    _, flow = _build(name, input_dim, context_dim, torch.float64)
    context = _context(flow)
    parameters = list(flow.parameters())

    torch.manual_seed(1)
    q = flow(context)
    z = q.rsample()
    parts = q.score_parts(z)
    assert parts.score_function == 0
    torch.testing.assert_close(parts.entropy_term, parts.log_prob)
    path = torch.autograd.grad(parts.entropy_term, parameters, allow_unused=True)

    torch.manual_seed(1)
    base_dist = flow(context).base_dist
    eps = base_dist.rsample().requires_grad_()
    z, ladj = flow.transform.forward_and_ladj(eps, context)
    leaf = eps.detach().requires_grad_()
    (d_base,) = torch.autograd.grad(base_dist.log_prob(leaf), leaf)
    (d_ladj,) = torch.autograd.grad(ladj + 0.0 * eps.sum(), eps, retain_graph=True)
    score = torch.linalg.solve(jacobian(flow.transform, eps, context).mT, d_base - d_ladj)
    expected = torch.autograd.grad((z * score).sum(), parameters, allow_unused=True)
    for (key, _), got, wanted in zip(flow.named_parameters(), path, expected, strict=True):
        got, wanted = (torch.zeros(()) if g is None else g for g in (got, wanted))
        torch.testing.assert_close(
            got, wanted, atol=1e-7, rtol=1e-6, check_dtype=False, msg=lambda message, key=key: f"{key}: {message}"
        )


@families
@context_dims
def test_every_parameter_gets_a_gradient(name: str, context_dim: int) -> None:
    """A finite one that is not zero, of the ordinary ELBO's entropy and of a function of the draw."""
    _, flow = _build(name, max(3, _spec(name).min_dim), context_dim)
    z, log_prob = flow(_context(flow, 4), path_gradient=False).rsample_and_log_prob((16,))
    (log_prob + z.sin().sum(-1)).mean().backward()
    for parameter in trained(flow):
        key = next(name for name, p in flow.named_parameters() if p is parameter)
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


@families
def test_context_matters(name: str) -> None:
    """The same noise lands elsewhere under another context, also with the head's part taken out."""
    _, flow = _build(name, _small_dim(name), 3)
    eps = torch.randn(flow.input_dim)
    with torch.no_grad():
        first, second = (flow.transform.forward_and_ladj(eps, torch.full((3,), value))[0] for value in (-1.0, 1.0))
        assert (first - second).abs().max() > 1e-3
        for layer in flow.transform.parts[:-1]:
            if any(True for _ in layer.parameters()):
                first, second = (layer.forward_and_ladj(eps, torch.full((3,), value))[0] for value in (-1.0, 1.0))
                assert (first - second).abs().max() > 1e-6, type(layer).__name__


@families
@context_dims
@pytest.mark.parametrize("input_dim", (1, 5))
def test_identity_start(name: str, context_dim: int, input_dim: int) -> None:
    """A fresh flow is the normal that its head was set to."""
    spec = _spec(name)
    if not spec.identity_start or input_dim < spec.min_dim or spec.base != "normal":
        pytest.skip("no identity start, below the family's minimum, or not a normal")
    flow = spec.build(input_dim, context_dim).double()
    loc, scale = torch.randn(input_dim).double(), torch.rand(input_dim).double() + 0.1
    flow.head.initialize(loc, scale)
    with torch.no_grad():
        z, log_prob = flow(_context(flow, 4)).rsample_and_log_prob((5,))
    normal = dist.Normal(loc, scale).to_event(1)
    # Starts are set in float32, whose rounding stays.
    torch.testing.assert_close(log_prob, normal.log_prob(z), atol=1e-5, rtol=1e-5)


@families
@context_dims
def test_copies_and_state(name: str, context_dim: int) -> None:
    """After drawing: no graph is kept, deep copies and pickles draw the same, and so does a loaded state."""
    _, flow = _build(name, _small_dim(name), context_dim)
    context = _context(flow, 2)
    for _ in range(2):
        q = flow(context)
        q.score_parts(q.rsample((3,))).entropy_term.sum().backward()
        assert_no_graph(flow)

    other = _spec(name).build(flow.input_dim, context_dim)
    buffer = io.BytesIO()
    torch.save(flow.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    outcomes = []
    for twin in (flow, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), other):
        torch.manual_seed(7)
        with torch.no_grad():
            outcomes.append(twin(context).rsample_and_log_prob((5,)))
    for z, log_prob in outcomes[1:]:
        assert torch.equal(z, outcomes[0][0])
        assert torch.equal(log_prob, outcomes[0][1])


@families
def test_spec_is_data(name: str) -> None:
    """Specs compare, hash, print and pickle."""
    spec = _spec(name)
    assert spec == _spec(name) == pickle.loads(pickle.dumps(spec))
    assert hash(spec) == hash(_spec(name))
    assert repr(spec).startswith(type(spec).__name__)
