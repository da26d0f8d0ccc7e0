# SPDX-License-Identifier: Apache-2.0
"""L7. What :func:`~pyro_flows.fit` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pyro_flows.diagnostics import Diagnosis
from pyro_flows.diagnostics.report import NOT_KNOWN, TRUST

__all__ = ["LOOK_CLOSER", "FitResult", "WeightedResult", "Widening"]

LOOK_CLOSER = "look closer"


@dataclass(frozen=True)
class WeightedResult:
    """What training by another objective than the ELBO added to the ELBO's fit.

    Attributes:
        objective: ``"importance_weighted"`` or ``"forward_kl"``.
        value: The bound of ``num_draws`` draws, or the negative forward KL as far as these can tell, in nats.
        se: Its standard error.
        start: The same of the ELBO's fit.
        num_draws: Number of draws that are weighted against each other.
        steps: Number of optimizer steps, in addition to those of the ELBO.
        kept: Whether the guide is the one that they trained; false where the ELBO's fit had the higher value.
        reason: Why training stopped.
        losses: Estimates of the negative objective in nats, one per step.
    """

    objective: str
    value: float
    se: float
    start: float
    num_draws: int
    steps: int
    kept: bool
    reason: str
    losses: tuple[float, ...]

    def __str__(self) -> str:
        forward = self.objective == "forward_kl"
        what, sign = (
            (f"Forward KL, by {self.num_draws} draws", -1) if forward else (f"Bound of {self.num_draws} draws", 1)
        )
        kept = "" if self.kept else ", which was kept"
        return (
            f"{what}: {sign * self.value:.3f} +/- {self.se:.3f} nats ({sign * self.start:.3f} after the ELBO's fit"
            f"{kept}); {self.steps} steps; stopped: {self.reason}"
        )


@dataclass(frozen=True)
class Widening:
    """What a wider flow added, which ``fit`` takes by itself where the first one has left more than ``target_gap``.

    Attributes:
        gap: The gap that the first flow had left, in nats, by 10,000 importance weights.
        gain: What the wider flow added to the ELBO, in nats, >= 0 up to the noise of estimates.
        gain_se: Its standard error.
        steps: Number of optimizer steps, among those of the result.
        num_particles: Number of particles per step.
        kept: Whether the guide is the one that they trained; false where the first flow's had the higher ELBO.
    """

    gap: float
    gain: float
    gain_se: float
    steps: int
    num_particles: int
    kept: bool

    def __str__(self) -> str:
        gained = f"{max(self.gain, 0.0):+.3f} +/- {self.gain_se:.3f} nats" if self.kept else "no gain"
        kept = "" if self.kept else "; the first flow was kept"
        return (
            f"A wider flow, since {self.gap:.3f} nats were left: {gained} in {self.steps} of these steps, with "
            f"{self.num_particles} draws each{kept}"
        )


@dataclass(frozen=True)
class FitResult:
    """Result of :func:`fit`; prints as a summary.

    Attributes:
        elbo: ELBO of the guide as it is now, from fresh draws, in nats.
        elbo_se: Its standard error (over mini-batches too, if there are any).
        start_elbo: ELBO of the initial guide, after the warm start if there was one, from as many draws.
        steps: Number of optimizer steps.
        seconds: Wall time, of this call where a run was resumed.
        kept: ``"flow"`` (the trained guide), or ``"start"`` (the initial guide) where training did not improve the
            ELBO.
        reason: Why training stopped.
        skipped: Number of skipped steps, whose gradient was not finite or above 20 times its running median norm.
        rollbacks: Number of times that, on divergence, the best parameters were restored and the learning rate halved.
        num_particles: Number of particles per step.
        learning_rate: Peak learning rate of the first cycle.
        losses: Negative ELBO estimates in nats, one per step.
        is_point: Whether the guide is a point, as AutoDelta, so that ``elbo`` is the log joint density there.
        obstacle: Reason why the particles of a step cannot share a run of the model, with the line of the model; empty
            if they can.
        skipped_at: The sites without a finite log density at a draw like those of the first skipped step; empty if none
            was found.
        diagnosis: A first verdict, by the weights of fresh draws, without the search for lost modes; None with
            mini-batches, where draws cannot share a run, and where the guide has no density.
        dtype: Precision of the guide, in which everything was computed.
        rounding: What float32 is the reason for, such as skipped steps, and what to do; empty if nothing is.
        num_modes: Number of modes that the warm start has found, where it gave the guide a mixture with a component on
            each; 1 otherwise.
        widening: What a wider flow has added in this run; None if there was no need or use for one, or if the guide had
            one from an earlier run.
        weighted: What another objective than the ELBO added; None if there was none. Of the numbers above, ``elbo`` and
            ``diagnosis`` are then those of the final guide, the others those of the ELBO's fit.
    """

    elbo: float
    elbo_se: float
    start_elbo: float
    steps: int
    seconds: float
    kept: str
    reason: str
    skipped: int
    rollbacks: int
    num_particles: int
    learning_rate: float
    losses: tuple[float, ...]
    obstacle: str = ""
    is_point: bool = False
    dtype: torch.dtype | None = None
    rounding: str = ""
    skipped_at: str = ""
    diagnosis: Diagnosis | None = None
    widening: Widening | None = None
    weighted: WeightedResult | None = None
    num_modes: int = 1

    @property
    def gap(self) -> float:
        """Estimated KL divergence from the posterior, in nats; NaN without a diagnosis."""
        return math.nan if self.diagnosis is None else self.diagnosis.gap

    @property
    def khat(self) -> float:
        """Tail shape of the importance weights; NaN without a diagnosis."""
        return math.nan if self.diagnosis is None else self.diagnosis.khat

    @property
    def verdict(self) -> str:
        """``"trust it"``; ``"look closer"`` where :func:`~pyro_flows.diagnose` has to decide, which looks beyond the
        guide's draws; ``"not known"`` without a diagnosis."""
        if self.diagnosis is None:
            return NOT_KNOWN
        return TRUST if self.diagnosis.trustworthy else LOOK_CLOSER

    def __repr__(self) -> str:
        return (
            f"FitResult(elbo={self.elbo:.4g}, elbo_se={self.elbo_se:.2g}, steps={self.steps}, kept={self.kept!r}, "
            f"verdict={self.verdict!r})"
        )

    def __str__(self) -> str:
        what = "Log joint at a point" if self.is_point else "ELBO"
        lines = [
            f"{what} {self.elbo:.3f} +/- {self.elbo_se:.3f} nats (start {self.start_elbo:.3f}; kept: the {self.kept})",
            f"{self.steps} steps x {self.num_particles} draws in {self.seconds:.1f} s, "
            f"learning rate {self.learning_rate:g}; stopped: {self.reason}",
        ]
        if self.num_modes > 1:
            lines.append(
                f"{self.num_modes} modes: the guide's noise is a mixture, with a component on each that was found"
            )
        if self.widening is not None:
            lines.append(str(self.widening))
        if self.weighted is not None:
            lines.append(str(self.weighted))
        if self.skipped or self.rollbacks:
            where = f" (at a draw where {self.skipped_at})" if self.skipped_at else ""
            lines.append(f"{self.skipped} steps skipped{where}, {self.rollbacks} times rolled back")
        if self.obstacle:
            lines.append(f"Draws are run one by one, and few, since {self.obstacle}")
        if self.diagnosis is not None:
            found = f"gap {self.gap:.3f} +/- {self.diagnosis.log_evidence_se:.3f} nats, k-hat {self.khat:.2f}"
            lines.append(f"{self.verdict.capitalize()} ({found}): {self.diagnosis.reason}")
        if self.rounding:
            lines.append(self.rounding)
        lines.append(self.advice)
        return "\n".join(lines)

    @property
    def advice(self) -> str:
        """Recommended next step, in a sentence."""
        if not math.isfinite(self.elbo):
            return (
                "Next: the ELBO is minus infinity, since the model has no density at some draws or data. Look for data "
                "that are not finite; print(diagnose(model, guide, args)) says at which share of the draws."
            )
        if self.skipped > max(10, self.steps / 2):
            return (
                f"Next: in {self.skipped} of {self.steps} steps the loss or its gradient was not finite, or far too "
                "large; print(diagnose(model, guide, args)) says at which share of the draws the model has no density."
            )
        if self.is_point:
            return "Next: a point has no uncertainty; AutoFlowGuide(model) has."
        if self.kept == "start" and self.steps:
            return "Next: training gained nothing over the Gaussian start; compare another family, such as flow='iaf'."
        if self.rollbacks > 1:
            return f"Next: training was unstable; try learning_rate={self.learning_rate / 4:g}."
        if self.reason.startswith("all"):
            return f"Next: call fit again; it goes on from here (with checkpoint=, pass num_steps={2 * self.steps})."
        says = {NOT_KNOWN: "says how far from the posterior it is", TRUST: "says whether it has lost a mode"}
        more = says.get(self.verdict, "looks beyond the guide's draws, and says what to do")
        return f"Next: print(diagnose(model, guide, args)) {more}."
