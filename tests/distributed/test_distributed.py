# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does; what ends one of them ends both, and a checkpoint goes on."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample

from pyro_flows import AutoFlowGuide, Diagnosis, _files, fit
from pyro_flows.distributed.processes import Processes
from pyro_flows.training.trainer import Trainer
from tests.distributed import programs

ROOT = Path(__file__).resolve().parents[2]
AS_ONE = (
    "fit_schools",
    "fit_recorded",
    "fit_groups",
    "fit_loader",
    "fit_autoencoder",
    "fit_with_nan",
    "fit_without_start",
)
TOGETHER = (
    *("fit_nested", "fit_resumed", "fit_own_data", "fit_sampler", "fit_interrupted", "fit_late", "fit_stopped"),
    "rows_of_a_start",
    *("svi", "svi_broadcast", "compiled_svi", "svi_until_converged", "fit_refused", "fit_alone", "ddp_recipe"),
    *("diagnose_schools", "diagnose_searched", "diagnose_subsampled", "diagnose_refused", "compare_schools"),
    *("compare_set_up", "diagnose_buffers", "sent_to_first"),
)


def launch(folder: Path, names: Sequence[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Run programs in two processes, on a free port."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    return subprocess.run(
        [*command, "-m", "tests.distributed.programs", str(folder), *names],
        cwd=ROOT,
        # The latter so that restarted processes find no addresses of those before.
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each program found in the first and in the second process; and the folder of their files."""
    folder = tmp_path_factory.mktemp("both")
    with programs.double_precision():
        programs.fit_with_error(folder / "one.pt", 10)
    pyro.clear_param_store()
    done = launch(folder, [*AS_ONE, *TOGETHER])
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = {
        name: [torch.load(folder / f"{name}_{rank}.pt", weights_only=False) for rank in range(2)]
        for name in (*AS_ONE, *TOGETHER)
    }
    return {**found, "folder": folder}


def same(one: dict[str, Any], other: dict[str, Any], rtol: float = 0.0) -> None:
    texts = [name for name, value in one.items() if isinstance(value, str)]
    assert [one[name] for name in texts] == [other[name] for name in texts]
    one, other = ({name: each[name] for name in one if name not in texts} for each in (one, other))
    torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)


@pytest.mark.filterwarnings("ignore:AutoFlowGuide. the gradient of a draw was not finite")
@pytest.mark.parametrize("name", AS_ONE)
def test_two_processes_are_one_with_two_parts(both, name, tmp_path):
    with programs.double_precision():
        alone = getattr(programs, name)(tmp_path / "alone")
    first, second = both[name]
    same(first, second)
    same(first, alone, 1e-6)
    assert first["parameters"].dtype == torch.float64


def test_a_process_holds_the_rows_of_its_own_items(both):
    """In the tables, the points of the run and both moments; an error leaves those of others unknown."""
    for rank, (groups, members) in enumerate([(21, 42), (22, 44)]):
        found = both["fit_resumed"][rank]["held"]
        assert [found["held"][number] for number in (groups, members, 43, 86)] == [6, 6, 0, 0]
        assert found["left"] == [(43, groups), (86, members)]


def test_a_warm_start_holds_the_rows_of_its_own_items(both):
    """Also in the copy that is for errors."""
    of_tables = {21, 42, 22, 44, 43, 86}
    assert [found["rows"] & of_tables for found in both["rows_of_a_start"]] == [{21, 42}, {22, 44}]


def test_a_run_goes_on_in_another_number_of_processes(both, tmp_path):
    """From files after 10 steps of one process, and after 20 of which the last ten were those of two."""
    whole, second = both["fit_nested"]
    same(whole, second)
    for name in programs.FILES:
        first, second = (found[name] for found in both["fit_resumed"])
        same(first, second)
        same(first, whole, 1e-6)
        pyro.clear_param_store()
        with programs.double_precision():
            alone = programs.fit_nested(
                tmp_path, checkpoint=programs.copy_of(both["folder"] / name, tmp_path / "run.pt")
            )
        same(alone, whole, 1e-6)
    # Norms of gradients are those of all rows, though a process has some of them.
    norms = [_files.read(folder / "run.pt", unsigned=True)["state"]["norms"] for folder in (both["folder"], tmp_path)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and len(norms[0]) == 25
    same(*(both["fit_resumed"][0][name] for name in programs.FILES))  # bit for bit in two


def test_nan_in_one_process_is_a_skipped_step_in_both(both):
    first, second = both["fit_with_nan"]
    assert first["skipped"] == second["skipped"] == 2  # in two passes of 21 mini-batches
    assert first["parameters"].isfinite().all()


@pytest.mark.parametrize("name", ["fit_own_data", "fit_sampler"])
def test_data_of_their_own_in_unequal_numbers_do_not_hang(both, name):
    first, second = both[name]
    assert first["steps"] == second["steps"] == 25
    assert first["losses"] == second["losses"]
    same({"p": first["parameters"]}, {"p": second["parameters"]})


def test_an_interruption_of_one_stops_both_after_the_same_step(both):
    first, second = both["fit_interrupted"]
    assert first["reason"] == second["reason"] == "interrupted"
    assert first["steps"] == second["steps"] == 21  # the first step of the next cycle
    same({"p": first["parameters"]}, {"p": second["parameters"]})


def test_the_time_of_one_stops_both(both):
    first, second = both["fit_late"]
    assert second["reason"] == "its 0.001 seconds are over"
    assert first["reason"] == "the seconds of another process are over"
    assert first["steps"] == second["steps"] == 1
    same({"p": first["parameters"]}, {"p": second["parameters"]})


def test_the_callback_of_one_stops_both(both):
    first, second = both["fit_stopped"]
    assert first["reason"] == second["reason"] == "the callback asked for it"
    assert first["steps"] == second["steps"] == 20


def test_plain_svi_steps_by_the_mean_gradient(both):
    first, second = both["svi"]
    assert first["losses"] != second["losses"]
    same({"p": first["parameters"]}, {"p": second["parameters"]})
    # The same in one process, with the noise of both.
    with programs.double_precision():
        pyro.set_rng_seed(10)
        guide = AutoNormal(programs.schools, init_loc_fn=init_to_sample)
        Trace_ELBO().loss_and_grads(programs.schools, guide, programs.SCHOOLS)
        states = [torch.random.get_rng_state(), torch.Generator().manual_seed(11).get_state()]
        leaves = [p for p in guide.parameters() if p.grad is not None]
        optimizer = torch.optim.Adam(leaves, lr=0.01)
        optimizer.step()
        for _ in range(29):
            optimizer.zero_grad()
            for rank in range(2):
                torch.random.set_rng_state(states[rank])
                Trace_ELBO().loss_and_grads(programs.schools, guide, programs.SCHOOLS)
                states[rank] = torch.random.get_rng_state()
            for p in leaves:
                p.grad /= 2
            optimizer.step()
    same({"p": first["parameters"]}, {"p": programs.end(guide)["parameters"]}, 1e-9)


def test_parameters_that_begin_elsewhere_are_refused_or_broadcast(both):
    first, second = both["svi_broadcast"]
    assert "broadcast_parameters" in first["message"] and first["message"] == second["message"]
    assert first["losses"][-1] != second["losses"][-1]
    same({"p": first["parameters"]}, {"p": second["parameters"]})


def test_compiled_svi_is_svi(both):
    first, second = both["compiled_svi"]
    same({"p": first["parameters"]}, {"p": second["parameters"]})
    same(first, both["svi"][0], 1e-9)


def test_until_converged_stops_all_and_items_are_disjoint(both):
    first, second = both["svi_until_converged"]
    assert first["steps"] == second["steps"] > 100
    assert first["items"] == set(range(20)) and second["items"] == set(range(20, 40))
    same({"p": first["parameters"]}, {"p": second["parameters"]})


def test_what_does_not_fit_together_is_refused_in_both(both):
    expected = {
        "options": "the same options in all processes",
        "data": "the same data in all processes",
        "shapes": "the same model and guide in all processes",
        "parts": "a part for each of 2 processes",
        "plate": "enough items for disjoint mini-batches, but 2 of 5 are more than its 7",
    }
    for found in both["fit_refused"]:
        assert found.keys() == expected.keys()
        for name, text in expected.items():
            assert text in found[name], name


def test_processes_may_train_alone(both):
    assert [each["steps"] for each in both["fit_alone"]] == [5, 6]


def near(one: Diagnosis, other: Diagnosis) -> None:
    """Estimates by independent draws are within four standard errors of their difference."""
    for name in ("elbo", "log_evidence"):
        error = math.hypot(*(getattr(each, f"{name}_se") for each in (one, other)))
        assert abs(getattr(one, name) - getattr(other, name)) < 4 * error
    for name, site in one.sites.items():
        found = other.sites[name]
        error = math.sqrt(2.0 / len(one.log_weights)) * site.sd
        assert ((site.mean - found.mean).abs() < 4 * error).all()


@pytest.mark.parametrize("name", ["diagnose_schools", "diagnose_searched", "diagnose_subsampled"])
def test_processes_get_the_same_diagnosis(both, name):
    first, second = (vars(found["diagnosis"]) for found in both[name])
    assert str(both[name][0]["diagnosis"]) == str(both[name][1]["diagnosis"])
    torch.testing.assert_close(first["log_weights"], second["log_weights"], rtol=0.0, atol=0.0)
    for site, summary in first["sites"].items():
        one, other = ({k: v for k, v in vars(each).items() if k != "name"} for each in (summary, second["sites"][site]))
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def test_draws_of_a_diagnosis_are_divided(both):
    """Their estimates are those of one process, with other noise; the order of sums aside, they are the draws' own."""
    with programs.double_precision():
        alone = programs.diagnosed(distributed=False, num_samples=2001, search=False)
    for rank, found in enumerate(both["diagnose_schools"]):
        assert found["taken"][1::2] == [1000 + rank] * 2  # after those of the verdict of fit
        same({"w": found["diagnosis"].log_weights}, {"w": found["again"].log_weights})
    diagnosis = found["diagnosis"]
    weights = diagnosis.log_weights
    assert len(weights) == 2001 and len(weights.unique()) == 2001  # each process has noise of its own
    assert diagnosis.elbo == pytest.approx(weights.mean().item())
    assert diagnosis.log_evidence == pytest.approx((weights.logsumexp(0) - math.log(2001)).item())
    near(diagnosis, alone)
    assert diagnosis.verdict == alone.verdict


def test_a_mode_that_the_first_process_finds_counts_for_the_draws_of_all(both):
    found = both["diagnose_searched"][0]["diagnosis"]
    (lost,) = found.lost
    assert found.verdict == "start elsewhere" and lost.share == pytest.approx(0.5, abs=0.02)
    assert lost.values["z"].item() == pytest.approx(-1.0, abs=0.1)
    evidence = math.log(2.0) + torch.distributions.Normal(0.0, math.sqrt(1.01)).log_prob(torch.tensor(1.0)).item()
    assert abs(found.log_evidence - evidence) < 4 * found.log_evidence_se


def test_the_first_process_moves_as_many_draws_as_one_would(both):
    """Of a share of few draws, the drift could not be measured."""
    assert [found["moved"] for found in both["diagnose_searched"]] == [[4000], []]


def test_only_the_first_process_receives_what_is_for_it(both):
    assert [found["found"] for found in both["sent_to_first"]] == [[{"rank": "0"}, {"rank": "1"}], []]


def test_all_draw_by_the_buffers_of_the_first_process(both):
    """And have their own ones afterwards."""
    for rank, found in enumerate(both["diagnose_buffers"]):
        same({"w": found["unlike"].log_weights}, {"w": found["alike"].log_weights})
        torch.testing.assert_close(found["moved"], torch.full_like(found["moved"], rank))


def test_a_comparison_of_processes_is_one(both):
    first, second = both["compare_schools"]
    assert first["text"] == second["text"] and "full_rank_normal" in first["text"]
    same({"w": torch.stack(first["weights"])}, {"w": torch.stack(second["weights"])})
    assert [len(each.unique()) for each in first["weights"]] == [400, 400]


def test_guides_that_a_comparison_sets_up_begin_alike(both):
    first, second = both["compare_set_up"]
    assert first["text"] == second["text"] and "second" in first["text"]


def test_a_diagnosis_that_does_not_fit_together_is_refused_in_both(both):
    expected = {
        "options": (("ValueError", "the same options"), ("ValueError", "the same options")),
        "draws": (("ValueError", "51 draws in each of 2"), ("ValueError", "51 draws in each of 2")),
        "data": (("ValueError", "the same data and parameters"), ("ValueError", "args[0] is Tensor of shape (8,)")),
        "parameters": (
            ("ValueError", "of the model and the guide is"),
            ("ValueError", "of the model and the guide is"),
        ),
        "one": (("RuntimeError", "process 1 has failed (KeyError: 'here')"), ("KeyError", "'here'")),
        "first": (("KeyError", "'there'"), ("RuntimeError", "process 0 has failed (KeyError: 'there')")),
        "warning": (("UserWarning", "no site"), ("RuntimeError", "process 0 has failed (UserWarning: diagnose: no")),
    }
    for rank, found in enumerate(both["diagnose_refused"]):
        for name, texts in expected.items():
            kind, text = texts[rank]
            assert found[name][0] == kind and text in found[name][1], (name, found[name])


def test_a_killed_process_ends_both_and_the_run_goes_on(both, tmp_path):
    """Bit for bit, from the file of the first process."""
    done = launch(tmp_path / "killed", ["fit_killed"], "--max-restarts=2")
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = torch.load(tmp_path / "killed" / f"fit_killed_{rank}.pt", weights_only=False)
        same(found, both["fit_schools"][rank])
    pyro.clear_param_store()
    with programs.double_precision():  # one process reads the file of two
        guide = AutoFlowGuide(programs.schools)
        fit(programs.schools, guide, (programs.SCHOOLS,), checkpoint=tmp_path / "killed/run.pt", **programs.OPTIONS)
    same(programs.end(guide), both["fit_schools"][0])


def test_a_run_of_several_parts_in_one_process_goes_on(tmp_path, monkeypatch):
    """Each part has buffers of its own, which the file holds."""

    def train(path):
        pyro.clear_param_store()
        guide = AutoFlowGuide(programs.rows, "diagonal_normal")
        batches = [(part,) for part in programs.normal(42).split(6)]
        settings = replace(programs.TWO, checkpoint_interval=0.0)
        options = {**programs.OPTIONS, "num_steps": 30, "settings": settings}
        fit(programs.rows, guide, batches, checkpoint=path, **options)
        return programs.end(guide)

    whole = train(None)
    step, taken = Trainer._step, 0

    def stop(self, rate):
        nonlocal taken
        taken += 1
        if taken == 15:
            raise SystemExit
        step(self, rate)

    monkeypatch.setattr(Trainer, "_step", stop)
    with pytest.raises(SystemExit):
        train(tmp_path / "run.pt")
    monkeypatch.undo()
    same(train(tmp_path / "run.pt"), whole)


def test_the_recipe_for_ddp(both):
    first, second = both["ddp_recipe"]
    same({"p": first["parameters"]}, {"p": second["parameters"]})
    assert first["losses"] != second["losses"]
    # Steps of a constant rate leave noise in the mean, of half a posterior sd or so.
    assert abs(first["mean"].item()) < 0.2
    assert first["sd"].item() == pytest.approx(42**-0.5, rel=0.5)


def test_a_lost_process_is_named_with_what_to_do():
    told = pytest.raises(RuntimeError, match=r"process 0 has lost another one .*reset by peer\).*--max-restarts")
    with told, Processes("fit", 0, 2)._together():
        raise RuntimeError("Connection reset by peer. This is typically caused by a remote worker.")


@pytest.mark.parametrize(
    ("raised", "found"),
    [
        (UnicodeError("here"), ValueError),
        (NotImplementedError("here"), NotImplementedError),
        (RecursionError("here"), RuntimeError),
    ],
    ids=["value", "not implemented", "run time"],
)
def test_what_the_first_process_raises_is_raised_in_both(raised, found, monkeypatch):
    sent = []

    def broadcast(self, value):
        sent.extend([value] if self.is_first else [])
        return sent[0]

    def work():
        raise raised

    monkeypatch.setattr(Processes, "broadcast", broadcast)
    for rank in range(2):
        with pytest.raises(found, match="here") as told:
            Processes("fit", rank, 2).first(work)
        assert told.type is found


@pytest.mark.parametrize(
    ("raised", "found"),
    [(UnicodeError("here"), ValueError), (NotImplementedError("here"), NotImplementedError), (KeyError("here"), None)],
    ids=["value", "not implemented", "other"],
)
def test_what_one_process_raises_is_an_error_in_the_other(raised, found, monkeypatch):
    sent = []

    def gather(self, value):
        sent.append(value)
        return [None, value] if self.rank else [None, sent[0]]

    def fail():
        raise raised

    monkeypatch.setattr(Processes, "gather", gather)
    with pytest.raises(type(raised)) as told:
        Processes("diagnose", 1, 2).each(fail)
    assert told.value is raised
    with pytest.raises(found or RuntimeError, match=r"diagnose: .* process 1 has failed \(\w+: '?here"):
        Processes("diagnose", 0, 2).each(lambda: 1)
    monkeypatch.setattr(Processes, "gather", lambda self, value: [None, None])
    assert Processes("diagnose", 0, 2).each(lambda: 1) == 1


def test_a_warning_says_that_processes_are_no_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.warns(UserWarning, match="fit: is one of 2 processes of torchrun, but works alone.*init_process_group"):
        programs.fit_recorded(Path("alone"))
