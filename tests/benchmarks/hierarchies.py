# SPDX-License-Identifier: Apache-2.0
"""Centered hierarchies of 60 to 90 dimensions on public data, against long runs of NUTS.

    python tests/benchmarks/hierarchies.py [--only NAME ...] [--seeds 1] [--cache FOLDER] [--write]

``fit(model, AutoFlowGuide(model))`` with nothing set. Data come with statsmodels and scikit-learn. Each model is
written once, for Pyro and for NumPyro, whose NUTS (float64, four chains; non-centered, or with Gaussian parts
integrated out, where that helps) goes on until the Monte Carlo error of each mean is 0.015 sds; its draws stay in
``--cache``. Run by hand, never by pytest; needs ``pip install "pyro-flows[benchmarks]"``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from posteriors import score, spread
from tables import TABLES, as_rst

from pyro_flows import AutoFlowGuide, fit

try:
    import statsmodels.datasets as public
    from sklearn.datasets import load_wine
except ImportError as error:
    raise ImportError('hierarchies.py: needs its data; pip install "pyro-flows[benchmarks]"') from error

# Monte Carlo error of a reference mean, in sds.
REFERENCE_ERROR = 0.015
CHAINS, WARMUP, BLOCK, MAX_BLOCKS = 4, 1500, 1500, 12
DRAWS = 20_000
HEADER = (
    "model",
    "dim",
    "ELBO",
    "log evidence",
    "gap",
    "k-hat",
    "ESS / S",
    "worst mean error, sds",
    "of",
    "worst log sd ratio",
    "of",
    "CPU seconds",
)
Data = dict[str, np.ndarray]


def standard(column: Any) -> np.ndarray:
    """Mean 0, sd 1."""
    column = np.asarray(column, dtype=float)
    return (column - column.mean(0)) / column.std(0)


def codes(column: Any) -> np.ndarray:
    """Levels as 0, 1, ..."""
    return np.unique(np.asarray(column), return_inverse=True)[1]


# The models: ``pp`` is pyro or numpyro, ``d`` its distributions; the rest are the data.


def grunfeld(pp: Any, d: Any, x: Any, firm: Any, year: Any, y: Any) -> None:
    """Investment of 11 firms in 20 years: correlated intercepts and slopes of firms, effects of years."""
    mu = pp.sample("mu", d.Normal(0.0, 1.0).expand([3]).to_event(1))
    tau = pp.sample("tau", d.HalfNormal(1.0).expand([3]).to_event(1))
    factor = pp.sample("factor", d.LKJCholesky(3, 2.0))
    sd_year = pp.sample("sd_year", d.HalfNormal(1.0))
    noise = pp.sample("noise", d.HalfNormal(1.0))
    with pp.plate("firms", 11):
        coef = pp.sample("coef", d.MultivariateNormal(mu, scale_tril=tau[..., None] * factor))
    with pp.plate("years", 20):
        effect = pp.sample("effect", d.Normal(0.0, sd_year))
    with pp.plate("rows", len(y)):
        pp.sample("y", d.Normal((coef[..., firm, :] * x).sum(-1) + effect[..., year], noise), obs=y)


def grunfeld_data() -> Data:
    """Logs, standardized: investment on value and capital."""
    table = public.grunfeld.load_pandas().data
    x = np.stack([np.ones(len(table)), standard(np.log(table.value)), standard(np.log(table.capital))], -1)
    return {"x": x, "firm": codes(table.firm), "year": codes(table.year), "y": standard(np.log(table.invest))}


def grunfeld_collapsed(pp: Any, d: Any, x: Any, firm: Any, year: Any, y: Any) -> None:
    """The same with mu, coefficients and effects integrated out: 8 dimensions, where NUTS has no funnel to enter."""
    tau = pp.sample("tau", d.HalfNormal(1.0).expand([3]).to_event(1))
    factor = pp.sample("factor", d.LKJCholesky(3, 2.0))
    sd_year = pp.sample("sd_year", d.HalfNormal(1.0))
    noise = pp.sample("noise", d.HalfNormal(1.0))
    pp.factor("y", grunfeld_given(tau, factor, sd_year, noise, x, firm, year, y)[0])


def grunfeld_given(
    tau: Any, factor: Any, sd_year: Any, noise: Any, x: Any, firm: Any, year: Any, y: Any, eps: Any = 0.0
) -> tuple[Any, dict[str, Any]]:
    """Log density of y given the variances, and a draw of what was integrated out from 56 standard normals."""
    from jax import numpy as jnp
    from jax.scipy.linalg import block_diag, solve_triangular

    firms = (jnp.eye(11)[firm][:, :, None] * x[:, None, :]).reshape(len(y), 33)
    design = jnp.concatenate([x, firms, jnp.eye(20)[year]], 1)
    scale = block_diag(jnp.eye(3), jnp.kron(jnp.eye(11), tau[:, None] * factor), sd_year * jnp.eye(20))
    precision = jnp.eye(56) + scale.T @ (design.T @ design) @ scale / noise**2
    chol = jnp.linalg.cholesky(precision)
    white = solve_triangular(chol, scale.T @ (design.T @ y), lower=True) / noise**2
    log_y = -0.5 * (y @ y / noise**2 - white @ white) - jnp.log(jnp.diagonal(chol)).sum() - len(y) * jnp.log(noise)
    drawn = scale @ solve_triangular(chol.T, white + eps, lower=False)
    coef = drawn[:3] + drawn[3:36].reshape(11, 3)
    return log_y, {"mu": drawn[:3], "coef": coef, "effect": drawn[36:]}


VOTE_LEVELS = {"PID": 7, "selfLR": 7, "educ": 7, "income": 24, "TVnews": 8}


def anes96(pp: Any, d: Any, x: Any, y: Any, **level: Any) -> None:
    """Votes of 944 people in 1996: logistic, with varying intercepts by five of their answers."""
    intercept = pp.sample("intercept", d.Normal(0.0, 2.0))
    slope = pp.sample("slope", d.Normal(0.0, 1.0).expand([2]).to_event(1))
    logits = intercept + (slope * x).sum(-1)
    for name, count in VOTE_LEVELS.items():
        sd = pp.sample(f"sd_{name}", d.HalfNormal(1.0))
        with pp.plate(f"{name}_levels", count):
            effect = pp.sample(name, d.Normal(0.0, sd))
        logits = logits + effect[..., level[name]]
    with pp.plate("people", len(y)):
        pp.sample("y", d.Bernoulli(logits=logits), obs=y)


def anes96_data() -> Data:
    """Age and log population standardized; levels as they are coded."""
    table = public.anes96.load_pandas().data
    levels = {name: codes(table[name]) for name in VOTE_LEVELS}
    x = np.stack([standard(table.age), standard(table.logpopul)], -1)
    return {"x": x, "y": np.asarray(table.vote, dtype=float), **levels}


def elnino(pp: Any, d: Any, y: Any) -> None:
    """Sea surface temperatures of 61 years by month: effects of both, and a noise of each month."""
    mu = pp.sample("mu", d.Normal(0.0, 1.0))
    sd_month = pp.sample("sd_month", d.HalfNormal(3.0))
    sd_year = pp.sample("sd_year", d.HalfNormal(1.0))
    log_noise = pp.sample("log_noise", d.Normal(0.0, 1.0))
    sd_noise = pp.sample("sd_noise", d.HalfNormal(0.5))
    years, months = pp.plate("years", 61, dim=-2), pp.plate("months", 12, dim=-1)
    with years:
        year = pp.sample("year", d.Normal(0.0, sd_year))
    with months:
        month = pp.sample("month", d.Normal(mu, sd_month))
        noise = pp.sample("noise", d.LogNormal(log_noise, sd_noise))
    with years, months:
        pp.sample("y", d.Normal(year + month, noise), obs=y)


def elnino_data() -> Data:
    """Degrees above 23 Celsius."""
    return {"y": public.elnino.load_pandas().data.to_numpy()[:, 1:] - 23.0}


def wine(pp: Any, d: Any, group: Any, y: Any) -> None:
    """Thirteen measures of 178 wines from three cultivars: each with its spread between and within cultivars."""
    log_between = pp.sample("log_between", d.Normal(0.0, 1.0))
    sd_between = pp.sample("sd_between", d.HalfNormal(1.0))
    log_within = pp.sample("log_within", d.Normal(0.0, 1.0))
    sd_within = pp.sample("sd_within", d.HalfNormal(1.0))
    features = pp.plate("features", 13, dim=-1)
    with features:
        between = pp.sample("between", d.LogNormal(log_between, sd_between))
        within = pp.sample("within", d.LogNormal(log_within, sd_within))
    with pp.plate("cultivars", 3, dim=-2), features:
        effect = pp.sample("effect", d.Normal(0.0, between))
    with pp.plate("rows", len(y), dim=-2), features:
        pp.sample("y", d.Normal(effect[..., group, :], within), obs=y)


def wine_data() -> Data:
    """Standardized."""
    loaded = load_wine()
    return {"group": loaded.target, "y": standard(loaded.data)}


@dataclass(frozen=True)
class Hierarchy:
    """A model, its data, and how NUTS takes it: with sites non-centered, or with a Gaussian part integrated out.

    For the latter, ``given`` draws that part from standard normals, ``count`` of them.
    """

    write: Callable[..., None]
    load: Callable[[], Data]
    noncentered: tuple[str, ...] = ()
    collapsed: Callable[..., None] | None = None
    given: Callable[..., tuple[Any, dict[str, Any]]] | None = None
    count: int = 0


HIERARCHIES = {
    "grunfeld": Hierarchy(grunfeld, grunfeld_data, (), grunfeld_collapsed, grunfeld_given, 56),
    "anes96": Hierarchy(anes96, anes96_data, ("selfLR", "educ", "income", "TVnews")),
    "elnino": Hierarchy(elnino, elnino_data),
    "wine": Hierarchy(wine, wine_data, ("between",)),
}


@dataclass(frozen=True)
class Posterior:
    """What ``posteriors.score`` takes."""

    model: Callable[..., None]
    data: dict[str, torch.Tensor]
    mean: Mapping[str, float]
    sd: Mapping[str, float]

    def to_reference(self, samples: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Draws by parameter."""
        return natural({name: np.asarray(value) for name, value in samples.items()})


def natural(samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every element of every site by name; a factor of correlations as the correlations."""
    columns = {}
    for name, value in samples.items():
        value = value.astype(float)
        if name == "factor":
            matrix = value @ value.swapaxes(-1, -2)
            for i, j in zip(*np.tril_indices(matrix.shape[-1], -1), strict=True):
                columns[f"correlation[{j},{i}]"] = matrix.reshape(len(value), *matrix.shape[-2:])[:, i, j]
            continue
        flat = value.reshape(len(value), -1)
        columns |= {(f"{name}[{i}]" if flat.shape[1] > 1 else name): flat[:, i] for i in range(flat.shape[1])}
    return columns


def reference(name: str, cache: Path) -> dict[str, np.ndarray]:
    """Means and sds by parameter, from draws in the cache or drawn now."""
    path = cache / f"{name}.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        columns, facts = draw_reference(HIERARCHIES[name])
        np.savez_compressed(path, **columns, __facts__=np.array(facts))
    with np.load(path) as loaded:
        print(f"{name}: reference {loaded['__facts__']}", flush=True)
        return {key: loaded[key] for key in loaded.files if key != "__facts__"}


def draw_reference(hierarchy: Hierarchy) -> tuple[dict[str, np.ndarray], str]:
    """NUTS until the means are known well enough; draws of all chains, and how it went."""
    try:
        import jax
        import numpyro
    except ImportError as error:
        raise ImportError('hierarchies.py: needs NumPyro; pip install "pyro-flows[benchmarks]"') from error
    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
    from numpyro.infer import MCMC, NUTS

    def decentered(name: str, fn: Any, obs: Any) -> tuple[None, Any]:
        """What LocScaleReparam(0) does, for normals, log-normals and multivariate normals."""
        noise = numpyro.distributions.Normal(0.0, 1.0).expand(fn.shape()).to_event(fn.event_dim)
        eps = numpyro.sample(f"{name}_decentered", noise)
        while isinstance(fn, numpyro.distributions.Independent | numpyro.distributions.ExpandedDistribution):
            fn = fn.base_dist
        if hasattr(fn, "scale_tril"):
            return None, fn.loc + (fn.scale_tril * eps[..., None, :]).sum(-1)
        value = fn.loc + fn.scale * eps
        return None, jax.numpy.exp(value) if isinstance(fn, numpyro.distributions.LogNormal) else value

    numpyro.enable_x64()
    data = {key: jax.numpy.asarray(value) for key, value in hierarchy.load().items()}
    config = dict.fromkeys(hierarchy.noncentered, decentered)
    twin = numpyro.handlers.reparam(
        partial(hierarchy.collapsed or hierarchy.write, numpyro, numpyro.distributions), config=config
    )
    kernel = NUTS(twin, target_accept_prob=0.95, dense_mass=True)
    mcmc = MCMC(kernel, num_warmup=WARMUP, num_samples=BLOCK, num_chains=CHAINS, chain_method="sequential",
                progress_bar=False)  # fmt: skip
    blocks: list[dict[str, np.ndarray]] = []
    divergent, begin = 0, time.perf_counter()
    while True:
        mcmc.run(jax.random.PRNGKey(len(blocks)), extra_fields=("diverging",), **data)
        mcmc.post_warmup_state = mcmc.last_state
        divergent += int(mcmc.get_extra_fields()["diverging"].sum())
        samples = {k: v for k, v in mcmc.get_samples(group_by_chain=True).items() if not k.endswith("_decentered")}
        if hierarchy.given:
            eps = jax.random.normal(jax.random.PRNGKey(1000 + len(blocks)), (CHAINS, BLOCK, hierarchy.count))
            rest = lambda sites, eps: hierarchy.given(**sites, **data, eps=eps)[1]  # noqa: E731
            samples |= jax.jit(jax.vmap(jax.vmap(rest)))(samples, eps)
        blocks.append(
            {
                key: column.reshape(CHAINS, BLOCK)
                for key, column in natural(
                    {k: np.asarray(v).reshape(CHAINS * BLOCK, *v.shape[2:]) for k, v in samples.items()}
                ).items()
            }
        )
        chains = {key: np.concatenate([block[key] for block in blocks], axis=1) for key in blocks[0]}
        ess = {key: effective_sample_size(value) for key, value in chains.items()}
        rhat = max(split_gelman_rubin(value) for value in chains.values())
        worst = min(ess, key=ess.__getitem__)
        size = next(iter(chains.values())).size
        facts = (
            f"{size} draws, {divergent} divergent, R-hat at most {rhat:.4f}, "
            f"ESS at least {ess[worst]:.0f} ({worst}), {time.perf_counter() - begin:.0f} s"
        )
        print(facts, flush=True)
        if ess[worst] >= REFERENCE_ERROR**-2 or len(blocks) == MAX_BLOCKS:
            return {key: value.reshape(-1) for key, value in chains.items()}, facts


def load(name: str, cache: Path) -> Posterior:
    """The Pyro model with its reference."""
    hierarchy = HIERARCHIES[name]
    draws = reference(name, cache)
    data = {
        key: torch.tensor(value, dtype=torch.float if value.dtype.kind == "f" else torch.long)
        for key, value in hierarchy.load().items()
    }
    mean = {key: float(value.mean()) for key, value in draws.items()}
    sd = {key: float(value.std()) for key, value in draws.items()}
    return Posterior(partial(hierarchy.write, pyro, dist), data, mean, sd)


def main() -> None:
    """Run, print a line each, and write the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="*", default=list(HIERARCHIES), choices=list(HIERARCHIES))
    made.add_argument("--seeds", type=int, default=1)
    made.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "pyro_flows_reference")
    made.add_argument("--write", action="store_true", help="write docs/tables/hierarchies.rst")
    made.add_argument("--reference", action="store_true", help="draw the reference only")
    options = made.parse_args()
    torch.set_num_threads(1)
    rows = []
    for title in options.only:
        posterior = load(title, options.cache)
        if options.reference:
            continue
        scores, errors = [], []
        for seed in range(options.seeds):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            guide = AutoFlowGuide(posterior.model)
            begin = time.process_time()  # one thread: wall time on a core of its own
            print(fit(posterior.model, guide, kwargs=posterior.data, progress=sys.stderr.isatty()), flush=True)
            found, by_parameter = score(posterior, guide, DRAWS, time.process_time() - begin)
            scores.append(found)
            errors.append(by_parameter)
            for column, label in enumerate(("mean error", "log sd ratio")):
                ordered = sorted(by_parameter, key=lambda k: -abs(by_parameter[k][column]))[:8]
                print(f"  {label}: " + ", ".join(f"{k} {by_parameter[k][column]:+.3f}" for k in ordered), flush=True)
        cells = spread(scores)
        names = [max(errors[-1], key=lambda k: abs(errors[-1][k][column])) for column in (0, 1)]
        rows.append([title, str(guide.latent_dim), *cells[:6], names[0], cells[6], names[1], *cells[7:]])
        print("  ".join(rows[-1]), flush=True)
    if options.write and rows:
        (TABLES / "hierarchies.rst").write_text(as_rst(HEADER, rows))


if __name__ == "__main__":
    main()
