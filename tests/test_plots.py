# SPDX-License-Identifier: Apache-2.0
"""Figures: what is on them is what was passed, and they leave matplotlib as it was."""

from __future__ import annotations

import math
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.path import Path

from pyro_flows import AutoFlowGuide, fit, flows, plots
from pyro_flows.diagnostics import Calibration, SiteCalibration, pareto_smooth
from pyro_flows.plots.common import STYLES


@pytest.fixture(autouse=True)
def quiet_figures(monkeypatch):
    """A backend without windows; fails a test that shows a figure or changes a setting."""

    def show(*args, **kwargs):
        raise AssertionError("a plot called show")

    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", show)
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    plt.close("all")


def draws(num_samples=400, shift=0.0):
    return {"mu": torch.randn(num_samples) + shift, "theta": torch.randn(num_samples, 2) + shift}


def decode(z):
    """Each image is its latent's first number, all over."""
    return z[:, :1].expand(-1, 9)


def calibrated():
    ranks = {"mu": torch.rand(100, 1), "theta": torch.rand(100, 2)}
    sites = {name: SiteCalibration(name, 1.0, 0.0, 0.03, 1.0, 0.06) for name in ranks}
    return Calibration(ranks, sites, calibrated=True, failed=0)


SINGLE = {
    "calibration": lambda **ax: plots.calibration(calibrated(), **ax),
    "training": lambda **ax: plots.training([3.0, 2.0, 1.0], gaussian=-2.5, log_evidence=-0.5, **ax),
    "posterior_predictive": lambda **ax: plots.posterior_predictive(torch.randn(50, 4), torch.zeros(4), **ax),
    "flow_grid": lambda **ax: plots.flow_grid(lambda noise: noise, **ax),
    "reconstructions": lambda **ax: plots.reconstructions(torch.rand(3, 9), torch.rand(3, 9), **ax),
    "prior_samples": lambda **ax: plots.prior_samples(decode, torch.randn(5, 2), **ax),
    "latent_traversal": lambda **ax: plots.latent_traversal(decode, torch.zeros(2), **ax),
}
SEVERAL = {
    "pairs": (lambda **axes: plots.pairs({"one": draws(), "two": draws()}, **axes), (3, 3)),
    "marginals": (lambda **axes: plots.marginals({"one": draws(), "two": draws()}, num_columns=2, **axes), (2, 2)),
    "weights": (lambda **axes: plots.weights(torch.randn(500), **axes), (2,)),
}


def test_every_plot_is_tested():
    assert {*SINGLE, *SEVERAL} == set(plots.__all__)


@pytest.mark.parametrize("name", SINGLE)
def test_one_panel(name):
    ax = SINGLE[name]()
    assert isinstance(ax, Axes)
    assert len(plt.get_fignums()) == 1
    ax.figure.canvas.draw()
    mine = plt.subplots()[1]
    assert SINGLE[name](ax=mine) is mine
    assert len(plt.get_fignums()) == 2


@pytest.mark.parametrize("name", SEVERAL)
def test_several_panels(name):
    plot, shape = SEVERAL[name]
    grid = plot()
    assert grid.shape == shape and all(isinstance(ax, Axes) for ax in grid.flat)
    grid.flat[0].figure.canvas.draw()
    mine = plt.subplots(*(shape if len(shape) == 2 else (1, *shape)))[1]
    assert plot(axes=mine).flat[0] is mine.flat[0]
    with pytest.raises(ValueError, match=r"Axes, but got 5.*plt\.subplots"):
        plot(axes=plt.subplots(1, 5)[1])


def test_lines_differ_without_color():
    assert len({str(style.linestyle) for style in STYLES[1:]}) == len(STYLES) - 1


# Quality of a fit


def test_training_has_every_loss_and_the_running_mean():
    losses = np.random.default_rng(0).normal(10.0, 1.0, 500)
    ax = plots.training({"a": losses, "b": list(losses)}, gaussian=-11.0, log_evidence=-9.0, window=4)
    raw, mean, *_, gaussian, evidence = ax.lines
    np.testing.assert_array_equal(raw.get_xdata(), np.arange(1, 501))
    np.testing.assert_array_equal(raw.get_ydata(), -losses)
    np.testing.assert_allclose(mean.get_ydata()[0], -losses[:4].mean())
    assert mean.get_xdata()[0] == 2.5  # the middle of steps 1 to 4
    assert list(gaussian.get_ydata()) == [-11.0] * 2 and list(evidence.get_ydata()) == [-9.0] * 2
    assert ax.get_ylim()[0] < -11.0 and ax.get_ylim()[1] > -9.0
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["a", "b", "Gaussian", "log evidence"]
    shown = [line.get_linestyle() for line in ax.lines if not line.get_label().startswith("_")]
    assert len(set(shown[:2])) == 2


def test_training_takes_a_fit():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    result = fit(model, AutoFlowGuide(model), num_steps=5, progress=False)
    ax = plots.training(result)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [-loss for loss in result.losses])


def test_training_lives_with_losses_that_are_not_finite():
    ax = plots.training([5.0, math.inf, math.nan, 4.0], window=1)
    assert all(math.isfinite(limit) for limit in ax.get_ylim())


def test_weights():
    log_weights = 1.5 * torch.randn(4000, dtype=torch.double) - 30.0
    left, right = plots.weights(SimpleNamespace(log_weights=log_weights))
    smoothed = pareto_smooth(log_weights)
    assert f"{smoothed.khat:.2f}" in right.get_title()
    weights = log_weights.softmax(0) * 4000
    points, line = right.lines
    np.testing.assert_allclose(points.get_xdata()[:5], weights.sort(descending=True).values[:5])
    np.testing.assert_allclose(points.get_ydata()[:2], [1 / 4000, 2 / 4000])
    np.testing.assert_allclose(line.get_xdata()[0], smoothed.log_weights.max().exp() * 4000)
    assert f"ESS {4000**2 / weights.square().sum():.0f} of 4000" == left.get_title()
    assert sum(patch.get_height() for patch in left.patches) == 4000


def test_weights_of_a_perfect_guide():
    plots.weights(torch.zeros(100))[0].figure.canvas.draw()


@pytest.mark.parametrize("bad", [torch.zeros(5), torch.zeros(40, 2), torch.full((40,), math.nan)])
def test_weights_that_are_none(bad):
    with pytest.raises(ValueError, match="at least 20 log weights"):
        plots.weights(bad)


def test_flow_grid_of_an_affine_map():
    ax = plots.flow_grid(lambda noise: 2 * noise + 1, extent=2.0, num_lines=5)
    first, second, circles = ax.collections
    assert len(first.get_segments()) == len(second.get_segments()) == 5
    assert len(circles.get_segments()) == 2
    for radius, circle in enumerate(circles.get_segments(), start=1):
        np.testing.assert_allclose(np.linalg.norm(circle - 1, axis=1), 2 * radius, rtol=1e-5)
    np.testing.assert_allclose(first.get_segments()[0][[0, -1]], [[-3, -3], [5, -3]], atol=1e-6)
    linestyles = {str(collection.get_linestyle()) for collection in (first, circles)}
    assert len(linestyles) == 2


def test_flow_grid_of_a_guide_and_of_a_flow():
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    ax = plots.flow_grid(AutoFlowGuide(model).setup())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("unconstrained a", "unconstrained b")
    flow = flows.get("maf").build(2, context_dim=3).double()
    plots.flow_grid(flow, context=torch.zeros(3, dtype=torch.double), num_lines=3)
    with pytest.raises(ValueError, match=r"over two dimensions.*over 3.*plots\.pairs"):
        plots.flow_grid(flows.get("iaf").build(3))


# Draws


def test_pairs_points_and_contours():
    torch.manual_seed(0)
    reference, guide = draws(4000), draws(4000, shift=0.5)
    grid = plots.pairs({"NUTS": reference, "guide": guide}, sites=["theta[1]", "mu"], max_points=4000)
    assert grid.shape == (2, 2)
    panel = grid[1, 0]
    points = panel.lines[0]
    np.testing.assert_allclose(points.get_xdata(), reference["theta"][:, 1], rtol=1e-6)
    np.testing.assert_allclose(points.get_ydata(), reference["mu"], rtol=1e-6)
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("theta[1]", "mu")
    assert not grid[0, 1].axison
    assert [text.get_text() for text in grid[0, 1].get_legend().get_texts()] == ["NUTS", "guide"]
    cloud = torch.stack([guide["theta"][:, 1], guide["mu"]], -1).numpy()
    outer, inner = (Path(path.vertices, path.codes) for path in panel.collections[0].get_paths())
    assert abs(outer.contains_points(cloud).mean() - 0.9) < 0.05
    assert abs(inner.contains_points(cloud).mean() - 0.5) < 0.07


def test_pairs_thins_evenly():
    grid = plots.pairs({"one": {"x": torch.arange(100.0), "y": torch.randn(100)}}, max_points=10)
    np.testing.assert_array_equal(grid[1, 0].lines[0].get_xdata(), np.arange(0, 100, 10))


def test_marginals_are_densities():
    samples = {"one": {"x": torch.randn(20_000)}, "two": {"x": np.random.default_rng(0).normal(size=500)}}
    ax = plots.marginals(samples)[0, 0]
    for patch in ax.patches:
        density, edges, _ = patch.get_data()
        assert 0.98 < (density * np.diff(edges)).sum() <= 1.0
    density, edges, _ = ax.patches[0].get_data()
    middle = (edges[1:] + edges[:-1]) / 2
    expected = np.exp(-0.5 * middle**2) / math.sqrt(2 * math.pi)
    assert np.abs(density - expected).max() < 5 * 0.4 / math.sqrt(20_000 * 0.4 * np.diff(edges)[0])
    assert ax.patches[0].get_fill() and not ax.patches[1].get_fill()


@pytest.mark.parametrize("plot", [plots.pairs, plots.marginals])
def test_samples_that_do_not_fit(plot):
    with pytest.raises(TypeError, match="under 'mu'"):
        plot(draws())
    with pytest.raises(ValueError, match=r"among 'mu', 'theta', but got 'nope'"):
        plot({"one": draws()}, sites=["nope"])
    with pytest.raises(ValueError, match=r"'theta\[7\]' in 'one'"):
        plot({"one": draws()}, sites=["theta[7]"])
    with pytest.raises(ValueError, match=r"'mu' in 'two'"):
        plot({"one": draws(), "two": {"theta": torch.randn(5, 2)}})
    with pytest.raises(ValueError, match=r"columns, but got 50.*sites="):
        plot({"one": {"z": torch.randn(10, 50)}})
    with pytest.raises(ValueError, match="1 to 6 sets of draws, but got 0"):
        plot({})
    with pytest.raises(ValueError, match="none of 3 is finite"):
        plot({"one": {"x": torch.full((3,), math.inf)}})


def test_draws_at_infinity_and_at_a_point():
    samples = {"one": {"x": torch.cat([torch.randn(99), torch.tensor([-math.inf])]), "y": torch.zeros(100)}}
    grid = plots.pairs({**samples, "two": samples["one"]})
    grid[0, 0].figure.canvas.draw()


def test_posterior_predictive():
    new = torch.linspace(-1, 1, 101).unsqueeze(-1).expand(-1, 3).reshape(101, 3, 1)
    observed = torch.tensor([[0.0], [0.7], [0.95]])
    ax = plots.posterior_predictive(new, observed, x=torch.tensor([5.0, 6.0, 7.0]), interval=0.8)
    thin, thick = ax.collections
    np.testing.assert_allclose(thin.get_segments()[0], [[5, -0.8], [5, 0.8]], atol=1e-6)
    np.testing.assert_allclose(thick.get_segments()[2], [[7, -0.5], [7, 0.5]], atol=1e-6)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), observed.squeeze(-1))
    assert "data, 2 of 3 inside 80 %" in [text.get_text() for text in ax.get_legend().get_texts()]
    with pytest.raises(ValueError, match=r"\(S, \*\(3, 1\)\), but got \(101, 2\)"):
        plots.posterior_predictive(torch.zeros(101, 2), observed)
    with pytest.raises(ValueError, match="interval"):
        plots.posterior_predictive(new, observed, interval=1.0)
    with pytest.raises(ValueError, match="3 values of x, but got 2"):
        plots.posterior_predictive(new, observed, x=[1.0, 2.0])


# Images


def tile(ax, row, column, height, width):
    top, left = row * (height + 1) + 1, column * (width + 1) + 1
    return ax.images[0].get_array()[top : top + height, left : left + width]


def test_reconstructions():
    images, once, often = torch.rand(4, 6), torch.rand(4, 6), torch.rand(2, 4, 6)
    ax = plots.reconstructions(images, {"a": once, "b": often}, image_shape=(2, 3))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["data", "a", "b 1", "b 2"]
    for row, expected in enumerate([images, once, *often]):
        np.testing.assert_allclose(tile(ax, row, 3, 2, 3), expected[3].reshape(2, 3), rtol=1e-6)
    with pytest.raises(ValueError, match="image_shape="):
        plots.reconstructions(images, once)
    with pytest.raises(ValueError, match="'draw'"):
        plots.reconstructions(images, once[:2])


@pytest.mark.parametrize("shape", [(3, 5, 4), (5, 4, 3)])
def test_images_in_color(shape):
    images = torch.rand(2, *shape)
    ax = plots.reconstructions(images, images)
    expected = images[1].movedim(0, -1) if shape[0] == 3 else images[1]
    np.testing.assert_allclose(tile(ax, 0, 1, 5, 4), expected, rtol=1e-6)


def test_prior_samples_fill_rows():
    z = torch.rand(5, 2)
    ax = plots.prior_samples(decode, z, num_columns=3)
    np.testing.assert_allclose(tile(ax, 1, 1, 3, 3), np.full((3, 3), z[4, 0]), rtol=1e-6)
    assert np.ma.masked_invalid(tile(ax, 1, 2, 3, 3)).mask.all()


def test_latent_traversal_moves_one_latent_at_a_time():
    z = torch.tensor([0.25, 0.5])
    ax = plots.latent_traversal(lambda z: z.repeat_interleave(2, -1), z, values=[0.0, 1.0])
    np.testing.assert_allclose(tile(ax, 0, 1, 2, 2), [[1.0, 1.0], [0.5, 0.5]])
    np.testing.assert_allclose(tile(ax, 1, 0, 2, 2), [[0.25, 0.25], [0.0, 0.0]])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1"]
    with pytest.raises(ValueError, match=r"dims in \[0, 1\], but got \[2\]"):
        plots.latent_traversal(decode, z, dims=[2])
    with pytest.raises(ValueError, match=r"z\[0\]"):
        plots.latent_traversal(decode, torch.zeros(4, 2))
