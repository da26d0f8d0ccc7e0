# SPDX-License-Identifier: Apache-2.0
"""NumPyro's half of the speed benchmarks: twins of their models, and training by ``svi.update`` under jit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

try:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO, autoguide
except ImportError as error:
    raise ImportError('speed.py: peers need NumPyro; pip install "pyro-flows[benchmarks]"') from error

from numpyro_guides import eight_schools

__all__ = ["Training", "autoguide", "train", "train_plate"]

EVALUATION_DRAWS, EVALUATION_RUNS = 4000, 5


def logistic(x: Any, y: Any) -> None:
    """A logistic regression."""
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[-1]), 1.0).to_event(1))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def vector(y: Any) -> None:
    """A scale and a vector."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("elements", len(y)):
        x = numpyro.sample("x", dist.Normal(0.0, scale))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


TWINS: dict[str, Callable[..., None]] = {"eight_schools": eight_schools, "logistic": logistic, "vector": vector}


class Training:
    """Adam on a guide.

    Args:
        model: The model.
        guide: The guide.
        args: The model's arguments.
        num_particles: Draws a step, under vmap.
        rate: Of Adam.
        seed: Of the start and the noise.
    """

    def __init__(
        self,
        model: Callable[..., None],
        guide: Any,
        args: Sequence[Any],
        num_particles: int,
        rate: float,
        seed: int = 0,
    ) -> None:
        self._args = args
        self._svi = SVI(model, guide, numpyro.optim.Adam(rate), Trace_ELBO(num_particles=num_particles))
        self._update = jax.jit(self._svi.update)
        self._loop = jax.jit(self._many)
        self._state = self._svi.init(jax.random.PRNGKey(seed), *args)
        self._weigh = jax.jit(partial(self._negative_elbo, Trace_ELBO(num_particles=EVALUATION_DRAWS)))

    def take(self, count: int) -> None:
        """So many calls of the jitted update; only the last one's end is waited for."""
        for _ in range(count):
            self._state, _ = self._update(self._state, *self._args)
        jax.block_until_ready(self._state)

    def loop(self, count: int) -> None:
        """So many updates in one call."""
        self._state = jax.block_until_ready(self._loop(self._state, count, *self._args))

    def _many(self, state: Any, count: Any, *args: Any) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, state: self._svi.update(state, *args)[0], state)

    def _negative_elbo(self, elbo: Trace_ELBO, key: Any, params: Any, *args: Any) -> Any:
        return elbo.loss(key, params, self._svi.model, self._svi.guide, *args)

    def elbo(self) -> float:
        """Of the guide as it is, from :data:`EVALUATION_DRAWS` x :data:`EVALUATION_RUNS` draws."""
        params = self._svi.get_params(self._state)
        keys = jax.random.split(jax.random.fold_in(self._state.rng_key, 1), EVALUATION_RUNS)
        return -sum(float(self._weigh(key, params, *self._args)) for key in keys) / EVALUATION_RUNS


def as_jax(args: Sequence[Any]) -> list[Any]:
    """Tensors as arrays."""
    return [jnp.asarray(value.numpy()) for value in args]


def train(
    twin: str, guide: Callable[..., Any], args: Sequence[Any], num_particles: int, rate: float, seed: int = 0
) -> Training:
    """Set up training of a guide, made from the twin."""
    model = TWINS[twin]
    return Training(model, guide(model), as_jax(args), num_particles, rate, seed)


def train_plate(args: Sequence[Any], batch: int, num_particles: int, rate: float) -> Training:
    """``AutoNormal`` on random effects in mini-batches, which NumPyro's plate draws itself, one a particle."""

    def plates(y: Any, sd: Any) -> Any:
        return numpyro.plate("groups", len(y), subsample_size=batch)

    def model(y: Any, sd: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = numpyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with plates(y, sd):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            subsample = partial(numpyro.subsample, event_dim=0)
            numpyro.sample("y", dist.Normal(theta, subsample(sd)), obs=subsample(y))

    return Training(model, autoguide.AutoNormal(model, create_plates=plates), as_jax(args), num_particles, rate)
