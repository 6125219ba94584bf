"""toy/dav.py: its search on a chain where all is known, its M-step, its rounds in closed form, its exact answers."""
import json
import math
import types

import pytest
import torch
from conftest import load, planted
from torch import nn

das, dav = load("toy/das.py"), load("toy/dav.py")
LEVELS = das.signal_power(torch.linspace(1, 0, 7)).tolist()

class Tilt(nn.Module):
    """N(0, 1) in two dimensions times exp(theta x): Var(x_0 | x_t) is 1 - abar, and shifts the mean by theta."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2))
    def forward(self, x, abar):
        var = (1 - torch.as_tensor(abar)) * torch.ones_like(x)
        return torch.as_tensor(abar) ** 0.5 * x + var * self.theta, var

def chain(module=dav, particles=8, groups=4000, children=0, ess=1.1):
    """z of Z and of E[r] on N((0.5, -1), (0.4, 0.2)), r = -2 (x - 1)^2, against the exact answer of the chain itself."""
    torch.manual_seed(0)
    mean, var = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.4, 0.2]])
    data = das.Mixture(torch.zeros(1), mean, var)
    found = module.search(data.denoise, lambda x: -2 * ((x - 1) ** 2).sum(-1), torch.randn(groups, particles, 2),
                          LEVELS, 3.0, children, ess)
    m, v = torch.zeros(2).double(), torch.ones(2).double()  # of x_t along the chain: a Gaussian recursion
    for a, b in zip(LEVELS, LEVELS[1:]):
        at_0, at_1 = (das.kernel(x, *data.denoise(x, a), a, b) for x in (torch.zeros(2), torch.ones(2)))
        m, v = at_0[0] + (at_1[0] - at_0[0]) * m, (at_1[0] - at_0[0]) ** 2 * v + at_0[1]
    # of the target times its normaliser, by coordinate: exp(-2 (x - 1)^2 / 3) is a Gaussian of variance 3 / 4
    z_exact = (torch.exp(-((m - 1) ** 2) / (2 * (v + 0.75))) * (0.75 / (v + 0.75)).sqrt()).prod()
    spread, centre = 0.75 * v / (v + 0.75), (0.75 * m + v) / (v + 0.75)
    r_exact = ((centre - 1) ** 2 + spread).sum()
    w, off = found["log_w"].double().exp(), (found["x"].double() - 1).square().sum(-1)
    errors = w.mean(1) - z_exact, (w * (off - r_exact)).mean(1)
    return max(abs(e.mean() / (e.std() / groups**0.5)).item() for e in errors)

@pytest.mark.parametrize("options", [dict(), dict(ess=0.5), dict(children=4, particles=1, groups=20_000),
                                     dict(children=1), dict(children=3, particles=4)], ids=str)
def test_weights_are_right_on_the_chain(options):
    """Of the population, and of the local search if its weights are kept; both at once are nested SMC."""
    assert chain(**options) < 5

BUGS = {
    "mean of children forgotten": [(" - math.log(len(z))", "")],
    "chosen twist kept": [(' - new["log_twist"]  # of one', "  # of one")],
    "p / q forgotten": [("- (shift * (z + shift / 2)).sum(-1)", "")],
    "half of p / q": [("(z + shift / 2)", "(z + shift)")],
    "the heaviest child": [("Categorical(logits=log_v.movedim(0, -1)).sample()", "log_v.argmax(0)")],
    "the first child": [("Categorical(logits=log_v.movedim(0, -1)).sample()", "0 * log_v.argmax(0)")],
    "variance of x_0 forgotten": [('state["x0_hat"], state["var"]', 'state["x0_hat"], 0 * state["var"]')],
}

@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug):
    assert chain(planted("toy/dav.py", *BUGS[bug]), children=3, particles=4) > 5

def test_a_transition_weighs_as_much_as_its_descendants():
    """A copy is known by its place: x_next of a step is where the next step starts, at once for each of its copies."""
    torch.manual_seed(1)
    found = dav.search(Tilt().requires_grad_(False).double(), lambda x: x.sum(-1), torch.randn(3, 20, 2).double(),
                       LEVELS, 0.5, ess=1.1)
    x_t, x_next, _, _, weights = found["transitions"]
    assert torch.allclose(weights.mean(2), torch.ones(6, 3).double(), atol=1e-10)
    assert torch.allclose(weights[-1], found["log_w"].softmax(1) * 20, atol=1e-10) and (x_next[-1] == found["x"]).all()
    for t in range(5):
        copies = (x_next[t][:, :, None] == x_t[t + 1][:, None]).all(-1)  # (G, parent, child)
        assert (copies.sum(1) == 1).all() and (copies.sum(2) != 1).any()  # some have no child, others have several
        assert torch.allclose(weights[t], (copies * weights[t + 1][:, None]).sum(2), atol=1e-10)

def test_the_local_search_drops_its_weights():
    torch.manual_seed(2)
    found = dav.search(Tilt().requires_grad_(False), lambda x: x.sum(-1), torch.randn(50, 1, 2), LEVELS, 0.5, children=4)
    assert (found["transitions"][-1] == 1).all() and found["log_w"].std() > 1e-3

# ---- the M-step ------------------------------------------------------------------------------------------------------
@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

def losses(monkeypatch, found, net, **options):
    """The network that an M-step would train, and its loss."""
    monkeypatch.setattr(dav, "descend", lambda new, loss, updates, lr: (new.requires_grad_(True), loss))
    return dav.m_step(net, net, found, LEVELS, 1, **options)

def test_weights_of_one_change_nothing(monkeypatch, double):
    torch.manual_seed(3)
    net = Tilt()
    net.theta.data = torch.tensor([0.3, -0.2])
    found = dav.search(net.requires_grad_(False), lambda x: 0 * x[..., 0], torch.randn(1, 500, 2), LEVELS, 1.0)
    for ours in (1, 0):
        new, loss = losses(monkeypatch, found, net, ours=ours)
        loss().backward()
        assert (new.theta.grad.norm() < 1e-10) == bool(ours)  # the paper's loss has the noise of x_next

def test_both_losses_have_the_same_mean(monkeypatch, double):
    """Up to a constant, wherever the new network is: their difference at two networks is one, by z over batches."""
    torch.manual_seed(4)
    net = Tilt().requires_grad_(False)
    found = dav.search(net, lambda x: x.sum(-1), torch.randn(1, 100_000, 2), LEVELS, 4.0)
    values = torch.zeros(2, 2, 100)
    for ours in (0, 1):
        for i, theta in enumerate((0.0, 0.25)):
            new, loss = losses(monkeypatch, found, net, ours=ours, batch=4096)
            new.theta.data[:] = theta
            torch.manual_seed(5)  # the same batches
            with torch.no_grad():
                values[ours, i] = torch.stack([loss() for _ in range(100)])
    difference = values[1, 1] - values[1, 0] - values[0, 1] + values[0, 0]
    assert abs(difference.mean() / (difference.std() / 100**0.5)) < 5
    gain = values[:, 1] - values[:, 0]
    assert gain[1].std() < 0.6 * gain[0].std() and gain.mean(1).max() < 0  # a step along the reward pays, and ours sees it

ROUNDS = dict(  # reward x_0 - x_1 / 2 at kl_weight 4: round k has theta k (1, -.5) / 4; with kl the end is 1 / kl of that
    dav=(dict(), 2, 2.0), paper=(dict(ours=0), 1, 1.0), local=(dict(children=4), 1, 1.0), kl=(dict(kl=1.0), 4, 15 / 16))

@pytest.mark.parametrize("name", ROUNDS)
def test_rounds_are_known_in_closed_form(name):
    options, rounds, times = ROUNDS[name]
    torch.manual_seed(6)
    sizes = dict(particles=40_000, updates=1000) if rounds == 1 else dict(particles=8000, updates=300)
    args = types.SimpleNamespace(kl_weight=4.0, rounds=rounds, **sizes)
    abar = das.signal_power(torch.linspace(1, 0, 17)).tolist()
    runs = list(dav.dav(Tilt().requires_grad_(False), lambda x: x[..., 0] - x[..., 1] / 2, abar, args, **options))
    expected = times * torch.tensor([1.0, -0.5]) / 4
    assert (runs[-1][0].theta - expected).abs().max() < 0.06
    if not options:  # log E_k[exp(r / 4)] of N(k g, 1), g = (1, -.5) / 4
        assert abs(runs[-1][1]["elbo"] - 2.5 * (expected / 2).square().sum()) < 0.05

# ---- exact answers, the whole script ---------------------------------------------------------------------------------
def test_the_grid_is_right():
    """At kl_weight 1 log Z has a closed form, as exp(r) is a sum of Gaussians; E[r] was known from another grid."""
    problem = dav.Problem("unequal", 1.0)
    var, distance = 0.36 + 0.09, torch.cdist(problem.means, problem.means[::2]) ** 2
    bumps = torch.tensor(dav.REWARDS["unequal"]).expm1() * 0.36 / var * torch.exp(-distance / (2 * var))
    start = problem.moments(problem.grid, problem.tilted(0))
    assert abs(start["elbo"] - math.log(1 + bumps.sum() / 8)) < 1e-4
    assert (start["masses"] - 1 / 8).abs().max() < 1e-3
    for name, known in (("equal", (2.71, 3.28, 3.72, 3.83)), ("unequal", (2.12, 2.63, 3.21, 3.58))):
        problem = dav.Problem(name, 4.0)
        found = [problem.moments(problem.grid, problem.tilted(k))["mean_reward"] for k in (1, 2, 4, 8)]
        assert max(abs(f - k) for f, k in zip(found, known)) < 0.006
    assert set((2 * dav.Problem("coarse", 4.0).reward(problem.grid)).tolist()) <= set(range(9))

def test_the_fixed_point_is_right():
    """With much kl it is the forecast of the data; for a Gaussian and a slope, the slope over kl_weight and kl."""
    torch.manual_seed(7)
    problem, x = dav.Problem("equal", 4.0), 4 * torch.rand(1, 1, 500, 2) - 2
    for abar in (0.1, 0.5, 0.8):
        exact = das.Mixture(torch.zeros(8), problem.means, torch.full((8, 2), 0.09)).denoise(x, abar)
        for found, expected in zip(problem.fixed_point(1e6)(x, abar), exact):
            assert (found - expected).abs().mean() < 0.01 * expected.abs().max()  # what is left is interpolation
    problem.data = das.Mixture(torch.zeros(1), torch.zeros(1, 2), torch.full((1, 2), 0.5))
    problem.reward = lambda x: x[..., 0] - x[..., 1] / 2
    for abar in (0.1, 0.5, 0.8):
        mean, var = problem.data.denoise(x, abar)
        found = problem.fixed_point(0.5)(x, abar)
        assert (found[0] - mean - var * torch.tensor([1.0, -0.5]) / 4 / 0.5).abs().max() < 1e-3
        assert (found[1] - var).abs().max() < 1e-2

def test_the_script_runs_and_its_rows_are_tidy(tmp_path, capsys):
    args = dav.parse_args(["--quick", "--problem", "coarse", "coarse", "--out", str(tmp_path)])
    dav.main(args)
    assert capsys.readouterr().out.startswith("COARSE")
    record = json.loads((tmp_path / "numbers.json").read_text())
    keys = [(r["problem"], r["method"], r["quantity"]) for r in record["rows"]]
    assert len(keys) == len(set(keys)) == 5 * 4 and {k[1] for k in keys} == set(dav.METHODS)
    assert all(r["exact"] is not None and math.isfinite(r["estimate"]) for r in record["rows"])
    exact = {r["method"]: r["exact"] for r in record["rows"] if r["quantity"] == "mean_reward_round_1"}
    assert exact["dav"] == exact["dav_local"] < exact["dav_posterior"] and exact["dav_kl"] < 4
    assert int.from_bytes((tmp_path / "figure.png").read_bytes()[16:20], "big") == 900
