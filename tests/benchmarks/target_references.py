# SPDX-License-Identifier: Apache-2.0
"""Log evidence and moments of the targets, without the library: by closed forms, quadrature and annealing.

All in float64. ``REFERENCES`` says how each is made; ``targets.py`` compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from target_models import (
    bym2,
    cox,
    cox_whitened,
    crossed,
    gp_classification,
    gp_counts,
    gp_regression,
    horseshoe,
    item_response,
    kernel,
    logistic,
    lorenz_bridge,
    mixture,
    modes,
    one_factor,
    random_walk,
    sparse_logistic,
    volatility,
    volatility_walk,
)
from torch import Tensor
from torch.distributions import biject_to
from torch.func import grad_and_value, hessian, vmap

__all__ = ["AT_ANY_SIZE", "REFERENCES", "Reference"]


class Reference(NamedTuple):
    """What a posterior is.

    Args:
        log_evidence: In nats.
        se: Its standard error, 0 for a closed form.
        moments: Site -> mean and sd, of the site's shape, in the model's own coordinates; of some sites, or of none.
        source: How they were computed.
    """

    log_evidence: float
    se: float
    moments: Mapping[str, tuple[Tensor, Tensor]]
    source: str


@contextmanager
def double() -> Iterator[None]:
    """New tensors are float64, and nothing is validated, which batches of draws do not allow."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.double)
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        torch.set_default_dtype(dtype)


def to_double(value: Any) -> Any:
    """Floating tensors in float64, the rest as it is."""
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


class Joint:
    """Log joint of a model over one vector of unconstrained latents.

    Args:
        model: A Pyro model.
        args: What it is called with.
    """

    def __init__(self, model: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._model, self._args = model, tuple(map(to_double, args))
        with InitMessenger(init_to_median):
            trace = poutine.block(poutine.trace(model).get_trace)(*self._args)
        nodes = {name: trace.nodes[name] for name in trace.stochastic_nodes if not is_plate(trace.nodes[name])}
        self._maps = {name: biject_to(node["fn"].support) for name, node in nodes.items()}
        init = {name: self._maps[name].inv(node["value"]) for name, node in nodes.items()}
        self._shapes = {name: value.shape for name, value in init.items()}
        self.init = torch.cat([value.reshape(-1) for value in init.values()]).detach()
        self.dim = len(self.init)

    def _split(self, packed: Tensor) -> dict[str, Tensor]:
        parts = packed.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def __call__(self, packed: Tensor) -> Tensor:
        """``(D,)`` -> log density ``()``."""
        values = self.constrain(packed)
        log_det = sum(self._maps[k].log_abs_det_jacobian(z, values[k]).sum() for k, z in self._split(packed).items())
        return poutine.trace(poutine.condition(self._model, values)).get_trace(*self._args).log_prob_sum() + log_det

    def constrain(self, packed: Tensor) -> dict[str, Tensor]:
        """``(D,)`` -> values of the sites."""
        return {name: self._maps[name](value) for name, value in self._split(packed).items()}


def is_plate(node: Mapping[str, Any]) -> bool:
    """Whether a site of a trace is a plate's."""
    return type(node["fn"]).__name__ == "_Subsample"


def climb(joint: Joint | Filtered, start: Tensor) -> tuple[Tensor, Tensor]:
    """The mode above ``start``, ``(D,)``, and a Cholesky factor of the inverse Hessian there, ``(D, D)``."""
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([point], max_iter=2000, history_size=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -joint(point)
        value.backward()
        return value

    optimizer.step(loss)
    mode = point.detach()
    precision = -hessian(joint)(mode)
    values, vectors = torch.linalg.eigh((precision + precision.mT) / 2)
    root = vectors / values.clamp(min=1e-2).sqrt()
    factor = torch.linalg.qr(root.mT).R.mT  # of R R^T, whose condition number is the square of R's
    return mode, factor * factor.diagonal().sign()


def log_mean(log_weights: Tensor) -> tuple[float, float]:
    """log of the mean weight, and its standard error."""
    log_evidence = log_weights.logsumexp(0) - math.log(len(log_weights))
    relative = (log_weights - log_evidence).exp()
    return log_evidence.item(), relative.std().item() / math.sqrt(len(log_weights))


# Few dimensions


def draw_weighted(joint: Joint | Filtered, starts: int, draws: int) -> tuple[Tensor, Tensor]:
    """Draws ``(S, D)`` of a mixture of Student-t distributions at the modes, and their log weights ``(S,)``."""
    found: list[tuple[Tensor, Tensor]] = []
    for start in [joint.init, *(2 * torch.randn(starts, joint.dim))]:
        try:
            mode, factor = climb(joint, start)
        except RuntimeError:  # where it is flat
            continue
        if joint(mode).isfinite() and all((mode - other).norm() > 0.1 for other, _ in found):
            found.append((mode, factor))
    locs, factors = (torch.stack(parts) for parts in zip(*found, strict=True))
    mass = vmap(joint)(locs) + factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    keep = mass > mass.max() - 10
    components = dist.MultivariateStudentT(torch.tensor(5.0), locs[keep], 1.1 * factors[keep])
    proposal = dist.MixtureSameFamily(dist.Categorical(logits=mass[keep]), components)
    packed = proposal.sample(torch.Size((draws,)))
    return packed, vmap(joint, chunk_size=500)(packed) - proposal.log_prob(packed)


def weighted_moments(values: Mapping[str, Tensor], weights: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Means and sds by weights ``(S,)`` that sum to 1, of values ``(S, ...)``."""
    moments = {}
    for name, value in values.items():
        mean = torch.tensordot(weights, value, 1)
        moments[name] = (mean, torch.tensordot(weights, (value - mean).square(), 1).sqrt())
    return moments


def integrate(model: Callable[..., None], args: tuple[Any, ...], starts: int = 10, draws: int = 20_000) -> Reference:
    """Importance sampling of all latents, which are few."""
    joint = Joint(model, args)
    packed, log_weights = draw_weighted(joint, starts, draws)
    moments = weighted_moments(vmap(joint.constrain)(packed), log_weights.softmax(0))
    return Reference(*log_mean(log_weights), moments, "importance sampling at all modes")


class Filtered:
    """Log joint of the parameters of stochastic volatility, whose daily states are summed out on a grid.

    Args:
        returns: The data, ``(T,)``.
        side: Number of points of the grid.
        width: Its half width, in sds of a state.
    """

    dim = 3

    def __init__(self, returns: Tensor, side: int = 300, width: float = 5.0) -> None:
        self._returns, self._width = returns.double(), width
        self._unit = torch.linspace(-1.0, 1.0, side, dtype=torch.double)
        self.init = torch.tensor([0.0, 3.0, -1.5], dtype=torch.double)

    def __call__(self, packed: Tensor) -> Tensor:
        """``(3,)`` -> log density ``()``."""
        mean, share, scale = self.constrain(packed).values()
        persistence = 2 * share - 1
        prior = dist.Cauchy(0.0, 5.0).log_prob(mean) + dist.Beta(20.0, 1.5).log_prob(share)
        prior = prior + dist.HalfCauchy(2.0).log_prob(scale) + share.log() + (1 - share).log() + packed[2]
        sd = scale / (1 - persistence**2).sqrt()
        grid = self._width * sd * self._unit
        step = self._width * sd * (self._unit[1] - self._unit[0])
        moves = dist.Normal(persistence * grid.unsqueeze(-1), scale).log_prob(grid).softmax(-1)
        mass, total = dist.Normal(0.0, sd).log_prob(grid).exp() * step, prior
        for observed in self._returns:
            mass = mass * dist.Normal(0.0, ((mean + grid) / 2).exp()).log_prob(observed).exp()
            total = total + mass.sum().log()
            mass = mass / mass.sum() @ moves
        return total

    def constrain(self, packed: Tensor) -> dict[str, Tensor]:
        """``(3,)`` -> values of the parameters."""
        return {"mean": packed[0], "persistence": packed[1].sigmoid(), "scale": packed[2].exp()}


def integrate_series(returns: Tensor) -> Reference:
    """Importance sampling of the parameters of stochastic volatility; of a long series, by few draws."""
    joint = Filtered(returns)
    packed, log_weights = draw_weighted(joint, 0, max(400, 400_000 // len(returns)))
    moments = weighted_moments(vmap(joint.constrain)(packed), log_weights.softmax(0))
    return Reference(*log_mean(log_weights), moments, "filtering on a grid")


class Linear(NamedTuple):
    """Observations that are linear in normal latents: ``y = offset + design @ z + sd * noise``.

    Args:
        offset: ``(N,)``.
        covariance: Of the latents, whose mean is 0, ``(D, D)``.
        design: ``(N, D)``.
        sd: Of the noise, ``()``.
        y: ``(N,)``.
    """

    offset: Tensor
    covariance: Tensor
    design: Tensor
    sd: Tensor
    y: Tensor


def integrate_scales(
    linear: Callable[..., Linear],
    args: tuple[Any, ...],
    name: Callable[[Tensor], dict[str, Tensor]],
    starts: int = 3,
    draws: int = 4000,
) -> Reference:
    """Importance sampling of the few latents given which the others are normal; these are summed out.

    Args:
        linear: A model of the few, which returns the rest.
        args: What it is called with.
        name: Splits ``(..., D)``, the normal latents, into sites.
        starts: Random points from which modes are looked for.
        draws: Number of draws.
    """

    def collapsed(*args: Any) -> None:
        offset, covariance, design, sd, y = linear(*args)
        total = design @ covariance @ design.mT + sd**2 * torch.eye(len(y))
        pyro.sample("y", dist.MultivariateNormal(offset, total), obs=y)

    args = tuple(map(to_double, args))
    joint = Joint(collapsed, args)
    packed, log_weights = draw_weighted(joint, starts, draws)
    weights = log_weights.softmax(0)
    theta = vmap(joint.constrain)(packed)

    def conditional(theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and sd of the normal latents."""
        offset, covariance, design, sd, y = pyro.condition(linear, data=theta)(*args)
        precision = torch.linalg.inv(covariance) + design.mT @ design / sd**2
        inverse = torch.linalg.inv(precision)
        return inverse @ (design.mT @ (y - offset)) / sd**2, inverse.diagonal().sqrt()

    rows = weights.multinomial(1000, replacement=True)
    means, sds = vmap(conditional, chunk_size=100)({site: value[rows] for site, value in theta.items()})
    mean, sd = name(means.mean(0)), name((means.var(0) + sds.square().mean(0)).sqrt())
    moments = weighted_moments(theta, weights) | {site: (mean[site], sd[site]) for site in mean}
    return Reference(*log_mean(log_weights), moments, "quadrature over the scales, the rest summed out")


def gp_linear(x: Tensor, y: Tensor) -> Linear:
    """``gp_regression`` without the function."""
    length = pyro.sample("length", dist.LogNormal(-1.0, 0.5))
    amplitude = pyro.sample("amplitude", dist.LogNormal(0.0, 0.5))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    return Linear(torch.zeros(len(x)), kernel(x, length, amplitude), torch.eye(len(x)), sigma, y)


def crossed_linear(a: Tensor, b: Tensor, y: Tensor) -> Linear:
    """``crossed`` without the effects."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    sd_a = pyro.sample("sd_a", dist.HalfNormal(1.0))
    sd_b = pyro.sample("sd_b", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    one_a, one_b = torch.nn.functional.one_hot(a).double(), torch.nn.functional.one_hot(b).double()
    variances = torch.cat([sd_a**2 * torch.ones(one_a.shape[1]), sd_b**2 * torch.ones(one_b.shape[1])])
    return Linear(mean * torch.ones(len(y)), variances.diag_embed(), torch.cat([one_a, one_b], -1), sigma, y)


def walk_linear(y: Tensor, times: list[int]) -> Linear:
    """``random_walk`` without the path."""
    innovation = pyro.sample("innovation", dist.LogNormal(0.0, 2.0))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 2.0))
    step = torch.arange(1.0, 31.0)
    covariance = innovation**2 * torch.minimum(step, step.unsqueeze(-1))
    return Linear(torch.zeros(len(times)), covariance, torch.eye(30)[times], noise, y[times])


def factor_linear(y: Tensor) -> Linear:
    """``one_factor`` without the scores."""
    loadings = pyro.sample("loadings", dist.Normal(0.0, 1.0).expand([y.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    design = torch.kron(torch.eye(len(y)), loadings.unsqueeze(-1))
    return Linear(torch.zeros(y.numel()), torch.eye(len(y)), design, sigma, y.reshape(-1))


def split_effects(num_a: int) -> Callable[[Tensor], dict[str, Tensor]]:
    """Sites of ``(..., D)``, the effects of :func:`crossed_linear`, of which ``num_a`` are of the first factor."""
    return lambda z: {"effect_a": z[..., :num_a], "effect_b": z[..., num_a:]}


def split_path(z: Tensor) -> dict[str, Tensor]:
    """Sites of ``(..., D)``, the path of :func:`walk_linear`."""
    return {f"x_{t}": value for t, value in enumerate(z.unbind(-1))}


def normal_modes(weights: Tensor, locs: Tensor, sds: Tensor) -> Reference:
    """Product of a normal prior, sd 10, and a normal mixture, in closed form."""
    weights, locs, sds = weights.double(), locs.double(), sds.double()
    mass = weights.log() + dist.Normal(0.0, (sds.square() + 100).sqrt()).to_event(1).log_prob(locs)
    variances = 1 / (1 / sds.square() + 1 / 100)
    means = variances * locs / sds.square()
    share = mass.softmax(0)
    mean = share @ means
    sd = (share @ (variances + means.square()) - mean.square()).sqrt()
    return Reference(mass.logsumexp(0).item(), 0.0, {"z": (mean, sd)}, "closed form")


# Gaussian processes with another likelihood


def integrate_gp(log_likelihood: Callable[[Tensor], Tensor], x: Tensor, side: int = 24, draws: int = 400) -> Reference:
    """Quadrature over length scale and amplitude; at each node, importance sampling from Laplace's approximation.

    Args:
        log_likelihood: Values of the function ``(..., N)`` -> log likelihood of each, ``(..., N)``.
        x: ``(N,)``.
        side: Nodes of each axis: prior mean +- 4 prior sds.
        draws: Number of draws of a node.
    """
    x = x.double()
    axis = torch.linspace(-4.0, 4.0, side)
    prior = dist.Normal(0.0, 1.0).log_prob(axis) + math.log(8 / (side - 1))
    nodes, log_weights, means, squares, errors = [], [], [], [], []
    slope = grad_and_value(lambda f: log_likelihood(f).sum())
    for i in range(side):
        for j in range(side):
            length, amplitude = (-1 + 0.5 * axis[i]).exp(), (0.5 * axis[j]).exp()
            factor = torch.linalg.cholesky(kernel(x, length, amplitude))
            u = torch.zeros(len(x))
            for _ in range(50):  # Newton's method on f = factor @ u, damped
                gradient = slope(factor @ u)[0]
                curvature = -hessian_diagonal(log_likelihood, factor @ u)
                precision = torch.eye(len(x)) + factor.mT @ (curvature.unsqueeze(-1) * factor)
                step = torch.linalg.solve(precision, factor.mT @ gradient - u)
                u = u + step * min(1.0, 5.0 / step.norm().item())
                if step.norm() < 1e-6:
                    break
            laplace = dist.MultivariateNormal(u, precision_matrix=precision)
            draw = laplace.sample((draws,))
            f = draw @ factor.mT
            ratio = dist.Normal(0.0, 1.0).log_prob(draw).sum(-1) + log_likelihood(f).sum(-1) - laplace.log_prob(draw)
            log_weight, error = log_mean(ratio)
            nodes.append(torch.stack([length, amplitude]))
            log_weights.append(log_weight + prior[i] + prior[j])
            errors.append(error)
            means.append(ratio.softmax(0) @ f)
            squares.append(ratio.softmax(0) @ f.square())
    total = torch.stack(log_weights)
    share = total.softmax(0)
    theta = torch.stack(nodes)
    moments = weighted_moments({"length": theta[:, 0], "amplitude": theta[:, 1]}, share)
    mean = share @ torch.stack(means)
    moments["f"] = (mean, (share @ torch.stack(squares) - mean.square()).sqrt())
    error = (share * torch.tensor(errors)).norm().item()
    return Reference(total.logsumexp(0).item(), error, moments, "quadrature over the scales, sampling within")


def hessian_diagonal(log_likelihood: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
    """Second derivatives of terms that each depend on one coordinate, ``(N,)``."""
    f = f.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_likelihood(f).sum(), f, create_graph=True)
    return torch.autograd.grad(gradient.sum(), f)[0]


# Many dimensions


def anneal(
    model: Callable[..., None], args: tuple[Any, ...], particles: int = 64, temperatures: int = 400, leapfrogs: int = 4
) -> Reference:
    """Annealed importance sampling from Laplace's approximation to the posterior, by Hamiltonian Monte Carlo.

    Neal. Annealed Importance Sampling. Statistics and Computing 11, 2001.
    """
    joint = Joint(model, args)
    mode, factor = climb(joint, joint.init)
    log_det = factor.diagonal().log().sum()

    def ratio(u: Tensor) -> Tensor:
        """Log density of the posterior over that of the approximation, in coordinates where that is standard normal."""
        return joint(mode + factor @ u) + log_det + 0.5 * u.square().sum() + 0.5 * joint.dim * math.log(2 * math.pi)

    gradients = vmap(grad_and_value(ratio), chunk_size=64)
    u = torch.randn(particles, joint.dim)
    slope, value = gradients(u)
    log_weights, step = torch.zeros(particles), joint.dim**-0.25
    powers = torch.linspace(0.0, 1.0, temperatures + 1).tolist()
    for before, power in pairwise(powers):
        log_weights = log_weights + (power - before) * value
        momentum = torch.randn_like(u)
        energy = power * value - 0.5 * u.square().sum(-1) - 0.5 * momentum.square().sum(-1)
        new, new_slope, new_value = u, slope, value
        for _ in range(leapfrogs):
            momentum = momentum + 0.5 * step * (power * new_slope - new)
            new = new + step * momentum
            new_slope, new_value = gradients(new)
            momentum = momentum + 0.5 * step * (power * new_slope - new)
        gain = power * new_value - 0.5 * new.square().sum(-1) - 0.5 * momentum.square().sum(-1) - energy
        accepted = torch.rand(particles).log() < gain
        keep = accepted.unsqueeze(-1)
        u, slope, value = u.where(~keep, new), slope.where(~keep, new_slope), value.where(~accepted, new_value)
        step *= 1.05 if gain.clamp(max=0).exp().nan_to_num().mean() > 0.8 else 0.95
    return Reference(*log_mean(log_weights), {}, "annealed importance sampling")


# Of a model's arguments, by the model.
REFERENCES: dict[Callable[..., None], Callable[..., Reference]] = {
    logistic: lambda *args: anneal(logistic, args),
    sparse_logistic: lambda *args: anneal(sparse_logistic, args),
    horseshoe: lambda x, y, centered: anneal(horseshoe, (x, y, False)),
    cox: lambda *args: anneal(cox_whitened, args),
    cox_whitened: lambda *args: anneal(cox_whitened, args),
    volatility: integrate_series,
    volatility_walk: lambda *args: anneal(volatility_walk, args),
    item_response: lambda *args: anneal(item_response, args),
    bym2: lambda *args: anneal(bym2, args),
    lorenz_bridge: lambda *args: anneal(lorenz_bridge, args),
    gp_regression: lambda *args: integrate_scales(gp_linear, args, lambda z: {"f": z}),
    gp_classification: lambda x, y: integrate_gp(lambda f: dist.Bernoulli(logits=f).log_prob(y.double()), x),
    gp_counts: lambda x, y: integrate_gp(lambda f: dist.Poisson((1 + f).exp()).log_prob(y.double()), x),
    crossed: lambda a, b, y: integrate_scales(crossed_linear, (a, b, y), split_effects(int(a.max()) + 1)),
    random_walk: lambda *args: integrate_scales(walk_linear, args, split_path, draws=20_000),
    one_factor: lambda y: integrate_scales(factor_linear, (y,), lambda z: {"score": z}, starts=10),
    mixture: lambda y: integrate(mixture, (y,), starts=60),
    modes: normal_modes,
}
# Those whose reference takes a minute or so for large data too.
AT_ANY_SIZE = {volatility}
