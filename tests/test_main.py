# SPDX-License-Identifier: Apache-2.0
"""The main job, at a size that takes seconds."""

from __future__ import annotations

import pytest

from pyro_flows import __main__


def test_table_and_figure(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    settings = __main__.Settings(num_particles=4, num_samples=300)
    __main__.main(["--steps", "5", "--seed", "3", "--flow", "full_rank_normal", "--out", str(figure)], settings)
    out = capsys.readouterr().out
    assert "AutoNormal" in out and "AutoFlowGuide" in out and "-31.3113" in out
    assert "k-hat" in out and "5 steps x 4 particles" in out
    assert figure.stat().st_size > 10_000


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--flow", "nope"], ["--out", "/no/such/folder/x.png"]])
def test_bad_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(argv)
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err
