# SPDX-License-Identifier: Apache-2.0
"""L7. :func:`diagnose`: accuracy of a guide, as estimates with standard errors and as a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_flows._checks import check_bool, checked, integer
from pyro_flows._random import seeded
from pyro_flows._threads import one_at_a_time
from pyro_flows.diagnostics.division import Division
from pyro_flows.diagnostics.elbo import estimate_elbo
from pyro_flows.diagnostics.evidence import Evidence, estimate_evidence, lost_mass
from pyro_flows.diagnostics.modes import LostMode, Modes, lost_modes
from pyro_flows.diagnostics.moves import measure_drift, measure_reach
from pyro_flows.diagnostics.reference import sample_reference
from pyro_flows.diagnostics.report import TRUST, Diagnosis, Items
from pyro_flows.diagnostics.search import Regions, SearchResult, search_regions
from pyro_flows.diagnostics.sites import SiteTally
from pyro_flows.diagnostics.verdict import judge, khat_is_noise, not_known
from pyro_flows.importance.psis import khat_threshold
from pyro_flows.importance.weights import Draws, ImportanceSampler
from pyro_flows.models.draws import GuideSampler
from pyro_flows.models.precision import may_be_rounded, rounding_message

__all__ = ["diagnose", "weigh"]


@checked(num_samples=integer(100), distributed=check_bool)
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
    distributed: bool = False,
) -> Diagnosis:
    r"""Estimate how far a guide is from the posterior, and advise on what to do next.

    Log weights :math:`\log p(x, z) - \log q(z)` of new draws give the ELBO and its two terms, the log evidence by
    importance sampling, and the gap between them; the tail of the weights (k-hat) shows whether that estimate is
    reliable. A guide's own draws cannot reveal a mode that it lost. So the log joint is also maximized from draws of
    the prior and from widened draws of the guide, and the probability mass around points on the paths of ascent is
    compared with the guide's own estimate of it. In up to 12 dimensions, weighted draws of a wider mixture than the
    guide estimate evidence and moments too; and draws of the guide, moved once by Hamiltonian Monte Carlo, must not
    drift, nor, moved a few times, come to where the guide hardly has density.

    Enumerated discrete sites are summed out. Where every site of model and guide is in one plate (a variational
    autoencoder), all numbers are given item by item. Where plates are subsampled, only the ELBO and its terms are
    estimated.

    Args:
        model: Any Pyro model.
        guide: Any Pyro guide with a density, trained.
        args: The model's arguments; one mini-batch of them for an amortized guide.
        kwargs: The model's keyword arguments.
        num_samples: Number of draws S, >= 100.
        search: Whether to look beyond the guide's draws, in models of up to 200 dimensions. It costs up to 90 runs of
            the model and its gradient, vectorized over 25 to 73 initial points, a backward pass for each dimension at
            the end, Newton steps for up to three Gaussians where the guide does not draw, 2000 to 20,000 draws of the
            mixture, and some gradients at some of the guide's draws.
        progress: Whether to show a progress bar, if it takes more than a second.
        seed: Makes the result reproducible; torch's global random state is not changed. None uses the global state.
        distributed: Whether the processes of ``torch.distributed``'s default group share the draws, which all of them
            have to call with the same guide and data; all get the same result. The search and the judgment are the
            first one's, which moves draws of its own. See :doc:`/distributed`.

    Raises:
        TypeError: If an argument is of another type, or the model or the guide does not take the arguments.
        NotImplementedError: If the guide has no density, or the model has latents that are neither in the guide nor
            enumerated.
        ValueError: If ``num_samples`` is out of range; if observed values are not finite or outside their support; if
            model and guide were swapped, or the guide belongs to another model, or to data of another size.
        ValueError: If processes that share the draws have other options, data or parameters.
        RuntimeError: If another process that shares the draws raises, or has ended.
        Exception: Any exception that the model raises in plain runs, or Pyro about the shapes of its sites.

    Warning:
        A narrow mode far from both prior and guide is not detected.

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
    division = Division("diagnose", distributed=distributed, num_samples=num_samples, seed=seed, search=search)
    with one_at_a_time("diagnose"), seeded(division.seed):
        sampler = division.sampler(model, guide, args, kwargs)
        division.warn_without_data(sampler)
        division.check(model, {"the guide": guide}, args, kwargs or {})
        look = partial(search_regions, sampler, model, args, kwargs or {}, enabled=search, progress=progress)
        with division.first_buffers(model, guide):
            return weigh(sampler, guide, division.search(look, sampler), division, moves=search, progress=progress)


def weigh(
    sampler: ImportanceSampler,
    guide: Callable[..., Any],
    search: SearchResult,
    division: Division,
    *,
    moves: bool,
    progress: bool,
) -> Diagnosis:
    """Draw from the guide, compute importance weights, and derive the diagnosis.

    Args:
        sampler: Sampler of the model and the guide.
        guide: The guide.
        search: Regions with posterior mass, found without the guide; or the reason that there are none.
        division: The number of draws, and the processes that share them.
        moves: Whether draws are moved to beyond the guide's reach.
        progress: Whether to show a progress bar.
    """
    tally = SiteTally(sampler.structure)
    draw = partial(_draw, sampler, tally, search.regions)
    samples, first = division.sample(sampler, tally, draw, progress=progress)

    def judged() -> Diagnosis:
        # A share may be too small for what is made of these; one process takes its own first draws.
        anew = division.processes.size > 1 and moves
        some = next(sampler.chunks(division.num_samples, progress=False)) if anew else first
        found = _judged(sampler, guide, _joined(samples), some, tally, search, moves=moves)
        return replace(found, lost=tuple(mode.to("cpu") for mode in found.lost))

    found = division.first(judged)
    # Where a guide can start from them: each process may have a GPU of its own.
    device = next(iter(first.values.values())).device
    return replace(found, lost=tuple(mode.to(device) for mode in found.lost))


def _judged(
    sampler: ImportanceSampler,
    guide: Callable[..., Any],
    sample: _Sample,
    first: Draws,
    tally: SiteTally,
    search: SearchResult,
    *,
    moves: bool,
) -> Diagnosis:
    """The diagnosis by all draws; ``first`` are draws with their values, of these or others."""
    structure, num_samples = sampler.structure, len(sample.log_weights)
    elbo = estimate_elbo(sample.log_likelihood, sample.log_ratio, sample.log_weights, sample.group_sizes)
    threshold = khat_threshold(num_samples)
    evidence, lost = _evidence(sampler, sample, first, search.regions)
    if sampler.draws_at_once and not structure.subsampled:
        tally.add_more(GuideSampler(guide, sampler.score.model.call), sampler.chunk)
    reference, drift = None, None
    if search.regions is not None and sampler.score.is_vectorized:
        modes = Modes(sampler, search.regions, structure.pack(first.values))
        reference = sample_reference(sampler, first, search.regions, like=tally, modes=modes)
        drift = measure_drift(sampler, first, modes)
    if moves and (reference is None or not reference.is_reliable):
        reach = measure_reach(sampler, guide, first)
        evidence = evidence if reach is None else reach.correct(evidence)
    if reference is None:
        sites, by_reference = tally.summaries(), False
    else:
        is_noise = khat_is_noise(sample.log_weights, evidence, drift)
        evidence = reference.correct(evidence, threshold, is_noise=is_noise)
        sites, by_reference = reference.summaries(tally, evidence, is_noise=is_noise), reference.is_reliable
    log_evidence = evidence.log_evidence.sum().item()
    items = None
    if structure.items is not None:
        items = Items(
            plate=structure.items.name,
            elbo=elbo.by_item,
            log_evidence=evidence.log_evidence,
            log_evidence_se=evidence.error,
            gap=evidence.log_evidence - elbo.by_item,
            khat=evidence.khat,
            ess=evidence.ess,
        )
    diagnosis = Diagnosis(  # without the verdict
        elbo=elbo.mean,
        elbo_se=elbo.error,
        expected_log_likelihood=elbo.expected_log_likelihood,
        kl_to_prior=elbo.kl_to_prior,
        log_evidence=log_evidence,
        log_evidence_se=evidence.error.square().sum().sqrt().item(),
        gap=log_evidence - elbo.mean,
        khat=evidence.khat.quantile(0.95, interpolation="higher").item(),
        khat_threshold=threshold,
        ess=evidence.ess.quantile(0.05, interpolation="lower").item(),
        verdict="",
        reason="",
        advice="",
        log_weights=sample.log_weights.sum(-1) if items is None else sample.log_weights,
        sites=sites,
        items=items,
        lost=lost,
        obstacle=sampler.score.model.obstacle,
        num_refused=elbo.num_refused,
        dtype=sample.dtype,
    )
    plates = structure.subsampled
    verdict = (
        not_known(plates[0])
        if plates
        else judge(diagnosis, evidence, search, guide, drift=drift, by_reference=by_reference)
    )
    is_suspect = verdict.verdict != TRUST or may_be_rounded(diagnosis.elbo)
    rounding = rounding_message(sampler.score.model.model, guide, sampler.score.model.call) if is_suspect else ""
    return replace(diagnosis, **verdict._asdict(), rounding=rounding)


class _Sample(NamedTuple):
    """Log densities of S draws.

    Attributes:
        log_likelihood: log p(x | z), ``(S,)``; NaN for draws that the model refuses.
        log_ratio: log q(z) - log p(z), ``(S,)``.
        log_weights: log p(x, z) - log q(z) by item, ``(S, N)``.
        where: Index of the region of each draw, ``(S, N)``; None if there was no search.
        group_sizes: Numbers of consecutive draws that share a mini-batch; None if all draws are independent.
        dtype: Precision of the draws.
    """

    log_likelihood: Tensor
    log_ratio: Tensor
    log_weights: Tensor
    where: Tensor | None
    group_sizes: list[int] | None
    dtype: torch.dtype


def _draw(sampler: ImportanceSampler, tally: SiteTally, regions: Regions | None, chunks: Iterator[Draws]) -> _Sample:
    """Draw in chunks; values of latents are added to the tally and not kept."""
    structure = sampler.structure
    likelihoods, ratios, weights, wheres = [], [], [], []
    for draws in chunks:
        log_weights = draws.log_weights
        likelihoods.append(draws.log_likelihood.sum(-1))
        ratios.append((draws.log_guide - draws.log_prior).sum(-1))
        weights.append(log_weights)
        # Weights with the noise of mini-batches are useless.
        tally.add(draws, log_weights if not structure.subsampled else torch.zeros_like(log_weights))
        if regions is not None:
            wheres.append(regions.locate(structure.pack(draws.values)).to("cpu", torch.int8))
    return _Sample(
        log_likelihood=torch.cat(likelihoods),
        log_ratio=torch.cat(ratios),
        log_weights=torch.cat(weights),
        where=torch.cat(wheres) if wheres else None,
        group_sizes=[len(part) for part in weights] if structure.subsampled else None,
        dtype=next(iter(draws.values.values())).dtype,
    )


def _joined(samples: Sequence[_Sample]) -> _Sample:
    """The draws of all processes."""
    sizes = [sample.group_sizes for sample in samples]
    return _Sample(
        log_likelihood=torch.cat([sample.log_likelihood for sample in samples]),
        log_ratio=torch.cat([sample.log_ratio for sample in samples]),
        log_weights=torch.cat([sample.log_weights for sample in samples]),
        where=None if samples[0].where is None else torch.cat([s.where for s in samples if s.where is not None]),
        group_sizes=None if sizes[0] is None else [count for each in sizes for count in each or ()],
        dtype=samples[0].dtype,
    )


def _evidence(
    sampler: ImportanceSampler, sample: _Sample, first: Draws, regions: Regions | None
) -> tuple[Evidence, tuple[LostMode, ...]]:
    """The log evidence, including the mass that the guide lost, and the lost modes."""
    if sampler.structure.subsampled:
        return Evidence.unknown(sampler.structure.num_items), ()
    evidence = estimate_evidence(sample.log_weights)
    if regions is None or sample.where is None:
        return evidence, ()
    packed = sampler.structure.pack(first.values).double()
    distance = ((regions.centers - packed.mean(0)) / packed.std(0)).abs().amax(-1).cpu()  # (K, N)
    found = lost_mass(regions.log_mass.cpu(), regions.error.cpu(), sample.where, sample.log_weights, distance)
    missing = -torch.expm1(evidence.log_evidence - found.log_evidence)
    evidence = evidence._replace(
        log_evidence=found.log_evidence, error=found.error, lost=found.share.sum(0), missing=missing
    )
    return evidence, lost_modes(sampler, regions, found.share)
