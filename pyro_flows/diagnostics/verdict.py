# SPDX-License-Identifier: Apache-2.0
"""L7. The verdict on a guide, its reason and advice, derived from diagnostics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_flows.diagnostics.evidence import Evidence
from pyro_flows.diagnostics.moves import Drift
from pyro_flows.diagnostics.report import NOT_KNOWN, RESAMPLE, SEARCH_ELSEWHERE, TRAIN, TRUST, USE_NUTS, Diagnosis
from pyro_flows.diagnostics.search import SearchResult
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.importance.psis import nearly_constant

__all__ = ["NEUTRA", "Thresholds", "Verdict", "judge", "khat_is_noise", "not_known"]

NEUTRA = """\
neutra = NeuTraReparam(guide.requires_grad_(False))
mcmc = MCMC(NUTS(neutra.reparam(model)), num_samples=1000, warmup_steps=500); mcmc.run(*args, **kwargs)
draws = neutra.transform_sample(*[z.unsqueeze(-2) for z in mcmc.get_samples().values()])"""


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the verdict. That of k-hat is :func:`~pyro_flows.diagnostics.khat_threshold`.

    Attributes:
        small_gap: KL(q || posterior) per item in nats at which no marginal is far off: that of a normal whose mean is
            off by 0.45 standard deviations, since the KL is half of the squared shift.
        large_gap: KL per item in nats above which further training is advised rather than importance weights.
        gap_z_score: Standard errors by which a gap must exceed ``small_gap``.
        max_gap_se: Largest acceptable standard error of the gap per item, in nats: beyond, it is not known.
        max_shift: Largest acceptable error of a mean, in standard deviations; the upper limit of its estimate counts.
        max_sd_error: Largest acceptable relative error of a standard deviation; the same.
        most_of_the_mass: Share of the mass above which what a guide has lost is all that matters.
        max_missing: Largest acceptable share of the mass that the guide's weights do not account for.
        evidence_z_score: Standard errors by which one guide's estimate of the evidence must lie below another's to be
            called too low.
        min_ess: Effective number of draws that summaries need: Vehtari, Gelman, Simpson, Carpenter, Buerkner.
            Rank-Normalization, Folding, and Localization. Bayesian Analysis 16(2), 2021.
        min_ess_to_resample: Effective number of draws below which resampling is not advised: with the 10,000 draws that
            it takes, 200 of 4000 are 500.
        max_bad_items: Share of items that may be bad, since k-hat is noisy; with one item there is none.
    """

    small_gap: float = 0.1
    large_gap: float = 1.0
    gap_z_score: float = 2.0
    max_gap_se: float = 0.2
    max_shift: float = 0.15
    max_sd_error: float = 0.15
    most_of_the_mass: float = 0.95
    max_missing: float = 0.05
    evidence_z_score: float = 4.0
    min_ess: float = 400.0
    min_ess_to_resample: float = 200.0
    max_bad_items: float = 0.05


class Verdict(NamedTuple):
    """A verdict with its reason and advice.

    Attributes:
        verdict: One of the phrases of :class:`~pyro_flows.Diagnosis`.
        reason: Reason for the verdict, in a sentence.
        advice: Recommended next step, with the code for it.
    """

    verdict: str
    reason: str
    advice: str


def khat_is_noise(log_weights: Tensor, evidence: Evidence, drift: Drift | None) -> bool:
    """Whether log weights, ``(S, N)``, hardly differ: k-hat is invariant to scale, and so meaningless then.

    A few weights that are large do not matter if draws that are moved, into the tails too, stay what they are.
    """
    largest = (log_weights - evidence.log_evidence).max().item() if drift is None or drift.is_significant else 0.0
    return nearly_constant(largest, float(evidence.ess.min()), len(log_weights))


def not_known(plate: str) -> Verdict:
    """The verdict where a plate is subsampled."""
    return Verdict(
        NOT_KNOWN,
        f"plate '{plate}' is subsampled, so log weights carry the noise of mini-batches and say nothing about the "
        "evidence.",
        "Run a model of the full plate with the same sites on the same guide, or compare ELBOs.",
    )


def judge(
    diagnosis: Diagnosis,
    evidence: Evidence,
    search: SearchResult,
    guide: Any,
    limits: Thresholds = Thresholds(),
    *,
    drift: Drift | None = None,
    by_reference: bool = False,
) -> Verdict:
    """The verdict on a guide.

    Args:
        diagnosis: Diagnosis of the guide, without the verdict.
        evidence: Estimates for each item; a single item where log weights do not factorize.
        search: Result of the search for lost modes.
        guide: The guide; the advice depends on its type.
        limits: Thresholds of the verdict.
        drift: Change of the guide's draws by moves that leave the posterior as it is; None if it was not measured.
        by_reference: Whether summaries of sites and the evidence come from reliable weights of another distribution
            than the guide, since the guide's own have heavy tails.

    References:
        Yao, Vehtari, Simpson, Gelman. Yes, but Did It Work?: Evaluating Variational Inference. ICML 2018.
        Vehtari, Simpson, Gelman, Yao, Gabry. Pareto Smoothed Importance Sampling. JMLR 25(72), 2024.
    """
    inaccurate = _inaccurate(diagnosis, evidence, limits, by_reference=by_reference)
    for verdict in (
        _without_density(diagnosis),
        _lost_modes(diagnosis, evidence, guide, limits),
        # Tails that hardly matter, as a reference shows, do not count.
        _heavy_tails(diagnosis, evidence, guide, drift, limits) if inaccurate or not by_reference else None,
        _missing_mass(evidence, drift, limits),
        inaccurate,
    ):
        if verdict is not None:
            return verdict
    reason = "draws of the guide are as good as the posterior's"
    reason += f"; other modes were not looked for, since {search.why_none}" if search.why_none else ""
    heavy = next((site.name for site in diagnosis.sites.values() if not site.has_sd), "")
    reason += f"; tails of '{heavy}' are too heavy for a mean and an sd, so take its quantiles." if heavy else "."
    return Verdict(TRUST, reason, "Use `guide.sample_posterior(1000, ...)` or `Predictive`.")


def _without_density(diagnosis: Diagnosis) -> Verdict | None:
    """Verdict if the ELBO is minus infinity."""
    if math.isfinite(diagnosis.elbo):
        return None
    weights = diagnosis.log_weights.reshape(diagnosis.num_samples, -1).sum(-1)
    share = (~weights.isfinite()).double().mean().item()
    return Verdict(
        TRAIN,
        f"the model has no density at {share:.2%} of the draws, so the ELBO is minus infinity.",
        "Look at the model at guide draws with validation on; then train on: `fit(model, guide, args)`.",
    )


def _lost_modes(diagnosis: Diagnosis, evidence: Evidence, guide: Any, limits: Thresholds) -> Verdict | None:
    """Verdict if the search found modes that the guide lost."""
    lost, num_items = evidence.lost > 0, len(evidence.lost)
    if not _is_bad(lost, limits):
        return None
    where = _describe(diagnosis.lost[0].values)
    reason = f"about {evidence.lost.max():.0%} of the mass lies around {where}, where the guide does not go"
    reason += f" ({int(lost.sum())} of {num_items} items)." if num_items > 1 else "."
    if not any(mode.separate for mode in diagnosis.lost):
        return Verdict(TRAIN, reason, "No ridge lies between: `fit(model, guide, args)` goes on from here.")
    advice = "It is another mode, which the guide's own draws cannot show. "
    if evidence.lost.max() < limits.most_of_the_mass:
        own = guide.posterior.num_modes if isinstance(guide, AutoFlowGuide) else 1
        count = own + sum(mode.separate for mode in diagnosis.lost)
        advice += (
            "A mixture has all: `AutoFlowGuide(model, flow=flows.Auto(base=flows.Mixture(num_components="
            f"{count})))`, which `fit` starts at the modes that it finds. Or start a guide"
        )
    else:
        advice += "Start a guide"
    advice += " there, `AutoFlowGuide(model, init_loc_fn=init_to_value(values=report.lost[0].values))`"
    return Verdict(SEARCH_ELSEWHERE, reason, f"{advice}, and `compare` the two.")


def _heavy_tails(
    diagnosis: Diagnosis, evidence: Evidence, guide: Any, drift: Drift | None, limits: Thresholds
) -> Verdict | None:
    """Verdict if the tail of the importance weights is too heavy."""
    threshold, num_items = diagnosis.khat_threshold, len(evidence.khat)
    bad = evidence.khat > threshold
    log_weights = diagnosis.log_weights.reshape(diagnosis.num_samples, num_items)
    if not _is_bad(bad, limits) or khat_is_noise(log_weights, evidence, drift):
        return None
    number = f"k-hat is {evidence.khat.max():.2f}, above {threshold:.2f}"
    if num_items > 1:
        number = f"k-hat is above {threshold:.2f} for {int(bad.sum())} of {num_items} items"
    gap = diagnosis.gap / num_items
    if gap > limits.large_gap:
        ours = isinstance(guide, AutoFlowGuide)
        more = "another family, such as flow='spline_coupling'" if ours else "`AutoFlowGuide(model)`"
        return Verdict(
            TRAIN,
            f"{number}: the guide misses tails of the posterior, and the gap is at least {gap:.1f} nats.",
            f"`fit(model, guide, args)` goes on from here; if that gains nothing, take {more}.",
        )
    reason = f"{number}: the guide is close, but misses tails of the posterior that weights cannot bring back."
    if not _has_transform(guide):
        return Verdict(USE_NUTS, reason, "`MCMC(NUTS(model), 1000)`, or train an `AutoFlowGuide(model)` first.")
    return Verdict(USE_NUTS, reason, "NUTS with NeuTraReparam(guide), in three lines:\n" + NEUTRA)


def _missing_mass(evidence: Evidence, drift: Drift | None, limits: Thresholds) -> Verdict | None:
    """Verdict if there is mass where the guide does not draw, although none of its modes is lost."""
    if _is_bad(evidence.missing > limits.max_missing, limits):
        reason = f"about {evidence.missing.max():.0%} of the mass lies where the guide does not go"
    elif drift is not None and drift.is_significant:
        reason = (
            "mass lies next to where the guide goes: moves by Hamiltonian Monte Carlo, which leave the posterior as it "
            f"is, change its draws ({drift.z_score:.1f} standard errors)"
        )
    else:
        return None
    return Verdict(
        TRAIN,
        f"{reason}, and importance weights cannot bring it back.",
        "`fit(model, guide, args)` goes on from here; if that gains nothing, use NUTS: `MCMC(NUTS(model), 1000)`.",
    )


def _inaccurate(diagnosis: Diagnosis, evidence: Evidence, limits: Thresholds, *, by_reference: bool) -> Verdict | None:
    """Verdict if the guide has errors that importance weights can correct."""
    num_items = len(evidence.ess)
    gap, gap_se = diagnosis.gap / num_items, math.hypot(diagnosis.log_evidence_se, diagnosis.elbo_se) / num_items
    min_ess = 0.0 if by_reference else min(limits.min_ess, diagnosis.num_samples / 2)
    reason = _wrong_site(diagnosis, limits)
    if not reason and not (gap - limits.gap_z_score * gap_se <= limits.small_gap and gap_se <= limits.max_gap_se):
        reason = f"its gap is {gap:.2f} nats, with a standard error of {gap_se:.2f}"
    if not reason and not evidence.ess.double().quantile(limits.max_bad_items) >= min_ess:
        reason = "few draws carry most of the weight"
    if not reason:
        return None
    if not evidence.ess.double().quantile(limits.max_bad_items) >= min(
        limits.min_ess_to_resample, diagnosis.num_samples / 4
    ):
        return Verdict(
            TRAIN,
            f"{reason}, and the weights are worth {diagnosis.ess:.0f} draws, too few to correct it.",
            "`fit(model, guide, args)` goes on from here; if that gains nothing, take another family.",
        )
    return Verdict(
        RESAMPLE,
        f"{reason}, but k-hat is below {diagnosis.khat_threshold:.2f}, so importance weights can correct it.",
        "`importance_resample(model, guide, 1000, args)` gives draws of the posterior.",
    )


def _wrong_site(diagnosis: Diagnosis, limits: Thresholds) -> str:
    """A site whose marginal is off, or may be, in words; empty if there is none."""
    for site in diagnosis.sites.values():
        mean, sd = ("mean", "sd") if site.has_sd else ("bulk", "spread of the bulk")
        if site.max_shift > limits.max_shift:
            return f"the {mean} of '{site.name}' may be {site.max_shift:.2f} sds off"
        if site.max_sd_error > limits.max_sd_error:
            return f"the {sd} of '{site.name}' may be {site.max_sd_error:.0%} off"
    return ""


def _is_bad(items: Tensor, limits: Thresholds) -> bool:
    """Whether the share of bad items exceeds ``max_bad_items``."""
    return items.double().mean().item() > (limits.max_bad_items if len(items) > 1 else 0.0)


def _has_transform(guide: Any) -> bool:
    """Whether NeuTraReparam supports the guide."""
    try:
        return isinstance(guide, AutoContinuous) and guide.get_transform() is not None
    except (NotImplementedError, ValueError, TypeError, RuntimeError):
        return False


def _describe(values: Mapping[str, Tensor]) -> str:
    """Abbreviated values of a few sites."""
    parts = []
    for name, value in list(values.items())[:4]:
        numbers = ", ".join(f"{x:.3g}" for x in value.flatten()[:3].tolist())
        parts.append(f"{name} = {numbers}{', ...' if value.numel() > 3 else ''}")
    return "; ".join(parts) + ("; ..." if len(values) > 4 else "")
