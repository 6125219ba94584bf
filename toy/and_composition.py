"""Compose pretrained diffusion models by AND: sample the product of their densities whose worst KL is least.

Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104. Draws its Fig. 1 (figure.png), the dual function with the paths of the multipliers
(duals.png) and both KL lemmas against the closed form (lemmas.png).

Run    python toy/and_composition.py                       the paper's problem and an unequal pair   2 minutes (2 cores)
       python toy/and_composition.py --quick               the same, coarse                          20 seconds
       python toy/and_composition.py --score exact         closed-form scores: no network error      2 minutes
       python toy/and_composition.py --problem triple mixtures      two more problems                3 minutes
       python toy/and_composition.py --paper               more samples and dual steps               some 40 times that

Notation (here -> paper)
       q_i, weights -> q^i, lambda    the pretrained models; multipliers, which are also the exponents of the product
       product      -> q_AND^lambda   prod_i q_i^lambda_i / Z(lambda), lambda on the simplex
       D(lambda)    -> D_AND          the dual function -log Z(lambda); concave, its gradient is KL(product || q_i)
       u                              min over p of max_i KL(p || q_i) = D(lambda*): the KL of every model that counts
       summed score -> surrogate      sum_i lambda_i score of q_i with noise; the score of the noised product only
                                      where all q_i have one covariance, or without noise

Algorithm
       1. sample the product at the present multipliers     `sample_ddim` (paper), `sample_langevin`, `sample_smc`
       2. estimate each KL up to what all have in common     `pointwise_kl` (Lemma 2), `cross_entropy`
       3. raise the multiplier of the larger ones            `dual_update`, `project_to_simplex`
       4. repeat; average the second half                    `dual_ascent` (Algorithm 3)
       5. or train a network on the samples of 1. and take the KLs of 2. from it      `primal_dual` (Algorithm 2)

`corrected` is what the paper lacks. The product of the models' reverse kernels is known up to its normalisation
C_t(x_t), and the paths of prod_i q_i^lambda_i are those of the kernels weighted by C_t: `sample_smc` does that with
no further network call, and its estimate of log Z is the value of the dual function. And since
KL(p || q_i) = -E_p[log q_i] - entropy of p, the models' own denoising errors on samples of the product give the
differences of the KLs, with no need of the score of the product. With the summed score in Lemma 2 instead,
KL_i is (1 - lambda_i)^2 times the same number for two models: dual_only then returns 1/2, 1/2 for any pair.

What you should see: equal weights have a worst KL of 17.8 nats where 10.2 is possible. dual_only finds (0.495, 0.253,
0.253) on the paper's problem, but stays at (1/2, 1/2) on `pair`, where (0.210, 0.790) is exact; corrected and
primal_dual are within 0.01 of it. At the exact multipliers of `pair`, DDIM on summed scores has its mean at 0.00
instead of 0.68; SMC, MALA and unadjusted Langevin are near, the last with 15% too much variance where scores are exact.
To try: --problem triple --score exact: which methods find the multipliers, and which mean does DDIM give?
"""
import argparse
import concurrent.futures
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
from scipy.optimize import linear_sum_assignment, minimize
from scipy.spatial.distance import cdist

PRESETS = {  # what the size flags default to
    "quick": dict(samples=1000, steps=30, dual_steps=20, primal_steps=10, train_steps=200, budget=100, subsamples=4),
    "default": dict(samples=2000, steps=40, dual_steps=40, primal_steps=20, train_steps=800, budget=500,
                    subsamples=20),
    "paper": dict(samples=20000, steps=100, dual_steps=100, primal_steps=40, train_steps=5000, budget=1000,
                  subsamples=100),
}


def parse_args(argv=None):
    parser = common_parser(__doc__)
    parser.add_argument("--problem", nargs="+", choices=list(PROBLEMS), default=["paper", "pair"])
    parser.add_argument("--score", choices=["mlp", "exact"], default="mlp", help="trained networks or closed form")
    parser.add_argument("--samples", type=positive(int), help="samples at each dual step")
    parser.add_argument("--steps", type=positive(int), help="sampling steps, at most 1000")
    parser.add_argument("--dual-steps", type=positive(int), help="steps of the multipliers, at least 4")
    parser.add_argument("--dual-lr", type=positive(float), default=0.1, help="their step, for KLs one unit apart")
    parser.add_argument("--primal-steps", type=positive(int), help="training steps between dual steps (Algorithm 2)")
    parser.add_argument("--train-steps", type=positive(int), help="training steps of each pretrained network")
    parser.add_argument("--budget", type=positive(int), help="calls of each model per sample, in the table of samplers")
    parser.add_argument("--subsamples", type=positive(int), help="EMDs (500 against 500 points) behind each mean")
    args = parser.parse_args(argv)
    for name, value in PRESETS["quick" if args.quick else "paper" if args.paper else "default"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.steps > 1000 or args.budget > 1000 or args.dual_steps < 4 or args.samples < 500 or args.budget < 20:
        parser.error("--steps and --budget can be at most 1000, --budget at least 20, --dual-steps at least 4,"
                     " --samples at least 500")
    return args


# ---- the problem: models, exact product, exact multipliers -----------------------------------------------------------

PROBLEMS = {  # a model is a list of equally weighted Gaussians: mean x, mean y, variances along x and y, correlation
    "paper": [[(1, 0, 0.05, 0.05, 0)], [(-1, 0.2, 0.05, 0.05, 0)], [(-1, -0.2, 0.05, 0.05, 0)]],
    "pair": [[(1, 0, 0.025, 0.025, 0)], [(-1, 0, 0.5, 0.5, 0)]],
    "triple": [[(1, 0, 0.3, 0.05, 0)], [(-0.6, 0.8, 0.2, 0.2, 0.6)], [(-0.6, -0.8, 0.1, 0.1, 0)]],
    "mixtures": [[(1, 0, 0.1, 0.1, 0), (-1, 0.5, 0.2, 0.2, 0)], [(1, 0.5, 0.2, 0.2, 0), (0, -1.2, 0.1, 0.1, 0)]],
}


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
    """Models q_i, and what is exact by quadrature on a grid: multipliers, u, product. A namespace.

    The grid (M, 2) reaches 6 in each direction; log_q (m, M) are log masses of its cells, so that the trapezoid rule,
    which is exact to round-off for densities this smooth, is a sum.
    """
    models = []
    for components in PROBLEMS[name]:
        table = torch.tensor(components, dtype=torch.float64, device=device)
        means, (a, b, rho) = table[:, :2], table[:, 2:].T
        off = rho * (a * b).sqrt()
        covs = torch.stack([torch.stack([a, off], 1), torch.stack([off, b], 1)], 1)
        models.append(GaussianMixture(torch.full_like(a, 1 / len(a)), means, covs))
    grid, log_cell = make_grid(6.0, 401, device)
    log_q = torch.stack([model.log_prob(grid) for model in models]) + log_cell
    problem = types.SimpleNamespace(name=name, models=models, grid=grid, log_q=log_q)
    problem.weights = maximise_dual(lambda w: dual_function(problem, w), len(models), len(models))
    problem.u = dual_function(problem, problem.weights)[0]
    return problem


def product_on_grid(problem, weights):
    """prod_i q_i^weights_i -> its masses on the grid (M,), log Z."""
    log_p = weights @ problem.log_q
    return log_p.softmax(0), log_p.logsumexp(0).item()


def dual_function(problem, weights):
    """D(weights) = -log Z and KL(product || q_i) (m,), its gradient along the simplex."""
    p, log_z = product_on_grid(problem, weights)
    cross = problem.log_q @ p  # (m,), E_p[log q_i]
    return -log_z, weights @ cross - log_z - cross


def product_moments(problem, weights):
    """Mean (2,) and covariance (2, 2) of the product."""
    p, _ = product_on_grid(problem, weights)
    mean = p @ problem.grid
    return mean, (problem.grid - mean).T @ (p[:, None] * (problem.grid - mean))


def sample_grid(problem, weights, n, rng):
    """n draws of the product, uniform within the cells of the grid -> (n, 2), float32."""
    p, _ = product_on_grid(problem, weights)
    side = problem.grid[1, 1] - problem.grid[0, 1]
    jitter = torch.rand(n, 2, generator=rng, device=rng.device, dtype=side.dtype) - 0.5
    return (problem.grid[torch.multinomial(p, n, replacement=True, generator=rng)] + side * jitter).float()


# ---- shared: multipliers and their exact values ----------------------------------------------------------------------


def make_grid(half, n, device):
    """Points of a square grid (n * n, 2), float64, and the logarithm of the area of a cell."""
    line = torch.linspace(-half, half, n, dtype=torch.float64, device=device)
    return torch.cartesian_prod(line, line), 2 * math.log(2 * half / (n - 1))


def maximise_dual(dual, count, on_simplex):
    """Maximum of a concave dual function over `count` multipliers >= 0, the first `on_simplex` of which sum to one.

    dual(v) -> value, gradient (count,). By sequential quadratic programming (scipy's SLSQP), to about 1e-7.
    """
    start = torch.ones(count, dtype=torch.float64)
    start[:on_simplex] /= max(on_simplex, 1)

    def negative(v):
        value, gradient = dual(torch.as_tensor(v))
        return -float(value), -gradient.cpu().numpy()

    rows = [dict(type="eq", fun=lambda v: v[:on_simplex].sum() - 1)] if on_simplex else []
    found = minimize(negative, start.numpy(), jac=True, method="SLSQP", bounds=[(0, None)] * count, constraints=rows,
                     options=dict(ftol=1e-15, maxiter=500))
    return torch.as_tensor(found.x)


def project_to_simplex(v):
    """The nearest point (Euclidean) to v (m,) with entries >= 0 that sum to one.

    It is max(v - c, 0); c follows from the largest k entries of v that stay above it (Held, Wolfe, Crowder 1974).
    """
    # exercise 4: how large is c if the largest k entries stay above it? and which k is right?
    top = v.sort(descending=True)[0]
    excess = (top.cumsum(0) - 1) / torch.arange(1, len(v) + 1, device=v.device)
    return (v - excess[(top > excess).sum() - 1]).clamp(min=0)
    # end exercise


def dual_update(dual, gap, memory, ki, kp=0.0, nu=0.0):
    """One step of nuPI (Sohrabi et al. 2024) on the multipliers (m,), before projection -> dual, memory.

    dual + ki gap + kp (change of the moving average nu memory + (1 - nu) gap); kp = 0 is dual ascent.
    """
    average = nu * memory + (1 - nu) * gap
    return dual + ki * gap + kp * (average - memory), average


# ---- shared: KL of diffusion models ----------------------------------------------------------------------------------


def multistep_kernel(x, eps, before, a, b, eta=1.0):
    """Second-order DDIM kernel between levels evenly spaced in log SNR -> mean (..., N, d), sigma, x0_hat (..., N, d).

    x0_hat is extrapolated to the middle of the step from its value `before`, one step ago (None at the first), as in
    DPM-Solver++ (Lu et al. 2022). Plain DDPM loses 22% of the variance of data with variance 0.05 in 100 steps.
    """
    x0_hat = (x - (1 - a) ** 0.5 * eps) / a**0.5
    ahead = x0_hat if before is None or b == 1 else 1.5 * x0_hat - 0.5 * before
    return *ddim_kernel(ahead, (x - a**0.5 * ahead) / (1 - a) ** 0.5, a, b, eta), x0_hat


def pathwise_kl(predict_p, predictions, x, abar, eta, rng):
    """Lemma 1: KL between the whole reverse path of p and that of each other model -> samples (N, ...), KL (m, N).

    x (N, ...) standard normal; abar (T + 1,) from noise to data. Kernels of one variance differ by their means: a step
    costs |mean_p - mean_q|^2 / (2 sigma^2). A last step without noise is left out: there the KL is not defined.
    """
    total, before = 0, [None] * (1 + len(predictions))
    for a, b in zip(abar, abar[1:]):
        means = []
        for i, predict in enumerate((predict_p, *predictions)):
            mean, sigma, before[i] = multistep_kernel(x, predict(x, a), before[i], a, b, eta)
            means.append(mean)
        if sigma > 0:
            total = total + torch.stack([(means[0] - m).flatten(1).pow(2).sum(1) for m in means[1:]]) / (2 * sigma**2)
        x = means[0] + sigma * torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
    return x, total


def log_snr_rule(abar):
    """Weights of the trapezoid rule for 1/2 int f d log(abar / (1 - abar)) at the levels abar -> list of float.

    Outside of the levels, f falls as abar (noise) and as 1 - abar (data), whose integrals are f at the ends.
    """
    snr = [math.log(a / (1 - a)) for a in abar]
    gaps = [abs(s - t) / 2 for s, t in zip(snr, snr[1:])]
    return [(left + right) / 2 for left, right in zip([1.0, *gaps], [*gaps, 1.0])]


def pointwise_kl(predict_p, predictions, x0, abar, rng):
    """Lemma 2: KL between samples of p and of each other model, from samples x0 (N, ...) of p -> (m, N).

    1/2 int E |eps_p - eps_q|^2 d log SNR over the levels abar: in terms of scores the weight of a step is
    1/2 d log abar, about beta_t / 2. Needs that p is a diffusion of x0: eps_p the noise prediction of its samples.
    """
    total = 0
    for a, weight in zip(abar, log_snr_rule(abar)):
        x = a**0.5 * x0 + (1 - a) ** 0.5 * torch.randn(x0.shape, generator=rng, device=x0.device)
        eps = predict_p(x, a)
        total = total + weight * torch.stack([(eps - f(x, a)).flatten(1).pow(2).sum(1) for f in predictions])
    return total


def cross_entropy(predictions, x0, abar, rng):
    """-log q_i(x0) in nats for every model q_i, from its denoising error: x0 (N, ...) -> (m, N), to be averaged.

    d/2 log 2 pi + 1/2 int (E |eps - eps_i|^2 - abar^2 |eps|^2) d log SNR (Guo, Shamai and Verdu 2005): for samples of p
    it is KL(p || q_i) plus the entropy of p. The same noise serves all models.
    """
    total = x0.flatten(1).shape[1] / 2 * math.log(2 * math.pi)
    for a, weight in zip(abar, log_snr_rule(abar)):
        eps = torch.randn(x0.shape, generator=rng, device=x0.device)
        x = a**0.5 * x0 + (1 - a) ** 0.5 * eps
        errors = torch.stack([(eps - f(x, a)).flatten(1).pow(2).sum(1) for f in predictions])
        total = total + weight * (errors - a**2 * eps.flatten(1).pow(2).sum(1))
    return total


def log_snr_levels(count, end=None):
    """`count` signal powers from noise to data, evenly spaced in log SNR: from -end to end, or all of the schedule."""
    top, bottom = (math.log(a / (1 - a)) for a in (noise_levels()[0], noise_levels()[-1]))
    return torch.linspace(-end if end else bottom, end or top, count, dtype=torch.float64).sigmoid().tolist()


# ---- the method: samplers of the product -----------------------------------------------------------------------------


class Counted:
    """A noise prediction (x, abar) that counts the points it is asked for."""

    def __init__(self, predict):
        self.predict, self.calls = predict, 0

    def __call__(self, x, abar):
        self.calls += len(x)
        return self.predict(x, abar)


def summed(predictions, weights):
    """The noise prediction sum_i weights_i eps_i, the paper's surrogate for that of the product."""
    return lambda x, a: torch.stack([w * f(x, a) for w, f in zip(weights.tolist(), predictions)]).sum(0)


def sample_ddim(predictions, weights, x, steps, rng):
    """Reverse diffusion with the summed score, from noise x (N, d): right where the surrogate is (Algorithm 3)."""
    predict, abar, before = summed(predictions, weights), [*log_snr_levels(steps), 1.0], None
    for a, b in zip(abar, abar[1:]):
        mean, sigma, before = multistep_kernel(x, predict(x, a), before, a, b)
        x = mean + sigma * torch.randn(x.shape, generator=rng, device=x.device)
    return x


def sample_langevin(predictions, weights, x, steps, rng, inner=10, size=0.3, metropolis=False):
    """Annealed Langevin: `inner` steps at each of steps / inner noise levels -> x (N, d), share of accepted moves.

    The summed score is the gradient of sum_i weights_i log q_i with noise, which at the last level is the product. The
    step is `size` times the variance of the samples' distribution, d / E|score|^2 for a Gaussian; unadjusted, it widens
    a Gaussian by 1 / (1 - size / 2). metropolis=True adds the acceptance of MALA to each chain, with the log density
    ratio by the trapezoid rule along the move, exact for Gaussians.
    """
    predict, accepted, moves = summed(predictions, weights), 0.0, 0
    for a in log_snr_levels(max(2, steps // (inner + 1))):
        score = -predict(x, a) / (1 - a) ** 0.5
        for _ in range(inner):
            step = size * x.shape[1] / score.pow(2).sum(1).mean().item()
            y = x + step * score + (2 * step) ** 0.5 * torch.randn(x.shape, generator=rng, device=x.device)
            score_y = -predict(y, a) / (1 - a) ** 0.5
            if metropolis:
                log_ratio = ((score + score_y) / 2 * (y - x)).sum(1)
                there, back = (y - x - step * score).pow(2).sum(1), (x - y - step * score_y).pow(2).sum(1)
                log_accept = log_ratio + (there - back) / (4 * step)  # (N,): every chain decides for itself
                move = torch.rand(len(x), generator=rng, device=x.device).log() < log_accept
                accepted, moves = accepted + move.float().mean().item(), moves + 1
                x, score = torch.where(move[:, None], y, x), torch.where(move[:, None], score_y, score)
            else:
                x, score = y, score_y
    return x, accepted / max(moves, 1)


def sample_smc(predictions, weights, x, steps, rng, ess=0.5):
    """Sequential Monte Carlo on the product of the models' reverse kernels, from noise x (N, d) -> x, log Z.

    prod_i N(x'; mean_i, sigma^2)^weights_i = C N(x'; mean, sigma^2) with mean = sum_i weights_i mean_i and
    log C = -sum_i weights_i |mean_i - mean|^2 / (2 sigma^2): the particles move by the summed score and carry C as
    weight. Returns equally weighted particles. Exact as the number of steps and of particles grows.
    """
    abar, before = [*log_snr_levels(steps), 1.0], None
    log_w, log_z = torch.zeros(1, len(x), device=x.device), 0.0
    for a, b in zip(abar, abar[1:]):
        if effective_sample_size(log_w) < ess * len(x):
            index = resample(log_w, "systematic", rng)[0]
            x, before, log_z = x[index], before[:, index], log_z + log_mean_exp(log_w).item()
            log_w = torch.zeros_like(log_w)
        means, sigma, before = multistep_kernel(x, torch.stack([f(x, a) for f in predictions]), before, a, b)
        mean = torch.einsum("m,mnd->nd", weights.to(x), means)
        if sigma > 0:  # the last step has no noise, and a product of points is not defined
            log_w = log_w - torch.einsum("m,mnd->n", weights.to(x), (means - mean) ** 2) / (2 * sigma**2)
        x = mean + sigma * torch.randn(x.shape, generator=rng, device=x.device)
    return x[resample(log_w, "systematic", rng)[0]], log_z + log_mean_exp(log_w).item()


# ---- the method: multipliers -----------------------------------------------------------------------------------------


def dual_ascent(predictions, draw, kl, args):
    """Algorithm 3: projected ascent of the multipliers -> average of the second half (m,), path (steps + 1, m).

    draw(weights) -> samples of the product; kl(weights, samples) -> KL of each model, up to a common constant.
    """
    weights = torch.full((len(predictions),), 1 / len(predictions), dtype=torch.float64)
    path, memory, unit = [weights], torch.zeros_like(weights), None
    for step in range(args.dual_steps):
        gap = kl(weights, draw(weights)).double().cpu()
        unit = unit or spread(gap)
        raw, memory = dual_update(weights, gap / unit, memory, args.dual_lr)
        weights = project_to_simplex(raw)
        path.append(weights)
        progress("multipliers", step + 1, args.dual_steps)
    return torch.stack(path[len(path) // 2 :]).mean(0), torch.stack(path)


def spread(kl):
    """The unit of the multipliers' steps: how far the KLs (m,) are apart at the start, at least one nat."""
    return max((kl.max() - kl.min()).item(), 1.0)


def primal_dual(predictions, args, rng):
    """Algorithm 2: a network learns the product while the multipliers rise by its own KLs -> net, weights, path.

    A first share of training steps at equal weights, or the KLs of an untrained network would drive the multipliers;
    a last share at the averaged multipliers, while the learning rate falls to zero.
    """
    rounds, count = args.dual_steps, len(predictions)
    levels = torch.tensor(noise_levels(), dtype=torch.float32, device=rng.device)

    def draw(weights):
        noise = torch.randn(args.samples, 2, generator=rng, device=rng.device)
        return sample_smc(predictions, weights, noise, args.steps, rng)[0]

    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    x0 = draw(weights)
    net = Denoiser(x0.mean(0), (x0 - x0.mean(0)).std(), 96, rng)
    optimizer = torch.optim.Adam(net.parameters(), 4e-3, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=2 * rounds * args.primal_steps)
    path, memory, unit = [weights], torch.zeros_like(weights), None
    for step in range(2 * rounds):  # a quarter of them warms up, a quarter settles
        for _ in range(args.primal_steps):
            batch = x0[torch.randint(len(x0), (512,), generator=rng, device=rng.device)]
            optimizer.zero_grad()
            velocity_loss(net, batch, levels, rng).mean().backward()
            optimizer.step()
            schedule.step()
        if rounds // 2 <= step < 3 * rounds // 2:
            with torch.no_grad():
                kl = pointwise_kl(net, predictions, x0, log_snr_levels(20), rng).mean(1)
            unit = unit or spread(kl)
            raw, memory = dual_update(weights, kl.double().cpu() / unit, memory, args.dual_lr)
            weights = project_to_simplex(raw)
            path.append(weights)
        elif step >= 3 * rounds // 2:
            weights = torch.stack(path[len(path) // 2 :]).mean(0)
        x0 = draw(weights)
        progress("primal-dual", step + 1, 2 * rounds)
    return net.requires_grad_(False), weights, torch.stack(path)


# ---- the measures ----------------------------------------------------------------------------------------------------


def run_methods(problem, predictions, args, rng):
    """Every method on one problem -> {method: namespace of weights, samples x, path, log_z, kl; None without}."""
    count, levels = len(predictions), log_snr_levels(20)

    def noise(n=args.samples):
        return torch.randn(n, 2, generator=rng, device=rng.device)

    def own_kl(predict, x):
        return pointwise_kl(predict, predictions, x, levels, rng).mean(1)

    equal = torch.full((count,), 1 / count, dtype=torch.float64)
    x, log_z = sample_smc(predictions, equal, noise(), args.steps, rng)
    out = dict(equal=types.SimpleNamespace(weights=equal, x=x, log_z=log_z, path=None, kl=None))

    weights, path = dual_ascent(
        predictions,
        lambda w: sample_ddim(predictions, w, noise(), args.steps, rng),
        lambda w, x: own_kl(summed(predictions, w), x),
        args,
    )
    x = sample_ddim(predictions, weights, noise(), args.steps, rng)
    kl = own_kl(summed(predictions, weights), x)
    out["dual_only"] = types.SimpleNamespace(weights=weights, x=x, log_z=None, path=path, kl=kl)

    weights, path = dual_ascent(
        predictions,
        lambda w: sample_smc(predictions, w, noise(), args.steps, rng)[0],
        lambda w, x: cross_entropy(predictions, x, levels, rng).mean(1),
        args,
    )
    x, log_z = sample_smc(predictions, weights, noise(), args.steps, rng)
    out["corrected"] = types.SimpleNamespace(weights=weights, x=x, log_z=log_z, path=path, kl=None)

    net, weights, path = primal_dual(predictions, args, rng)
    x = sample_ddim([net], torch.ones(1), noise(), args.steps, rng)
    out["primal_dual"] = types.SimpleNamespace(weights=weights, x=x, log_z=None, path=path, kl=own_kl(net, x))
    return out


def compare_samplers(problem, predictions, args, rng):
    """Samplers of the product at the exact multipliers, at equal calls of the models -> {sampler: x}, extra rows."""
    weights, steps = problem.weights, args.budget
    noise = torch.randn(args.samples, 2, generator=rng, device=rng.device)
    mala, accepted = sample_langevin(predictions, weights, noise, steps, rng, metropolis=True)
    out = dict(target=sample_grid(problem, weights, args.samples, rng),
               ddim=sample_ddim(predictions, weights, noise, steps, rng),
               langevin=sample_langevin(predictions, weights, noise, steps, rng)[0], mala=mala,
               smc=sample_smc(predictions, weights, noise, steps, rng)[0])
    return out, [row(f"mala.{problem.name}.accepted", accepted)]


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


def moment_rows(name, x, mean, cov):
    """Rows of the sample mean and variances of x (N, 2) against the exact ones, with standard errors."""
    rows = []
    for axis, value, exact_mean, exact_var in zip("xy", x.double().T, mean.tolist(), cov.diagonal().tolist()):
        rows.append(row(f"{name}.mean_{axis}", *mean_and_se(value), exact_mean))
        rows.append(row(f"{name}.var_{axis}", *mean_and_se((value - value.mean()) ** 2), exact_var))
    return rows


def measure(problem, results, samplers, args, rng):
    """All rows of a problem. Exact values are those of the product at the exact multipliers, also for equal weights."""
    name, target = problem.name, types.SimpleNamespace(sample=lambda n, g: sample_grid(problem, problem.weights, n, g))
    mean, cov = product_moments(problem, problem.weights)
    u, kls = dual_function(problem, problem.weights)
    counts = problem.weights > 1e-6
    kkt = max((kls[counts] - u).abs().max().item(), (kls - u).max().item())
    rows = [row(f"exact.{name}.u", u), row(f"exact.{name}.kkt_residual", kkt)]
    rows += [row(f"exact.{name}.dual_{i + 1}", w) for i, w in enumerate(problem.weights.tolist())]
    rows += [row(f"exact.{name}.kl_{i + 1}", v) for i, v in enumerate(kls.tolist())]
    for method, out in results.items():
        rows += [row(f"{method}.{name}.dual_{i + 1}", w, exact=e)
                 for i, (w, e) in enumerate(zip(out.weights.tolist(), problem.weights.tolist()))]
        _, kls = dual_function(problem, out.weights)  # exact, of the product that these multipliers stand for
        rows += [row(f"{method}.{name}.kl_{i + 1}", v, exact=u) for i, v in enumerate(kls.tolist())]
        rows.append(row(f"{method}.{name}.worst_kl", kls.max().item(), exact=u))
        if out.kl is not None:
            rows.append(row(f"{method}.{name}.worst_kl_estimated", out.kl.max().item(), exact=u))
        if out.log_z is not None:
            rows.append(row(f"{method}.{name}.dual_value", -out.log_z, exact=dual_function(problem, out.weights)[0]))
        rows += moment_rows(f"{method}.{name}", out.x, mean, cov)
    for sampler, x in samplers.items():
        rows += moment_rows(f"{sampler}.{name}_samplers", x, mean, cov)
        equal = torch.ones(len(x), device=x.device)
        rows.append(row(f"{sampler}.{name}_samplers.emd", *emd_to_target(x, equal, target, rng, args.subsamples)))
    return rows


def measure_lemmas(args, rng, sizes=(10, 20, 50, 100, 200, 500, 1000), etas=(1.0, 0.5, 0.25)):
    """Both lemmas on the first two models of `paper` and `pair`, exact scores, against the KL by quadrature."""
    rows, sizes = [], (10, 20, 50, 100) if args.quick else sizes
    for name in ("paper", "pair"):
        problem = make_problem(name, rng.device)
        p, q = problem.models[:2]
        exact = (problem.log_q[0].exp() * (problem.log_q[0] - problem.log_q[1])).sum().item()
        rows.append(row(f"exact.{name}_lemmas.kl", exact))
        for size in sizes:
            abar = [*log_snr_levels(size), 1.0]
            x0 = p.sample(args.samples, rng)
            value = pointwise_kl(p.predict_noise, [q.predict_noise], x0, abar[:-1], rng).mean().item()
            rows.append(row(f"pointwise.{name}_lemmas.kl_{size}", value, exact=exact))
            for eta in etas:
                noise = torch.randn(x0.shape, generator=rng, device=rng.device)
                value = pathwise_kl(p.predict_noise, [q.predict_noise], noise, abar, eta, rng)[1].mean().item()
                method = f"pathwise_eta_{eta:.2f}".replace(".", "_")
                rows.append(row(f"{method}.{name}_lemmas.kl_{size}", value, exact=exact))
    return rows


# ---- the figures -----------------------------------------------------------------------------------------------------

COLORS = dict(equal="#E69F00", dual_only="#D55E00", corrected="#0072B2", primal_dual="#009E73")
TITLES = dict(equal="equal weights", dual_only="constrained, summed score", corrected="constrained, SMC",
              primal_dual="constrained, network")


def draw_panels(path, problems, results):
    """Models, then the samples of every method over the contours of the exact constrained product."""
    figure, axes = plt.subplots(len(problems), 5, figsize=(13, 2.9 * len(problems)), squeeze=False)
    for line, problem in zip(axes, problems):
        side = round(len(problem.grid) ** 0.5)
        x, y = problem.grid.view(side, side, 2).cpu().numpy().transpose(2, 0, 1)
        p = product_on_grid(problem, problem.weights)[0].view(side, side).cpu().numpy()
        for log_q, color in zip(problem.log_q, ("#CC79A7", "#009E73", "#56B4E9")):
            q = log_q.exp().view(side, side).cpu().numpy()
            line[0].contour(x, y, q, [q.max() * v for v in (0.01, 0.1, 0.6)], colors=color, linewidths=1)
        line[0].set_title("pretrained models", fontsize=9)
        line[0].set_ylabel(problem.name)
        for ax, (method, title) in zip(line[1:], TITLES.items()):
            out = results[problem.name][method]
            ax.scatter(*out.x[:1500].T.cpu().numpy(), s=2, c=COLORS[method], alpha=0.4, linewidths=0)
            worst = dual_function(problem, out.weights)[1].max()
            ax.set_title(f"{title}\nworst KL {worst:.2f}, exact {problem.u:.2f}", fontsize=9)
        for ax in line:
            ax.contour(x, y, p, [p.max() * v for v in (0.01, 0.1, 0.6)], colors="black", linewidths=0.6)
            ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-2.5, 2.5), ylim=(-1.8, 1.8))
    figure.tight_layout()
    save_figure(figure, path)


def draw_duals(path, problems, results):
    """The multipliers against the dual step, and their path over the dual function on the simplex."""
    figure, axes = plt.subplots(len(problems), 2, figsize=(9, 3.2 * len(problems)), squeeze=False)
    for line, problem in zip(axes, problems):
        paths = {m: out.path for m, out in results[problem.name].items() if out.path is not None}
        for method, steps in paths.items():
            line[0].plot(steps[:, 0].numpy(), color=COLORS[method], label=TITLES[method])
            line[0].plot(steps[:, 1].numpy(), color=COLORS[method], linestyle="--")
        for value in problem.weights[:2].tolist():
            line[0].axhline(value, color="black", linestyle=":")
        line[0].set(title=f"{problem.name}: first multiplier, second dashed, exact dotted", xlabel="dual step")
        line[0].title.set_fontsize(9)
        line[0].legend(fontsize=7)
        if len(problem.models) == 2:
            grid = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
            values = [dual_function(problem, torch.stack([a, 1 - a]))[0] for a in grid]
            line[1].plot(grid.numpy(), values, color="black", linewidth=1)
            for method, steps in paths.items():
                line[1].plot(steps[:, 0].numpy(), [dual_function(problem, w)[0] for w in steps], "o-", markersize=3,
                             color=COLORS[method])
            line[1].plot(problem.weights[0], problem.u, "k*", markersize=10)
            line[1].set(xlabel="first multiplier", ylabel="dual function D")
        else:
            corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64)
            a, b = torch.meshgrid(*[torch.linspace(0, 1, 41, dtype=torch.float64)] * 2, indexing="ij")
            inside = torch.stack([a, b, 1 - a - b], 2)[a + b <= 1 + 1e-9].clamp(min=0)
            values = [dual_function(problem, w)[0] for w in inside]
            line[1].tricontourf(*(inside @ corners).T.numpy(), values, 15, cmap="Greys_r")
            for method, steps in paths.items():
                line[1].plot(*(steps @ corners).T.numpy(), "o-", markersize=3, linewidth=1, color=COLORS[method])
            line[1].plot(*(problem.weights @ corners).numpy(), "k*", markersize=10)
            for (x, y), text in zip(corners.tolist(), "123"):
                line[1].text(0.5 + 1.1 * (x - 0.5), 0.29 + 1.1 * (y - 0.29), text, ha="center", va="center")
            line[1].set(xlim=(-0.1, 1.1), ylim=(-0.1, 0.98), aspect="equal")
            line[1].axis("off")
        line[1].set_title("dual function on the simplex, star: exact", fontsize=9)
    figure.tight_layout()
    save_figure(figure, path)


def draw_lemmas(path, rows):
    """Path-wise and point-wise KL against the number of steps."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for ax, name in zip(axes, ("paper", "pair")):
        lines = {}
        for r in rows:
            method, problem, key = r["name"].split(".")
            if problem == f"{name}_lemmas" and method != "exact":
                lines.setdefault(method, []).append((int(key[3:]), r["estimate"], r["exact"]))
        for (method, points), color in zip(lines.items(), ("#0072B2", "#E69F00", "#D55E00", "#CC79A7")):
            steps, values, exact = zip(*points)
            label = "point-wise" if method == "pointwise" else "path-wise, eta " + method[13:].replace("_", ".")
            ax.plot(steps, values, "o-", markersize=3, color=color, label=label)
        ax.axhline(exact[0], color="black", linestyle=":", label="KL, exact")
        ax.set(xscale="log", yscale="log", xlabel="steps", title=f"{name}: KL of model 1 from model 2")
        ax.title.set_fontsize(9)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


# ---- shared: the sampler's parts, the network ------------------------------------------------------------------------


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


def ddim_kernel(x0_hat, eps, abar, abar_next, eta):
    """Mean (N, ...) and standard deviation (float) of p(x_{t-1} | x_t); eta = 1 is DDPM. DDIM (Song 2021) eq. 12."""
    sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
    return abar_next**0.5 * x0_hat + max(1 - abar_next - sigma**2, 0.0) ** 0.5 * eps, sigma


def noise_levels():
    """abar of the 1000 training steps with linear beta from 1e-4 to 0.02 (Ho et al. 2020) -> list of float."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()


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


# ---- main ------------------------------------------------------------------------------------------------------------


def main(args):
    """Solve every problem exactly and by every method, write figures and numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "toy_and_composition")
    rng = torch.Generator(args.device).manual_seed(args.seed)
    problems = [make_problem(name, rng.device) for name in args.problem]
    rows, results, calls = [], {}, 0
    for problem in problems:
        predictions = [model.predict_noise for model in problem.models]
        if args.score == "mlp":
            settings = [dict(model=f"and {problem.name} {i}", steps=args.train_steps, seed=args.seed)
                        for i in range(len(predictions))]
            predictions = [cached_denoiser(args.out / "cache", s, model.sample, noise_levels(), rng.device)
                           for s, model in zip(settings, problem.models)]
        predictions = [Counted(f) for f in predictions]
        results[problem.name] = run_methods(problem, predictions, args, rng)
        samplers, extra = compare_samplers(problem, predictions, args, rng)
        rows += measure(problem, results[problem.name], samplers, args, rng) + extra
        calls += sum(f.calls for f in predictions)
    rows += measure_lemmas(args, rng)
    draw_panels(out / "figure.png", problems, results)
    draw_duals(out / "duals.png", problems, results)
    draw_lemmas(out / "lemmas.png", rows)
    write_numbers(out / "numbers.json", args, rows, calls, time.perf_counter() - start)
    for problem in problems:
        duals = [f"dual_{i + 1}" for i in range(len(problem.models))]
        print_table(rows, problem.name, [*duals, "worst_kl", "worst_kl_estimated", "dual_value", "u", "kkt_residual"])
        print_table(rows, problem.name, ["mean_x", "mean_y", "var_x", "var_y"])
        print_table(rows, f"{problem.name}_samplers", ["mean_x", "mean_y", "var_x", "var_y", "emd"])
    for name in ("paper", "pair"):
        print_table(rows, f"{name}_lemmas", ["kl", *(f"kl_{size}" for size in (10, 20, 50, 100, 200, 500, 1000))])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
