"""Compose diffusion models by OR: one model that covers every data set, at the mixture whose worst case is best.

Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104. Draws its Fig. 2 (figure.png) and the path of the multipliers (duals.png).

Run    python toy/or_composition.py                        both problems, both objectives      2 minutes, 2 CPU cores
       python toy/or_composition.py --quick                the same, coarse                    15 seconds
       python toy/or_composition.py --objective elbo       what the paper's figure shows       1.5 minutes
       python toy/or_composition.py --paper                longer training                     some 3 times that

Notation (here -> paper)
       q_i, weights -> q^i, lambda     the data sets; multipliers, which are also the shares of the mixture
       mixture      -> q_mix^lambda    sum_i lambda_i q_i, lambda on the simplex: the best model at these multipliers
       kl           -> (UF-C)          min over p of max_i KL(q_i || p): the problem as written
       elbo         -> eq. 70          min over p of max_i -E_{q_i}[log p], cross entropies: the problem that is solved

The two differ by the entropy of q_i, which is not the same for all i, so their solutions differ too: `elbo` gives more
weight to the data set with more entropy, and ends in the mixture of largest entropy; `kl` in that of largest mutual
information. On the paper's problem `elbo` has lambda = (1/3, 2/3) and `kl` (1/2, 1/2).

Algorithm (`primal_dual`)
       1. train one network on the data sets' denoising losses, weighted by the multipliers    `velocity_loss`
       2. estimate KL(q_i || model) or the cross entropy of each data set    `pointwise_kl`, `cross_entropy`
       3. raise the multiplier of the worse ones, back to the simplex        `dual_update`, `project_to_simplex`
       4. repeat while the learning rate falls; settle at the average of the last steps

What you should see: on the paper's problem weights within 0.01 of (1/3, 2/3) for `elbo` and (1/2, 1/2) for `kl`, modes
of variance 0.025 and masses within 0.02 of the weights. `overlap` is harder for the network: 0.83 instead of 0.86.
To try: --objective kl --problem overlap: which data set needs less than half of the mixture, and why?
"""
import argparse
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

PRESETS = {  # what the size flags default to
    "quick": dict(samples=2000, rounds=20, primal_steps=15, train_steps=300),
    "default": dict(samples=10000, rounds=120, primal_steps=25, train_steps=1000),
    "paper": dict(samples=50000, rounds=240, primal_steps=25, train_steps=4000),
}


def parse_args(argv=None):
    parser = common_parser(__doc__)
    parser.add_argument("--problem", nargs="+", choices=list(PROBLEMS), default=["paper", "overlap"])
    parser.add_argument("--objective", nargs="+", choices=["elbo", "kl"], default=["elbo", "kl"])
    parser.add_argument("--score", choices=["mlp", "exact"], default="mlp", help="of the data sets, for --objective kl")
    parser.add_argument("--samples", type=positive(int), help="samples behind masses and variances")
    parser.add_argument("--rounds", type=positive(int), help="of training and a step of the multipliers, at least 10")
    parser.add_argument("--dual-lr", type=positive(float), default=0.1, help="their step, per nat")
    parser.add_argument("--primal-steps", type=positive(int), help="training steps between them")
    parser.add_argument("--train-steps", type=positive(int), help="training steps of each data set's own network")
    args = parser.parse_args(argv)
    for name, value in PRESETS["quick" if args.quick else "paper" if args.paper else "default"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.rounds < 10:
        parser.error("--rounds must be at least 10")
    return args


# ---- the problem: data sets, exact multipliers -----------------------------------------------------------------------

PROBLEMS = {  # a data set is a list of equally weighted round Gaussians: mean x, mean y, variance
    "paper": [[(0.75, 0, 0.025)], [(-0.75, 0.75, 0.025), (-0.75, -0.75, 0.025)]],
    "overlap": [[(0, 0, 0.3)], [(0.6, 0, 0.03), (-0.9, 0.9, 0.03), (-0.9, -0.9, 0.03)]],
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
    """Data sets q_i, the means of all modes, and on a grid log q_i (log masses of the cells). A namespace."""
    data = []
    for components in PROBLEMS[name]:
        table = torch.tensor(components, dtype=torch.float64, device=device)
        covs = table[:, 2, None, None] * torch.eye(2, dtype=torch.float64, device=device)
        data.append(GaussianMixture(torch.full_like(table[:, 0], 1 / len(table)), table[:, :2], covs))
    grid, log_cell = make_grid(4.0, 401, device)
    log_q = torch.stack([q.log_prob(grid) for q in data]) + log_cell
    entropy = -(log_q.exp() * (log_q - log_cell)).sum(1)
    means = torch.cat([q.means for q in data])
    return types.SimpleNamespace(name=name, data=data, grid=grid, log_q=log_q, entropy=entropy, means=means)


def divergences(problem, weights):
    """KL(q_i || mixture) (m,) by quadrature; with the entropies added, the cross entropies."""
    log_mix = (problem.log_q + weights.log()[:, None]).logsumexp(0)
    return (problem.log_q.exp() * (problem.log_q - log_mix)).sum(1)


def blahut_arimoto(problem, objective, rounds=20_000):
    """The exact multipliers (m,): weights_i grow by exp(KL_i), or exp(cross entropy), until all that count are equal.

    For objective `kl` the mixture's weights are the capacity-achieving input of a channel (Blahut 1972, Arimoto 1972).
    """
    weights = torch.full((len(problem.data),), 1 / len(problem.data), dtype=torch.float64)
    for _ in range(rounds):
        gain = divergences(problem, weights) + (problem.entropy if objective == "elbo" else 0)
        new = (weights.log() + gain).softmax(0)
        if (new - weights).abs().max() < 1e-13:
            break
        weights = new
    return new


# ---- shared: multipliers ---------------------------------------------------------------------------------------------


def make_grid(half, n, device):
    """Points of a square grid (n * n, 2), float64, and the logarithm of the area of a cell."""
    line = torch.linspace(-half, half, n, dtype=torch.float64, device=device)
    return torch.cartesian_prod(line, line), 2 * math.log(2 * half / (n - 1))


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


# ---- shared: KL and cross entropy of diffusion models ----------------------------------------------------------------


def log_snr_levels(count, end=None):
    """`count` signal powers from noise to data, evenly spaced in log SNR: from -end to end, or all of the schedule."""
    top, bottom = (math.log(a / (1 - a)) for a in (noise_levels()[0], noise_levels()[-1]))
    return torch.linspace(-end if end else bottom, end or top, count, dtype=torch.float64).sigmoid().tolist()


def log_snr_rule(abar):
    """Weights of the trapezoid rule for 1/2 int f d log(abar / (1 - abar)) at the levels abar -> list of float.

    Outside of the levels, f falls as abar (noise) and as 1 - abar (data), whose integrals are f at the ends.
    """
    snr = [math.log(a / (1 - a)) for a in abar]
    gaps = [abs(s - t) / 2 for s, t in zip(snr, snr[1:])]
    return [(left + right) / 2 for left, right in zip([1.0, *gaps], [*gaps, 1.0])]


def multistep_kernel(x, eps, before, a, b, eta=1.0):
    """Second-order DDIM kernel between levels evenly spaced in log SNR -> mean (..., N, d), sigma, x0_hat (..., N, d).

    x0_hat is extrapolated to the middle of the step from its value `before`, one step ago (None at the first), as in
    DPM-Solver++ (Lu et al. 2022). Plain DDPM loses 22% of the variance of data with variance 0.05 in 100 steps.
    """
    x0_hat = (x - (1 - a) ** 0.5 * eps) / a**0.5
    ahead = x0_hat if before is None or b == 1 else 1.5 * x0_hat - 0.5 * before
    return *ddim_kernel(ahead, (x - a**0.5 * ahead) / (1 - a) ** 0.5, a, b, eta), x0_hat


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


# ---- the method ------------------------------------------------------------------------------------------------------


def primal_dual(problem, predictions, objective, args, rng):
    """Train one network on the weighted data sets while the multipliers rise -> net, weights (m,), path (steps + 1, m).

    objective `equal` keeps the multipliers equal. The first sixth of the rounds warms up at equal weights; the
    multipliers move while the learning rate falls, as an unfinished network is further from some data sets than from
    others; the last tenth settles at the average of their last quarter.
    """
    count, batch, levels = len(problem.data), 512, log_snr_levels(30)
    steps = torch.tensor(noise_levels(), dtype=torch.float32, device=rng.device)
    pooled = torch.cat([q.sample(10_000, rng) for q in problem.data])
    net = Denoiser(pooled.mean(0), (pooled - pooled.mean(0)).std(), 96, rng)
    optimizer = torch.optim.Adam(net.parameters(), 8e-3, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=args.rounds * args.primal_steps)
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    path, memory = [weights], torch.zeros_like(weights)
    for step in range(args.rounds):
        for _ in range(args.primal_steps):
            losses = velocity_loss(net, torch.cat([q.sample(batch, rng) for q in problem.data]), steps, rng)
            optimizer.zero_grad()
            (weights.to(losses) @ losses.view(count, batch).mean(1)).backward()
            optimizer.step()
            schedule.step()
        if objective != "equal" and args.rounds // 6 <= step < args.rounds * 9 // 10:
            gap = measure_gap(problem, predictions, objective, net, levels, rng)
            raw, memory = dual_update(weights, gap, memory, args.dual_lr)
            weights = project_to_simplex(raw)
            path.append(weights)
        elif step >= args.rounds * 9 // 10:
            weights = torch.stack(path[len(path) * 3 // 4 :]).mean(0)
        progress(f"{problem.name}: {objective}", step + 1, args.rounds)
    return net.requires_grad_(False), weights, torch.stack(path)


@torch.no_grad()
def measure_gap(problem, predictions, objective, net, levels, rng, n=2000):
    """Estimated KL(q_i || net), or cross entropy, of every data set in nats (m,)."""
    values = []
    for q, predict in zip(problem.data, predictions):
        x0 = q.sample(n, rng)
        kl = objective == "kl"
        value = pointwise_kl(predict, [net], x0, levels, rng) if kl else cross_entropy([net], x0, levels, rng)
        values.append(value.mean().item())
    return torch.tensor(values, dtype=torch.float64)


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


# ---- the measures ----------------------------------------------------------------------------------------------------


def mode_masses(x, w, means):
    """Share of the weighted points x (N, d), w (N,) that is nearest to each of means (K, d) -> (K,)."""
    nearest = torch.cdist(x, means.to(x)).argmin(1)
    return torch.zeros(len(means)).to(w).index_add_(0, nearest, w) / w.sum()


def mode_variance(x, w, means):
    """Variance per axis of points x (N, 2), weights w (N,), about the centre of those nearest to the same mean."""
    nearest = torch.cdist(x, means.to(x)).argmin(1)
    total = torch.zeros(len(means)).to(w).index_add_(0, nearest, w)
    centre = torch.zeros(len(means), 2).to(w).index_add_(0, nearest, w[:, None] * x) / total[:, None].clamp(min=1e-30)
    return ((w * ((x - centre[nearest]) ** 2).sum(1)).sum() / (2 * w.sum())).item()


def measure(problem, results, predictions, args, rng):
    """All rows of a problem. Exact values are those of the mixture at the exact multipliers of the objective."""
    name, rows = problem.name, []
    for objective, out in results.items():
        p = (problem.log_q + out.exact.log()[:, None]).logsumexp(0).exp()
        kl = divergences(problem, out.exact)
        masses = mode_masses(problem.grid, p, problem.means)
        exact = dict(dual=out.exact, kl=kl, ce=kl + problem.entropy, mass=masses)
        uniform, levels = torch.ones(len(out.x), dtype=torch.float64), log_snr_levels(50)
        found = dict(dual=out.weights, mass=mode_masses(out.x.double(), uniform, problem.means))
        for key in ("kl", "ce"):
            found[key] = measure_gap(problem, predictions, key, out.net, levels, rng, args.samples)
        for key, values in exact.items():
            for i, (b, a) in enumerate(zip(values.tolist(), found[key].tolist())):
                se = (b * (1 - b) / len(out.x)) ** 0.5 if key == "mass" else None
                rows.append(row(f"exact_{objective}.{name}.{key}_{i + 1}", b))
                rows.append(row(f"{objective}.{name}.{key}_{i + 1}", a, se, b))
        variance, exact = (mode_variance(*v, problem.means) for v in ((out.x.double(), uniform), (problem.grid, p)))
        rows.append(row(f"exact_{objective}.{name}.variance", exact))
        rows.append(row(f"{objective}.{name}.variance", variance, exact=exact))
    return rows


# ---- the figures -----------------------------------------------------------------------------------------------------

TITLES = dict(equal="equal weights", elbo="constrained, elbo", kl="constrained, kl")
COLORS = dict(equal="#E69F00", elbo="#0072B2", kl="#009E73")


def draw_panels(path, problems, results):
    """The data sets, then the samples of every model over the contours of its exact mixture."""
    columns = 1 + max(len(r) for r in results.values())
    figure, axes = plt.subplots(len(problems), columns, figsize=(3 * columns, 3.2 * len(problems)), squeeze=False)
    for line, problem in zip(axes, problems):
        x, y = problem.grid.view(401, 401, 2).cpu().numpy().transpose(2, 0, 1)
        for log_q, color in zip(problem.log_q, ("#CC79A7", "#56B4E9")):
            q = log_q.exp().view(401, 401).cpu().numpy()
            line[0].contour(x, y, q, [q.max() * v for v in (0.01, 0.1, 0.6)], colors=color, linewidths=1)
        line[0].set_title("data sets 1 (pink), 2 (blue)", fontsize=9)
        line[0].set_ylabel(problem.name)
        for ax, (objective, out) in zip(line[1:], results[problem.name].items()):
            p = (problem.log_q + out.exact.log()[:, None]).logsumexp(0).exp().view(401, 401).cpu().numpy()
            ax.scatter(*out.x[:2000].T.cpu().numpy(), s=2, c=COLORS[objective], alpha=0.4, linewidths=0)
            ax.contour(x, y, p, [p.max() * v for v in (0.01, 0.1, 0.6)], colors="black", linewidths=0.6)
            ax.set_title(f"{TITLES[objective]}\nweights {out.weights[0]:.2f}, {out.weights[1]:.2f}"
                         f"   exact {out.exact[0]:.2f}, {out.exact[1]:.2f}", fontsize=9)
        for ax in line:
            ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-1.9, 1.9), ylim=(-1.9, 1.9))
    figure.tight_layout()
    save_figure(figure, path)


def draw_duals(path, problems, results):
    """First multiplier against the dual step, exact value dotted."""
    figure, axes = plt.subplots(1, len(problems), figsize=(4.5 * len(problems), 3), squeeze=False)
    for ax, problem in zip(axes[0], problems):
        for objective, out in results[problem.name].items():
            if objective != "equal":
                ax.plot(out.path[:, 0].numpy(), color=COLORS[objective], label=objective)
                ax.axhline(out.exact[0].item(), color=COLORS[objective], linestyle=":")
        ax.set(title=f"{problem.name}: weight of data set 1, exact dotted", xlabel="dual step", ylim=(0, 1))
        ax.title.set_fontsize(9)
        ax.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


# ---- shared: the sampler's kernel, the network -----------------------------------------------------------------------


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
    """Train one network for every problem and objective, write figures and numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "toy_or_composition")
    rng = torch.Generator(args.device).manual_seed(args.seed)
    problems = [make_problem(name, rng.device) for name in args.problem]
    rows, results, calls = [], {}, 0
    for problem in problems:
        predictions = [q.predict_noise for q in problem.data]
        if args.score == "mlp" and "kl" in args.objective:
            settings = [dict(model=f"or {problem.name} {i}", steps=args.train_steps, seed=args.seed)
                        for i in range(len(predictions))]
            predictions = [cached_denoiser(args.out / "cache", s, q.sample, noise_levels(), rng.device)
                           for s, q in zip(settings, problem.data)]
        predictions = [Counted(f) for f in predictions]
        results[problem.name] = {}
        for objective in ("equal", *args.objective):
            net, weights, path = primal_dual(problem, predictions, objective, args, rng)
            net = Counted(net)
            noise = torch.randn(args.samples, 2, generator=rng, device=rng.device)
            exact = weights if objective == "equal" else blahut_arimoto(problem, objective)
            results[problem.name][objective] = types.SimpleNamespace(
                net=net, weights=weights, path=path, exact=exact, x=sample_ddim([net], torch.ones(1), noise, 60, rng))
        rows += measure(problem, results[problem.name], predictions, args, rng)
        calls += sum(f.calls for f in [*predictions, *(r.net for r in results[problem.name].values())])
    draw_panels(out / "figure.png", problems, results)
    draw_duals(out / "duals.png", problems, results)
    write_numbers(out / "numbers.json", args, rows, calls, time.perf_counter() - start)
    for problem in problems:
        print_table(rows, problem.name, ["dual_1", "dual_2", "kl_1", "kl_2", "ce_1", "ce_2", "variance"])
        print_table(rows, problem.name, [f"mass_{k + 1}" for k in range(len(problem.means))])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
