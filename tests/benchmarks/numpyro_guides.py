# SPDX-License-Identifier: Apache-2.0
"""NumPyro's guides, for ``posteriors.py --numpyro``: twins of three of its models, trained and weighed as Pyro's are.

A Pyro model has no NumPyro twin in general, so the twins are written out here. Each is checked against its Pyro model:
the two log joints have to differ by nothing at the draws of a guide.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pyro import poutine

try:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro import handlers
    from numpyro.infer import SVI, Trace_ELBO, autoguide
    from numpyro.infer.util import log_density
except ImportError as error:
    raise ImportError('posteriors.py: --numpyro needs NumPyro; pip install "pyro-flows[benchmarks]"') from error

# NumPyro starts anywhere within 2 of the origin: 2000 decaying steps, as Pyro's guides get, would not be enough.
STEPS, PARTICLES, RATE = 5000, 16, 0.01


def eight_schools(sigma: Any, y: Any) -> None:
    """Centered."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(sigma)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def ark(y: Any, K: int) -> None:
    """Autoregression."""
    lags = jnp.stack([y[K - 1 - k : len(y) - 1 - k] for k in range(K)], -1)
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([K]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    with numpyro.plate("time", len(y) - K):
        numpyro.sample("y", dist.Normal(alpha + (lags * beta).sum(-1), sigma), obs=y[K:])


def kidscore(mom_hs: Any, mom_iq: Any, kid_score: Any) -> None:
    """Regression with an interaction, not centered."""
    beta = numpyro.sample("beta", dist.Normal(0.0, 1000.0).expand([4]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * mom_hs + beta[2] * mom_iq + beta[3] * mom_hs * mom_iq
    with numpyro.plate("kids", len(mom_hs)):
        numpyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)


TWINS: dict[str, Callable[..., None]] = {
    "ark__ark": ark,
    "eight_schools__eight_schools_centered": eight_schools,
    "kidiq__kidscore_interaction": kidscore,
}
GUIDES: dict[str, Callable[[Callable[..., None]], Any]] = {
    "NumPyro AutoNormal": autoguide.AutoNormal,
    "NumPyro AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "NumPyro AutoIAFNormal": autoguide.AutoIAFNormal,
    "NumPyro AutoBNAFNormal": autoguide.AutoBNAFNormal,
}


def run(title: str, name: str, posterior: Any, count: int, seed: int) -> tuple[torch.Tensor, dict[str, Any], float]:
    """Train a guide: 5000 steps of 16 draws, Adam at 0.01 with decay; log weights, draws, and seconds."""
    twin = TWINS[title]
    data = {k: jnp.asarray(v.numpy()) if torch.is_tensor(v) else v for k, v in posterior.data.items()}
    guide = GUIDES[name](twin)
    optim = numpyro.optim.Adam(lambda step: RATE * 0.01 ** (step / STEPS))
    svi = SVI(twin, guide, optim, Trace_ELBO(num_particles=PARTICLES))
    begin = time.perf_counter()
    result = svi.run(jax.random.PRNGKey(seed), STEPS, progress_bar=False, **data)
    params = jax.block_until_ready(result.params)
    seconds = time.perf_counter() - begin
    latents = [site for site, node in guide.prototype_trace.items() if is_latent(node)]

    def draw(key: Any) -> tuple[Any, dict[str, Any]]:
        """A log weight and its draw."""
        log_guide, trace = log_density(handlers.seed(guide, key), (), data, params)
        values = {site: trace[site]["value"] for site in latents}
        return log_density(twin, (), data, values)[0] - log_guide, values

    keys = jax.random.split(jax.random.PRNGKey(seed + 1000), count)
    weights, values = jax.jit(jax.vmap(draw))(keys)
    samples = {site: np.array(value) for site, value in values.items()}
    check(title, posterior, twin, data, samples)
    return torch.from_numpy(np.asarray(weights, dtype=float)), samples, seconds


def is_latent(node: Mapping[str, Any]) -> bool:
    """Whether a node of a NumPyro trace is a latent."""
    return node["type"] == "sample" and not node["is_observed"]


def check(title: str, posterior: Any, twin: Callable[..., None], data: Any, samples: dict[str, np.ndarray]) -> None:
    """Stop at a twin whose log joint is not the Pyro model's."""
    for row in range(3):
        values = {site: value[row] for site, value in samples.items()}
        model = poutine.condition(posterior.model, {site: torch.from_numpy(np.array(v)) for site, v in values.items()})
        expected = poutine.trace(model).get_trace(**posterior.data).log_prob_sum().item()
        found = float(log_density(twin, (), data, values)[0])
        close = abs(found - expected) <= 1e-4 * (1 + abs(expected))
        assert close, f"{title}: the twin's log joint is {found}, the model's {expected}"
