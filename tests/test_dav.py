"""toy/dav.py: closed forms, exact recursions on the grid, z-scores of the search, and the M-step on a known optimum.

The z-scores are of unnormalised averages over independent populations, Z_g (sum_n w_gn f(x_gn) - E[f]), which are
unbiased at any size of the population; so |z| > 5 is a bug. `python tests/test_dav.py 300` counts false alarms.
"""
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from conftest import load, planted
from scipy.optimize import minimize

dav = load("toy/dav.py")


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["equal", "unequal"])
def test_tilted_mixture_is_the_tilted_density(name):
    problem = dav.make_problem(name, "cpu")
    line = torch.linspace(-8, 8, 161, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    p, r = problem.data.log_prob(x).exp() * 0.01, problem.reward(x)
    assert abs(p.sum() - 1) < 1e-10
    tilted = p * r.exp()
    assert abs(tilted.sum().log() - problem.log_z) < 1e-10
    assert (tilted / tilted.sum() - problem.tilted.log_prob(x).exp() * 0.01).abs().max() < 1e-12
    assert abs(problem.log_z - dav.log_expectation(problem.law, problem.r)) < 1e-8  # the script's own, coarser grid
    assert abs((tilted @ r) / tilted.sum() - dav.tilted_law(problem, 1.0).mean_reward) < 1e-8


def test_reward_heights_and_shape():
    """At a bump the reward is its height, up to what the other bumps add; far away it is zero."""
    for name, heights in dav.REWARDS.items():
        problem = dav.make_problem(name, "cpu")
        assert (problem.reward(problem.means[::2]) - torch.tensor(heights).double()).abs().max() < 1e-4
        assert problem.reward(torch.full((1, 2), 50.0)).item() == 0
    coarse = dav.make_problem("coarse", "cpu").reward(torch.randn(100, 2, generator=generator(0)).requires_grad_())
    assert not coarse.requires_grad and ((2 * coarse) == (2 * coarse).round()).all()


def test_tilts_compose_and_raise_the_reward():
    problem = dav.make_problem("unequal", "cpu")
    laws = [dav.tilted_law(problem, k / 4) for k in range(9)]
    assert all(b.mean_reward > a.mean_reward for a, b in zip(laws, laws[1:]))
    again = dav.GridLaw(problem, laws[3].log_p + problem.r / 4)
    assert (again.log_p - laws[4].log_p).abs().max() < 1e-10
    ratios = [(law.masses[0] / law.masses[4]).log().item() for law in laws]
    assert np.ptp(np.diff(ratios)) < 0.01  # log ratio of two modes grows by the same amount each round
    x = laws[8].sample(100_000, generator(0)).double()
    assert abs(problem.reward(x).mean() - laws[8].mean_reward) < 0.03
    masses, numbers = dav.compare_modes(problem, x, laws[8])
    assert numbers["mode_error"][0] < 0.01 and numbers["kl_modes"][0] < 1e-3
    assert numbers["covered"] == (4, 4) and abs(numbers["spread"][0] - laws[8].spread) < 0.01


@pytest.mark.parametrize("kl", [0.1, 0.3, 2.0])
def test_m_step_on_laws_is_the_numerical_optimum(kl):
    eta, p0 = torch.randn(2, 12, generator=generator(1), dtype=torch.float64).log_softmax(1)
    log_q, c = dav.law_kl_update(eta, p0, kl)
    q = log_q.exp()
    distance = (q * (log_q - p0)).sum().item()
    assert abs(q.sum() - 1) < 1e-10 and abs(c - (1 - kl * distance)) < 1e-9

    def objective(v):
        w = torch.tensor(v, requires_grad=True)
        log = w.log_softmax(0)
        value = -(eta.exp() * log).sum() + kl * (log.exp() * (log - p0)).sum()
        return value.item(), torch.autograd.grad(value, w)[0].numpy()

    best = minimize(objective, np.zeros(12), jac=True, options=dict(gtol=1e-10))
    assert (torch.tensor(best.x).softmax(0) - q).abs().max() < 1e-6


def test_fixed_point_of_laws():
    """It is one of E-step and M-step, and EM goes there."""
    problem, kl = dav.make_problem("unequal", "cpu"), 0.3
    law = dav.law_fixed_point(problem, 4.0, kl)
    step, _ = dav.law_kl_update((law.log_p + problem.r / 4).log_softmax(0), problem.log_p, kl)
    assert (step.exp() - law.p).abs().sum() < 1e-9
    log_q = problem.log_p
    for _ in range(60):
        log_q, _ = dav.law_kl_update((log_q + problem.r / 4).log_softmax(0), problem.log_p, kl)
    assert (log_q.exp() - law.p).abs().sum() < 1e-6


# ---- the recursions on the grid --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.2, 0.6])
def test_kernels_on_the_grid(sigma):
    problem = dav.make_problem("equal", "cpu")
    kernel, inner = dav.GridKernel(0.7 * problem.grid, sigma), problem.grid.abs().amax(1) < 4
    x, y = 0.7 * problem.grid.T
    found = kernel.expect(torch.stack([torch.ones_like(x), *problem.grid.T, *(problem.grid.T**2),
                                       problem.grid.prod(1), problem.grid[:, 0] ** 3]))
    wanted = torch.stack([torch.ones_like(x), x, y, x**2 + sigma**2, y**2 + sigma**2, x * y, x**3 + 3 * x * sigma**2])
    assert (found - wanted)[:, inner].abs().max() < 1e-5  # cut off: the grid ends
    p, f = torch.randn(2, len(x), generator=generator(0), dtype=torch.float64)
    assert abs(kernel.push(p) @ f - p @ kernel.expect(f[None])[0]) < 1e-9


def test_exact_search_tilts_the_law_of_the_sampler():
    """With exact values and no discount the law found is that of the sampler times exp(r / kl_weight)."""
    problem, abar = dav.make_problem("unequal", "cpu"), dav.search_levels(6)
    means, sigmas = dav.grid_kernels(problem, abar)
    _, values = dav.grid_round(problem, means, sigmas, means, 2.0)
    base, found = dav.grid_law(problem, means, sigmas), dav.grid_law(problem, means, sigmas, values)
    assert (dav.GridLaw(problem, base.log_p + problem.r / 2).p - found.p).abs().max() < 1e-12
    x = dav.ancestral(problem.data.predict_noise, torch.randn(20_000, 2, generator=generator(0)).double(), abar,
                      generator(1))
    r = problem.reward(x)
    assert abs(r.mean() - base.mean_reward) < 5 * r.std() / len(r) ** 0.5


def test_less_discounted_reward_is_more_reward():
    problem, abar = dav.make_problem("unequal", "cpu"), dav.search_levels(6)
    rewards = [dav.grid_rounds(problem, abar, 0, 1.0, discount=g)[1][0].mean_reward for g in (1.0, 0.9, 0.6)]
    base = dav.grid_rounds(problem, abar, 0, 1.0)[0][0].mean_reward
    assert all(a > b + 0.02 for a, b in zip(rewards, [*rewards[1:], base]))


def linear_world(discount, abar, slope):
    """Gaussian data N(0, 1) and reward slope . x: V_t = discount^(t - 1) slope . x0_hat + const, E[x_0] follows.

    Noise prediction sqrt(1 - abar) x, x0_hat = sqrt(abar) x. Returns log Z of the search's weights (values without
    constants) and the mean of x_0 at the discounted optimum.
    """
    steps, slope = len(abar) - 1, torch.tensor(slope, dtype=torch.float64)
    start = discount**steps * abar[0] ** 0.5 * slope
    mean, log_z = start, start @ start / 2
    for i, (a, b) in enumerate(zip(abar, abar[1:])):
        shrink, sigma = dav.ddim_kernel(a**0.5, (1 - a) ** 0.5, a, b, 1.0)
        pull = sigma * slope * (discount ** (steps - i - 1) * b**0.5 if i + 1 < steps else 1.0)
        mean, log_z = shrink * mean + sigma * pull, log_z + pull @ pull / 2
    return log_z.item(), mean


@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_discounted_recursion_against_the_linear_world(discount):
    problem, abar = dav.make_problem("equal", "cpu"), [0.05, 0.3, 0.7, 0.9, 1 - 1e-3]
    one = torch.ones(1, dtype=torch.float64)
    gauss = dav.GaussianMixture(one, 0 * one[:, None].expand(1, 2), torch.eye(2).double()[None])
    slope = [0.6, -0.3]
    world = types.SimpleNamespace(**vars(problem) | dict(data=gauss, r=problem.grid @ torch.tensor(slope).double()))
    law = dav.grid_rounds(world, abar, 0, 1.0, discount=discount)[1][0]
    mean = linear_world(discount, abar, slope)[1]
    assert (law.p @ problem.grid - mean).abs().max() < 5e-4


@pytest.mark.parametrize("old, new", [("reach = discount if i + 1 < len(means) else 1.0", "reach = discount"),
                                      ("h = (reach * values[-1]).exp()", "h = values[-1].exp()")])
def test_planted_bug_in_the_recursion_is_caught(old, new):
    problem, abar = dav.make_problem("equal", "cpu"), [0.05, 0.3, 0.7, 0.9, 1 - 1e-3]
    one = torch.ones(1, dtype=torch.float64)
    gauss = dav.GaussianMixture(one, 0 * one[:, None].expand(1, 2), torch.eye(2).double()[None])
    r = problem.grid @ torch.tensor([0.6, -0.3]).double()
    world = types.SimpleNamespace(**vars(problem) | dict(data=gauss, r=r))
    law = planted("toy/dav.py", (old, new)).grid_rounds(world, abar, 0, 1.0, discount=0.7)[1][0]
    assert (law.p @ problem.grid - linear_world(0.7, abar, [0.6, -0.3])[1]).abs().max() > 1e-2


def test_em_on_the_grid_tends_to_the_exact_laws(monkeypatch):
    """More steps: one round tends to p_0 exp(r / kl_weight); rounds with the KL term tend to the path fixed point."""
    monkeypatch.setattr(dav, "POINTS", 61)
    problem, errors = dav.make_problem("unequal", "cpu"), []
    for steps in (8, 16):
        abar = dav.search_levels(steps + 1)
        plain = dav.grid_rounds(problem, abar, 1, 4.0)[0][1]
        tied = dav.grid_rounds(problem, abar, 3, 4.0, kl=2.0)[0][-1]
        right = dav.tilted_law(problem, 0.25), dav.path_fixed_point(problem, abar, 4.0, 2.0)
        errors.append([abs(a.mean_reward - b.mean_reward) for a, b in zip((plain, tied), right)])
    (coarse, coarse_tied), (fine, fine_tied) = errors  # of gains of 0.6 and 0.3
    assert fine < 0.65 * coarse and fine < 0.15
    assert fine_tied < 0.8 * coarse_tied and fine_tied < 0.08


# ---- the search on a linear-Gaussian chain ---------------------------------------------------------------------------


class Chain:
    """DDPM of six steps on Gaussian data, tilted by a quadratic reward: x_0 is Gaussian, and so is its tilt."""

    abar, kl_weight, discount = [0.02, 0.15, 0.4, 0.65, 0.85, 0.97, 0.995], 0.5, 1.0
    curvature = torch.tensor([[0.35, 0.1], [0.1, 0.5]], dtype=torch.float64)
    center = torch.tensor([1.2, 0.9], dtype=torch.float64)
    cov = torch.tensor([[0.8, 0.3], [0.3, 0.5]], dtype=torch.float64)

    def __init__(self):
        eye = torch.eye(2, dtype=torch.float64)
        cov = eye
        for a, b in zip(self.abar, self.abar[1:]):
            eps = self.predict_noise(eye, a)
            A, sigma = dav.ddim_kernel((eye - (1 - a) ** 0.5 * eps) / a**0.5, eps, a, b, 1.0)
            cov = A.T @ cov @ A + sigma**2 * eye
        B = 2 * self.curvature / self.kl_weight
        grow = eye + cov @ B
        self.mean = self.center - torch.linalg.solve(grow, self.center)
        energy = self.center @ B @ torch.linalg.solve(grow, self.center)
        self.log_z = (-torch.linalg.slogdet(grow)[1] / 2 - energy / 2).item()
        d = self.mean - self.center
        self.mean_reward = -(d @ self.curvature @ d + (self.curvature * torch.linalg.solve(grow, cov)).sum()).item()

    def predict_noise(self, x, a):
        return (1 - a) ** 0.5 * torch.linalg.solve(a * self.cov + (1 - a) * torch.eye(2, dtype=torch.float64), x.T).T

    def reward(self, x):
        return -torch.einsum("nd,de,ne->n", x - self.center, self.curvature, x - self.center)


class LinearChain:
    """Standard normal data and a linear reward: Tweedie values are exact up to constants, for any discount."""

    abar, kl_weight, discount = Chain.abar, 1.0, 0.8
    slope = [1.5, -1.0]

    def __init__(self):
        self.log_z, self.mean = linear_world(self.discount, self.abar, self.slope)
        self.mean_reward = (torch.tensor(self.slope).double() @ self.mean).item()

    def predict_noise(self, x, a):
        return (1 - a) ** 0.5 * x

    def reward(self, x):
        return x @ torch.tensor(self.slope).to(x)


WORLDS = {"quadratic": Chain(), "linear": LinearChain()}
SETTINGS = {"smc": dict(kind="smc"), "smc guided": dict(kind="smc", guided=True),
            "nested": dict(kind="nested"), "nested guided": dict(kind="nested", guided=True, max_shift=0.3)}


def run_search(module, world, seed, n=128, kind="smc", guided=False, value="tweedie", reward=None, **option):
    rng, world = generator(seed), WORLDS[world]
    look = module.foresight(world.predict_noise, reward or world.reward, world.abar, world.kl_weight, rng, value,
                            guided, world.discount)
    x = torch.randn(n, 2, generator=rng, dtype=torch.float64)
    return module.search(look, x, world.abar, rng, kind, discount=world.discount, **dict(ess=0.95) | option)


def z_scores(module, world, seed=0, populations=64, **setting):
    """z of Z, of both means of x_0 and of E[r] over independent populations."""
    rows, truth = [], WORLDS[world]
    for g in range(populations):
        out = run_search(module, world, 1000 * seed + g, **setting)
        w, z = out["log_w"].softmax(0), math.exp(out["log_z"] - truth.log_z)
        rows.append([z - 1, *(z * (w @ out["x"] - truth.mean)), z * (w @ truth.reward(out["x"]) - truth.mean_reward)])
    rows = torch.tensor(rows, dtype=torch.float64)
    return (rows.mean(0) / rows.std(0) * len(rows) ** 0.5).tolist()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_search_is_unbiased(world, setting):
    out = run_search(dav, world, 0, **SETTINGS[setting])
    perfect = world == "linear" and "guided" in setting  # nothing is left to weigh
    resampled = [len(set(s["chosen"].tolist())) < 128 for s in out["steps"]]
    assert perfect or any(resampled), "resampling must happen, or it is not tested"
    assert max(map(abs, z_scores(dav, world, **SETTINGS[setting]))) <= 5


SEARCH_BUGS = {  # the change, and the world and setting in which it shows
    "log ratio averaged over dimensions": (
        [("-(shift * z).flatten(1).sum(1) - 0.5 * (shift**2).flatten(1).sum(1)",
          "-(shift * z).flatten(1).mean(1) - 0.5 * (shift**2).flatten(1).mean(1)")], "quadratic", "smc guided"),
    "no proposal correction": ([("log_v = (ratio + reach", "log_v = (0 * ratio + reach")], "quadratic", "smc guided"),
    "discount off by one": ([("discount ** (steps - i - 1)", "discount ** (steps - i)")], "linear", "smc"),
    "discount of the last reward": ([("        reach = discount if i + 1 < steps else 1.0\n",
                                      "        reach = discount\n")], "linear", "smc"),
    "no discount of what comes next": ([("log_v = (ratio + reach * child", "log_v = (ratio + child")], "linear", "smc"),
    "value of the parent not taken out": ([('log_w = state["log_w"] - state["value"] + log_mean',
                                            'log_w = state["log_w"] + log_mean')], "quadratic", "smc"),
    "sum instead of mean over children": ([("+ log_mean_exp(log_v)", "+ log_v.logsumexp(1)")], "quadratic", "nested"),
    "weight of the chosen child alone": (
        [("log_w = state[\"log_w\"] - state[\"value\"] + log_mean_exp(log_v)",
          "log_w = state[\"log_w\"] - state[\"value\"] + log_v.flatten()[chosen]")], "quadratic", "nested"),
    "children not chosen by weight": ([("invert_cdf(log_v.double().softmax(1), u)",
                                        "invert_cdf(torch.ones_like(log_v).double(), u)")], "quadratic", "nested"),
    "log Z not accumulated": ([(", log_z + log_mean_exp(log_w[None]).item()", ", log_z")], "quadratic", "smc"),
    "weights kept after resampling": ([("            log_w = torch.zeros_like(log_w)\n        share",
                                        "        share")], "quadratic", "smc"),
    "proposal std 0.8x": ([("look(mean + sigma * (shift + z), i", "look(mean + sigma * (shift + 0.8 * z), i")],
                          "quadratic", "smc"),
    "shift made but not told": ([("log_ratio(shift, z)\n", "log_ratio(0 * shift, z)\n")], "quadratic", "smc guided"),
}


@pytest.mark.parametrize("bug", SEARCH_BUGS)
def test_planted_bug_in_the_search_is_caught(bug):
    changes, world, setting = SEARCH_BUGS[bug]
    assert max(map(abs, z_scores(planted("toy/dav.py", *changes), world, **SETTINGS[setting]))) > 5


def test_log_weights_are_those_of_the_densities():
    """Without resampling, log_w = reward + log p - log q of the whole path, densities of shifted normals recomputed."""
    world = WORLDS["quadratic"]
    out = run_search(dav, "quadratic", 3, guided=True, max_shift=math.inf, ess=0)
    total = world.reward(out["x"]) / world.kl_weight
    paths = [s["x"] for s in out["steps"]] + [out["x"]]
    for x, y, a, b in zip(paths, paths[1:], world.abar, world.abar[1:]):
        x = x.clone().requires_grad_()
        eps = world.predict_noise(x, a)
        x0_hat = (x - (1 - a) ** 0.5 * eps) / a**0.5
        (grad,) = torch.autograd.grad(world.reward(x0_hat).sum() / world.kl_weight, x)
        mean, sigma = dav.ddim_kernel(x0_hat.detach(), eps.detach(), a, b, 1.0)
        p, q = (torch.distributions.Normal(m, sigma).log_prob(y).sum(1) for m in (mean, mean + sigma**2 * grad))
        total = total + p - q
    assert (total - out["log_w"]).abs().max() < 1e-10


def test_local_choice_is_exact_only_with_exact_values():
    """With many children: right in the linear world, where the forecast is exact; in the quadratic one it stays off,

    and the weights of the nested search put that right.
    """
    def error(world, n, **setting):
        out = run_search(dav, world, 5, n=n, **setting)
        return (out["log_w"].softmax(0) @ out["x"] - WORLDS[world].mean).norm().item()

    few, some, many = (error("linear", 40_000 // m, kind="local", children=m) for m in (1, 4, 64))
    assert few > 2 * some > 4 * many
    assert error("linear", 4000, kind="local", children=256) < 0.08
    biased, weighted = (error("quadratic", 8000, kind=kind, children=64) for kind in ("local", "nested"))
    assert biased > 0.1 > 0.05 > weighted


@pytest.mark.parametrize("kind, value, guided", [("local", "tweedie", False), ("smc", "tweedie", True),
                                                 ("nested", "completion", False), ("local", "completion", False)])
@pytest.mark.parametrize("world", WORLDS)
def test_a_constant_in_the_reward_changes_nothing(world, kind, value, guided):
    """r - 100 finds the same trajectories from the same seed; log Z moves by the constant."""
    truth = WORLDS[world]
    same, moved = (run_search(dav, world, 7, kind=kind, value=value, guided=guided,
                              reward=lambda x, c=c: truth.reward(x) - c) for c in (0, 100))
    assert (same["x"] - moved["x"]).abs().max() < 1e-9
    assert (same["log_w"].softmax(0) - moved["log_w"].softmax(0)).abs().max() < 1e-9
    if truth.discount == 1:
        assert abs(same["log_z"] - moved["log_z"] - 100 / truth.kl_weight) < 1e-9


def test_completions_estimate_the_soft_value():
    world, abar = WORLDS["quadratic"], WORLDS["quadratic"].abar
    x = torch.randn(1, 2, generator=generator(1), dtype=torch.float64)
    few = [dav.complete(world.predict_noise, world.reward, x, abar, 0.5, generator(s), count=4, strides=6)
           for s in range(400)]
    one = dav.complete(world.predict_noise, world.reward, x, abar, 0.5, generator(1), count=200_000, strides=6)
    mean, se = dav.mean_and_se(torch.stack(few).exp()[:, 0])
    assert abs(mean - one.exp().item()) < 5 * se and se < 0.2 * mean


def test_elbo_is_a_lower_bound():
    for kind in ("local", "smc", "nested"):
        elbos = torch.tensor([run_search(dav, "quadratic", s, kind=kind)["elbo"] for s in range(40)])
        mean, se = dav.mean_and_se(elbos)
        assert mean < Chain().log_z + 3 * se


# ---- the M-step ------------------------------------------------------------------------------------------------------


def descendants(out):
    """Weight of every child of every step, by following each survivor back one by one."""
    n, final = len(out["x"]), out["log_w"].softmax(0) * len(out["x"])
    tables = [torch.zeros_like(s["share"]) for s in out["steps"]]
    for survivor in range(n):
        at = survivor
        for step, table in zip(reversed(out["steps"]), reversed(tables)):
            child = step["chosen"][at].item()
            at, sibling = divmod(child, table.shape[1])
            table[at, sibling] += final[survivor]
    return tables


@pytest.mark.parametrize("setting", ["smc guided", "nested guided"])
def test_transitions(setting):
    """Weights by brute force; and weight |d|^2 / 2 - pull . d is the change of -log p at moved means, summed."""
    out = run_search(dav, "quadratic", 1, n=40, **SETTINGS[setting])
    x, eps, weight, pull = dav.transitions(out, recentre=False)
    centred = dav.transitions(out)[3]
    d = torch.randn(pull.shape, generator=generator(2), dtype=torch.float64)
    for i, (step, table) in enumerate(zip(out["steps"], descendants(out))):
        assert (weight[i] - table.sum(1)).abs().max() < 1e-10 and abs(weight[i].sum() - 40) < 1e-9
        normal = torch.distributions.Normal(0.0, 1.0)
        change = (normal.log_prob(step["z"]) - normal.log_prob(step["z"] - d[i][:, None])).sum(2)
        gain = weight[i] * d[i].pow(2).sum(1) / 2 - (pull[i] * d[i]).sum(1)
        assert (gain - (table * change).sum(1)).abs().max() < 1e-10
        taken = (step["share"][:, :, None] * step["z"]).sum(1)
        assert (pull[i] - centred[i] - taken).abs().max() < 1e-10


def test_what_is_taken_out_of_the_pull_has_mean_zero():
    taken = []
    for seed in range(200):
        out = run_search(dav, "quadratic", seed, n=64, **SETTINGS["nested guided"])
        taken.append(torch.stack([(s["share"][:, :, None] * s["z"]).sum(1).mean(0) for s in out["steps"]]).flatten())
    taken = torch.stack(taken)
    assert (taken.mean(0) / taken.std(0) * 200**0.5).abs().max() < 5


def test_mean_per_noise():
    x, e, f = torch.randn(3, 5, 2, generator=generator(0), dtype=torch.float64)
    for a, b, move in zip(Chain.abar, Chain.abar[1:], dav.mean_per_noise(Chain.abar)):
        (m, sigma), (n, _) = (dav.ddim_kernel((x - (1 - a) ** 0.5 * v) / a**0.5, v, a, b, 1.0) for v in (e, f))
        assert ((n - m) / sigma - move * (f - e)).abs().max() < 1e-10


class Offsets(torch.nn.Module):
    """Noise prediction of a chain plus a free constant at each level: the M-step's optimum is a weighted mean."""

    def __init__(self, world):
        super().__init__()
        self.world, self.abar = world, torch.tensor(world.abar[:-1], dtype=torch.float64)
        self.offset = torch.nn.Parameter(torch.zeros(len(self.abar), 2, dtype=torch.float64), requires_grad=False)

    def forward(self, x, abar):
        level = torch.as_tensor(abar, dtype=x.dtype).expand(len(x), 1)
        eps = torch.empty_like(x)
        for a in level.unique().tolist():
            rows = level[:, 0] == a
            eps[rows] = self.world.predict_noise(x[rows], a)
        return eps + self.offset[(level - self.abar).abs().argmin(1)]


def fitted_offsets(module, kl):
    world = WORLDS["quadratic"]
    out, base = run_search(dav, "quadratic", 2, n=2000), Offsets(world)
    new = module.m_step(base, base, out, world.abar, generator(0), kl=kl, updates=600, batch=2000, lr=0.03)
    _, _, weight, pull = dav.transitions(out)
    move = torch.tensor(dav.mean_per_noise(world.abar), dtype=torch.float64)[:, None]
    wanted = pull.sum(1) / weight.sum(1, keepdim=True) / (1 + kl) / move
    return ((new.offset - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_m_step_finds_the_mean_between_found_and_pretrained(kl):
    assert fitted_offsets(dav, kl) < 0.05


M_BUGS = {"KL to nothing": [("loss = loss + kl * (w *", "loss = loss + 0 * (w *")],
          "KL not halved": [("- base(here, level[t]))).pow(2).sum(1) / 2)", "- base(here, level[t]))).pow(2).sum(1))")],
          "mean over dimensions": [("(w * d.pow(2).sum(1) / 2 -", "(w * d.pow(2).mean(1) / 2 -")],
          "weights not traced back": [("        weight = w.sum(1)\n", "        weight = torch.ones_like(weight)\n")],
          "pull of the wrong sign": [("(pull[t, n] * d).sum(1)).mean()", "(-pull[t, n] * d).sum(1)).mean()")]}


@pytest.mark.parametrize("bug", M_BUGS)
def test_planted_bug_in_the_m_step_is_caught(bug):
    assert fitted_offsets(planted("toy/dav.py", *M_BUGS[bug]), 0.5) > 0.1


@pytest.fixture(scope="module")
def small():
    """A ring, a network trained for a few seconds, and levels."""
    problem = dav.make_problem("unequal", "cpu")
    net = dav.train_denoiser(problem.data.sample, dav.noise_levels(), 300, generator(0), batch=512)
    return problem, net, dav.search_levels(17)


@pytest.mark.parametrize("kind", ["smc", "nested", "local"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_a_round_without_reward_is_the_identity(small, kind, kl):
    """Exactly where every child is chosen alike (smc), within sampling error where one of four is drawn at random."""
    problem, net, abar = small
    runs = list(dav.dav(net, lambda x: 0 * x[:, 0], abar, generator(0), rounds=1, trajectories=2000, updates=50,
                        kind=kind, kl=kl, batch=1000))
    noise = torch.randn(20_000, 2, generator=generator(1))
    before, after = (dav.ancestral(model, noise, abar, generator(2)) for _, model, _ in runs)
    if kind == "smc":
        assert runs[0][2]["log_w"].abs().max() == 0 and dav.transitions(runs[0][2])[3].abs().max() == 0
        assert (before - after).abs().mean() < 0.02
    r = [problem.reward(x) for x in (before, after)]
    assert abs(r[0].mean() - r[1].mean()) < 0.12
    masses = [dav.compare_modes(problem, x, problem.law)[0] for x in (before, after)]
    assert (masses[0] - masses[1]).abs().max() < 0.03


@pytest.mark.parametrize("m_kind", ["trajectory", "renoise"])
def test_rounds_raise_reward_and_elbo(small, m_kind):
    problem, net, abar = small
    runs = [(problem.reward(dav.ancestral(model, torch.randn(5000, 2, generator=generator(k)), abar, generator(9))),
             out["elbo"]) for k, model, out in dav.dav(net, problem.reward, abar, generator(3), rounds=3,
                                                       trajectories=2000, updates=100, m_kind=m_kind, batch=1000)]
    means, elbos = [r.mean().item() for r, _ in runs], [elbo for _, elbo in runs]
    assert means == sorted(means) and elbos == sorted(elbos)
    assert means[-1] > means[0] + 0.4 and elbos[-1] > elbos[0] + 0.1


def test_search_samples_and_evaluations(small):
    problem, net, abar = small
    (_, _, out), = dav.dav(net, problem.reward, abar, generator(0), rounds=0, trajectories=500, kind="nested")
    assert out["evaluations"] == 500 + 15 * 500 * 4
    x = dav.search_samples(out, generator(1))
    weighted = (out["log_w"].softmax(0) @ problem.reward(out["x"])).item()
    assert x.shape == (500, 2) and abs(problem.reward(x).mean() - weighted) < 0.1


# ---- rewards without gradient, bad input -----------------------------------------------------------------------------


def assert_one_sentence(end, capsys):
    text = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(text) == 1 and len(text[0]) > 15, text


def test_reward_without_gradient(small, capsys):
    problem, (_, net, abar) = dav.make_problem("coarse", "cpu"), small
    (_, _, out), = dav.dav(net, problem.reward, abar, generator(0), rounds=0, trajectories=2000, kl_weight=1.0)
    base = dav.ancestral(net, torch.randn(2000, 2, generator=generator(0)), abar, generator(1))
    assert problem.reward(dav.search_samples(out, generator(1))).mean() > problem.reward(base).mean() + 0.5
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        list(dav.dav(net, problem.reward, abar, generator(0), rounds=0, trajectories=50, guided=True))
    assert_one_sentence(end, capsys)


@pytest.mark.parametrize("reward", [lambda x: x[:, 0] * math.nan, lambda x: x, lambda x: x.sum()])
def test_bad_reward_ends_in_one_sentence(reward, capsys):
    with pytest.raises(SystemExit) as end:
        run_search(dav, "quadratic", 0, reward=reward)
    assert_one_sentence(end, capsys)


BAD_FLAGS = ["--children 0", "--steps 1", "--problem ring", "--search best", "--discount 1.5", "--discount 0",
             "--kl -1", "--kl-weight nan", "--m-step both", "--value exact", "--problem coarse --guided", "--rounds 0",
             "--quick --paper", "--device cuda:99", "--samples 1", "--subsamples 1", "--lr 0", "--no-such-flag"]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_sentence(flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        dav.main(dav.parse_args([*flags.split(), "--out", str(tmp_path / "out")]))
    assert_one_sentence(end, capsys)
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        dav.main(dav.parse_args(["--out", str(tmp_path / "file")]))
    assert_one_sentence(end, capsys)


# ---- the script ------------------------------------------------------------------------------------------------------

TINY = "--quick --steps 8 --problem unequal --trajectories 600 --samples 600 --train-steps 150".split()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Two runs with one seed: the second finds the cached network."""
    out = tmp_path_factory.mktemp("out")
    return out, [dav.main(dav.parse_args([*TINY, "--out", str(out)])) for _ in range(2)]


def test_same_seed_same_numbers_with_and_without_the_cache(quick):
    assert quick[1][0] == quick[1][1]


def test_quick_run_is_finite_and_in_range(quick):
    out, (_, numbers) = quick
    assert all(math.isfinite(v) for v in numbers.values())
    for method in ("pretrained", "dav", "dav_kl", "search_only", "posterior"):
        assert 0 < numbers[f"{method}.unequal.mean_reward"] < 4.1
        assert 0 <= numbers[f"{method}.unequal.mode_error"] < 0.5 and 0 <= numbers[f"{method}.unequal.covered"] <= 8
    assert numbers["search_only.unequal.mean_reward"] > numbers["pretrained.unequal.mean_reward"] + 0.1
    assert abs(numbers["law_fixed_point.unequal.mean_reward"] - 2.88) < 0.02
    record = json.loads((out / "toy_dav" / "numbers.json").read_text())
    assert {r["name"]: r["estimate"] for r in record["rows"]} == numbers
    assert {"args", "rows", "network_evaluations", "seconds", "peak_memory_mb", "versions"} == set(record)
    assert record["network_evaluations"] > 0 and (out / "toy_dav" / "figure.png").stat().st_size > 10_000


if __name__ == "__main__":
    seeds = int(sys.argv[1])
    worst = torch.tensor([[z_scores(dav, world, seed, **setting) for world in WORLDS for setting in SETTINGS.values()]
                          for seed in range(seeds)]).abs()
    print(f"{seeds} seeds x {worst.shape[1]} settings: share of |z| > 5 is {(worst > 5).double().mean():.5f} of"
          f" {worst.numel()}, largest |z| {worst.max():.2f}, share of |z| > 2 is {(worst > 2).double().mean():.4f}")
