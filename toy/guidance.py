"""Steer a diffusion sampler by the gradient of a reward, without training or weights: what guidance does and does not.

Methods: the reward gradient of DPS (Chung et al., ICLR 2023, arXiv 2209.14687), taken through the network at the
Tweedie mean, in three forms; one is the guidance baseline in Fig. 1 of DAS (Kim, Kim and Park, ICLR 2025, arXiv
2501.05803), which this script puts beside the others.

Run    python toy/guidance.py                    gmm and gmm2: the figure and the table            45 seconds of CPU
       python toy/guidance.py --quick            the same, coarse                                  10 seconds
       python toy/guidance.py --score exact      no network: what is wrong with guidance itself    about as long
       python toy/guidance.py --paper            5 x the samples                             some 5 times that

Notation (here -> papers)
       kl_weight -> alpha    reward temperature: the target is p(x) exp(r(x) / kl_weight) / Z
       abar      -> abar_t   signal power: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps
       x0_hat    -> x0hat_t  Tweedie mean E[x_0 | x_t] = (x_t - sqrt(1 - abar) eps) / sqrt(abar)
       push                  what guidance adds to the mean of the DDPM kernel, g = grad r(x0_hat) / kl_weight:
                             published: strength g; scaled: sigma^2 strength g; tempered: sigma^2 temper strength g
       temper    -> lambda_t from 0 (noise) to 1 (sample), the schedule of DAS

Objective. KL - E[r] / kl_weight, nats: at least -log Z by Gibbs' bound, which only the target reaches. Guidance is
judged by the KL of its samples from the data (a histogram). The KL of its path is the mean of sum |push|^2 /
(2 sigma^2), exact given the path, and larger: pushes at high noise are mostly forgotten. Fine-tuning is charged for
them and makes fewer (toy/draft.py, toy/ddpo.py).

Algorithm (`guidance`; one particle, no weights, no training)
       1. look ahead: eps, x0_hat, its reward, the gradient of that through the network      `look_ahead`
       2. push the mean of the kernel: sigma^2 g is the first order of Bayes' rule           `guide`, `ddim_kernel`
       3. count the KL of the push; draw the next point                                      `guidance`
       4. among forms and strengths, the least objective                                     `run_methods`

What is wrong with it: the value of x_t is log E[exp(r / kl_weight)] over what x_0 can still become, not r of the mean
x0_hat. At high noise that lies between the modes, so guidance cannot tell what each is worth, and no weight corrects
it: that is what SMC adds (toy/das.py).

What you should see: on gmm guidance is 0.02 nats from the optimum (0.01 of it is the histogram's noise). On gmm2 it
is 0.08 above without the temper and 0.13 with it, EMD 0.4±0.1 and 1.4±0.1 (exact samples 0.26): the masses of the two
modes are wrong. Its path costs 5 to 14 nats more than its samples. The published form, without sigma^2, is 8 nats above
the optimum on gmm2, and on gmm it sometimes throws samples far away (E[r] -0.1, -0.1 and -45 for three seeds).
To try: --score exact, --strength 0.5 1 2 4 8, --steps 20, --kl-weight 0.3.
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
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch.nn.functional import one_hot

PRESETS = {  # what the size flags default to
    "quick": dict(samples=1000, sweep=100, steps=50, train_steps=500, subsamples=4),
    "default": dict(samples=4000, sweep=1000, steps=100, train_steps=2000, subsamples=20),
    "paper": dict(samples=20000, sweep=10000, steps=100, train_steps=5000, subsamples=100),
}


def parse_args(argv=None):
    parser = common_parser(__doc__)
    parser.add_argument("--problem", nargs="+", choices=["gmm", "gmm2"], default=["gmm", "gmm2"])
    parser.add_argument("--score", choices=["mlp", "exact"], default="mlp", help="trained network or closed form")
    parser.add_argument("--kl-weight", type=positive(float), default=1.0, help="reward temperature alpha")
    parser.add_argument("--strength", nargs="+", type=positive(float), default=[0.25, 0.5, 1.0, 2.0],
                        help="factors of the gradient to choose from; 1 is Bayes' rule")
    parser.add_argument("--gamma", type=positive(float), default=0.008, help="growth of the temper in 1/100 of the run")
    parser.add_argument("--samples", type=positive(int), help="samples behind the final numbers")
    parser.add_argument("--sweep", type=positive(int), help="samples behind each strength")
    parser.add_argument("--steps", type=positive(int), help="sampling steps, at most 1000")
    parser.add_argument("--train-steps", type=positive(int), help="training steps of the network, batch 2048")
    parser.add_argument("--subsamples", type=positive(int), help="EMDs (500 against 500 points) behind each mean")
    args = parser.parse_args(argv)
    for name, value in PRESETS["quick" if args.quick else "paper" if args.paper else "default"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not 1 < args.steps <= 1000 or min(args.samples, args.sweep) < 2 or not math.isfinite(max(args.strength)):
        parser.error("--steps must be 2 to 1000, --samples and --sweep at least 2, and every --strength finite")
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


def make_problem(name, kl_weight, device):
    """A toy problem of DAS with its exact answer: a namespace of data, reward, target, log_z, kl, *_reward, masses...

    `gmm` is a 3 x 3 grid of Gaussians, `gmm2` a ring of 8, the rewards are quadratic, so that the target is a mixture.
    masses (K,) and spread are those of the target by quadrature, as `mode_masses` and `mode_spread` see samples of it.
    """
    if name == "gmm":
        line, curvature, center = torch.tensor([-4.0, 0.0, 4.0]).double(), [0.01, 1.0], [0.0, 0.0]
        means = torch.cartesian_prod(line, line)
    else:
        angle, curvature, center = torch.arange(8).double() * math.pi / 4, [1.0, 0.1], [0.0, 1.0]
        means = 4 * torch.stack([angle.cos(), angle.sin()], 1)
    means, A, c = (torch.as_tensor(v, dtype=torch.float64, device=device) for v in (means, curvature, center))
    weights, cov = torch.full_like(means[:, 0], 1 / len(means)), 0.3 * torch.eye(2).to(A)
    data = GaussianMixture(weights, means, cov.expand(len(means), 2, 2))
    target, log_z = data.tilt(A.diag(), c, kl_weight)

    def reward(x):
        return -((x - c.to(x)) ** 2 * A.to(x)).sum(1)

    def mean_reward(mixture):
        mean, cov = mixture.moments()
        return -(((mean - c) ** 2 + cov.diagonal()) * A).sum().item()

    line = torch.linspace(-10, 10, 401, dtype=torch.float64, device=device)
    grid = torch.cartesian_prod(line, line)
    w = target.log_prob(grid).exp()
    exact = dict(data_reward=mean_reward(data), target_reward=mean_reward(target), log_z=log_z)
    exact |= dict(masses=mode_masses(grid, w, means), spread=mode_spread(grid, w, means))
    kl = exact["target_reward"] / kl_weight - log_z  # of the target from the data, nats
    return types.SimpleNamespace(name=name, data=data, reward=reward, target=target, kl=kl, **exact)


# ---- the method ------------------------------------------------------------------------------------------------------


def guidance(problem, predict_noise, x, timesteps, abar, rng, kl_weight=1.0, strength=1.0, form="tempered",
             gamma=0.008):
    """Sample with pushes along the gradient of the reward of x0_hat -> dict of x (N, ...), reward (N,), kl (N,), nats.

    predict_noise (N, ...), t -> (N, ...); x (N, ...) standard normal; timesteps (T,) from noise to data; abar (T + 1,)
    their signal powers and that of the result. form: `none`, `scaled` (Bayes' rule for a kernel of width sigma: move
    the mean by sigma^2 strength grad), `tempered` (the same times a temper that rises from 0 to 1, the proposal of
    DAS) or `published` (strength grad at every step). kl is |push|^2 / (2 sigma^2), summed over the path: its mean is
    the KL of the guided path from the unguided, infinite where a step without noise is pushed.
    """
    n, kl = len(x), torch.zeros(len(x)).to(x)
    temper = temper_schedule(len(timesteps), gamma, "schedule" if form == "tempered" else "none").to(x)
    for i, t in enumerate(timesteps):
        state = look_ahead(predict_noise, problem.reward, x, t, abar[i], kl_weight, form != "none", None)
        mean, sigma = ddim_kernel(state["x0_hat"], state["eps"], abar[i], abar[i + 1], 1.0)
        push = strength * state["grad"]
        if form != "published":
            push = sigma * guide(push, sigma, temper[i + 1].expand(n), math.inf)
        size = push.flatten(1).pow(2).sum(1)
        kl = kl + torch.where(size > 0, size / (2 * sigma**2) if sigma > 0 else math.inf, 0.0)
        x = mean + push + sigma * torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
    return dict(x=x, reward=checked(problem.reward(x), x.shape[:1]).detach(), kl=kl)


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


def temper_schedule(steps, gamma, kind):
    """temper before each step and after the last -> (steps + 1,). DAS: min((1 + gamma)^i - 1, 1), i in 1/100 runs.

    Counting i in hundredths of the run makes one gamma serve any number of steps: the paper's 0.008 for 100 steps is
    then about its 0.1 for 8.
    """
    if kind == "none":
        return torch.ones(steps + 1)
    # exercise 1: the schedule of the docstring, which is 0 at first and 1 at the end, for any gamma
    temper = ((1 + gamma) ** (torch.arange(steps + 1) * 100 / steps) - 1).clamp(max=1)
    temper[-1] = 1
    return temper
    # end exercise


def guide(grad, sigma, temper, max_shift):
    """Shift of the proposal in units of sigma: sigma temper grad, its norm capped. grad (N, ...), temper (N,).

    A shift u multiplies the second moment of the weights by exp(|u|^2) at every step; the cap keeps that finite and
    costs no exactness, because log_ratio knows the shift that was made.
    """
    shift = sigma * per_particle(temper, grad) * grad
    norm = shift.flatten(1).norm(dim=1).clamp(min=1e-30)
    return shift * per_particle((max_shift / norm).clamp(max=1), shift)


def per_particle(v, x):
    """v (N,) -> (N, 1, ..., 1), to multiply x (N, ...)."""
    return v.view(-1, *[1] * (x.dim() - 1))


def ddim_kernel(x0_hat, eps, abar, abar_next, eta):
    """Mean (N, ...) and standard deviation (float) of p(x_{t-1} | x_t); eta = 1 is DDPM. DDIM (Song 2021) eq. 12."""
    sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
    return abar_next**0.5 * x0_hat + max(1 - abar_next - sigma**2, 0.0) ** 0.5 * eps, sigma


def run_methods(problem, predict_noise, args, rng):
    """Every form, and for two of them every strength -> {method: out}, [(form, strength, terminal, path objective)].

    Both objectives are KL - E[r] / kl_weight in nats, with the KL of the law of the samples or that of the path; for
    both the least value is -log Z. Guidance is chosen by the first, since what its pushes do early is mostly forgotten
    later and only the path remembers. `guidance_tuned` is the form and strength with the least, sampled afresh.
    """
    abar = noise_levels()
    timesteps = [round(999 * (1 - i / args.steps)) for i in range(args.steps)]

    def sample(n, **options):
        noise = torch.randn(n, problem.data.means.shape[1], generator=rng, device=rng.device)
        return guidance(problem, lambda x, t: predict_noise(x, abar[t]), noise, timesteps,
                        [*(abar[t] for t in timesteps), 1.0], rng, args.kl_weight, gamma=args.gamma, **options)

    sweep = []
    for form in ("scaled", "tempered"):
        for strength in args.strength:
            out = sample(args.sweep, form=form, strength=strength)
            r = out["reward"].mean().item() / args.kl_weight
            sweep.append((form, strength, terminal_kl(out["x"], problem.data)[0] - r, out["kl"].mean().item() - r))
            print(f"{problem.name}: {form}, strength {strength:g}: terminal objective {sweep[-1][2]:.3f}, "
                  f"path objective {sweep[-1][3]:.3f} (optimum of both {-problem.log_z:.3f})", file=sys.stderr)
    form, strength, *_ = min(sweep, key=lambda line: line[2])
    options = dict(pretrained=dict(form="none"), guidance_published=dict(form="published"),
                   guidance_scaled=dict(form="scaled"), guidance_tempered=dict(form="tempered"),
                   guidance_tuned=dict(form=form, strength=strength))
    return {method: sample(args.samples, **option) for method, option in options.items()}, sweep


# ---- the measures ----------------------------------------------------------------------------------------------------


def mean_and_se(values):
    """Independent values (G,) -> their mean and its standard error (None for a single one)."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None


def log_mean_and_se(log_values):
    """Independent unbiased estimates of Z, as logarithms (G,) -> log of their mean, its standard error."""
    top = log_values.max().item()
    mean, se = mean_and_se((log_values.double() - top).exp())
    return top + math.log(mean), se and se / mean


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


def mode_spread(x, w, means):
    """Root mean square distance, per axis, of points x (N, d), weights w (N,), from the mean of those of their mode."""
    mode = one_hot(torch.cdist(x, means.to(x)).argmin(1), len(means)).to(x) * (w / w.sum())[:, None]  # (N, K)
    mass = mode.sum(0)
    center = mode.T @ x / mass.clamp(min=1e-30)[:, None]
    variance = (mode.T @ x**2).sum(1) - mass * (center**2).sum(1)
    return (variance.sum() / x.shape[1]).clamp(min=0).sqrt().item()


def terminal_kl(x, data, cell=0.4, fine=6):
    """KL of the law of samples x (N, 2) from a mixture, nats, by a histogram -> estimate, standard error.

    The mass of the mixture in each cell that holds samples is by quadrature on fine^2 points. A histogram can only see
    less KL than there is; its sampling bias, (cells - 1) / (2 N) (Miller 1955), is taken out.
    """
    cells, slot, count = (x.double() / cell).floor().unique(dim=0, return_inverse=True, return_counts=True)
    line = (torch.arange(fine, device=x.device).double() + 0.5) / fine
    points = (cells[:, None] + torch.cartesian_prod(line, line)) * cell  # (cells, fine^2, 2)
    log_q = data.log_prob(points.flatten(0, 1)).view(len(cells), -1).logsumexp(1) + 2 * math.log(cell / fine)
    mean, se = mean_and_se(((count / len(x)).log() - log_q)[slot])
    return mean - (len(cells) - 1) / (2 * len(x)), se


def sample_rows(name, x, kl, problem, args, rng):
    """Rows of samples x (N, 2) and the KL of their paths (N,) or None; name is method.problem.

    path_objective and terminal_objective are KL - E[r] / kl_weight with the KL of the path and of the law of x alone
    from the data: the first is at least the second, both are at least -log Z, and only the first is what is trained.
    """
    r, rows = checked(problem.reward(x), x.shape[:1]).double(), []

    def add(key, value, se=None, exact=None):  # without z: a trained model is not an estimate of the optimum
        rows.append(dict(row(f"{name}.{key}", value, se, exact), z=None))

    add("mean_reward", *mean_and_se(r), problem.target_reward)
    if kl is not None:
        add("path_kl", *mean_and_se(kl.double()), problem.kl)
        add("path_objective", *mean_and_se(kl - r / args.kl_weight), -problem.log_z)
    divergence, se = terminal_kl(x, problem.data)
    add("terminal_kl", divergence, se, problem.kl)
    add("terminal_objective", divergence - mean_and_se(r)[0] / args.kl_weight, None, -problem.log_z)
    w = torch.ones(len(x)).to(x)
    add("emd", *emd_to_target(x, w, problem.target, rng, args.subsamples))  # its se: the deviation over subsamples
    masses, large = mode_masses(x, w, problem.data.means).to(problem.masses), problem.masses > 0.05
    add("mode_l1", (masses - problem.masses).abs().sum().item(), None, 0.0)
    add("modes_covered", int((masses >= problem.masses / 2)[large].sum()), None, int(large.sum()))
    add("spread", mode_spread(x, w, problem.data.means), None, problem.spread)
    return rows


def checked(value, shape):
    """value, a reward or its gradient, if it has this shape and is finite."""
    if value.shape != shape or not value.isfinite().all():
        fail(f"The reward must be one finite number per sample, with a finite gradient: expected shape {tuple(shape)}, "
             f"got {tuple(value.shape)}, {int((~value.isfinite()).sum())} of them not finite.")
    return value


def measure(problem, results, sweep, args, rng):
    """{method: rows}; the network costs a gradient as well wherever there is guidance."""
    rows = {}
    for method, out in results.items():
        finite = bool(out["kl"].isfinite().all())
        kl = out["kl"] if finite else None
        rows[method] = sample_rows(f"{method}.{problem.name}", out["x"], kl, problem, args, rng)
    log_w = results["pretrained"]["reward"] / args.kl_weight
    rows["pretrained"].append(row(f"pretrained.{problem.name}.log_z", *log_mean_and_se(log_w), problem.log_z))
    best = min(sweep, key=lambda line: line[2])
    rows["guidance_tuned"].append(row(f"guidance_tuned.{problem.name}.strength", best[1]))
    rows["guidance_tuned"].append(row(f"guidance_tuned.{problem.name}.is_tempered", int(best[0] == "tempered")))
    x = problem.target.sample(args.samples, rng)
    rows["target"] = sample_rows(f"target.{problem.name}", x, None, problem, args, rng)
    results["target"] = dict(x=x)
    return rows


# ---- the figure ------------------------------------------------------------------------------------------------------

TITLES = {"pretrained": "pretrained", "target": "exact target", "guidance_published": "published: grad r",
          "guidance_scaled": "sigma$^2$ grad r", "guidance_tempered": "tempered sigma$^2$ grad r",
          "guidance_tuned": "tuned"}


def panel(ax, title, x, problem, rows, color="#0072B2"):
    """Samples x (N, 2) over contours of the exact target, E[r] and EMD in the title."""
    span = torch.linspace(-6.5, 6.5, 181)
    log_p = problem.target.log_prob(torch.cartesian_prod(span, span).to(x.device)).view(181, 181).T.cpu()
    ax.contour(span, span, log_p, [-9, -6, -3], colors="black", linewidths=0.4, linestyles="solid")
    ax.scatter(*x[:1500].cpu().T, s=2, c=color, alpha=0.5, linewidths=0)
    value = {r["name"].split(".")[-1]: r["estimate"] for r in rows}
    ax.set_title(f"{title}\nE[r] {value['mean_reward']:.2f}   EMD {value['emd']:.2f}", fontsize=9)
    ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-6.5, 6.5), ylim=(-6.5, 6.5))


def draw_panels(path, problems, results):
    """A line a problem: samples of every form over contours of the exact target, and the objective by strength."""
    columns = len(TITLES) + 1
    figure, axes = plt.subplots(len(problems), columns, squeeze=False, width_ratios=[1] * (columns - 1) + [1.3],
                                figsize=(1.75 * columns + 1, 2.3 * len(problems) + 0.4), layout="constrained")
    for line, problem in zip(axes, problems):
        samples, rows, sweep = results[problem.name]
        for ax, (method, title) in zip(line, TITLES.items()):
            panel(ax, title, samples[method]["x"], problem, rows[method],
                  "#555555" if method == "target" else "#0072B2")
        line[0].set_ylabel(problem.name)
        for form, color in (("scaled", "#E69F00"), ("tempered", "#0072B2")):
            strength, terminal, whole = zip(*(found[1:] for found in sweep if found[0] == form))
            line[-1].plot(strength, terminal, color=color, label=f"{form}, of the samples", marker="o", markersize=3)
            line[-1].plot(strength, whole, color=color, label=f"{form}, of the path", linestyle="--", linewidth=0.8)
        line[-1].axhline(-problem.log_z, color="black", linestyle=":", label="optimum, -log Z")
        line[-1].set(xscale="log", yscale="log", xlabel="strength", ylim=(0.8 * -problem.log_z, 60))
        ticks = sorted({found[1] for found in sweep})
        line[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        line[-1].set_yticks([2, 3, 5, 10, 20, 50], [2, 3, 5, 10, 20, 50], fontsize=8)
        line[-1].minorticks_off()
        line[-1].set_title("KL - E[r] / kl_weight", fontsize=9)
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside lower right", ncols=6, fontsize=8)
    save_figure(figure, path)


# ---- the network -----------------------------------------------------------------------------------------------------


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
    """Train or load, run every form, write the figure and numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "toy_guidance")
    rng = torch.Generator(args.device).manual_seed(args.seed)
    problems = [make_problem(name, args.kl_weight, rng.device) for name in args.problem]
    results, rows = {}, []
    for problem in problems:
        predict_noise = problem.data.predict_noise
        if args.score == "mlp":
            settings = dict(problem=problem.name, steps=args.train_steps, seed=args.seed)
            cache = args.out / "cache"
            predict_noise = cached_denoiser(cache, settings, problem.data.sample, noise_levels(), rng.device)
        samples, sweep = run_methods(problem, predict_noise, args, rng)
        found = measure(problem, samples, sweep, args, rng)
        results[problem.name] = samples, found, sweep
        rows += [r for part in found.values() for r in part]
        for form, strength, *values in sweep:
            method = f"{form}_{strength:g}".replace(".", "p")
            for key, value in zip(("terminal_objective", "path_objective"), values):
                rows.append(row(f"{method}.{problem.name}.sweep_{key}", value, exact=-problem.log_z))
    draw_panels(out / "figure.png", problems, results)
    count = len(problems) * args.steps * (5 * args.samples + 2 * len(args.strength) * args.sweep)
    write_numbers(out / "numbers.json", args, rows, count, time.perf_counter() - start)
    for problem in problems:
        exact = dict(mean_reward=problem.target_reward, path_kl=problem.kl, path_objective=-problem.log_z,
                     terminal_kl=problem.kl, terminal_objective=-problem.log_z, emd=0.0, mode_l1=0.0,
                     modes_covered=int((problem.masses > 0.05).sum()), spread=problem.spread)
        shown = rows + [row(f"exact.{problem.name}.{key}", value) for key, value in exact.items()]
        print_table(shown, problem.name, list(exact))
        print_table(rows, problem.name, ["log_z", "strength", "is_tempered"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
