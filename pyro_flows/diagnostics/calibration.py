# SPDX-License-Identifier: Apache-2.0
"""L7. :func:`check_calibration`: simulation-based calibration of amortized guides and of inference procedures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flows._checks import check_call, check_callable, check_program, check_type, checked, integer, optional, shown
from pyro_flows._random import seeded
from pyro_flows._threads import one_at_a_time
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.importance.weights import ImportanceSampler
from pyro_flows.models.sites import full_size
from pyro_flows.models.structure import common_plate
from pyro_flows.models.traces import NO_DENSITY, Call, run_quietly, sample_nodes

__all__ = ["Calibration", "SiteCalibration", "check_calibration"]

OWNER = "check_calibration"
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class CalibrationSettings:
    """Default number of simulations, and the level of the test of calibration.

    Attributes:
        num_datasets: Number of simulations if each requires a fit.
        num_items: Total number of items in all simulations if none requires a fit.
        level: Significance level of the test of all coordinates together: how often a calibrated guide fails it.
    """

    num_datasets: int = 100
    num_items: int = 2000
    level: float = 0.01


@dataclass(frozen=True)
class SiteCalibration:
    """Calibration of one site, by its worst coordinate.

    Attributes:
        name: Name of the site.
        p_value: P-value of the Kolmogorov-Smirnov test of uniform ranks, times the number of coordinates (Bonferroni).
        bias: Mean rank of the true value as a share of all draws, less 0.5; in [-0.5, 0.5]. Above 0 the guide's values
            are too low.
        bias_se: Its standard error if the guide is calibrated.
        width: Mean distance of ranks from the middle, divided by its expectation under calibration. Above 1 the guide
            is too narrow.
        width_se: Its standard error if the guide is calibrated.
    """

    min_z_score: ClassVar[float] = 3.0  # standard errors from which a bias, or a width other than 1, is reported

    name: str
    p_value: float
    bias: float
    bias_se: float
    width: float
    width_se: float

    @property
    def reason(self) -> str:
        """Description of the miscalibration."""
        words = []
        if abs(self.bias) > self.min_z_score * self.bias_se:
            words.append("too low" if self.bias > 0 else "too high")
        if abs(self.width - 1.0) > self.min_z_score * self.width_se:
            words.append("too narrow" if self.width > 1.0 else "too wide")
        return " and ".join(words)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Result of simulation-based calibration; prints as a table.

    Attributes:
        ranks: Site -> ranks of true values among draws as shares, randomized so as to be uniform on [0, 1] if the
            guide is calibrated, ``(N, coordinates)``; N counts data sets, or items where the sites are in one plate.
        sites: Site -> calibration of its worst coordinate.
        calibrated: Whether no coordinate's ranks differ significantly from uniform ones, at level 0.01 for all
            together.
        failed: Number of data sets that could not be fitted, and are omitted.
    """

    max_lines: ClassVar[int] = 12  # of the printed table

    ranks: Mapping[str, Tensor]
    sites: Mapping[str, SiteCalibration]
    calibrated: bool
    failed: int

    def __str__(self) -> str:
        count = len(next(iter(self.ranks.values())))
        worst = sorted(self.sites.values(), key=lambda site: site.p_value)
        width = max(len("site"), *(len(site.name) for site in worst))
        verdict = "calibrated, as far as they can tell" if self.calibrated else f"not calibrated: '{worst[0].name}' is "
        if not self.calibrated:
            verdict += worst[0].reason or "of another shape"
        failed = f"; {self.failed} more could not be fitted" if self.failed else ""
        lines = [
            f"{count} simulations{failed}: {verdict}",
            f"{'site':<{width}}  {'p':>7}  {'bias':>16}  {'width':>15}",
        ]
        for site in worst[: self.max_lines]:
            bias, spread = f"{site.bias:+.3f} +/- {site.bias_se:.3f}", f"{site.width:.3f} +/- {site.width_se:.3f}"
            lines.append(
                f"{site.name:<{width}}  {site.p_value:>7.2g}  {bias:>16}  {spread:>15}  {site.reason}".rstrip()
            )
        if len(worst) > self.max_lines:
            lines.append(f"and {len(worst) - self.max_lines} more sites")
        return "\n".join(lines)


@checked(
    guide=optional(check_program),
    refit=optional(check_callable),
    to_args=optional(check_callable),
    num_datasets=optional(integer(2)),
    num_samples=integer(20),
    settings=partial(check_type, kind=CalibrationSettings),
)
def check_calibration(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    refit: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Callable[..., Any]] | None = None,
    to_args: Callable[[dict[str, Tensor]], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    num_datasets: int | None = None,
    num_samples: int = 200,
    progress: bool = True,
    seed: int | None = None,
    settings: CalibrationSettings = CalibrationSettings(),
) -> Calibration:
    r"""Simulation-based calibration: ranks of simulated latent values among the guide's draws given their data.

    If q(z | x) is the posterior, the rank of the value that x was simulated from is uniform. This finds biases, wrong
    widths and lost modes that the guide's own draws cannot show, on average over simulated data sets rather than for
    the observed one. An amortized guide is used as it is. For others, pass ``refit``, which is called for each data
    set (variational simulation-based calibration).

    Where every site is in one plate, as in a variational autoencoder, each item counts as one simulation.

    Args:
        model: A Pyro model that can draw its own data: proper priors, and no ``pyro.factor``.
        guide: An amortized guide, trained; or None with ``refit``.
        args: The model's arguments; those that a site observes, by identity or as a view, are replaced by simulated
            data, so that their values do not matter.
        kwargs: The model's keyword arguments; data among them are also replaced.
        refit: ``refit(model, args, kwargs)`` trains a guide for the model, conditioned on simulated data, and returns
            it.
        to_args: Maps simulated values of observed sites to the arguments, if the model observes a function of its
            arguments.
        num_datasets: Number of simulations, >= 2. None takes 100, or as many as make 2000 items without ``refit``.
        num_samples: Number of draws of each guide, >= 20.
        progress: Whether to show a progress bar.
        seed: Makes the result reproducible; torch's global random state is not changed. None uses the global state.
        settings: Default numbers of simulations, and the level of the test.

    Raises:
        ValueError: If neither or both of ``guide`` and ``refit`` are given; if the model cannot draw its own data; if
            an amortized guide's data are not among the arguments.
        RuntimeError: If no data set can be fitted.
        NotImplementedError: If plates are subsampled, or as :func:`diagnose`.

    References:
        Talts, Betancourt, Simpson, Vehtari, Gelman. Validating Bayesian Inference Algorithms with Simulation-Based
        Calibration. 2018. arXiv:1804.06788.
        Yao, Vehtari, Simpson, Gelman. Yes, but Did It Work?: Evaluating Variational Inference. ICML 2018, section 4.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_flows.diagnostics import check_calibration
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("mu", dist.Normal(y / 2, 0.3))
        >>> report = check_calibration(model, guide, (torch.tensor(0.0),), num_datasets=200, progress=False, seed=0)
        >>> report.calibrated, report.sites["mu"].reason
        (False, 'too narrow')
    """
    if (guide is None) == (refit is None):
        raise ValueError(
            f"{OWNER}: expected an amortized guide, or refit=..., but got {'neither' if guide is None else 'both'}. "
            "Write refit=lambda model, args, kwargs: ..., which trains a guide and returns it."
        )
    check_call(OWNER, "model", model, args, kwargs or {})
    if refit is not None:
        check_call(OWNER, "refit", refit, (model, args, kwargs), {}, "Write refit=lambda model, args, kwargs: ...")
    with one_at_a_time("check_calibration"), seeded(seed):
        simulator = _Simulator(model, args, dict(kwargs or {}), to_args, amortized=refit is None)
        if num_datasets is None:
            many = math.ceil(settings.num_items / simulator.num_items)
            num_datasets = settings.num_datasets if refit is not None else max(2, many)
        found: list[dict[str, Tensor]] = []
        failure: Exception | None = None
        at_once: bool | None = None
        for _ in tqdm(range(num_datasets), desc="simulations", disable=not progress):
            truth, conditioned, (new_args, new_kwargs) = simulator.draw()
            try:
                fitted = guide if refit is None else refit(conditioned, new_args, new_kwargs)
                if not callable(fitted):
                    raise TypeError(
                        f"{OWNER}: expected refit to return a guide, but got {shown(fitted)}. Let it end in `return "
                        "guide`."
                    )
                if at_once is None:
                    at_once = ImportanceSampler(OWNER, conditioned, fitted, new_args, new_kwargs).draws_at_once
                draws = _draw(fitted, num_samples, new_args, new_kwargs, at_once=at_once)
            except (*NO_DENSITY, RuntimeError) as error:
                if refit is None:
                    raise
                failure = error
                continue
            found.append(
                {name: simulator.by_item(name, _rank(draws[name], truth[name])) for name in truth if name in draws}
            )
        if not found:
            raise RuntimeError(f"{OWNER}: expected fits of simulated data, but all {num_datasets} failed.") from failure
    ranks = {name: torch.cat([rows[name] for rows in found]) for name in found[0]}
    total = sum(part.shape[-1] for part in ranks.values())
    sites = {name: _judge(name, part) for name, part in ranks.items()}
    worst = min(site.p_value * total / ranks[site.name].shape[-1] for site in sites.values())
    return Calibration(ranks, sites, calibrated=worst >= settings.level, failed=num_datasets - len(found))


class _Simulator:
    """Draws values of all sites from the model, and replaces its data by those of observed sites.

    Attributes:
        num_items: Number of items in the plate that every site is in; 1 if there is none.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        to_args: Callable[[dict[str, Tensor]], Arguments] | None,
        *,
        amortized: bool,
    ) -> None:
        self._model = model
        self._call = args, kwargs
        self._to_args = to_args
        nodes = self._run()
        frames = [[f for f in node["cond_indep_stack"] if f.vectorized] for node in nodes.values()]
        subsampled = sorted({f.name for stack in frames for f in stack if full_size(f) > f.size})
        if subsampled and not amortized:
            raise NotImplementedError(
                f"{OWNER}: expected full plates, but '{subsampled[0]}' is subsampled, and simulated mini-batches are "
                "not kept. Pass a model of the full plate."
            )
        self._items = common_plate(frames)
        self.num_items = 1 if self._items is None else int(self._items.size)
        self._latents = {name: node["fn"].event_dim for name, node in nodes.items() if "obs" not in node["infer"]}
        self._places = list(self._find(nodes)) if to_args is None else []
        if amortized and to_args is None and not self._places:
            raise ValueError(
                f"{OWNER}: expected an observed site whose data are among the arguments, which a guide could read, but "
                "found none. Pass to_args=lambda data: ((...,), {}), from simulated values of observed sites to the "
                "arguments; or refit=... for a guide that does not read them."
            )

    def _run(self) -> dict[str, dict[str, Any]]:
        try:
            trace = run_quietly(poutine.uncondition(self._model), Call(*self._call))
        except NotImplementedError as error:
            raise ValueError(f"{OWNER}: expected a model that can draw its own data, but {error}.") from error
        nodes = sample_nodes(trace)
        for name, node in nodes.items():
            masked = isinstance(node["fn"], dist.MaskedDistribution) and node["fn"]._mask is False
            if masked or isinstance(node["fn"], dist.Unit):
                raise ValueError(
                    f"{OWNER}: expected a model that can draw its own data, but '{name}' is "
                    f"{'masked' if masked else 'a pyro.factor'}, a density without a way to draw from it. Write the "
                    "model with sample statements."
                )
        return nodes

    def _find(self, nodes: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, int | str]]:
        """Observed sites, and the arguments that they observe."""
        args, kwargs = self._call
        for name, node in nodes.items():
            places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            for place, value in places:
                if torch.is_tensor(value) and "obs" in node["infer"] and _same(value, node["infer"]["obs"]):
                    yield name, place

    def draw(self) -> tuple[dict[str, Tensor], Callable[..., Any], Arguments]:
        """True values, the model conditioned on simulated data, and its arguments with the data replaced."""
        nodes = self._run()
        truth = {name: nodes[name]["value"] for name in self._latents}
        data = {name: node["value"] for name, node in nodes.items() if name not in truth}
        conditioned = poutine.condition(self._model, data=data)
        if self._to_args is not None:
            made = self._to_args(data)
            is_pair = isinstance(made, tuple) and len(made) == 2
            if not (is_pair and isinstance(made[0], tuple) and isinstance(made[1], Mapping)):
                raise TypeError(
                    f"{OWNER}: expected to_args to return (args, kwargs), but got {shown(made)}. Write "
                    "to_args=lambda data: ((data['y'],), {})."
                )
            return truth, conditioned, made
        args, kwargs = list(self._call[0]), dict(self._call[1])
        for name, place in self._places:
            holder: Any = args if isinstance(place, int) else kwargs
            holder[place] = data[name].reshape(holder[place].shape).to(holder[place].dtype)
        return truth, conditioned, (tuple(args), kwargs)

    def by_item(self, name: str, rank: Tensor) -> Tensor:
        """A site's ranks as ``(items, coordinates)``."""
        if self._items is None:
            return rank.reshape(1, -1)
        return rank.movedim(rank.dim() - self._latents[name] + self._items.dim, 0).flatten(1)


def _same(argument: Tensor, observed: Any) -> bool:
    """Whether a site observes an argument, or a view of all of it."""
    if not torch.is_tensor(observed) or argument.numel() != observed.numel() or not argument.numel():
        return False
    return argument.data_ptr() == observed.data_ptr()


@torch.no_grad()
def _draw(
    guide: Callable[..., Any], count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, at_once: bool
) -> Mapping[str, Tensor]:
    with poutine.block():
        if isinstance(guide, AutoFlowGuide):
            return guide.sample_posterior(count, *args, **kwargs)
        draws: dict[str, Tensor] = Predictive(guide, num_samples=count, parallel=at_once)(*args, **kwargs)
        return draws


def _rank(draws: Tensor, truth: Tensor) -> Tensor:
    """Ranks as shares, randomized uniformly between one rank and the next, and over ties."""
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    return (below + torch.rand(truth.shape, device=truth.device) * (equal + 1)) / (len(draws) + 1)


def _judge(name: str, ranks: Tensor) -> SiteCalibration:
    """Calibration of the worst coordinate, from ranks ``(N, C)``."""
    count, dim = ranks.shape
    ranks = ranks.double()
    order = ranks.sort(0).values
    steps = torch.arange(count + 1, dtype=torch.double, device=ranks.device).unsqueeze(-1) / count
    distance = torch.maximum((steps[1:] - order).amax(0), (order - steps[:-1]).amax(0))
    worst = int(distance.argmax())
    deviation = ranks[:, worst] - 0.5
    return SiteCalibration(
        name=name,
        p_value=min(1.0, dim * _kolmogorov(float(distance[worst]), count)),
        bias=float(deviation.mean()),
        bias_se=math.sqrt(1 / (12 * count)),
        width=float(deviation.abs().mean()) / 0.25,
        width_se=math.sqrt(1 / (48 * count)) / 0.25,
    )


def _kolmogorov(distance: float, count: int) -> float:
    """P-value of the Kolmogorov-Smirnov statistic of at least 5 draws.

    References:
        Stephens. EDF statistics for goodness of fit and some comparisons. JASA 1974, section 4.
    """
    scaled = (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count)) * distance
    if scaled < 0.3:  # the series converges slowly, to 1
        return 1.0
    return min(1.0, 2.0 * sum((-1) ** (k - 1) * math.exp(-2.0 * (k * scaled) ** 2) for k in range(1, 50)))
