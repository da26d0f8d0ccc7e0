# SPDX-License-Identifier: Apache-2.0
"""The recorded and compiled step gives the numbers of Pyro's own, and says when it can't."""

import math
import random
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam, ClippedAdam, ExponentialLR
from torch import nn
from torch._dynamo.utils import counters

from pyro_flows import AutoFlowGuide, CompiledSVI, fit
from pyro_flows.compiled import inductor

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", y.shape[-1]):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


@pytest.fixture
def interpreted(monkeypatch):
    """Graphs run as they are: compiling takes seconds, and is tested elsewhere."""
    monkeypatch.setattr(inductor, "_inductor", lambda graph, inputs, options: graph)


def trained(cls, model, make_guide, *batches, elbo=None, optim=None, seed=0):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    svi = cls(model, make_guide(model), optim or Adam({"lr": 0.02}), elbo or Trace_ELBO())
    svi.guide(*batches[0])
    pyro.set_rng_seed(seed + 1)
    losses = torch.tensor([svi.step(*batch) for batch in batches], dtype=torch.double)
    if isinstance(svi.guide, AutoFlowGuide):
        svi.guide.step_limit.apply()  # as at its next call
    parameters = torch.cat([p.detach().reshape(-1).double() for p in svi.guide.parameters()])
    return svi, losses, parameters


def assert_same(model, make_guide, *batches, rtol=1e-4, **options):
    svi, *found = trained(CompiledSVI, model, make_guide, *batches, **options)
    _, *expected = trained(SVI, model, make_guide, *batches, **options)
    assert svi._graphs
    for one, other in zip(found, expected, strict=True):
        assert ((one - other).norm() / other.norm()) < rtol
    return svi


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_machine_code_equals_svi(dtype, rtol):
    torch.set_default_dtype(dtype)
    try:
        elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(schools, AutoNormal, *[(Y.to(dtype),)] * 100, rtol=rtol, elbo=elbo)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_a_second_compilation_comes_from_the_cache(tmp_path, monkeypatch):
    """It was made anew each time: 62 seconds in place of 6."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hits = []
    for _ in range(2):
        counters.clear()
        trained(CompiledSVI, schools, AutoNormal, (Y,))
        hits.append(counters["inductor"]["fxgraph_cache_hit"])
    assert hits == [0, 1]


@pytest.mark.parametrize("make", [AutoNormal, AutoFlowGuide])
def test_a_fresh_guide_has_the_noise_of_svi(interpreted, make):
    """Set-up draws, and so does the first guess of the nesting of plates; both did not count."""
    losses = []
    for cls in (CompiledSVI, SVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        elbo = Trace_ELBO(num_particles=3, vectorize_particles=True)
        svi = cls(schools, make(schools), Adam({"lr": 0.02}), elbo)
        losses.append(torch.tensor([svi.step(Y) for _ in range(10)]))
    assert torch.allclose(*losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flow", ["auto", "iaf", "realnvp", "spline_coupling", "planar", "block_autoregressive"])
def test_flows_equal_svi(interpreted, flow):
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    assert_same(schools, lambda model: AutoFlowGuide(model, flow), *[(Y,)] * 30, elbo=elbo, rtol=3e-3)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO(), Trace_ELBO(num_particles=3)])
@pytest.mark.parametrize("optim", [ClippedAdam, ExponentialLR])
def test_losses_and_optimizers(interpreted, elbo, optim):
    made = {"lr": 0.02}
    if optim is ExponentialLR:
        made = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-4, "momentum": 0.9}, "gamma": 0.9}
    # An optimizer keeps state, so each run needs its own.
    svi, *found = trained(CompiledSVI, schools, AutoNormal, *[(Y,)] * 20, elbo=elbo, optim=optim(dict(made)))
    _, *expected = trained(SVI, schools, AutoNormal, *[(Y,)] * 20, elbo=elbo, optim=optim(dict(made)))
    assert svi._graphs
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def with_changes(cls, change):
    """Losses of 30 steps with something changed after every tenth, and the SVI."""
    pyro.clear_param_store()
    optim = ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.5})
    svi = cls(schools, AutoNormal(schools), optim, Trace_ELBO())
    svi.guide(Y)
    pyro.set_rng_seed(1)
    losses = []
    for step in range(30):
        losses.append(svi.step(Y))
        if step % 10 == 9:
            change(optim)
    return torch.tensor(losses), svi


def test_adam_in_the_graph_follows_its_scheduler(interpreted):
    found, svi = with_changes(CompiledSVI, lambda optim: optim.step())
    assert torch.allclose(found, with_changes(SVI, lambda optim: optim.step())[0], rtol=1e-5)
    (graph,) = svi._graphs
    assert graph.rule is not None
    (scheduler,) = svi.optim.optim_objs.values()
    (state,) = scheduler.optimizer.state.values()
    assert state["step"] == 30


def test_new_options_of_adam_take_a_new_graph(interpreted):
    def change(optim):
        for scheduler in optim.optim_objs.values():
            scheduler.optimizer.param_groups[0]["betas"] = (0.5, 0.9)

    found, svi = with_changes(CompiledSVI, change)
    assert torch.allclose(found, with_changes(SVI, change)[0], rtol=1e-5)
    assert len(svi._graphs) == 1


def test_a_wrong_step_is_noticed(monkeypatch):
    """The compiled graph has to move the parameter as the rule says."""

    def compile_wrongly(graph, inputs, options):
        def run(vector, *rest):
            found = graph(vector, *rest)
            vector += 0.1
            return found

        return run

    monkeypatch.setattr(inductor, "_inductor", compile_wrongly)
    with pytest.warns(UserWarning, match="its step is not repeated"):
        _, found, _ = trained(CompiledSVI, schools, AutoNormal, *[(Y,)] * 10)
    assert torch.allclose(found, trained(SVI, schools, AutoNormal, *[(Y,)] * 10)[1], rtol=1e-5)


def test_enumerated_sites_take_eager_steps(interpreted):
    @config_enumerate
    def model(y):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        with pyro.plate("data", len(y)):
            which = pyro.sample("which", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("y", dist.Normal(loc[which], 10.0), obs=y)

    def make(model):
        return AutoNormal(pyro.poutine.block(model, hide=["which"]))

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    with pytest.warns(UserWarning, match=r"pyro/infer/util.py, line \d+, `if .*mask.all"):
        _, found, _ = trained(CompiledSVI, model, make, *[(Y,)] * 20, elbo=elbo)
    assert torch.equal(found, trained(SVI, model, make, *[(Y,)] * 20, elbo=elbo)[1])


def test_new_data_are_inputs_and_new_shapes_new_graphs(interpreted):
    batches = [(Y,), (Y + 5.0,), (Y[:3],), (Y - 5.0,), (Y[1:],), (torch.cat([Y, Y]),)]

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 3.0), obs=y)

    svi = assert_same(model, AutoNormal, *batches)
    assert len(svi._graphs) == 3


def test_amortized_mini_batches_train_the_decoder_too(interpreted):
    images = torch.rand(40, 6)

    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.decoder = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6))
            self.encoder = nn.Linear(6, 4)

        def model(self, x):
            pyro.module("vae", self.decoder)
            with pyro.plate("images", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    batches = [(images[i : i + 10],) for i in (0, 10, 20, 30)] * 5
    runs = []
    for cls in (CompiledSVI, SVI):
        vae = VAE()
        _, losses, _ = trained(
            cls, vae.model, lambda model, vae=vae: AutoFlowGuide(model, amortize={"images": vae.encoder}), *batches
        )
        runs.append((losses, vae.decoder[0].weight.detach(), vae.encoder.weight.detach()))
    for one, other in zip(*runs, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)
    assert vae.decoder[1].running_mean.abs().max() > 0


def test_subsampled_plates_draw_new_items_at_each_step(interpreted):
    y = torch.randn(50)

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 50, subsample_size=5) as index:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[index])

    assert_same(model, lambda model: AutoNormal(model, create_plates=None), *[()] * 30)


def groups_of_fifty(index):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", 50, subsample=index):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=(torch.arange(50.0) % 7)[index])


def test_items_of_mini_batches(interpreted):
    """The check of their indices stood in the way."""

    def make(model):
        return AutoFlowGuide(model, create_plates=lambda index: pyro.plate("groups", 50, subsample=index))

    batches = [(torch.arange(begin, begin + 10),) for begin in (0, 10, 20, 30, 40)] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(groups_of_fifty, make, *batches, rtol=3e-3)


@pytest.mark.slow
def test_machine_code_refuses_items_that_are_not_there():
    guide = AutoFlowGuide(groups_of_fifty, create_plates=lambda index: pyro.plate("groups", 50, subsample=index))
    svi = CompiledSVI(groups_of_fifty, guide, Adam({"lr": 0.01}), Trace_ELBO())
    index = torch.arange(10)
    svi.step(index)
    svi.step(index + 40)
    with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
        svi.step(index + 45)


def test_names_the_line_that_stands_in_the_way():
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        if loc.item() > 100.0:
            loc = loc / 2
        pyro.sample("y", dist.Normal(loc, 1.0).expand([4]).to_event(1), obs=y)

    with pytest.warns(UserWarning, match=r"test_svi.py, line \d+, `if loc.item\(\) > 100.0:`") as caught:
        _, found, _ = trained(CompiledSVI, model, AutoNormal, *[(Y,)] * 5)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert torch.equal(found, trained(SVI, model, AutoNormal, *[(Y,)] * 5)[1])


def test_random_numbers_of_others_are_noticed(interpreted):
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal(loc + random.random(), 1.0).expand([4]).to_event(1), obs=y)

    with pytest.warns(UserWarning, match="random numbers that are not torch's"):
        trained(CompiledSVI, model, AutoNormal, (Y,))


def test_without_a_compiler_the_graph_runs_as_it_is(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch._inductor, "compile", broken)
    with pytest.warns(UserWarning, match="without machine code, since RuntimeError: No working C") as caught:
        _, found, _ = trained(CompiledSVI, schools, AutoNormal, *[(Y,)] * 10)
    assert caught[0].filename == __file__  # the line that took the step
    assert torch.allclose(found, trained(SVI, schools, AutoNormal, *[(Y,)] * 10)[1], rtol=1e-5)


def test_parameters_that_others_move_or_replace(interpreted):
    svi, *_ = trained(CompiledSVI, schools, AutoNormal, *[(Y,)] * 3)
    state = {name: value + 1.0 for name, value in svi.guide.state_dict().items()}
    svi.guide.load_state_dict(state)
    svi.step(Y)
    assert svi.guide.locs.mu > 0.9
    pyro.clear_param_store()
    before = svi.guide.locs.mu.clone()
    svi.step(Y)
    assert svi.guide.locs.mu != before
    assert svi._parameter.is_whole


@pytest.mark.parametrize(
    "optim, message",
    [
        (Adam(lambda name: {"lr": 0.1}), "same options for all parameters"),
        (Adam({"lr": 0.1}, {"clip_norm": 1.0}), "no clip_norm"),
        (pyro.optim.Adadelta, "optim to be one of pyro.optim's"),
        (pyro.optim.DCTAdam({"lr": 0.1}), "but got DCTAdam"),
    ],
)
def test_refuses_optimizers_that_would_move_otherwise(optim, message):
    with pytest.raises(ValueError, match=message):
        CompiledSVI(schools, AutoNormal(schools), optim, Trace_ELBO())


def test_refuses_losses_without_a_differentiable_value():
    with pytest.raises(ValueError, match="TraceGraph_ELBO"):
        CompiledSVI(schools, AutoNormal(schools), Adam({"lr": 0.1}), TraceGraph_ELBO())


def test_shapes_that_svi_refuses_are_refused_after_others_too(interpreted):
    """Recording validates nothing, and a column of data broadcasts against a row."""

    def model(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    for make in (AutoNormal, AutoFlowGuide):
        pyro.clear_param_store()
        svi = CompiledSVI(model, make(model), Adam({"lr": 0.1}), Trace_ELBO())
        svi.step(Y, Y)
        before = {name: value.clone() for name, value in svi.guide.named_parameters()}
        with pytest.raises(ValueError, match='at site "y", invalid log_prob shape'):
            svi.step(Y, Y.unsqueeze(-1))
        assert all(torch.equal(value, before[name]) for name, value in svi.guide.named_parameters())
        assert math.isfinite(svi.step(Y, Y))


@pytest.mark.slow
def test_fit_gives_the_same_numbers_compiled(interpreted):
    results, guides = [], []
    for compile in (True, False):
        pyro.set_rng_seed(0)
        guide = AutoFlowGuide(schools)
        results.append(
            fit(schools, guide, (Y,), seed=0, progress=False, num_steps=40, num_particles=4, compile=compile)
        )
        guides.append(guide)
    losses = torch.tensor([result.losses for result in results])
    assert torch.allclose(losses[0], losses[1], rtol=1e-4, atol=1e-3)
    assert torch.allclose(guides[0].median()["tau"], guides[1].median()["tau"], rtol=1e-2)
    pointers = [p.untyped_storage().data_ptr() for p in guides[0].parameters()]
    assert len(set(pointers)) == len(pointers)  # every parameter has memory of its own again


def test_fit_says_why_it_does_not_compile():
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        scale = 1.0 if loc.sum().item() < 1e6 else 2.0
        pyro.sample("y", dist.Normal(loc.unsqueeze(-1), scale).expand([*loc.shape, 4]).to_event(1), obs=y)

    with pytest.warns(UserWarning, match="fit: takes eager steps, since test_svi.py, line"):
        fit(model, AutoFlowGuide(model), (Y,), seed=0, progress=False, num_steps=10, compile=True)


def test_steps_whose_losses_are_read_together_are_those_of_single_steps(interpreted):
    """As ``run`` takes them on a GPU."""
    found = []
    for together in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = CompiledSVI(schools, AutoNormal(schools), Adam({"lr": 0.02}), Trace_ELBO())
        losses = svi._steps(7, (Y,), {}) if together else [svi.step(Y) for _ in range(7)]
        found.append((losses, [p.tolist() for p in svi.guide.parameters()]))
    assert found[0] == found[1] and len(set(found[0][0])) == 7


def test_a_loss_that_is_not_finite_is_noticed_when_it_is_read(interpreted):
    svi = CompiledSVI(schools, AutoNormal(schools), Adam({"lr": 0.02}), Trace_ELBO())
    svi.run(3, Y)
    with pytest.warns(UserWarning, match="the loss of a step is not finite"):
        assert not any(map(math.isfinite, svi._steps(3, (Y * math.inf,), {})[1:]))


def test_sizes_that_follow_from_data_are_recorded_and_noticed():
    """``int(group.max()) + 1`` is how users count groups; steps were eager for it, with a warning."""

    def model(group, y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 4):
            offset = pyro.sample("offset", dist.Normal(loc, 1.0))
        share = torch.ones(int(group.max()) + 1).mean() / (int(group.max()) + 1)  # fixed in a graph
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(offset[group] + share, 1.0), obs=y)

    groups = [torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 3, 0, 1, 3]), torch.tensor([2, 0, 1, 1, 0, 2])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi = assert_same(model, AutoNormal, *[(group, torch.arange(6.0)) for group in (*groups, *groups)])
    assert len(svi._graphs) == 2


class Groups(PyroModule):
    """Groups in a buffer, as users keep data of fixed size."""

    def __init__(self):
        super().__init__()
        self.register_buffer("group", torch.tensor([0, 1, 1]))

    def forward(self, y):
        count = int(self.group.max()) + 1
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc + count, 1.0), obs=y)


def test_values_of_buffers_are_noticed_when_these_change(interpreted):
    found = []
    for cls in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = Groups()
        svi = cls(model, AutoNormal(model), Adam({"lr": 0.01}), Trace_ELBO())
        losses = []
        for group in (1, 1, 5, 5, 1):
            model.load_state_dict({"group": torch.tensor([0, 1, group])})
            losses.append(svi.step(torch.arange(3.0)))
        found.append(torch.tensor(losses))
    torch.testing.assert_close(*found)


def test_batches_of_which_python_reads_other_values_each_time(interpreted):
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, y.std().item()), obs=y)

    batches = [(torch.randn(5),) for _ in range(6)]
    with pytest.warns(UserWarning, match=r"what Python reads of the data, by .item\(\).* differs from call") as caught:
        svi, *found = trained(CompiledSVI, model, AutoNormal, *batches)
    assert len(caught) == 1 and len(svi._graphs) == 2
    for one, other in zip(found, trained(SVI, model, AutoNormal, *batches)[1:], strict=True):
        torch.testing.assert_close(one, other)


class Lines(PyroModule):
    """Priors that are made with the module, while Pyro validates, as in its tutorial of Bayesian networks."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        self.noise = PyroSample(dist.Gamma(2.0, 2.0))

    def forward(self, x, y):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


def test_priors_that_validate_by_themselves_are_recorded():
    with pyro.validation_enabled(True):
        model = Lines()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(model, AutoNormal, *[(torch.randn(6, 2), torch.arange(6.0))] * 3)
