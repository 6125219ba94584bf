"""Align a diffusion model by expectation maximisation: a search finds rewarded trajectories, the model learns them.

Paper: Lee et al., "Diffusion Alignment as Variational Expectation-Maximization" (DAV), ICLR 2026, arXiv 2510.00502.
The paper has no toy: here eight Gaussians on a ring, four of them rewarded, where every stage has an exact answer.
figure.png: samples per round, then E[r], mode masses and the ELBO per round (the counterpart of its Fig. 4).

Run    python toy/dav.py                           both rewards: figure and table            3 minutes of CPU time
       python toy/dav.py --quick                   the same, coarse                          25 seconds
       python toy/dav.py --paper                   4 x the trajectories, 2 x the steps       about 15 minutes
       python toy/dav.py --search local --guided   the paper's search, 4 children            about 7 minutes
       python toy/dav.py --m-step renoise          learn the samples, not the trajectories   3 minutes
       python toy/dav.py --problem coarse          a reward without gradient                 2 minutes

Notation (here -> paper)
       kl_weight -> alpha   reward temperature: one round takes p to p exp(r / kl_weight) / Z
       kl        -> lambda  weight of the KL from the pretrained model in the M-step; above zero the method is DAV-KL
       discount  -> gamma   the E-step maximises sum_t discount^(T - t) (r_t / kl_weight + log p - log eta)
       value     -> V_t     soft value in nats, log E[exp(discount V_{t-1}) | x_t]; Q_t / alpha = discount V_{t-1}
       children  -> M       candidates for x_{t-1}; eta is the law of the trajectories found, p that of the model
       share, pull          weight of a child under the model itself; mean noise of the chosen children less that of all

Algorithm (`dav`)
       1. look ahead at every state: x0_hat, its value, perhaps the gradient of that         `foresight`, `complete`
       2. propose children for x_{t-1} and choose one by its weight exp(Q) p / proposal      `search`
       3. smc and nested: carry the log weight of each trajectory, resample the population   `resample`
       4. trace the survivors back: how many descendants each child has                      `transitions`
       5. M-step: move the means of the kernels towards the chosen children, and by the KL
          term towards the pretrained ones; or learn the denoising of the samples            `m_step`
       6. next round with the new model as prior. The search on the tuned model is DAV posterior

What is exact. Round k of DAV samples p_0 exp(k r / kl_weight): it keeps modes of equal reward, and must leave the
others. With the KL term the M-step has the optimum (E_eta[x_{t-1}] + kl mean_0) / (1 + kl) at each state. In continuous
time its fixed point is known: the score of p_0 plus grad log E_0[exp(c r / kl_weight) | x_t] / (kl + 2), c = 1 + 2 / kl
(`path_fixed_point`). The fixed point for laws of x_0 instead of paths is another, p_0 exp(w / kl) (`law_fixed_point`).
A discount below one has no simple law, but a recursion; all recursions run on a grid (`grid_round`, `grid_law`).

What differs from the paper: the search may resample the population, as the local choice of the paper cannot move mass
between modes (table `estep`); log ratios are sums over dimensions; the noise common to all children is taken out of
the M-step, which changes no mean (`transitions`), and makes a round without reward the identity.

What you should see: after 8 rounds E[r] of DAV is 3.82 (exact 3.83) for equal rewards, where four modes keep a quarter
each, and 3.52 (exact 3.58) for unequal ones, mode masses within 0.03. It lags by 0.1 to 0.2 in the middle, since the
kernels stay Gaussian in each M-step: with no other error a first round of 8, 16, 32 steps reaches 1.87, 1.98, 2.04 of
2.12. DAV-KL ends at 3.24 and 2.75 (exact 3.24 and 2.75; for laws it would be 3.41 and 2.88). The ELBO of DAV rises each
round, to 0.96 and 0.89 (0.96 and 0.90); without the search it falls a little, to 0.44 and 0.36 (0.47 and 0.38).
One E-step at kl_weight 1 misses the masses by 0.13 with a local choice among 4 or 16 children, 0.05 where completions
give the value, 0.02 with smc. A discount of 0.95 in 64 steps takes three quarters of the gain away.
To try: --search local, --kl 1, --discount 0.99 --rounds 2, --kl-weight 32 --rounds 64 (the same law, in more rounds).
"""
import argparse
import concurrent.futures
import copy
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pathlib
import pickle
import resource
import sys
import time
import types

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image
from scipy.optimize import brentq, linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import wrightomega

PRESETS = {  # what the size flags default to
    "quick": dict(rounds=2, trajectories=2000, steps=16, updates=60, samples=2000, train_steps=800, subsamples=3),
    "default": dict(rounds=8, trajectories=8192, steps=64, updates=150, samples=8192, train_steps=2000, subsamples=10),
    "paper": dict(rounds=8, trajectories=32768, steps=128, updates=600, samples=20000, train_steps=5000, subsamples=50),
}
REWARDS = {"equal": (4.0, 4.0, 4.0, 4.0), "unequal": (4.0, 3.0, 3.5, 2.5), "coarse": (4.0, 3.0, 3.5, 2.5)}


def parse_args(argv=None):
    parser = common_parser(__doc__)
    parser.add_argument("--problem", nargs="+", choices=list(REWARDS), default=["equal", "unequal"])
    parser.add_argument("--search", choices=["local", "smc", "nested"], default="smc", help="the E-step")
    parser.add_argument("--children", type=positive(int), default=4, help="of each state, for local and nested")
    parser.add_argument("--value", choices=["tweedie", "completion"], default="tweedie", help="forecast of the reward")
    parser.add_argument("--guided", action="store_true", help="propose along the gradient of the reward")
    parser.add_argument("--max-shift", type=positive(float), default=0.5, help="cap on the guidance, in sigmas, or inf")
    parser.add_argument("--discount", type=positive(float), default=1.0, help="gamma, at most 1")
    parser.add_argument("--kl-weight", type=positive(float), default=4.0, help="reward temperature alpha")
    parser.add_argument("--kl", type=positive(float), default=0.3, help="lambda of DAV-KL")
    parser.add_argument("--m-step", choices=["trajectory", "renoise"], default="trajectory")
    parser.add_argument("--rounds", type=positive(int), help="of E- and M-step")
    parser.add_argument("--trajectories", type=positive(int), help="of the E-step")
    parser.add_argument("--steps", type=positive(int), help="sampling steps")
    parser.add_argument("--updates", type=positive(int), help="gradient steps of an M-step, batch 4096")
    parser.add_argument("--lr", type=positive(float), default=6e-3, help="learning rate of the M-step")
    parser.add_argument("--samples", type=positive(int), help="samples behind each number")
    parser.add_argument("--train-steps", type=positive(int), help="training steps of the pretrained network")
    parser.add_argument("--subsamples", type=positive(int), help="EMDs (500 against 500 points) behind each mean")
    args = parser.parse_args(argv)
    for name, value in PRESETS["quick" if args.quick else "paper" if args.paper else "default"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.discount > 1 or min(args.steps, args.samples, args.subsamples) < 2:
        parser.error("--discount can be at most 1; --steps, --samples and --subsamples must be at least 2")
    if args.guided and "coarse" in args.problem:
        parser.error("the coarse reward has no gradient: leave out --guided")
    return args


# ---- the problem: data, reward, exact answer -------------------------------------------------------------------------


class GaussianMixture:
    """sum_k weights_k N(means_k, covs_k), in closed form at every noise level and under quadratic tilts.

    weights (K,), means (K, d), covs (K, d, d), float64. With noise, the means are sqrt(abar) means_k and the
    covariances abar covs_k + (1 - abar) I, so that density and score are exact at every abar.
    """

    def __init__(self, weights, means, covs):
        self.weights, self.means, self.covs = weights, means, covs
        self.var, self.axes = torch.linalg.eigh(covs)  # (K, d), (K, d, d): noise keeps the axes

    def sample(self, n, rng):
        """n draws -> (n, d), float32."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        z = torch.randn(n, self.means.shape[1], generator=rng, dtype=self.means.dtype, device=rng.device)
        return (self.means[k] + torch.einsum("nde,ne->nd", self.axes[k], self.var[k].sqrt() * z)).float()

    def along_axes(self, x, abar):
        """x (N, d) -> offset from each mean along its axes (N, K, d), variances (K, d), log joint density (N, K)."""
        means, axes, var = self.means.to(x), self.axes.to(x), abar * self.var.to(x) + 1 - abar
        offset = (x @ axes.transpose(0, 1).flatten(1)).view(len(x), *means.shape)  # (N, K, d)
        offset = offset - abar**0.5 * torch.einsum("kd,kde->ke", means, axes)
        log_p = -0.5 * (offset**2 / var + var.log() + math.log(2 * math.pi)).sum(2)
        return offset, var, log_p + self.weights.to(x).log()

    def log_prob(self, x, abar=1.0):
        """x (N, d) -> log density (N,), nats."""
        return self.along_axes(x, abar)[2].logsumexp(1)

    def predict_noise(self, x, abar):
        """x (N, d) -> E[eps | x_t = x] = -sqrt(1 - abar) * score (N, d)."""
        offset, var, log_joint = self.along_axes(x, abar)
        pull = log_joint.softmax(1)[:, :, None] * offset / var
        return (1 - abar) ** 0.5 * pull.flatten(1) @ self.axes.to(x).transpose(1, 2).flatten(0, 1)

    def tilt(self, curvature, center, kl_weight):
        """The mixture times exp(r / kl_weight), r(x) = -(x - center)' curvature (x - center) -> (mixture, log Z).

        Completing the square: precisions add, and the mass of a component is multiplied by its own integral.
        """
        B = 2 * curvature / kl_weight
        grow = torch.eye(len(B)).to(B) + self.covs @ B  # (K, d, d)
        offset = self.means - center
        covs = torch.linalg.solve(grow, self.covs)  # (V^-1 + B)^-1
        means = center + torch.linalg.solve(grow, offset[:, :, None])[:, :, 0]
        energy = torch.einsum("kd,kde,ke->k", offset, B @ torch.linalg.inv(grow), offset)
        log_mass = self.weights.log() - 0.5 * torch.linalg.slogdet(grow)[1] - 0.5 * energy
        return GaussianMixture(log_mass.softmax(0), means, (covs + covs.mT) / 2), log_mass.logsumexp(0).item()

    def moments(self):
        """Mean (d,) and covariance (d, d) of the whole mixture."""
        mean = self.weights @ self.means
        offset = self.means - mean
        return mean, torch.einsum("k,kde->de", self.weights, self.covs + offset[:, :, None] * offset[:, None, :])


def make_problem(name, device):
    """A ring of 8 Gaussians (radius 4, std 0.3), a reward bump on every second: data, reward, and both on a grid.

    r(x) = log(1 + sum_j (exp(height_j) - 1) exp(-|x - b_j|^2 / (2 0.6^2))), between 0 and about height_j: exp(r) is a
    sum of Gaussians, so `tilted` = p_0 exp(r) / Z is a mixture of 40, and log_z exact. `coarse` rounds r to halves: it
    has no gradient and no `tilted`. Laws for other powers of exp(r) live on the grid (P, 2).
    """
    angle, var, width = torch.arange(8, dtype=torch.float64, device=device) * math.pi / 4, 0.09, 0.36
    means = 4 * torch.stack([angle.cos(), angle.sin()], 1)
    data = GaussianMixture(torch.full_like(angle, 1 / 8), means, var * torch.eye(2).to(means).expand(8, 2, 2))
    heights, bumps = torch.tensor(REWARDS[name], dtype=torch.float64, device=device), means[::2]

    def reward(x):
        near = -((x[:, None] - bumps.to(x)) ** 2).sum(2) / (2 * width)
        r = (heights.to(x).expm1() * near.exp()).sum(1).log1p()
        return (2 * r.detach()).round() / 2 if name == "coarse" else r

    problem = types.SimpleNamespace(name=name, data=data, reward=reward, means=means, tilted=None, log_z=None)
    if name != "coarse":  # products of Gaussians, component by component: completing the square
        gap = ((means[:, None] - bumps) ** 2).sum(2)  # (8, 4)
        log_mass = heights.expm1().log() + math.log(width / (width + var)) - gap / (2 * (width + var))
        log_mass = torch.cat([torch.zeros_like(log_mass[:, :1]), log_mass], 1) - math.log(8)  # (8, 5)
        moved = (width * means[:, None] + var * bumps) / (width + var)
        centres = torch.cat([means[:, None], moved], 1).flatten(0, 1)
        spread = means.new_tensor([var] + 4 * [var * width / (var + width)]).repeat(8)
        covs = spread[:, None, None] * torch.eye(2).to(means)
        problem.tilted = GaussianMixture(log_mass.flatten().softmax(0), centres, covs)
        problem.log_z = log_mass.flatten().logsumexp(0).item()
    problem.line = torch.linspace(-HALF, HALF, POINTS, dtype=torch.float64, device=device)
    problem.grid = torch.cartesian_prod(problem.line, problem.line)
    problem.log_p = data.log_prob(problem.grid).log_softmax(0)  # on the grid, with sum 1
    problem.r = reward(problem.grid)
    problem.nearest = torch.cdist(problem.grid, means).argmin(1)
    problem.law = GridLaw(problem, problem.log_p)
    return problem


HALF, POINTS = 6.0, 81  # of the grid: the trapezoid rule is exact to round-off for widths of 0.3


class GridLaw:
    """A law on the grid of a problem, log_p (P,) up to a constant: its moments, and samples uniform in the cells."""

    def __init__(self, problem, log_p):
        self.problem, self.log_p = problem, log_p.log_softmax(0)
        self.p = self.log_p.exp()
        self.mean_reward = (self.p @ problem.r).item()
        self.masses = torch.zeros_like(self.p[:8]).index_add_(0, problem.nearest, self.p)
        self.spread = (self.p @ ((problem.grid - problem.means[problem.nearest]) ** 2).mean(1)).sqrt().item()

    def sample(self, n, rng):
        cell = torch.multinomial(self.p, n, replacement=True, generator=rng)
        jitter = torch.rand(n, 2, generator=rng, device=rng.device, dtype=self.p.dtype) - 0.5
        return (self.problem.grid[cell] + jitter * 2 * HALF / (POINTS - 1)).float()


def tilted_law(problem, strength):
    """p_0 exp(strength r) / Z -> GridLaw: DAV after k rounds has strength k / kl_weight."""
    return GridLaw(problem, problem.log_p + strength * problem.r)


def log_expectation(law, values):
    """log E[exp(values)] for values (P,) on the grid, nats."""
    return (law.log_p + values).logsumexp(0).item()


def law_kl_update(log_eta, log_p0, kl):
    """M-step on laws of x_0: the q (P,) with the least -E_eta[log q] + kl KL(q | p_0) -> log q, c.

    Stationary where kl q log(q / p_0) + c q = eta, so q = eta / (kl u) with u exp(u) = (eta / (kl p_0)) exp(c / kl):
    u is Wright's omega function of the logarithm, and c the root of sum q = 1. It equals 1 - kl KL(q | p_0).
    """
    log_ratio = (log_eta - log_p0).numpy(force=True)

    # exercise 8: q at a given c; scipy's wrightomega(a) is the u with u + log u = a
    def log_q(c):
        u = wrightomega(log_ratio - math.log(kl) + c / kl)
        return log_eta - math.log(kl) - torch.as_tensor(u).to(log_eta).log()
    # end exercise

    low = -1.0
    while log_q(low).logsumexp(0) < 0:
        low *= 2
    c = brentq(lambda c: log_q(c).logsumexp(0).item(), low, 1.0 + 1e-9, xtol=1e-14)
    return log_q(c), c


def law_fixed_point(problem, kl_weight, kl):
    """Where EM with `law_kl_update` ends: p_0 exp(w / kl), w = exp(r / kl_weight) / E[the same] -> GridLaw."""
    grow = (problem.r / kl_weight).exp()

    def at(z):
        return GridLaw(problem, problem.log_p + grow / (z * kl))

    return at(brentq(lambda z: (at(z).p @ grow).item() - z, 1.0, grow.max().item(), xtol=1e-13))


# ---- exact recursions of the sampler on the grid ---------------------------------------------------------------------


def grid_kernels(problem, abar, eps=None):
    """Means (T, P, 2) and sigmas of the reverse kernels; eps (T, P, 2), by default the exact one of the data."""
    kernels = []
    for i, (a, b) in enumerate(zip(abar, abar[1:])):
        e = problem.data.predict_noise(problem.grid, a) if eps is None else eps[i]
        kernels.append(ddim_kernel((problem.grid - (1 - a) ** 0.5 * e) / a**0.5, e, a, b, 1.0))
    return torch.stack([mean for mean, _ in kernels]), [sigma for _, sigma in kernels]


def spread_over(points, sigma):
    """Weights (P, n) of the grid's coordinates in expectations under N(points, sigma^2), points (P,), rows of sum 1.

    Wide kernels are summed on the grid itself, exact to round-off for smooth functions; narrow ones by three Gauss-
    Hermite points with cubic interpolation, which keeps moments up to the third.
    """
    line, cell = torch.linspace(-HALF, HALF, POINTS).to(points), 2 * HALF / (POINTS - 1)
    if sigma > 0.8 * cell:
        weights = (-((points[:, None] - line) ** 2) / (2 * sigma**2)).exp()
    else:
        weights = 0
        for offset, share in ((-(3**0.5), 1 / 6), (0.0, 2 / 3), (3**0.5, 1 / 6)):
            d = ((points[:, None] + sigma * offset - line) / cell).abs()
            near, far = (1 - d**2) * (2 - d) / 2, (1 - d) * (2 - d) * (3 - d) / 6
            weights = weights + share * torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


class GridKernel:
    """N(mean, sigma^2 I) at every point of the grid, mean (P, 2): expectations, and where it takes a law."""

    def __init__(self, mean, sigma):
        self.inside = mean.clamp(-HALF, HALF)
        self.first, self.second = (spread_over(v, sigma) for v in self.inside.T)

    def expect(self, f):
        """f (C, P) -> E[f(x_{t-1}) | x_t] (C, P)."""
        return torch.stack([((self.first @ g.view(POINTS, POINTS)) * self.second).sum(1) for g in f])

    def push(self, p):
        """Law p (P,) of x_t -> law of x_{t-1} (P,): the adjoint of `expect`."""
        return ((self.first * p[:, None]).T @ self.second).flatten()


def grid_round(problem, means, sigmas, start, kl_weight, kl=0.0, discount=1.0):
    """One round of EM without noise: infinitely many trajectories, a perfect network, the same number of steps.

    means, start (T, P, 2): the model's and the pretrained kernels' -> new means, soft values V (T + 1, P). Exact
    E-step V_t = log E exp(discount V_{t-1}), discount 1 at the last step; M-step: mean of x_{t-1}, with the KL term.
    """
    values, new = [problem.r / kl_weight], []
    for i in reversed(range(len(means))):
        reach = discount if i + 1 < len(means) else 1.0
        h = (reach * values[-1]).exp()
        total, *moment = GridKernel(means[i], sigmas[i]).expect(torch.stack([h, *(h * problem.grid.T)]))
        found = torch.stack(moment, 1) / total[:, None]
        new.append((found + kl * start[i]) / (1 + kl))
        values.append(total.log())
    return torch.stack(new[::-1]), torch.stack(values[::-1])


def grid_law(problem, means, sigmas, values=None, discount=1.0):
    """Law of x_0 under the kernels, or under the search with these exact soft values V (T + 1, P) -> GridLaw."""
    p = -problem.grid.pow(2).sum(1) / 2 + (discount * values[0] if values is not None else 0)
    p = p.softmax(0)
    for i in range(len(means)):
        kernel = GridKernel(means[i], sigmas[i])
        if values is None:
            p = kernel.push(p)
        else:
            h = ((discount if i + 1 < len(means) else 1.0) * values[i + 1]).exp()
            p = h * kernel.push(p / kernel.expect(h[None])[0])
    return GridLaw(problem, p.clamp(min=1e-300).log())


def grid_rounds(problem, abar, rounds, kl_weight, kl=0.0, discount=1.0):
    """`dav` without noise: laws of the model, and of the search on it, after 0 to `rounds` rounds -> two lists."""
    means, sigmas = grid_kernels(problem, abar)
    start, models, found = means, [], []
    for k in range(rounds + 1):
        new, values = grid_round(problem, means, sigmas, start, kl_weight, kl, discount)
        models.append(grid_law(problem, means, sigmas))
        found.append(grid_law(problem, means, sigmas, values, discount))
        progress("exact rounds", k + 1, rounds + 1)
        means = new
    return models, found


def path_fixed_point(problem, abar, kl_weight, kl):
    """Where DAV-KL ends -> GridLaw; exact for small steps.

    With drifts in units of the noise, EM takes u to (u + grad V) / (1 + kl), V the soft value under u; so u = grad V /
    kl, and V solves its Hamilton-Jacobi equation with (1 / 2 + 1 / kl) |grad V|^2 in place of |grad V|^2 / 2: c V is
    the logarithm of E_0[exp(c r / kl_weight) | x_t], with c = 1 + 2 / kl.
    """
    c, eps = 1 + 2 / kl, []
    cell = (2 * HALF / (POINTS - 1),)
    for a in abar[:-1]:
        kernel = (-((problem.line[:, None] - a**0.5 * problem.line) ** 2) / (2 * (1 - a))).exp()
        grown, plain = (kernel @ (problem.log_p + s * problem.r).exp().view(POINTS, POINTS) @ kernel.T + 1e-300
                        for s in (c / kl_weight, 0.0))
        slope = torch.stack(torch.gradient((grown / plain).log(), spacing=cell * 2), -1).view(-1, 2)
        eps.append(problem.data.predict_noise(problem.grid, a) - (1 - a) ** 0.5 * slope / (kl + 2))
    return grid_law(problem, *grid_kernels(problem, abar, eps))


# ---- shared: the sampler ---------------------------------------------------------------------------------------------


def search_levels(count):
    """`count` signal powers from noise to data, log SNR from -7 to 6, three times denser about -0.5 than evenly.

    There the modes part: a Gaussian kernel loses what the choice between two modes adds to its shape, and in the M-step
    that loss is proportional to the size of the steps. At the end the noise is 0.05: every step has a density.
    """
    u = torch.linspace(-1, 1, count, dtype=torch.float64)
    return (6.5 * (2.5 * u).sinh() / math.sinh(2.5) - 0.5).sigmoid().tolist()


def noise_levels():
    """abar of the 1000 training steps with linear beta from 1e-4 to 0.02 (Ho et al. 2020) -> list of float."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()


def per_particle(v, x):
    """v (N,) -> (N, 1, ..., 1), to multiply x (N, ...)."""
    return v.view(-1, *[1] * (x.dim() - 1))


def effective_sample_size(log_w):
    """log_w (G, P) -> (sum w)^2 / sum w^2 (G,), between 1 and P."""
    return (2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)).exp()


def log_mean_exp(log_w):
    """log_w (G, P) -> log of the mean weight (G,)."""
    return log_w.logsumexp(1) - math.log(log_w.shape[1])


def resample(log_w, scheme, rng):
    """Ancestors of P new particles in each group, log_w (G, P) -> indices (G, P); E[copies of n] = P w_n.

    multinomial: P independent uniforms through the inverse distribution function; stratified: one uniform in each
    interval of length 1/P; systematic: the same uniform in all of them; residual: floor(P w_n) copies for certain,
    multinomial for the rest; ssp (Gerber, Chopin and Whiteley 2019): floor or floor + 1 copies by the pivotal method.
    """
    groups, count = log_w.shape
    w = log_w.double().softmax(1)
    u = torch.rand(groups, 1 if scheme == "systematic" else count, generator=rng, dtype=w.dtype, device=w.device)
    if scheme in ("systematic", "stratified"):
        u = (u + torch.arange(count, device=w.device)) / count
    if scheme in ("residual", "ssp"):
        copies = (count * w).floor()  # (G, P), and the rest is shared out by the fractional parts
        part = count * w - copies
        if scheme == "ssp":
            copies += pivotal(part, u)
        else:
            left = count - copies.sum(1, keepdim=True)
            drawn = invert_cdf(part, u)  # the first `left` of these count
            use = (torch.arange(count, device=w.device) < left).to(w)
            copies.scatter_add_(1, drawn, use)
        slots = torch.arange(count, device=w.device).repeat(groups)
        return slots.repeat_interleave(copies.round().long().flatten()).view(groups, count)
    return invert_cdf(w, u)


def invert_cdf(w, u):
    """Smallest n with w_1 + ... + w_n > u sum(w), for w (G, P) and u (G, M) in [0, 1) -> (G, M)."""
    cdf = w.cumsum(1)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=w.shape[1] - 1)


def pivotal(part, u):
    """Round probabilities part (G, P), whose sums are integers, to 0 or 1 with those means, keeping the sums.

    Two undecided entries play at a time: while they sum to less than 1, one takes all; else one becomes 1 and the
    other keeps the excess. Deville and Tille (1998); u (G, P) are uniforms.
    """
    taken = torch.zeros_like(part)
    last = torch.zeros(len(part), 1, dtype=torch.long, device=part.device)  # the entry still undecided, and its value
    a = part[:, :1]
    for n in range(1, part.shape[1]):
        b = part[:, n : n + 1]
        both = a + b
        merge = both < 1
        wins = u[:, n : n + 1] < torch.where(merge, a / both.clamp(min=1e-300), (1 - b) / (2 - both).clamp(min=1e-300))
        new = torch.full_like(last, n)
        winner, loser = torch.where(wins, last, new), torch.where(wins, new, last)
        taken.scatter_add_(1, winner, (~merge).to(part))
        last, a = torch.where(merge, winner, loser), torch.where(merge, both, both - 1)
    return taken.scatter_add_(1, last, a.round())


def gather(state, index):
    """All per-particle state after resampling: every tensor of the dict, leading dimension N, at index (N,)."""
    return {name: value[index] for name, value in state.items()}


def look_ahead(predict_noise, reward, x, t, abar, kl_weight, guided, chunk):
    """What the sampler knows at x (N, ...): eps and x0_hat (N, ...), value = r(x0_hat) / kl_weight (N,), its gradient.

    The gradient goes through the network; without guidance it is zero and the reward need not be differentiable.
    """
    parts = []
    for part in x.split(chunk or len(x)):
        with torch.set_grad_enabled(guided):
            part = part.detach().requires_grad_(guided)
            eps = predict_noise(part, t)
            x0_hat = (part - (1 - abar) ** 0.5 * eps) / abar**0.5
            value = checked(reward(x0_hat), part.shape[:1]) / kl_weight
            if guided and not value.requires_grad:
                fail("The reward has no gradient: sample without guidance.")
            grad = torch.autograd.grad(value.sum(), part)[0] if guided else torch.zeros_like(part)
        parts.append([v.detach() for v in (part, eps, x0_hat, value, checked(grad, part.shape))])
    return dict(zip(("x", "eps", "x0_hat", "value", "grad"), map(torch.cat, zip(*parts))))


def checked(value, shape):
    """value, a reward or its gradient, if it has this shape and is finite."""
    if value.shape != shape or not value.isfinite().all():
        fail(f"The reward must be one finite number per sample, with a finite gradient: expected shape {tuple(shape)}, "
             f"got {tuple(value.shape)}, {int((~value.isfinite()).sum())} of them not finite.")
    return value


def ddim_kernel(x0_hat, eps, abar, abar_next, eta):
    """Mean (N, ...) and standard deviation (float) of p(x_{t-1} | x_t); eta = 1 is DDPM. DDIM (Song 2021) eq. 12."""
    sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
    return abar_next**0.5 * x0_hat + max(1 - abar_next - sigma**2, 0.0) ** 0.5 * eps, sigma


def guide(grad, sigma, temper, max_shift):
    """Shift of the proposal in units of sigma: sigma temper grad, its norm capped. grad (N, ...), temper (N,).

    A shift u multiplies the second moment of the weights by exp(|u|^2) at every step; the cap keeps that finite and
    costs no exactness, because log_ratio knows the shift that was made.
    """
    shift = sigma * per_particle(temper, grad) * grad
    norm = shift.flatten(1).norm(dim=1).clamp(min=1e-30)
    return shift * per_particle((max_shift / norm).clamp(max=1), shift)


def log_ratio(shift, z):
    """log p - log q -> (N,) of x = mean + sigma (shift + z) under the kernel p and the proposal q that drew z."""
    # exercise 2: both densities are Gaussian with the same sigma: write them down, and see what is left of them
    return -(shift * z).flatten(1).sum(1) - 0.5 * (shift**2).flatten(1).sum(1)
    # end exercise


# ---- the method: E-step ----------------------------------------------------------------------------------------------


def ancestral(predict_noise, x, levels, rng):
    """Plain sampling from x (N, d) along the signal powers `levels`, predict_noise (x, abar) -> x (N, d) at the end."""
    for a, b in zip(levels, levels[1:]):
        eps = predict_noise(x, a)
        mean, sigma = ddim_kernel((x - (1 - a) ** 0.5 * eps) / a**0.5, eps, a, b, 1.0)
        x = mean + sigma * torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
    return x


def complete(predict_noise, reward, x, levels, kl_weight, rng, count=4, strides=3):
    """Soft value of x (N, d) by `count` completions in a few strides: log mean exp(r(x_0) / kl_weight) -> (N,)."""
    kept = sorted({round(k * (len(levels) - 1) / strides) for k in range(strides + 1)})
    x0 = ancestral(predict_noise, x.repeat_interleave(count, 0), [levels[k] for k in kept], rng)
    return log_mean_exp(checked(reward(x0), x0.shape[:1]).detach().view(-1, count) / kl_weight)


def foresight(predict_noise, reward, abar, kl_weight, rng, value="tweedie", guided=False, discount=1.0):
    """What `search` asks of a model: (x (N, d), i) -> state at signal power abar[i], abar (T + 1,) from noise to data.

    The state holds x, eps, x0_hat, and the soft value V and its gradient: discount^(left - 1) r(x0_hat) / kl_weight,
    with `left` steps to go, or the same of completions. At the end the value is the reward itself.
    """
    steps = len(abar) - 1

    def look(x, i):
        if i == steps:
            return dict(x=x, value=checked(reward(x), x.shape[:1]).detach() / kl_weight)
        state = look_ahead(predict_noise, reward, x, abar[i], abar[i], kl_weight, guided, None)
        if value == "completion":
            state["value"] = complete(predict_noise, reward, x, abar[i:], kl_weight, rng)
        for name in ("value", "grad"):
            state[name] = discount ** (steps - i - 1) * state[name]
        return state

    return look


def search(look, x, abar, rng, kind="smc", children=4, discount=1.0, max_shift=0.5, ess=0.5):
    """The E-step: trajectories from x (N, d), standard normal, that follow p exp(r / kl_weight) -> dict.

    look (x, i) -> state as in `foresight`. Each state gets children (one for smc), of which one is drawn by its weight
    exp(Q) p / proposal, Q = discount V of the child. `local` stops there, as in the paper. nested and smc also carry
    log_w += log mean weight - V of the parent, which makes any values and any number of children exact on average,
    and resample the population where the effective sample size falls below ess N.
    Returns x (N, d), log_w (N,) (zero for local), log_z of E_p[exp(r / kl_weight)], elbo (nats, at discount 1), and
    steps for `transitions`. E[exp(log_z)] is exact for smc and nested; elbo is below log Z on average.
    """
    n, steps, children, log_z, trail = len(x), len(abar) - 1, 1 if kind == "smc" else children, 0.0, []
    first_child = torch.arange(n, device=x.device) * children
    state = look(x, 0)
    state["log_w"] = discount * state["value"]
    for i in range(steps):
        mean, sigma = ddim_kernel(state["x0_hat"], state["eps"], abar[i], abar[i + 1], 1.0)
        shift = guide(state["grad"], sigma, torch.ones_like(state["value"]), max_shift)
        mean, shift = mean.repeat_interleave(children, 0), shift.repeat_interleave(children, 0)
        z = torch.randn(mean.shape, generator=rng, device=x.device, dtype=x.dtype)
        child, ratio = look(mean + sigma * (shift + z), i + 1), log_ratio(shift, z)
        reach = discount if i + 1 < steps else 1.0
        log_v = (ratio + reach * child["value"]).view(n, children)
        u = torch.rand(n, 1, generator=rng, device=x.device, dtype=torch.float64)
        chosen = first_child + invert_cdf(log_v.double().softmax(1), u)[:, 0]
        log_w = state["log_w"] - state["value"] + log_mean_exp(log_v)
        if kind != "local" and i + 1 < steps and effective_sample_size(log_w[None]) < ess * n:
            ancestors = resample(log_w[None], "systematic", rng)[0]
            chosen, log_z = chosen[ancestors], log_z + log_mean_exp(log_w[None]).item()
            log_w = torch.zeros_like(log_w)
        share = ratio.exp().view(n, children) / children
        trail.append(dict(x=state["x"], eps=state["eps"], z=(shift + z).view(n, children, -1), share=share,
                          chosen=chosen))
        state = gather(child, chosen)
        state["log_w"] = log_w
    log_z += log_mean_exp(log_w[None]).item()
    elbo = log_w.mean().item() if kind == "local" else log_z
    if kind == "local":
        log_w = torch.zeros_like(log_w)
    return dict(x=state["x"], log_w=log_w, log_z=log_z, elbo=elbo, steps=trail)


def transitions(out, recentre=True):
    """What the M-step learns from a search: x, eps (T, N, d), weight (T, N), pull (T, N, d).

    Traced back from the end, every child has a weight, its share of the final weights (their mean is 1). For a kernel
    mean moved by d sigmas, -log p of the chosen children is weight |d|^2 / 2 - pull . d + const, where pull is the
    weighted sum of their noises z. The mean of share z over all children is zero whatever x is: taking it out of the
    pull (`recentre`) changes no expectation, and leaves no noise where all children are chosen alike.
    """
    weight, rows = out["log_w"].softmax(0) * len(out["x"]), []
    for step in reversed(out["steps"]):
        w = torch.zeros_like(step["share"]).flatten().index_add_(0, step["chosen"], weight).view_as(step["share"])
        pull = ((w - step["share"] if recentre else w)[:, :, None] * step["z"]).sum(1)
        weight = w.sum(1)
        rows.append((step["x"], step["eps"], weight, pull))
    return [torch.stack(column) for column in zip(*rows[::-1])]


# ---- the method: M-step ----------------------------------------------------------------------------------------------


def mean_per_noise(abar):
    """How far a kernel's mean moves, in sigmas, per unit of predicted noise -> list of T floats."""
    moves = []
    for a, b in zip(abar, abar[1:]):
        by_x0, sigma = ddim_kernel(1.0, 0.0, a, b, 1.0)
        moves.append((ddim_kernel(0.0, 1.0, a, b, 1.0)[0] - by_x0 * ((1 - a) / a) ** 0.5) / sigma)
    return moves


def m_step(net, base, out, abar, rng, kind="trajectory", kl=0.0, updates=150, batch=4096, lr=6e-3, recentre=True):
    """The network that makes the trajectories of a search likely, starting from net -> Denoiser.

    trajectory: -sum_t log p(x_{t-1} | x_t), Gaussian, summed over dimensions, plus kl times the KL of each kernel from
    that of `base`. renoise: denoising of the x_0 alone, at the levels abar[:-1], plus kl |v - v_base|^2.
    """
    new = copy.deepcopy(net).requires_grad_(True)
    optimizer = torch.optim.Adam(new.parameters(), lr, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    level = torch.tensor(abar[:-1], device=rng.device, dtype=out["x"].dtype)[:, None]
    if kind == "trajectory":
        x, eps, weight, pull = transitions(out, recentre)
        move = torch.tensor(mean_per_noise(abar), device=rng.device, dtype=x.dtype)[:, None]
    for _ in range(updates):
        t = torch.randint(len(level), (batch,), generator=rng, device=rng.device)
        if kind == "trajectory":
            n = torch.randint(x.shape[1], (batch,), generator=rng, device=rng.device)
            here, w = x[t, n], weight[t, n]
            guess = new(here, level[t])
            d = move[t] * (guess - eps[t, n])
            loss = (w * d.pow(2).sum(1) / 2 - (pull[t, n] * d).sum(1)).mean()
            if kl:
                loss = loss + kl * (w * (move[t] * (guess - base(here, level[t]))).pow(2).sum(1) / 2).mean()
        else:
            n = torch.multinomial(out["log_w"].softmax(0), batch, replacement=True, generator=rng)
            x0, noise = out["x"][n], torch.randn(batch, out["x"].shape[1], generator=rng, device=rng.device)
            here = level[t].sqrt() * x0 + (1 - level[t]).sqrt() * noise
            unit, cos, sin = new.normalise(here, level[t])
            v = new.velocity(unit, cos, sin)
            loss = (v - cos * noise + sin * (x0 - new.mean) / new.std).pow(2).mean()
            if kl:
                loss = loss + kl * (v - base.velocity(unit, cos, sin)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return new.requires_grad_(False)


def dav(net, reward, abar, rng, rounds=8, trajectories=8192, kl_weight=4.0, kl=0.0, kind="smc", children=4,
        value="tweedie", guided=False, discount=1.0, max_shift=0.5, m_kind="trajectory", updates=150, batch=4096,
        lr=6e-3, searching=True):
    """Yield (round, network, search on that network) for round 0 (the pretrained net) to `rounds`.

    reward (N, d) -> (N,); kl > 0 is DAV-KL. searching=False takes the model's own trajectories instead, and learns
    them as they are: what is left of EM without the search. evaluations of a search count from the first round.
    """
    base, calls = net, 0
    for k in range(rounds + 1):
        counted = Counted(net)
        x = torch.randn(trajectories, len(net.mean), generator=rng, device=rng.device)
        if searching:
            look = foresight(counted, reward, abar, kl_weight, rng, value, guided, discount)
            out = search(look, x, abar, rng, kind, children, discount, max_shift)
        else:
            out = search(foresight(counted, lambda x: 0 * x[:, 0], abar, 1.0, rng), x, abar, rng, "smc")
            out["elbo"] = checked(reward(out["x"]), x.shape[:1]).mean().item() / kl_weight
        out["evaluations"] = calls + counted.calls
        yield k, net, out
        if k < rounds:
            net = m_step(net, base, out, abar, rng, m_kind, kl, updates, batch, lr, recentre=searching)
            calls = out["evaluations"] + updates * batch * (2 if kl else 1)


def search_samples(out, rng):
    """Unweighted samples from the result of a search: of the tuned model, this is DAV posterior -> (N, d)."""
    return out["x"][resample(out["log_w"][None], "systematic", rng)[0]]


# ---- the measures ----------------------------------------------------------------------------------------------------


def mean_and_se(values):
    """Independent values (G,) -> their mean and its standard error (None for a single one)."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None


def emd(x, y):
    """Earth mover's distance of two sets of n points (n, d): the mean distance in the best one-to-one matching."""
    cost = cdist(x, y)
    return cost[linear_sum_assignment(cost)].mean()


def emd_to_target(x, w, target, rng, repeats, size=500):
    """Mean and standard deviation of the EMD between `size` draws of x (N, d) with weights w (N,) and of the target."""
    pairs = []
    for _ in range(repeats):
        drawn = x[torch.multinomial(w, size, replacement=True, generator=rng)]
        pairs.append((drawn.cpu().numpy(), target.sample(size, rng).cpu().numpy()))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # scipy works outside the interpreter lock
        values = torch.tensor(list(pool.map(lambda pair: emd(*pair), pairs)))
    return values.mean().item(), values.std().item()


def mode_masses(x, w, means):
    """Share of the weighted points x (N, d), w (N,) that is nearest to each of means (K, d) -> (K,)."""
    nearest = torch.cdist(x, means.to(x)).argmin(1)
    return torch.zeros(len(means)).to(w).index_add_(0, nearest, w) / w.sum()


def compare_modes(problem, x, law):
    """Masses of the 8 modes in samples x (N, 2) against those of a law -> masses (8,), dict of numbers.

    covered counts the modes with at least half the mass they should have, among those that should have 1%.
    """
    masses = mode_masses(x.double(), torch.ones_like(x[:, 0]).double(), problem.means)
    due = law.masses > 0.01
    kl = (law.masses * (law.masses.clamp(min=1e-300) / masses.clamp(min=1e-4)).log()).sum()
    spread = (x - problem.means.to(x)[torch.cdist(x, problem.means.to(x)).argmin(1)]).pow(2).mean().sqrt()
    return masses, dict(mode_error=((masses - law.masses).abs().max().item(), 0.0), kl_modes=(kl.item(), 0.0),
                        covered=(int((masses[due] >= law.masses[due] / 2).sum()), int(due.sum())),
                        spread=(spread.item(), law.spread))


def measure(problem, method, x, law, args, rng, independent=True):
    """The rows of one set of samples x (N, 2) against its exact law; a searched population has no simple error."""
    mean, se = mean_and_se(problem.reward(x))
    rows = [row(f"{method}.{problem.name}.mean_reward", mean, se if independent else None, law.mean_reward)]
    masses, numbers = compare_modes(problem, x, law)
    rows += [row(f"{method}.{problem.name}.{key}", value, exact=exact) for key, (value, exact) in numbers.items()]
    w = torch.ones_like(x[:, 0])
    for key, points in dict(emd=x, emd_floor=law.sample(len(x), rng)).items():  # their se is that of one subsample
        rows.append(row(f"{method}.{problem.name}.{key}", *emd_to_target(points, w, law, rng, args.subsamples)))
    return rows


def measure_rounds(problem, method, run, laws, elbos):
    """Rows of E[r], the masses of the rewarded modes and the ELBO, at each round; for DAV-KL exact is where it ends."""
    rows = []
    for k, state in enumerate(run):
        mean, se = mean_and_se(problem.reward(state["x"]))
        masses = compare_modes(problem, state["x"], laws[k])[0]
        name = f"{method}.{problem.name}_round_{k}"
        rows.append(row(f"{name}.mean_reward", mean, se, laws[k].mean_reward))
        rows += [row(f"{name}.mass_{j}", masses[j].item(), exact=laws[k].masses[j].item()) for j in range(0, 8, 2)]
        rows.append(row(f"{name}.elbo", state["elbo"], exact=elbos[k]))
    return rows


ESTEPS = {  # kind, children, value, guided
    "local_4": ("local", 4, "tweedie", False), "local_16": ("local", 16, "tweedie", False),
    "local_4_guided": ("local", 4, "tweedie", True), "local_4_completion": ("local", 4, "completion", False),
    "nested_4": ("nested", 4, "tweedie", False), "smc": ("smc", 1, "tweedie", False),
    "smc_guided": ("smc", 1, "tweedie", True),
}


def measure_searches(problem, net, abar, rng, n):
    """Rows of one E-step on the pretrained model at kl_weight 1, by kind of search."""
    rows, exact = [], tilted_law(problem, 1.0)
    log_z = log_expectation(problem.law, problem.r)
    for done, (name, (kind, children, value, guided)) in enumerate(ESTEPS.items()):
        if guided and problem.name == "coarse":
            continue
        noise = torch.randn(n // 4 if kind == "local" else n, 2, generator=rng, device=rng.device)
        look = foresight(net, problem.reward, abar, 1.0, rng, value, guided)
        out = search(look, noise, abar, rng, kind, children)
        x = search_samples(out, rng)
        numbers = compare_modes(problem, x, exact)[1]
        numbers["mean_reward"] = problem.reward(x).mean().item(), exact.mean_reward
        if kind != "local":
            numbers["log_z"] = out["log_z"], log_z
        rows += [row(f"{name}.estep_{problem.name}.{key}", value, exact=right)
                 for key, (value, right) in numbers.items()]
        progress(f"{problem.name}: searches", done + 1, len(ESTEPS))
    return rows


def measure_discounts(problem, net, abar, args, rng, n):
    """Rows of E[r] after one E-step by smc with a discount, against the exact discounted optimum on p_0."""
    rows, (means, sigmas) = [], grid_kernels(problem, abar)
    for discount in (0.99, 0.95, 0.9):
        look = foresight(net, problem.reward, abar, args.kl_weight, rng, discount=discount)
        out = search(look, torch.randn(n, 2, generator=rng, device=rng.device), abar, rng, "smc", discount=discount)
        mean = (out["log_w"].softmax(0) @ problem.reward(out["x"])).item()
        _, values = grid_round(problem, means, sigmas, means, args.kl_weight, discount=discount)
        exact = grid_law(problem, means, sigmas, values, discount).mean_reward
        rows.append(row(f"discount_{round(100 * discount)}.discount_{problem.name}.mean_reward", mean, exact=exact))
    return rows


# ---- the figure ------------------------------------------------------------------------------------------------------

COLORS = {"dav": "#0072B2", "dav_kl": "#D55E00", "posterior": "#009E73", "no_search": "#777777"}
LABELS = {"dav": "DAV", "dav_kl": "DAV-KL", "posterior": "DAV posterior", "no_search": "no search"}


def draw_ring_rounds(path, problems, results):
    """Samples of the last problem per round over the exact contours; below, curves per round for each problem."""
    rounds = len(results[problems[0].name]["runs"]["dav"]) - 1
    shown = sorted({0, 1, rounds} | {k for k in (2, 4) if k < rounds})
    figure = plt.figure(figsize=(2.0 * len(shown), 6.7 + 2.4 * len(problems)))
    top, bottom = figure.subfigures(2, 1, height_ratios=[6.7, 2.4 * len(problems)])
    axes = top.subplots(3, len(shown), squeeze=False)
    problem, result = problems[-1], results[problems[-1].name]
    for line, method in zip(axes, ("dav", "dav_kl", "posterior")):
        for ax, k in zip(line, shown):
            law = result["laws"][method][k]
            x = result["runs"][method][k]["x"][:1500].cpu().numpy()
            log_p = (law.log_p - 2 * math.log(2 * HALF / (POINTS - 1))).view(POINTS, POINTS).T.cpu().numpy()
            span = problem.line.cpu().numpy()
            ax.contour(span, span, log_p, [-9, -6, -3], colors="black", linewidths=0.4, linestyles="solid")
            ax.scatter(x[:, 0], x[:, 1], s=2, c=COLORS[method], alpha=0.5, linewidths=0)
            mean = problem.reward(result["runs"][method][k]["x"]).mean().item()
            ax.set_title(f"round {k}   E[r] {mean:.2f} ({law.mean_reward:.2f})", fontsize=8)
            ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-5.5, 5.5), ylim=(-5.5, 5.5))
        line[0].set_ylabel(LABELS[method])
    top.suptitle(f"reward `{problem.name}`: contours and brackets are exact, for DAV-KL its fixed point", fontsize=10)
    top.subplots_adjust(left=0.05, right=0.98, top=0.92, bottom=0.02, wspace=0.08, hspace=0.15)
    axes = bottom.subplots(len(problems), 3, squeeze=False)
    for line, problem in zip(axes, problems):
        result = results[problem.name]
        for method in COLORS:
            run = result["runs"][method]
            k = range(len(run))
            line[0].plot(k, [problem.reward(s["x"]).mean().item() for s in run], color=COLORS[method], marker=".",
                         label=LABELS[method])
            line[0].plot(k, [law.mean_reward for law in result["laws"][method]], color="black", linestyle=":")
            if method != "posterior":
                line[2].plot(k, [s["elbo"] for s in run], color=COLORS[method], marker=".", label=LABELS[method])
                line[2].plot(k, result["elbos"][method], color="black", linestyle=":")
        for j, color in zip(range(0, 8, 2), ("#0072B2", "#E69F00", "#009E73", "#CC79A7")):
            masses = [compare_modes(problem, s["x"], law)[0][j].item()
                      for s, law in zip(result["runs"]["dav"], result["laws"]["dav"])]
            height = REWARDS[problem.name][j // 2]
            line[1].plot(range(len(masses)), masses, color=color, marker=".", label=f"r = {height}")
            line[1].plot(range(len(masses)), [law.masses[j].item() for law in result["laws"]["dav"]], color="black",
                         linestyle=":")
        for ax, title in zip(line, ("E[r]", "mass of the rewarded modes, DAV", "ELBO, nats")):
            ax.set_title(f"{problem.name}: {title}", fontsize=9)
            ax.tick_params(labelsize=8)
            ax.legend(fontsize=6)
        if problem is problems[-1]:
            for ax in line:
                ax.set_xlabel("round (dotted: exact)", fontsize=8)
    bottom.subplots_adjust(hspace=0.35, wspace=0.2, left=0.05, right=0.98, top=0.93, bottom=0.1)
    save_figure(figure, path)


# ---- shared: the network ---------------------------------------------------------------------------------------------


class Denoiser(torch.nn.Module):
    """Noise prediction by a tiny MLP that is safe at every noise level.

    The data are normalised (mean (d,), std scalar), the network sees x_t at unit variance times 4 (features of a few
    tenths are then within the reach of smooth units) and the log signal-to-noise ratio, and predicts the velocity v
    of Salimans and Ho (2022), which has unit variance at every level. So x0_hat stays bounded where abar -> 0, where
    the division by sqrt(abar) turns a plain noise prediction's error into |x0_hat| = 9 and more.
    """

    def __init__(self, mean, std, width, rng):
        super().__init__()
        sizes = [len(mean) + 1, width, width, width, len(mean)]
        layers = [torch.nn.Linear(a, b, device=rng.device) for a, b in zip(sizes, sizes[1:])]
        for layer in layers:  # PyTorch's own initialisation, from our generator; the biases must not start at zero
            for value in layer.parameters():
                torch.nn.init.uniform_(value, -(layer.in_features**-0.5), layer.in_features**-0.5, generator=rng)
        self.mlp = torch.nn.Sequential(*[m for layer in layers for m in (layer, torch.nn.SiLU())][:-1])
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def normalise(self, x, abar):
        """x (N, d), abar a float or (N, 1) -> unit-variance x, and cos, sin with x = cos x_0 + sin eps there."""
        abar = torch.as_tensor(abar, device=x.device, dtype=x.dtype).expand(len(x), 1)
        scale = (abar * self.std**2 + 1 - abar) ** -0.5
        return (x - abar.sqrt() * self.mean) * scale, abar.sqrt() * self.std * scale, (1 - abar).sqrt() * scale

    def velocity(self, unit, cos, sin):
        """v = cos eps - sin x_0 for normalised x_0."""
        return self.mlp(torch.cat([4 * unit, (cos / sin).log() / 2], 1))

    def forward(self, x, abar):
        """x (N, d), abar a float or (N, 1) -> E[eps | x_t = x] (N, d)."""
        unit, cos, sin = self.normalise(x, abar)
        return sin * unit + cos * self.velocity(unit, cos, sin)


def velocity_loss(net, x0, abar, rng):
    """Mean squared error of the velocity at x0 (N, d), noised to random levels among abar (T,) -> (N,)."""
    eps = torch.randn(x0.shape, generator=rng, device=rng.device)
    level = abar[torch.randint(len(abar), (len(x0), 1), generator=rng, device=rng.device)]
    unit, cos, sin = net.normalise(level.sqrt() * x0 + (1 - level).sqrt() * eps, level)
    v = cos * eps - sin * (x0 - net.mean) / net.std
    return ((net.velocity(unit, cos, sin) - v) ** 2).mean(1)


def train_denoiser(sample, abar, steps, rng, width=96, batch=2048, lr=8e-3):
    """Velocity regression on fresh draws of sample(n, rng) -> (n, d) at uniform time steps -> Denoiser."""
    x0 = sample(100_000, rng)
    net = Denoiser(x0.mean(0), (x0 - x0.mean(0)).std(), width, rng)
    levels = torch.tensor(abar, device=rng.device, dtype=x0.dtype)
    optimizer = torch.optim.Adam(net.parameters(), lr, betas=(0.9, 0.99), fused=True)
    # at least 21: with fewer, the warm-up has no step, and OneCycleLR divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 21), pct_start=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        velocity_loss(net, sample(batch, rng), levels, rng).mean().backward()
        optimizer.step()
        schedule.step()
        progress("training", step + 1, steps)
    return net.requires_grad_(False)


def cached_denoiser(folder, settings, sample, abar, device):
    """The network with these settings (a flat dict with steps and seed), from `folder`, or trained and stored there.

    Training draws from a generator of its own: a run gives the same numbers whether or not the network was there.
    """
    text = json.dumps(settings, sort_keys=True)
    path = folder / f"denoiser-{hashlib.sha256(text.encode()).hexdigest()[:12]}.pt"
    if not path.exists():
        net = train_denoiser(sample, abar, settings["steps"], torch.Generator(device).manual_seed(settings["seed"]))
        write_atomically(path, lambda part: torch.save({"settings": text, "state": net.state_dict()}, part))
    try:
        stored = torch.load(path, map_location=device, weights_only=True)
        if stored["settings"] != text:
            fail(f"{path} was trained with other settings ({stored['settings']}): delete it to train again.")
        state = stored["state"]
        net = Denoiser(state["mean"], state["std"], len(state["mlp.0.bias"]), torch.Generator(device))
        net.load_state_dict(state)
    except (KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        fail(f"{path} is no network of this script ({type(error).__name__}): delete it to train again.")
    return net.requires_grad_(False)


# ---- shared: command line and files ----------------------------------------------------------------------------------


def common_parser(doc):
    """The flags that every script has, in the same order; a bad flag ends in one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{parser.prog}: {message}")
    parser.add_argument("--seed", type=int, default=0)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="coarse, in seconds")
    size.add_argument("--paper", action="store_true", help="the paper's sizes")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder of results and caches")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    return parser


def device(text):
    """An argparse type: a device of PyTorch that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine") from error
    return text


def results_folder(args, script):
    """The folder of a script's results, `out`/<folder>_<script>; made now, so that a bad path costs no work."""
    path = args.out / script
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{path} cannot be made: {error.strerror}")
    return path


def positive(kind):
    """An argparse type: a number of this kind (int or float) above zero."""

    def parse(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above zero, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def fail(message):
    """End with one sentence on stderr and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def progress(label, done, total):
    """A line on stderr that counts up."""
    if done == total or done % max(1, total // 20) == 0:
        print(f"\r{label} {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def write_atomically(path, write):
    """Call write(path of a temporary file), then rename: an interrupted run leaves no half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{path.name}")  # the suffix stays, matplotlib reads the format from it
    write(part)
    os.replace(part, path)


def save_figure(figure, path, dpi=100):
    """Write a figure as a PNG with a palette of 128 colours, which is a third of the size, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB").quantize(128)
    write_atomically(path, lambda part: picture.save(part, optimize=True))


def row(name, estimate, se=None, exact=None, reference=None):
    """A line of numbers.json. z is against `reference` (value, standard error) where there is one, else `exact`."""
    value, value_se = reference or (exact, 0.0)
    z = (estimate - value) / math.hypot(se, value_se) if se and value is not None else None
    return dict(name=name, estimate=estimate, se=se, exact=exact, reference=reference and reference[0], z=z)


def write_numbers(path, args, rows, evaluations, seconds):
    """numbers.json: the arguments, the rows and what the run cost."""
    args = {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in vars(args).items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy", "matplotlib")}
    record = dict(args=args, rows=rows, network_evaluations=evaluations, seconds=round(seconds, 1),
                  peak_memory_mb=round(peak), versions=dict(python=sys.version.split()[0], **versions))
    write_atomically(path, lambda part: part.write_text(json.dumps(record, indent=1) + "\n"))
    print(f"results: {path.parent}", file=sys.stderr)


def print_table(rows, problem, keys):
    """The rows named method.problem.key: a line a method, a column a key; estimate±se, and z in brackets."""
    table = {r["name"]: r for r in rows}
    methods = list(dict.fromkeys(name.split(".")[0] for name in table if name.split(".")[1] == problem))

    def cell(r):
        if r is None:
            return ""
        text = f"{r['estimate']:,}" if isinstance(r["estimate"], int) else f"{r['estimate']:.3f}"
        return text + (f"±{r['se']:.3f}" if r["se"] else "") + (f" ({r['z']:+.1f})" if r["z"] is not None else "")

    lines = [[m, *(cell(table.get(f"{m}.{problem}.{key}")) for key in keys)] for m in methods]
    lines = [[problem, *keys]] + [line for line in lines if any(line[1:])]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines if len(lines) > 1 else []:
        print(line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:])), sep="  ")
    print()


class Counted:
    """A noise prediction (x, abar) that counts the points it is asked for."""

    def __init__(self, predict):
        self.predict, self.calls = predict, 0

    def __call__(self, x, abar):
        self.calls += len(x)
        return self.predict(x, abar)


# ---- main ------------------------------------------------------------------------------------------------------------


def run_methods(problem, net, abar, args, rng):
    """DAV, DAV-KL, DAV posterior and EM without the search, round by round, each with its exact laws -> dict."""
    options = dict(rounds=args.rounds, trajectories=args.trajectories, kl_weight=args.kl_weight, kind=args.search,
                   children=args.children, value=args.value, guided=args.guided, discount=args.discount,
                   max_shift=args.max_shift, m_kind=args.m_step, updates=args.updates, lr=args.lr)
    runs = {}
    for method, option in dict(dav={}, dav_kl=dict(kl=args.kl), no_search=dict(searching=False)).items():
        runs[method] = []
        for k, model, out in dav(net, problem.reward, abar, rng, **options, **option):
            noise = torch.randn(args.samples, 2, generator=rng, device=rng.device)
            runs[method].append(dict(x=ancestral(model, noise, abar, rng), elbo=out["elbo"],
                                     searched=search_samples(out, rng), evaluations=out["evaluations"]))
            progress(f"{problem.name}: {method} round", k + 1, args.rounds + 1)
    if args.discount == 1:
        tilts = [tilted_law(problem, k / args.kl_weight) for k in range(args.rounds + 2)]
        fixed_point = path_fixed_point(problem, abar, args.kl_weight, args.kl)
        laws = dict(dav=tilts[:-1], posterior=tilts[1:], dav_kl=[fixed_point] * len(tilts[:-1]))
    else:
        laws = {"dav_kl": grid_rounds(problem, abar, args.rounds, args.kl_weight, args.kl, args.discount)[0]}
        laws["dav"], laws["posterior"] = grid_rounds(problem, abar, args.rounds, args.kl_weight, 0.0, args.discount)
    laws["no_search"] = [problem.law] * len(laws["dav"])
    elbos = {m: [log_expectation(law, problem.r / args.kl_weight) for law in laws[m]] for m in ("dav", "dav_kl")}
    elbos["no_search"] = [problem.law.mean_reward / args.kl_weight] * len(laws["dav"])
    runs["posterior"] = [dict(x=state["searched"]) for state in runs["dav"]]
    return dict(runs=runs, laws=laws, elbos=elbos)


def main(args):
    """Pretrain or load, run every method on every reward, write figure and numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "toy_dav")
    rng = torch.Generator(args.device).manual_seed(args.seed)
    problems = [make_problem(name, rng.device) for name in args.problem]
    abar = search_levels(args.steps + 1)
    settings = dict(problem="ring", steps=args.train_steps, seed=args.seed)
    net = cached_denoiser(args.out / "cache", settings, problems[0].data.sample, noise_levels(), rng.device)
    rows, results = [], {}
    for problem in problems:
        result = results[problem.name] = run_methods(problem, net, abar, args, rng)
        runs, laws = result["runs"], result["laws"]
        rows += measure(problem, "pretrained", runs["dav"][0]["x"], laws["dav"][0], args, rng)
        for method in ("dav", "dav_kl"):
            rows += measure(problem, method, runs[method][-1]["x"], laws[method][-1], args, rng)
        for method, k in dict(search_only=0, posterior=-1).items():
            rows += measure(problem, method, runs["posterior"][k]["x"], laws["posterior"][k], args, rng, False)
        for method, elbos in result["elbos"].items():
            rows += measure_rounds(problem, method, runs[method], laws[method], elbos)
        law = law_fixed_point(problem, args.kl_weight, args.kl)
        rows.append(row(f"law_fixed_point.{problem.name}.mean_reward", law.mean_reward))
    rows += measure_searches(problem, net, abar, rng, args.trajectories)
    rows += measure_discounts(problem, net, abar, args, rng, args.trajectories)
    evaluations = sum(run[-1]["evaluations"] for result in results.values() for run in result["runs"].values()
                      if "evaluations" in run[-1])
    draw_ring_rounds(out / "figure.png", problems, results)
    write_numbers(out / "numbers.json", args, rows, evaluations, time.perf_counter() - start)
    for problem in problems:
        print_table(rows, problem.name, ["mean_reward", "mode_error", "kl_modes", "covered", "spread"])
        print_table(rows, problem.name, ["emd", "emd_floor"])
    print_table(rows, f"estep_{problem.name}", ["mean_reward", "log_z", "kl_modes", "mode_error"])
    print_table(rows, f"discount_{problem.name}", ["mean_reward"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
