# SPDX-License-Identifier: Apache-2.0
"""Random models by hand: which properties of ``tests/random_models/properties.py`` are violated, and by what model.

    python tests/benchmarks/random_models.py [--count 1000] [--seed 0] [--thorough] [--only PROPERTY ...]
        [--out FOLDER] [--file SOURCE] [--shrink]

Checks models of the seeds from ``--seed`` on. Each has all quick properties checked, and one of the slow ones in turn;
with ``--thorough``, all of them. Prints each violation with the model's source, and a table of properties at the end.
``--out`` writes the sources; ``--file`` checks one of them again. ``--shrink`` lets hypothesis search models until the
first violation, and makes that model as small as it can. Run by hand, never by pytest.
"""

from __future__ import annotations

import argparse
import collections
import logging
import time
import traceback
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.random_models.models import RandomModel, numbered_model, random_models
from tests.random_models.properties import QUICK, SLOW, check

EVERY = 10  # models between two lines of progress
LONG = 20.0  # seconds of a check that are worth a line


def violation(model: RandomModel, name: str) -> str:
    """What is wrong, with the last lines of the traceback; empty if nothing is."""
    try:
        check(model, name)
    except Exception as error:
        last = "".join(traceback.format_tb(error.__traceback__)[-3:])
        return f"{type(error).__name__}: {error}\n{last}"
    return ""


def explore(first: int, count: int, only: list[str], thorough: bool, out: Path | None) -> None:
    """Check the models of consecutive seeds."""
    found, seconds, checked, features = (collections.Counter() for _ in range(4))
    slow = list(SLOW)
    for number in range(first, first + count):
        model = numbered_model(number)
        features.update(model.features or {"plain"})
        for name in only or [*QUICK, *(slow if thorough else [slow[number % len(slow)]])]:
            begin = time.process_time()
            words = violation(model, name)
            spent = time.process_time() - begin
            seconds[name] += spent
            checked[name] += 1
            if spent > LONG:
                print(f"# model {number}, {name}: {spent:.0f} s", flush=True)
            if not words:
                continue
            found[name] += 1
            print(f"{'=' * 100}\nmodel {number}, {name}: {words}\n{model}", flush=True)
            if out:
                out.mkdir(parents=True, exist_ok=True)
                (out / f"{number}_{name.replace(' ', '_')}.py").write_text(repr(model))
        if (number + 1 - first) % EVERY == 0:
            total = sum(seconds.values())
            print(f"# {number + 1 - first} models, {found.total()} violations, {total:.0f} s", flush=True)
    print(f"\n{count} models: " + ", ".join(f"{number} {name}" for name, number in features.most_common()))
    for name, number in checked.items():
        print(f"{name:10} {number:5} models {found[name]:4} violations {seconds[name] / number:8.2f} s each")


def shrink(first: int, count: int, only: list[str]) -> None:
    """Search for a violation, and for the smallest model that has it."""

    @seed(first)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(model=random_models())
    def search(model: RandomModel) -> None:
        for name in only or QUICK:
            words = violation(model, name)
            assert not words, f"{name}: {words}"

    search()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--thorough", action="store_true")
    parser.add_argument("--only", nargs="*", choices=[*QUICK, *SLOW], default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--shrink", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # Pyro's guesses of the nesting of plates
    if options.file:
        model = RandomModel.parse(options.file.read_text())
        for name in options.only or [*QUICK, *SLOW]:
            print(f"{name}: {violation(model, name) or 'holds'}", flush=True)
    elif options.shrink:
        shrink(options.seed, options.count, options.only)
    else:
        explore(options.seed, options.count, options.only, options.thorough, options.out)


if __name__ == "__main__":
    main()
