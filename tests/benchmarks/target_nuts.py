# SPDX-License-Identifier: Apache-2.0
"""NumPyro's NUTS on the targets, for ``targets.py --nuts``: twins of the models, 4 chains of 1000 + 1000 draws.

As NumPyro's users write them: plates, and scans where a loop over time has no shorter form. In float64, since Gaussian
processes fail in less; chains one after the other on one core. Seconds are CPU seconds of ``MCMC.warmup`` and
``MCMC.run`` in a process that has not compiled them before. Each twin is checked against its Pyro model: their log
joints have to be equal.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro import poutine
from scipy.special import ndtri
from scipy.stats import rankdata
from target_models import Target
from target_references import double, to_double

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")  # one thread; read when XLA is loaded
try:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.diagnostics import effective_sample_size, gelman_rubin
    from numpyro.infer import MCMC, NUTS, init_to_median
    from numpyro.infer.util import log_density
except ImportError as error:
    raise ImportError('targets.py: --nuts needs NumPyro; pip install "pyro-flows[benchmarks]"') from error

CHAINS, WARMUP, DRAWS = 4, 1000, 1000
sample, plate = numpyro.sample, numpyro.plate


def logistic(x: Any, y: Any, prior_sd: float) -> None:
    """Logistic regression."""
    w = sample("w", dist.Normal(jnp.zeros(x.shape[1]), prior_sd).to_event(1))
    b = sample("b", dist.Normal(0.0, prior_sd))
    sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)


def sparse_logistic(x: Any, y: Any) -> None:
    """Gamma scales."""
    scale = sample("scale", dist.Gamma(0.5, 0.5))
    with plate("columns", x.shape[1]):
        scales = sample("scales", dist.Gamma(0.5, 0.5))
        w = sample("w", dist.Normal(0.0, 1.0))
    sample("y", dist.Bernoulli(logits=x @ (scale * scales * w)), obs=y)


def horseshoe(x: Any, y: Any, centered: bool) -> None:
    """Linear regression."""
    sigma = sample("sigma", dist.HalfNormal(1.0))
    intercept = sample("intercept", dist.Normal(0.0, 5.0))
    tau = sample("tau", dist.HalfCauchy(1.0))
    with plate("columns", x.shape[1]):
        scales = sample("scales", dist.HalfCauchy(1.0))
        if centered:
            beta = sample("beta", dist.Normal(0.0, tau * scales))
        else:
            beta = tau * scales * sample("z", dist.Normal(0.0, 1.0))
    sample("y", dist.Normal(intercept + x @ beta, sigma), obs=y)


def cox(counts: Any, factor: Any, mean: float) -> None:
    """Centered."""
    field = sample("field", dist.MultivariateNormal(jnp.full(len(counts), mean), scale_tril=factor))
    sample("counts", dist.Poisson(jnp.exp(field) / len(counts)), obs=counts)


def cox_whitened(counts: Any, factor: Any, mean: float) -> None:
    """Whitened."""
    noise = sample("noise", dist.Normal(0.0, 1.0).expand([len(counts)]).to_event(1))
    sample("counts", dist.Poisson(jnp.exp(mean + factor @ noise) / len(counts)), obs=counts)


def gp_latents(x: Any) -> Any:
    """Values of the process."""
    length = sample("length", dist.LogNormal(-1.0, 0.5))
    amplitude = sample("amplitude", dist.LogNormal(0.0, 0.5))
    squares = jnp.square(x[:, None] - x)
    covariance = amplitude**2 * jnp.exp(-squares / (2 * length**2)) + 1e-4 * jnp.eye(len(x))
    return sample("f", dist.MultivariateNormal(jnp.zeros(len(x)), covariance))


def gp_regression(x: Any, y: Any) -> None:
    """Normal noise."""
    f = gp_latents(x)
    sample("y", dist.Normal(f, sample("sigma", dist.HalfNormal(1.0))), obs=y)


def gp_classification(x: Any, y: Any) -> None:
    """Classes."""
    sample("y", dist.Bernoulli(logits=gp_latents(x)), obs=y)


def gp_counts(x: Any, y: Any) -> None:
    """Counts."""
    sample("y", dist.Poisson(jnp.exp(1.0 + gp_latents(x))), obs=y)


def volatility(returns: Any) -> None:
    """Non-centered autoregression."""
    mean = sample("mean", dist.Cauchy(0.0, 5.0))
    persistence = 2 * sample("persistence", dist.Beta(20.0, 1.5)) - 1
    scale = sample("scale", dist.HalfCauchy(2.0))
    noise = sample("noise", dist.Normal(0.0, 1.0).expand([len(returns)]).to_event(1))

    def step(h: Any, e: Any) -> tuple[Any, Any]:
        h = persistence * h + scale * e
        return h, h

    first = scale * noise[0] / jnp.sqrt(1 - persistence**2)
    rest = jax.lax.scan(step, first, noise[1:])[1]
    log_variance = mean + jnp.concatenate([first[None], rest])
    sample("returns", dist.Normal(0.0, jnp.exp(log_variance / 2)), obs=returns)


def volatility_walk(returns: Any) -> None:
    """A site a day, as there."""
    scale = sample("scale", dist.Exponential(50.0))
    df = sample("df", dist.Exponential(0.1))
    h = 0.0
    for t in range(len(returns)):
        h = sample(f"h_{t}", dist.Normal(h, scale))
        sample(f"return_{t}", dist.StudentT(df, 0.0, jnp.exp(h / 2)), obs=returns[t])


def item_response(student: Any, item: Any, y: Any, slopes: bool) -> None:
    """Abilities and difficulties."""
    mean = sample("mean", dist.Normal(0.75, 1.0))
    with plate("students", int(student.max()) + 1):
        ability = sample("ability", dist.Normal(0.0, 1.0))
    with plate("items", int(item.max()) + 1):
        difficulty = sample("difficulty", dist.Normal(0.0, 1.0))
        slope = sample("slope", dist.LogNormal(0.0, 0.5)) if slopes else jnp.ones(int(item.max()) + 1)
    sample("y", dist.Bernoulli(logits=slope[item] * (mean + ability[student] - difficulty[item])), obs=y)


def crossed(a: Any, b: Any, y: Any) -> None:
    """Two factors."""
    mean = sample("mean", dist.Normal(0.0, 5.0))
    sd_a = sample("sd_a", dist.HalfNormal(1.0))
    sd_b = sample("sd_b", dist.HalfNormal(1.0))
    sigma = sample("sigma", dist.HalfNormal(1.0))
    with plate("a", int(a.max()) + 1):
        effect_a = sample("effect_a", dist.Normal(0.0, sd_a))
    with plate("b", int(b.max()) + 1):
        effect_b = sample("effect_b", dist.Normal(0.0, sd_b))
    sample("y", dist.Normal(mean + effect_a[a] + effect_b[b], sigma), obs=y)


def random_walk(y: Any, times: list[int]) -> None:
    """A site a step, as there."""
    innovation = sample("innovation", dist.LogNormal(0.0, 2.0))
    noise = sample("noise", dist.LogNormal(0.0, 2.0))
    x = 0.0
    for t in range(30):
        x = sample(f"x_{t}", dist.Normal(x, innovation))
        if t in times:
            sample(f"y_{t}", dist.Normal(x, noise), obs=y[t])


def lorenz_bridge(y: Any, times: list[int]) -> None:
    """A site a step, as there."""
    innovation = sample("innovation", dist.LogNormal(-1.0, 1.0))
    noise = sample("noise", dist.LogNormal(-1.0, 1.0))
    state = sample("state_0", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
    for t in range(30):
        if t > 0:
            a, b, c = state
            mean = state + 0.02 * jnp.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c])
            state = sample(f"state_{t}", dist.Normal(mean, 0.02**0.5 * innovation).to_event(1))
        if t in times:
            sample(f"y_{t}", dist.Normal(state[0], noise), obs=y[t])


def bym2(counts: Any, expected: Any, edges: Any) -> None:
    """A map."""
    intercept = sample("intercept", dist.Normal(0.0, 1.0))
    sigma = sample("sigma", dist.HalfNormal(1.0))
    rho = sample("rho", dist.Beta(0.5, 0.5))
    with plate("independent", len(counts)):
        theta = sample("theta", dist.Normal(0.0, 1.0))
    phi = sample("phi", dist.Normal(0.0, 10.0).expand([len(counts)]).to_event(1))
    numpyro.factor("neighbours", -0.5 * jnp.square(phi[edges[0]] - phi[edges[1]]).sum())
    numpyro.factor("sum to zero", dist.Normal(0.0, 0.001 * len(counts)).log_prob(phi.sum()))
    effect = sigma * (jnp.sqrt(1 - rho) * theta + jnp.sqrt(rho) * phi)
    sample("counts", dist.Poisson(expected * jnp.exp(intercept + effect)), obs=counts)


# By the name of the Pyro model; none of those with several modes, between which chains do not move.
TWINS: dict[str, Callable[..., None]] = {
    twin.__name__: twin
    for twin in (
        bym2,
        cox,
        cox_whitened,
        crossed,
        gp_classification,
        gp_counts,
        gp_regression,
        horseshoe,
        item_response,
        logistic,
        lorenz_bridge,
        random_walk,
        sparse_logistic,
        volatility,
        volatility_walk,
    )
}


def to_jax(value: Any) -> Any:
    """Floating tensors as JAX's arrays in float64, others as NumPy's, which are not traced; the rest as it is."""
    if not torch.is_tensor(value):
        return value
    return jnp.asarray(value.double().numpy()) if value.is_floating_point() else value.numpy()


def check(target: Target, twin: Callable[..., None], args: tuple[Any, ...], values: dict[str, Any]) -> None:
    """Stop at a twin whose log joint is not the Pyro model's, at one draw."""
    with double():
        model = poutine.condition(target.model, {k: torch.from_numpy(np.array(v)) for k, v in values.items()})
        expected = poutine.trace(model).get_trace(*map(to_double, target.args)).log_prob_sum().item()
    found = float(log_density(twin, args, {}, values)[0])
    assert abs(found - expected) <= 1e-6 * (1 + abs(expected)), f"the twin's log joint is {found}, not {expected}"


def rounded(values: Any, digits: Any) -> Any:
    """Nested lists, to ``digits`` decimals, of the same shape."""
    if np.ndim(values):
        return [rounded(v, d) for v, d in zip(values, digits, strict=True)]
    return round(float(values), int(digits))


def moments(draws: Any) -> list[Any]:
    """Means and sds of ``(chains, draws, ...)``, both to a thousandth of an sd or better."""
    mean, sd = draws.mean((0, 1)), draws.std((0, 1))
    digits = 3 - np.floor(np.log10(sd))
    return [rounded(mean, digits), rounded(sd, digits)]


def normal_scores(draws: Any) -> Any:
    """Ranks of ``(chains, draws, ...)`` as standard normal values, of half chains: ``(2 chains, draws / 2, D)``.

    Their effective sample size and R-hat are those of the bulk. Vehtari, Gelman, Simpson, Carpenter, Buerkner.
    Rank-Normalization, Folding, and Localization. Bayesian Analysis 16, 2021.
    """
    halves = draws.reshape(2 * CHAINS, DRAWS // 2, -1)
    ranks = rankdata(halves.reshape(CHAINS * DRAWS, -1), axis=0)
    return ndtri((ranks - 0.375) / (CHAINS * DRAWS + 0.25)).reshape(halves.shape)


def run(target: Target) -> dict[str, Any]:
    """What ``targets.Nuts`` holds: CPU seconds of warmup, compilation included, and of sampling; smallest effective
    sample size, largest R-hat, divergences; root mean square error of means, in sds; by site its means and sds."""
    jax.config.update("jax_enable_x64", True)
    twin, args = TWINS[target.model.__name__], tuple(map(to_jax, target.args))
    mcmc = MCMC(
        NUTS(partial(twin, *args), init_strategy=init_to_median),  # arguments of its own would be traced
        num_warmup=WARMUP,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="sequential",
        progress_bar=False,
    )
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:  # without a cache, NumPyro compiles anew for each chain
        jax.config.update("jax_compilation_cache_dir", folder)
        mcmc.warmup(jax.random.PRNGKey(0))
        jax.block_until_ready(mcmc.post_warmup_state)
        middle = time.process_time()
        mcmc.run(jax.random.PRNGKey(1))
        draws = {k: np.asarray(v) for k, v in mcmc.get_samples(group_by_chain=True).items()}
    end = time.process_time()
    check(target, twin, args, {name: value[0, 0] for name, value in draws.items()})
    scores = np.concatenate([normal_scores(value) for value in draws.values()], -1)
    ess = effective_sample_size(scores)
    return {
        "warmup": round(middle - begin, 1),
        "sampling": round(end - middle, 1),
        "ess": round(float(ess.min())),
        "rhat": round(float(gelman_rubin(scores).max()), 3),
        "divergences": int(mcmc.get_extra_fields()["diverging"].sum()),
        "error": round(math.sqrt(np.mean(1 / ess)), 4),
        "moments": {name: moments(value) for name, value in draws.items()},
    }
