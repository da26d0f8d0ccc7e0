# SPDX-License-Identifier: Apache-2.0
"""L1. Which kernels of a graph inductor combines into one on a GPU."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["combined_late"]


@dataclass(frozen=True)
class CombineSettings:
    """Which kernels are of a kind: all parts of a combined kernel share one size of blocks, small where sums are long.

    Attributes:
        max_terms: Number of terms of a sum up to which it is a short one.
    """

    max_terms: int = 64


COMBINE = CombineSettings()


@contextmanager
def combined_late() -> Iterator[None]:
    """Within this context inductor combines kernels as late as their results allow, and those of a kind.

    By itself it combines each kernel with those that can run as early as it. A gradient goes through a network by a
    chain of short kernels, each of which makes a gradient of weights possible, a long kernel that only the optimizer
    needs. Combined with links of the chain, they make all of it slow; combined with each other, they take the time of
    one.
    """
    kind = getattr(importlib.import_module("torch._inductor.scheduler"), "ForeachKernelSchedulerNode", None)
    groups = getattr(kind, "group_algorithm_for_combo_kernels", None)
    if kind is None or groups is None:  # another version of torch
        yield
        return

    def late_groups(scheduler: Any) -> Any:
        early = scheduler._topological_sort_nodes()
        scheduler._topological_sort_nodes = lambda: late_levels(scheduler, early)  # which the groups are made of
        try:
            return groups(scheduler)
        finally:
            del scheduler._topological_sort_nodes

    kind.set_group_algorithm_for_combo_kernels(late_groups)
    try:
        yield
    finally:
        kind.set_group_algorithm_for_combo_kernels(groups)


def late_levels(scheduler: Any, early: list[list[Any]]) -> list[list[Any]]:
    """Kernels that need none of each other's results, of one kind, and as many steps before the end.

    Args:
        scheduler: Inductor's, which knows what each kernel needs.
        early: All kernels, after those that they need.
    """
    nodes = [node for level in early for node in level]
    steps = dict.fromkeys(nodes, 0)  # of the longest way from a kernel to the end
    for node in reversed(nodes):
        for needed in scheduler._get_unmet_dep_nodes(node):
            steps[needed] = max(steps[needed], steps[node] + 1)
    levels: dict[tuple[int, int], list[Any]] = {}
    for node in nodes:
        levels.setdefault((-steps[node], _kind(node)), []).append(node)
    return [levels[key] for key in sorted(levels)]


def _kind(node: Any) -> int:
    """0 for a kernel without sums, 1 with short ones, 2 with long ones."""
    if not node.is_reduction():
        return 0
    terms = node.group[1][-1]  # a number on a GPU; on a CPU, the sizes of several dimensions
    return 1 if math.prod(terms if isinstance(terms, tuple) else [terms]) <= COMBINE.max_terms else 2
