# SPDX-License-Identifier: Apache-2.0
"""L7. :func:`compare`: several guides of one model, compared with one estimate of its evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pyro_flows._checks import check_bool, check_program, checked, close_match, integer, shown
from pyro_flows._random import seeded
from pyro_flows._threads import one_at_a_time
from pyro_flows.diagnostics.diagnose import weigh
from pyro_flows.diagnostics.division import Division
from pyro_flows.diagnostics.report import NOT_KNOWN, SEARCH_ELSEWHERE, Diagnosis
from pyro_flows.diagnostics.search import SearchResult, search_regions
from pyro_flows.diagnostics.verdict import Thresholds

__all__ = ["Comparison", "Row", "compare"]


@dataclass(frozen=True, eq=False)
class Row:
    """Result for one guide.

    Attributes:
        name: Name of the guide.
        gap: The common log evidence less the guide's ELBO, in nats.
        gap_se: Its standard error.
        diagnosis: Its :class:`~pyro_flows.Diagnosis`.
    """

    name: str
    gap: float
    gap_se: float
    diagnosis: Diagnosis


@dataclass(frozen=True, eq=False)
class Comparison:
    """Comparison of guides with one estimate of the evidence, smallest gap first; prints as a table.

    Attributes:
        log_evidence: The common estimate. NaN where plates are subsampled.
        log_evidence_se: Its standard error.
        source: Name of the guide whose weights it comes from.
        reliable: Whether that guide's k-hat is good; if not, the evidence may be higher, and so may all gaps.
        rows: One :class:`Row` for each guide.
    """

    log_evidence: float
    log_evidence_se: float
    source: str
    reliable: bool
    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        names = [row.name for row in self.rows]
        raise KeyError(f"Comparison: expected a guide of {names}, but got {name!r}.{close_match(name, names)}")

    def __str__(self) -> str:
        width = max(len("guide"), *(len(row.name) for row in self.rows))
        lines = [f"{'guide':<{width}}  {'ELBO':>20}  {'gap':>16}  {'k-hat':>5}  {'ESS / S':>7}  verdict"]
        for row in self.rows:
            found = row.diagnosis
            elbo = f"{found.elbo:.3f} +/- {found.elbo_se:.3f}"
            gap = f"{row.gap:.3f} +/- {row.gap_se:.3f}"
            ess = found.ess / found.num_samples
            lines.append(
                f"{row.name:<{width}}  {elbo:>20}  {gap:>16}  {found.khat:>5.2f}  {ess:>7.3f}  {found.verdict}"
            )
        if math.isnan(self.log_evidence):
            return "\n".join([*lines, f"No evidence: {self.rows[0].diagnosis.reason}"])
        tail = "" if self.reliable else "; no guide has a good k-hat, so it is a lower bound rather than an estimate"
        evidence = f"log evidence {self.log_evidence:.3f} +/- {self.log_evidence_se:.3f}"
        return "\n".join([*lines, f"{evidence}, by the weights of {self.source}{tail}"])


def _check_guides(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a mapping from names to guides."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(key, str) for key in value):
        raise ValueError(
            f"{owner}: expected {name} to be guides by name, such as {{'AutoNormal': guide}}, but got {shown(value)}."
        )
    for label, guide in value.items():
        check_program(owner, f"{name}[{label!r}]", guide)


@checked(guides=_check_guides, num_samples=integer(100), distributed=check_bool)
def compare(
    model: Callable[..., Any],
    guides: Mapping[str, Callable[..., Any]],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 4000,
    search: bool = True,
    progress: bool = True,
    seed: int | None = None,
    distributed: bool = False,
) -> Comparison:
    """Compare several guides of one model by their gaps to one estimate of its evidence.

    A poor guide underestimates its own gap: one that lost a mode underestimates the evidence by the mass of that mode.
    So all gaps are relative to one estimate, lost modes included: the most precise one among those whose k-hat is good
    and that no other such estimate significantly exceeds. A guide whose own estimate is significantly lower misses
    mass, whatever its k-hat.

    Args:
        model: Any Pyro model.
        guides: Name -> guide, at least one.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        num_samples: Number of draws of each guide, >= 100.
        search: Whether to search for lost modes; see :func:`diagnose`.
        progress: Whether to show progress bars.
        seed: As in :func:`diagnose`.
        distributed: As in :func:`diagnose`.

    Raises:
        ValueError: If ``guides`` is empty.
        ValueError, RuntimeError: As :func:`diagnose`, of other processes.
        NotImplementedError: As :func:`diagnose`.
    """
    found: dict[str, Diagnosis] = {}
    searched: dict[tuple[int, int], SearchResult] = {}
    division = Division(
        "compare", distributed=distributed, num_samples=num_samples, seed=seed, search=search, guides=list(guides)
    )
    with one_at_a_time("compare"), seeded(division.seed):
        for name, guide in guides.items():
            sampler = division.sampler(model, guide, args, kwargs)
            division.check(model, {f"guide '{name}'": guide}, args, kwargs or {})
            layout = (sampler.structure.num_items, sampler.structure.item_dim)
            look = partial(search_regions, sampler, model, args, kwargs or {}, enabled=search, progress=progress)
            with division.first_buffers(model, guide):
                if layout not in searched:
                    searched[layout] = division.search(look, sampler)
                found[name] = weigh(sampler, guide, searched[layout], division, moves=search, progress=progress)
    limits = Thresholds()
    source, reliable = _best(found, limits)
    log_evidence, error = found[source].log_evidence, found[source].log_evidence_se
    rows = [
        Row(
            name=name,
            gap=log_evidence - diagnosis.elbo,
            gap_se=math.hypot(error, diagnosis.elbo_se),
            diagnosis=_against(diagnosis, log_evidence, error, limits),
        )
        for name, diagnosis in found.items()
    ]
    rows.sort(key=lambda row: -row.diagnosis.elbo)
    return Comparison(log_evidence, error, source, reliable, tuple(rows))


def _best(found: Mapping[str, Diagnosis], limits: Thresholds) -> tuple[str, bool]:
    """Name of the guide whose estimate of the evidence is used, and whether its weights are reliable."""
    good = {name: d for name, d in found.items() if d.khat <= d.khat_threshold and math.isfinite(d.log_evidence)}
    good = {name: d for name, d in good.items() if not d.lost} or good
    if not good:  # with too heavy a tail an estimate is usually too low
        return max(found, key=lambda name: found[name].log_evidence), False
    top = max(good.values(), key=lambda d: d.log_evidence)
    level = {}
    for name, diagnosis in good.items():
        noise = limits.evidence_z_score * math.hypot(top.log_evidence_se, diagnosis.log_evidence_se)
        if top.log_evidence - diagnosis.log_evidence <= noise:
            level[name] = diagnosis
    return min(level, key=lambda name: level[name].log_evidence_se), True


def _against(diagnosis: Diagnosis, log_evidence: float, error: float, limits: Thresholds) -> Diagnosis:
    """A diagnosis, revised by the evidence from other guides."""
    missing = log_evidence - diagnosis.log_evidence
    noise = limits.evidence_z_score * math.hypot(error, diagnosis.log_evidence_se)
    if diagnosis.verdict in (NOT_KNOWN, SEARCH_ELSEWHERE) or diagnosis.khat > diagnosis.khat_threshold:
        return diagnosis
    if not missing > noise:
        return diagnosis
    share = -math.expm1(-missing)
    return replace(
        diagnosis,
        verdict=SEARCH_ELSEWHERE,
        reason=f"another guide finds {missing:.2f} nats more evidence: this one misses {share:.0%} of the mass.",
        advice="Use the other guide, or start this one from its draws.",
    )
