# SPDX-License-Identifier: Apache-2.0
"""L7. From numbers to words: can the guide be trusted, why, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_flows.diagnostics.sites import SiteSummary
from pyro_flows.guides import AutoFlowGuide
from pyro_flows.importance.psis import nearly_constant

__all__ = [
    "NEUTRA",
    "NOT_KNOWN",
    "RESAMPLE",
    "SEARCH_ELSEWHERE",
    "TRAIN",
    "TRUST",
    "USE_NUTS",
    "Facts",
    "Verdict",
    "judge",
]

TRUST = "trust it"
RESAMPLE = "use importance_resample"
TRAIN = "train longer"
USE_NUTS = "use NUTS"
SEARCH_ELSEWHERE = "start elsewhere"
NOT_KNOWN = "not known"

# KL(q || posterior), per item, at which no marginal can be far off: half a squared shift in sds.
SMALL_GAP = 0.1
# Where training has more to give than reweighting.
LARGE_GAP = 1.0
# Differences between the guide and its reweighted self that matter: of means in sds, and of log sds.
MAX_SHIFT, MAX_LOG_SD = 0.1, 0.1
# Enough draws for summaries (Stan's advice).
ENOUGH = 400.0
# Share of items whose weights may have heavy tails; k-hat is noisy.
BAD_ITEMS = 0.05

NEUTRA = """\
neutra = NeuTraReparam(guide.requires_grad_(False))
mcmc = MCMC(NUTS(neutra.reparam(model)), num_samples=1000, warmup_steps=500); mcmc.run(*args, **kwargs)
draws = neutra.transform_sample(*[z.unsqueeze(-2) for z in mcmc.get_samples().values()])"""


class Verdict(NamedTuple):
    """In words.

    Attributes:
        verdict: One of a few phrases.
        reason: Why, in a sentence.
        advice: What to do, with the lines to write.
    """

    verdict: str
    reason: str
    advice: str


class Facts(NamedTuple):
    """What a verdict rests on.

    Attributes:
        subsampled: Plates with mini-batches.
        num_items: Number of items whose weights fall apart; 1 if they do not.
        refused: Share of draws where the model has no density.
        gap: KL(q || posterior) per item, in nats.
        gap_se: Its standard error.
        khat: ``(N,)``.
        threshold: The largest good one.
        ess: ``(N,)``.
        num_samples: Number of draws.
        largest: log of the largest weight over the mean one.
        lost: Share of the mass that lies outside of the guide's reach, item by item, ``(N,)``.
        lost_at: Where, in words.
        separate: Whether the log joint dips on the way there.
        not_searched: Why there was no search; empty if there was.
        sites: By site.
    """

    subsampled: tuple[str, ...]
    num_items: int
    refused: float
    gap: float
    gap_se: float
    khat: Tensor
    threshold: float
    ess: Tensor
    num_samples: int
    largest: float
    lost: Tensor
    lost_at: str
    separate: bool
    not_searched: str
    sites: Mapping[str, SiteSummary]


def judge(facts: Facts, guide: Any) -> Verdict:
    """The verdict on a guide.

    References:
        Yao, Vehtari, Simpson, Gelman. Yes, but Did It Work?: Evaluating Variational Inference. ICML 2018.
        Vehtari, Simpson, Gelman, Yao, Gabry. Pareto Smoothed Importance Sampling. JMLR 25(72), 2024.
    """
    if facts.subsampled:
        return Verdict(
            NOT_KNOWN,
            f"plate '{facts.subsampled[0]}' is subsampled, so log weights carry the noise of mini-batches and say "
            "nothing about the evidence.",
            "Run a model of the full plate with the same sites on the same guide, or compare ELBOs.",
        )
    if facts.refused:
        return Verdict(
            TRAIN,
            f"the model has no density at {facts.refused:.2%} of the draws, so the ELBO is minus infinity.",
            "Look at the model at guide draws with validation on; then train on: `fit(model, guide, args)`.",
        )
    bad = facts.khat > facts.threshold
    lost = facts.lost > 0
    if (facts.num_items == 1 and lost.any()) or lost.double().mean() > BAD_ITEMS:
        reason = f"about {facts.lost.max():.0%} of the mass lies around {facts.lost_at}, where the guide does not go"
        reason += f" ({int(lost.sum())} of {facts.num_items} items)." if facts.num_items > 1 else "."
        if not facts.separate:
            return Verdict(TRAIN, reason, "No ridge lies between: `fit(model, guide, args)` goes on from here.")
        return Verdict(
            SEARCH_ELSEWHERE,
            reason,
            "It is another mode, which the guide's own draws cannot show. Start a guide there, `AutoFlowGuide(model, "
            "init_loc_fn=init_to_value(values=report.lost[0].values))`, and `compare` the two.",
        )
    # The fit of a tail knows no scale: weights that hardly differ have none that matters.
    if bad.double().mean() > (BAD_ITEMS if facts.num_items > 1 else 0.0) and not nearly_constant(
        facts.largest, float(facts.ess.min()), facts.num_samples
    ):
        return _heavy(facts, guide)
    enough = facts.ess.double().quantile(BAD_ITEMS) >= min(ENOUGH, facts.num_samples / 2)
    small = facts.gap - 2.0 * facts.gap_se <= SMALL_GAP
    wrong = _wrong_site(facts)
    if wrong or not small or not enough:
        reason = wrong or (f"its gap is {facts.gap:.2f} nats" if not small else "few draws carry most of the weight")
        return Verdict(
            RESAMPLE,
            f"{reason}, but k-hat is below {facts.threshold:.2f}, so importance weights can mend it.",
            "`importance_resample(model, guide, 1000, args)` gives draws of the posterior.",
        )
    reason = "draws of the guide are as good as the posterior's"
    reason += f"; other modes were not looked for, since {facts.not_searched}." if facts.not_searched else "."
    return Verdict(TRUST, reason, "Use `guide.sample_posterior(1000, ...)` or `Predictive`.")


def _wrong_site(facts: Facts) -> str:
    """A site whose marginal changes beyond noise when it is reweighted, in words; empty if there is none."""
    noise = 4.0 / math.sqrt(max(float(facts.ess.min()), 1.0))
    for site in facts.sites.values():
        if site.shift > MAX_SHIFT + noise:
            return f"the mean of '{site.name}' is {site.shift:.2f} sds off"
        if abs(math.log(max(site.sd_ratio, 1e-30))) > MAX_LOG_SD + noise:
            return f"the sd of '{site.name}' is {site.sd_ratio:.2f} times what it should be"
    return ""


def _heavy(facts: Facts, guide: Any) -> Verdict:
    """The advice where importance weights have too heavy a tail."""
    number = f"k-hat is {facts.khat.max():.2f}, above {facts.threshold:.2f}"
    if facts.num_items > 1:
        above = int((facts.khat > facts.threshold).sum())
        number = f"k-hat is above {facts.threshold:.2f} for {above} of {facts.num_items} items"
    if facts.gap > LARGE_GAP:
        ours = isinstance(guide, AutoFlowGuide)
        more = "another family, such as flow='spline_coupling'" if ours else "`AutoFlowGuide(model)`"
        return Verdict(
            TRAIN,
            f"{number}: the guide misses tails of the posterior, and the gap is at least {facts.gap:.1f} nats.",
            f"`fit(model, guide, args)` goes on from here; if that gains nothing, take {more}.",
        )
    reason = f"{number}: the guide is close, but misses tails of the posterior that weights cannot bring back."
    try:
        straightens = isinstance(guide, AutoContinuous) and guide.get_transform() is not None
    except (NotImplementedError, ValueError, TypeError, RuntimeError):
        straightens = False
    if not straightens:
        return Verdict(USE_NUTS, reason, "`MCMC(NUTS(model), 1000)`, or train an `AutoFlowGuide(model)` first.")
    return Verdict(USE_NUTS, reason, "NUTS with NeuTraReparam(guide), in three lines:\n" + NEUTRA)
