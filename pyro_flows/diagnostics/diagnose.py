# SPDX-License-Identifier: Apache-2.0
"""L7. :func:`diagnose`: how good a guide is, in numbers with errors, and in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_flows._checks import check_int
from pyro_flows.diagnostics.evidence import Evidence, estimate_evidence, lost_mass
from pyro_flows.diagnostics.modes import LostMode, lost_modes
from pyro_flows.diagnostics.search import Regions, Search, why_not
from pyro_flows.diagnostics.sites import SiteSummary, SiteTally
from pyro_flows.diagnostics.verdict import NOT_KNOWN, TRUST, Facts, judge
from pyro_flows.importance.psis import khat_threshold
from pyro_flows.importance.weights import ImportanceSampler
from pyro_flows.models.checks import warn_without_data

__all__ = ["Diagnosis", "Items", "diagnose", "find_regions", "weigh"]

MAX_LINES = 12


@dataclass(frozen=True, eq=False)
class Items:
    """The same numbers item by item, where every site is in one plate; all ``(N,)``.

    Attributes:
        plate: Name of the plate.
        elbo: ELBO of each item.
        log_evidence: log p(x_n) by importance sampling.
        log_evidence_se: Its standard error.
        gap: KL(q || posterior) of each item.
        khat: Pareto k-hat of each item's weights.
        ess: Effective sample size.
    """

    plate: str
    elbo: Tensor
    log_evidence: Tensor
    log_evidence_se: Tensor
    gap: Tensor
    khat: Tensor
    ess: Tensor


@dataclass(frozen=True, eq=False)
class Diagnosis:
    r"""How good a guide is; prints as a person reads it. All in nats, of S draws.

    ``elbo == expected_log_likelihood - kl_to_prior``, and ``gap`` estimates :math:`KL(q \| p(z | x))`.

    Attributes:
        elbo: :math:`E_q[\log p(x, z) - \log q(z)]`.
        elbo_se: Its standard error.
        expected_log_likelihood: :math:`E_q \log p(x | z)`, the reconstruction. Latents whose prior depends on an
            enumerated site count here.
        kl_to_prior: :math:`KL(q \| p(z))`.
        log_evidence: log p(x) by importance sampling, lost modes included. NaN where plates are subsampled.
        log_evidence_se: Its standard error; too small where k-hat is above the threshold.
        gap: ``log_evidence - elbo``.
        khat: Tail shape of the importance weights; over many items its 95 % quantile.
        khat_threshold: Largest k-hat at which weights of so many draws can be relied on.
        ess: Effective sample size of the draws; over many items its 5 % quantile.
        verdict: In words: "trust it", "use importance_resample", "train longer", "use NUTS", "start elsewhere" or
            "not known".
        reason: Why.
        advice: What to do next.
        log_weights: ``(S,)`` in float64; ``(S, N)`` where they fall apart over N items.
        sites: Site name -> :class:`SiteSummary`.
        items: Item by item, where every site is in one plate; else None.
        lost: Modes that the guide lost.
        obstacle: What keeps draws from sharing a run of the model, with the line; empty if nothing does.
    """

    elbo: float
    elbo_se: float
    expected_log_likelihood: float
    kl_to_prior: float
    log_evidence: float
    log_evidence_se: float
    gap: float
    khat: float
    khat_threshold: float
    ess: float
    verdict: str
    reason: str
    advice: str
    log_weights: Tensor
    sites: Mapping[str, SiteSummary]
    items: Items | None
    lost: tuple[LostMode, ...]
    obstacle: str = ""

    @property
    def trustworthy(self) -> bool:
        """Whether draws of the guide can be taken for draws of the posterior."""
        return self.verdict == TRUST

    @property
    def num_samples(self) -> int:
        """Number of draws S."""
        return len(self.log_weights)

    def __repr__(self) -> str:
        return f"Diagnosis(elbo={self.elbo:.4g}, gap={self.gap:.2g}, khat={self.khat:.2f}, verdict={self.verdict!r})"

    def __str__(self) -> str:
        lines = [
            f"{self.verdict[0].upper()}{self.verdict[1:]}: {self.reason}",
            f"ELBO          {self.elbo:>12.3f} +/- {self.elbo_se:.3f} nats = expected log likelihood "
            f"{self.expected_log_likelihood:.3f} - KL to prior {self.kl_to_prior:.3f}",
        ]
        if self.verdict != NOT_KNOWN:
            quantile = " (95 % of items)" if self.items is not None else ""
            lines += [
                f"log evidence  {self.log_evidence:>12.3f} +/- {self.log_evidence_se:.3f}",
                f"gap           {self.gap:>12.3f}",
                f"k-hat         {self.khat:>12.2f} (limit {self.khat_threshold:.2f}){quantile}",
                f"ESS           {self.ess:>12.0f} of {self.num_samples} draws",
            ]
        if self.items is not None:
            lines.append(_items_line(self.items, self.khat_threshold))
        if self.verdict != NOT_KNOWN:
            lines += _site_lines(list(self.sites.values()))
        if self.obstacle:
            lines.append(f"Draws were run one by one, since {self.obstacle}")
        return "\n".join([*lines, f"Next: {self.advice}"])


def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 4000,
    search: bool = True,
    progress: bool = True,
    seed: int | None = None,
) -> Diagnosis:
    r"""Say how good a guide is.

    Log weights :math:`\log p(x, z) - \log q(z)` of fresh draws give the ELBO and its two terms, the log evidence by
    importance sampling, and thus the gap; their tail (k-hat) says whether that estimate can be relied on. Since a
    guide's own draws cannot show what it lost, the log joint is also climbed from draws of the prior and from widened
    draws of the guide, and the mass around the points that are reached is compared with what the guide says of it.

    Enumerated discrete sites are summed out. Where every site of model and guide is in one plate (a variational
    autoencoder), everything is done item by item. Where plates are subsampled, only the ELBO and its terms are known.

    Args:
        model: Any Pyro model.
        guide: Any Pyro guide with a density, trained.
        args: The model's arguments; one mini-batch of them for an amortized guide.
        kwargs: The model's keyword arguments.
        num_samples: Number of draws S, >= 100.
        search: Whether to look for lost modes. It costs some 80 runs of the model and its gradient, vectorised over 25
            starts, and, at the end, a backward pass per dimension; up to 200 dimensions.
        progress: Whether to show a bar, if it takes more than a second.
        seed: Makes the result repeatable and leaves torch's global random state alone.

    Raises:
        NotImplementedError: If the guide has no density, or the model latents that neither the guide draws nor
            enumeration sums out.
        ValueError: If ``num_samples`` is out of range; if observed values are not finite or outside their support; if
            model and guide were swapped, or the guide is another model's, or of data of another size.
        Exception: Whatever the model raises in plain runs, and Pyro about the shapes of its sites.

    Warning:
        What neither the guide's draws nor the search come across remains unseen: a narrow mode far from prior and
        guide.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_flows import AutoFlowGuide, diagnose, fit
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> guide = AutoFlowGuide(model)
        >>> result = fit(model, guide, (y,), seed=0, progress=False)
        >>> report = diagnose(model, guide, (y,), seed=0)
        >>> report.verdict, f"{report.log_evidence:.2f}"
        ('trust it', '-6.63')

    References:
        Yao, Vehtari, Simpson, Gelman. Yes, but Did It Work?: Evaluating Variational Inference. ICML 2018.
        Vehtari, Simpson, Gelman, Yao, Gabry. Pareto Smoothed Importance Sampling. JMLR 25(72), 2024.
    """
    check_int("diagnose", "num_samples", num_samples, 100)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        sampler = ImportanceSampler("diagnose", model, guide, args, kwargs)
        warn_without_data("diagnose", sampler.score.model.nodes, sampler.score.model.call)
        regions, not_searched = find_regions(sampler, model, args, kwargs, search=search, progress=progress)
        return weigh(sampler, guide, num_samples, regions, not_searched, progress=progress)


def find_regions(
    sampler: ImportanceSampler,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    *,
    search: bool,
    progress: bool,
) -> tuple[Regions | None, str]:
    """Regions with mass, or None and why there are none."""
    reason = why_not(sampler) if search else "search is off"
    if reason:
        return None, reason
    regions = Search(sampler, model, args, kwargs or {}).run(progress=progress)
    return regions, "" if regions is not None else "the log joint cannot be followed"


def weigh(
    sampler: ImportanceSampler,
    guide: Callable[..., Any],
    num_samples: int,
    regions: Regions | None,
    not_searched: str,
    *,
    progress: bool,
) -> Diagnosis:
    """Draw, weigh, and judge."""
    structure = sampler.structure
    tally = SiteTally(structure)
    likelihoods, kls, weights, wheres = [], [], [], []
    for draws in sampler.chunks(num_samples, progress=progress):
        log_weights = draws.log_weights
        likelihoods.append(draws.log_likelihood.sum(-1))
        kls.append((draws.log_guide - draws.log_prior).sum(-1))
        weights.append(log_weights)
        # Weights that are noisy are none.
        tally.add(draws, log_weights if not structure.subsampled else torch.zeros_like(log_weights))
        if regions is not None:
            wheres.append(regions.locate(structure.pack(draws.values)).to("cpu", torch.int8))
    log_weights = torch.cat(weights)
    totals = log_weights.sum(-1)
    expected, kl = torch.cat(likelihoods).mean().item(), torch.cat(kls).mean().item()
    refused = (~totals.isfinite()).double().mean().item()
    elbo = expected - kl if not refused else -math.inf
    # The draws of one chunk share a mini-batch.
    parts = torch.stack([part.sum(-1).mean() for part in weights]) if structure.subsampled else totals
    evidence = _evidence(log_weights, known=not structure.subsampled)
    lost: tuple[LostMode, ...] = ()
    shares = torch.zeros(structure.num_items)
    if regions is not None:
        found = lost_mass(regions.log_mass.cpu(), regions.error.cpu(), torch.cat(wheres), log_weights)
        shares = found.share.sum(0)
        evidence = evidence._replace(log_evidence=found.log_evidence, error=found.error)
        lost = lost_modes(sampler, regions, found.share)
    log_evidence = evidence.log_evidence.sum().item()
    log_evidence_se = evidence.error.square().sum().sqrt().item()
    sites = tally.summaries()
    facts = Facts(
        subsampled=structure.subsampled,
        num_items=structure.num_items,
        refused=refused,
        gap=(log_evidence - elbo) / structure.num_items,
        gap_se=math.hypot(log_evidence_se, parts.std().item() / math.sqrt(len(parts))) / structure.num_items,
        khat=evidence.khat,
        threshold=khat_threshold(num_samples),
        ess=evidence.ess,
        num_samples=num_samples,
        largest=(log_weights - evidence.log_evidence).max().item(),
        lost=shares,
        lost_at=_describe(lost[0].values) if lost else "",
        separate=any(mode.separate for mode in lost),
        not_searched=not_searched,
        sites=sites,
    )
    items = None
    if structure.items is not None:
        by_item = log_weights.mean(0)
        items = Items(
            plate=structure.items.name,
            elbo=by_item,
            log_evidence=evidence.log_evidence,
            log_evidence_se=evidence.error,
            gap=evidence.log_evidence - by_item,
            khat=evidence.khat,
            ess=evidence.ess,
        )
    return Diagnosis(
        elbo=elbo,
        elbo_se=parts.std().item() / math.sqrt(len(parts)),
        expected_log_likelihood=expected,
        kl_to_prior=kl,
        log_evidence=log_evidence,
        log_evidence_se=log_evidence_se,
        gap=log_evidence - elbo,
        khat=evidence.khat.quantile(0.95, interpolation="higher").item(),
        khat_threshold=facts.threshold,
        ess=evidence.ess.quantile(0.05, interpolation="lower").item(),
        **judge(facts, guide)._asdict(),
        log_weights=log_weights if items is not None else totals,
        sites=sites,
        items=items,
        lost=lost,
        obstacle=sampler.score.model.obstacle,
    )


def _evidence(log_weights: Tensor, *, known: bool) -> Evidence:
    if known:
        return estimate_evidence(log_weights)
    nan = torch.full(log_weights.shape[1:], math.nan, dtype=torch.double)
    return Evidence(nan, nan, nan, nan)


def _describe(values: Mapping[str, Tensor]) -> str:
    """A few numbers of a few sites."""
    parts = []
    for name, value in list(values.items())[:4]:
        numbers = ", ".join(f"{x:.3g}" for x in value.flatten()[:3].tolist())
        parts.append(f"{name} = {numbers}{', ...' if value.numel() > 3 else ''}")
    return "; ".join(parts) + ("; ..." if len(values) > 4 else "")


def _items_line(items: Items, threshold: float) -> str:
    gaps = items.gap.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=items.gap.dtype))
    above = int((items.khat > threshold).sum())
    return (
        f"by item of '{items.plate}': gap 5 % {gaps[0]:.3f}, median {gaps[1]:.3f}, 95 % {gaps[2]:.3f}; k-hat above the "
        f"limit for {above} of {len(items.gap)}"
    )


def _site_lines(sites: list[SiteSummary]) -> list[str]:
    """A line a site; the worst first where they are too many."""
    if len(sites) > MAX_LINES:
        sites = sorted(sites, key=lambda site: site.shift + abs(math.log(max(site.sd_ratio, 1e-30))), reverse=True)
    width = max(len(site.name) for site in sites[:MAX_LINES]) if sites else 0
    lines = [f"{'site':<{width}}  E log prior  shift of mean, sds  sd / weighted sd"]
    for site in sites[:MAX_LINES]:
        lines.append(f"{site.name:<{width}}  {site.log_prior:>11.3f}  {site.shift:>18.2f}  {site.sd_ratio:>16.2f}")
    return lines + ([f"... and {len(sites) - MAX_LINES} more sites"] if len(sites) > MAX_LINES else [])
