# SPDX-License-Identifier: Apache-2.0
"""The main job, at a size that takes seconds."""

from __future__ import annotations

import pytest
import torch

from pyro_flows import AutoFlowGuide, __main__


def test_table_and_figure(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    __main__.main(["--steps", "5", "--seed", "3", "--flow", "full_rank_normal", "--out", str(figure)])
    out = capsys.readouterr().out
    assert "AutoNormal" in out and "AutoFlowGuide" in out and "-31.3113" in out
    assert figure.stat().st_size > 10_000


def test_reported_elbo_is_that_of_pyro():
    from pyro.infer import Trace_ELBO

    args = (torch.tensor(__main__.SIGMA), torch.tensor(__main__.Y))
    guide = AutoFlowGuide(__main__.model, flow="diagonal_normal").setup(*args)
    mean, std_error, _ = __main__.evaluate(guide, args)
    elbo = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
    # Two independent estimates from as many draws each.
    assert abs(mean + elbo.loss(__main__.model, guide, *args)) < 4 * 2**0.5 * std_error


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--flow", "nope"], ["--out", "/no/such/folder/x.png"]])
def test_bad_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(argv)
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err
