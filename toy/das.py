"""Sample from p(x) exp(r(x) / kl_weight) at test time: tempered sequential Monte Carlo (SMC) over a diffusion sampler.

Paper: Kim, Kim and Park, "Test-time Alignment of Diffusion Models without Reward Over-optimization" (DAS), ICLR 2025,
arXiv 2501.05803. Draws the toy comparison of its Fig. 1 (figure.png) and a figure the paper lacks (convergence.png):
the error against the number of particles, for this sampler and for one whose twist stays behind at resampling.

Run    python toy/das.py                        gmm and gmm2: both figures and the table   1 minute on 2 CPU cores
       python toy/das.py --quick                the same, coarse                           10 seconds
       python toy/das.py --paper                1000 groups x 100 particles                3 minutes
       python toy/das.py --score exact          no network: the sampler's own error        45 seconds
       python toy/das.py --problem swiss_roll   the paper's 3D problem                     1 minute

Notation (here -> paper)
       kl_weight -> alpha    reward temperature: the target is p(x) exp(r(x) / kl_weight) / Z
       abar      -> abar_t   signal power: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps
       x0_hat    -> x0hat_t  Tweedie mean E[x_0 | x_t] = (x_t - sqrt(1 - abar) eps) / sqrt(abar)
       temper    -> lambda_t from 0 (noise) to 1 (sample); the twist at t is exp(temper r(x0_hat) / kl_weight)
       shift                 what guidance adds to the noise, in units of sigma: sigma temper grad r(x0_hat) / kl_weight
       log_w, log_z          log weights of the particles; log of the estimate of Z = E_p[exp(r / kl_weight)]

Algorithm (`das`; the particles of a group interact, groups are independent)
       1. start from noise and look ahead: eps, x0_hat, its reward, the gradient of that     `look_ahead`
       2. where the effective sample size is low, resample: gather all per-particle state    `resample`, `gather`
       3. propose x_{t-1} from the DDIM kernel, its noise shifted towards higher reward      `ddim_kernel`, `guide`
       4. raise the temper, by schedule or as far as the weights allow        `temper_schedule`, `adapt_temper`
       5. weight: log_w += new twist - old twist + log p - log q                             `log_ratio`
       6. the last twist is the reward of x_0 itself: exact in the limit of many particles

What you should see: on gmm2 the EMD of DAS to the exact target is 0.27 where exact samples have 0.25 and guidance alone
1.3, and log Z is -2.96 (exact -2.97). On gmm every method is near the floor of 0.27. E[r] of DAS is a little too high
at 100 particles in a group, and importance resampling is as good: in 2D the pretrained model finds the target itself.
To try: --max-shift inf (the paper's proposal), --temper none, --temper adaptive, --particles 4 --select argmax.
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
    "quick": dict(groups=20, particles=50, steps=50, train_steps=500, reference=4000, subsamples=10),
    "default": dict(groups=100, particles=100, steps=100, train_steps=2000, reference=40000, subsamples=100),
    "paper": dict(groups=1000, particles=100, steps=100, train_steps=5000, reference=200000, subsamples=100),
}
SCHEMES = ("systematic", "stratified", "multinomial", "residual", "ssp")


def parse_args(argv=None):
    parser = common_parser(__doc__)
    parser.add_argument("--problem", nargs="+", choices=["gmm", "gmm2", "swiss_roll"], default=["gmm", "gmm2"])
    parser.add_argument("--score", choices=["mlp", "exact"], default="mlp", help="trained network or closed form")
    parser.add_argument("--groups", type=positive(int), help="independent groups of particles")
    parser.add_argument("--particles", type=positive(int), help="particles in a group")
    parser.add_argument("--steps", type=positive(int), help="sampling steps, at most 1000")
    parser.add_argument("--kl-weight", type=positive(float), default=1.0, help="reward temperature alpha")
    parser.add_argument("--eta", type=positive(float), default=1.0, help="noise of the DDIM kernel, at most 1 (DDPM)")
    parser.add_argument("--temper", choices=["schedule", "adaptive", "none"], default="schedule")
    parser.add_argument("--gamma", type=positive(float), default=0.008, help="growth of the temper in 1/100 of the run")
    parser.add_argument("--max-shift", type=positive(float), default=0.5, help="cap on the norm of the shift, or inf")
    parser.add_argument("--ess", type=positive(float), default=0.5, help="resample below this fraction of particles")
    parser.add_argument("--resampling", choices=SCHEMES, default="systematic")
    parser.add_argument("--select", choices=["draw", "argmax"], default="draw", help="argmax is biased towards modes")
    parser.add_argument("--chunk", type=positive(int), default=8192, help="particles in one network call")
    parser.add_argument("--train-steps", type=positive(int), help="training steps of the network, batch 2048")
    parser.add_argument("--reference", type=positive(int), help="base samples behind the sampler's own exact value")
    parser.add_argument("--subsamples", type=positive(int), help="EMDs (500 against 500 points) behind each mean")
    args = parser.parse_args(argv)
    for name, value in PRESETS["quick" if args.quick else "paper" if args.paper else "default"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.steps > 1000 or args.eta > 1:
        parser.error("--steps can be at most 1000 and --eta at most 1")
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
    """A toy problem of the paper with its exact answer: a namespace of data, reward, target, log_z, kl, *_reward.

    `gmm` is a 3 x 3 grid, `gmm2` a ring of 8, `swiss_roll` a roll in 3D blurred by 0.3. The roll is laid out as a
    lattice of Gaussians closer to each other than their width, so that all three are mixtures and all tilts exact.
    """
    if name == "gmm":
        line, var, curvature, center = torch.tensor([-4.0, 0.0, 4.0]).double(), 0.3, [0.01, 1.0], [0.0, 0.0]
        means = torch.cartesian_prod(line, line)
    elif name == "gmm2":
        angle, var, curvature, center = torch.arange(8).double() * math.pi / 4, 0.3, [1.0, 0.1], [0.0, 1.0]
        means = 4 * torch.stack([angle.cos(), angle.sin()], 1)
    else:
        var, curvature, center = 0.09, [0.01, 0.01, 1.0], [0.0, 0.0, 0.0]
        turns, heights = ((torch.arange(n).double() + 0.5) / n for n in (240, 20))
        turn, height = torch.cartesian_prod(turns, heights).T
        angle = 3 * math.pi * (0.5 + turn)
        means = torch.stack([angle * angle.cos() / 2, angle * angle.sin() / 2, 6 * height - 3], 1)
    means, A, c = (torch.as_tensor(v, dtype=torch.float64, device=device) for v in (means, curvature, center))
    count, d = means.shape
    data = GaussianMixture(torch.full_like(means[:, 0], 1 / count), means, var * torch.eye(d).to(A).expand(count, d, d))
    target, log_z = data.tilt(A.diag(), c, kl_weight)

    def reward(x):
        return -((x - c.to(x)) ** 2 * A.to(x)).sum(1)

    def mean_reward(mixture):
        mean, cov = mixture.moments()
        return -(((mean - c) ** 2 + cov.diagonal()) * A).sum().item()

    exact = dict(data_reward=mean_reward(data), target_reward=mean_reward(target), log_z=log_z)
    kl = exact["target_reward"] / kl_weight - log_z  # of the target from the data, nats
    return types.SimpleNamespace(name=name, data=data, reward=reward, target=target, kl=kl, **exact)


def noise_levels():
    """abar of the 1000 training steps with linear beta from 1e-4 to 0.02 (Ho et al. 2020) -> list of float."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()


# ---- shared: the sampler ---------------------------------------------------------------------------------------------


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


def adapt_temper(log_w, value, temper, enough):
    """The largest temper, from the present one (G,) up to 1, that leaves an effective sample size of `enough`.

    log_w (G, P) are the weights without a twist, value (G, P) the rewards over kl_weight. By bisection; the result
    lies just beyond the root, so that resampling follows.
    """
    low, high = temper, torch.ones_like(temper)
    all_the_way = effective_sample_size(log_w + value) >= enough
    # exercise 3: halve the interval 30 times; the effective sample size of log_w + temper value falls with the temper
    for _ in range(30):
        middle = (low + high) / 2
        fine = effective_sample_size(log_w + middle[:, None] * value) >= enough
        low, high = torch.where(fine, middle, low), torch.where(fine, high, middle)
    # end exercise
    return torch.where(all_the_way, 1.0, high)


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


def das(predict_noise, reward, x, timesteps, abar, rng, particles, kl_weight=1.0, eta=1.0, temper="schedule",
        gamma=0.008, guided=True, max_shift=math.inf, ess=0.5, scheme="systematic", chunk=None, regroup=gather):
    """Weighted particles for p(x) exp(r(x) / kl_weight): tempered SMC with guided proposals.

    predict_noise (n, ...), t -> (n, ...); reward (n, ...) -> (n,); x (N, ...) standard normal, N = groups x particles,
    a group being contiguous; timesteps (T,) from noise to data; abar (T + 1,) their signal powers and that of the
    result. guided=False is the bootstrap filter, ess=0 never resamples: then the weights are plain importance weights.
    Returns x (N, ...), reward (N,), log_w (G, P), log_z (G,), and of each step the mean ess and temper, and the share
    of groups that resampled. E[exp(log_z)] is the Z of the discretised sampler, for any number of particles.
    """
    groups, steps, device = len(x) // particles, len(timesteps), x.device
    schedule = temper_schedule(steps, gamma, temper).to(x)
    first_slot = torch.arange(groups, device=device)[:, None] * particles
    lam, log_z, history = schedule[0].expand(groups), torch.zeros(groups, device=device), []
    state = look_ahead(predict_noise, reward, x, timesteps[0], abar[0], kl_weight, guided, chunk)
    state["twist"] = lam.repeat_interleave(particles) * state["value"]
    state["log_w"] = state["twist"].clone()
    for i in range(steps):
        log_w = state["log_w"].view(groups, particles)
        size = effective_sample_size(log_w)
        due = size < ess * particles  # (G,)
        if due.any():
            ancestors = torch.where(due[:, None], resample(log_w, scheme, rng), torch.arange(particles, device=device))
            state = regroup(state, (first_slot + ancestors).flatten())
            state["log_w"] = torch.where(due[:, None], 0, log_w).flatten()
            log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)
        history.append((size.mean().item(), lam.mean().item(), due.float().mean().item()))

        mean, sigma = ddim_kernel(state["x0_hat"], state["eps"], abar[i], abar[i + 1], eta)
        ahead = lam if temper == "adaptive" else schedule[i + 1].expand(groups)
        shift = guide(state["grad"], sigma, ahead.repeat_interleave(particles), max_shift)
        z = torch.randn(mean.shape, generator=rng, device=device, dtype=mean.dtype)
        x = mean + sigma * (shift + z)
        log_w = state["log_w"] - state["twist"] + log_ratio(shift, z)

        if i + 1 < steps:
            state = look_ahead(predict_noise, reward, x, timesteps[i + 1], abar[i + 1], kl_weight, guided, chunk)
        else:  # the sample itself takes the place of its forecast
            state = dict(x=x, value=checked(reward(x), x.shape[:1]).detach() / kl_weight)
        if temper == "adaptive" and i + 1 < steps:
            lam = adapt_temper(log_w.view(groups, -1), state["value"].view(groups, -1), lam, ess * particles)
        else:
            lam = schedule[i + 1].expand(groups)
        state["twist"] = lam.repeat_interleave(particles) * state["value"]
        state["log_w"] = log_w + state["twist"]
    log_w = state["log_w"].view(groups, particles)
    return dict(x=x, reward=state["value"] * kl_weight, log_w=log_w, log_z=log_z + log_mean_exp(log_w), history=history)


# ---- the methods and their measures ----------------------------------------------------------------------------------


def sample(problem, predict_noise, args, rng, n, particles, **options):
    """Run `das` on n particles of a problem, predict_noise (x, abar) -> eps; adds evaluations and seconds."""
    start, abar = time.perf_counter(), noise_levels()
    timesteps = [round(999 * (1 - i / args.steps)) for i in range(args.steps)]
    noise = torch.randn(n, problem.data.means.shape[1], generator=rng, device=rng.device)
    out = das(lambda x, t: predict_noise(x, abar[t]), problem.reward, noise, timesteps,
              [*(abar[t] for t in timesteps), 1.0], rng, particles, args.kl_weight, args.eta, args.temper, args.gamma,
              chunk=args.chunk, scheme=args.resampling, **options)
    return dict(out, evaluations=n * args.steps, seconds=time.perf_counter() - start)


def run_methods(problem, predict_noise, args, rng):
    """Every sampler on one problem, and as `reference` what the discretised sampler itself tends to -> {method: out}.

    Without shift and resampling (guided=False, ess=0) the weights are those of importance sampling from the
    pretrained model; drawing from them in each group is the soft form of best-of-N.
    """
    n, particles = args.groups * args.particles, args.particles
    options = {
        "reference": dict(n=args.reference, particles=args.reference, guided=False, ess=0),
        "guidance": dict(n=n, particles=1, ess=0),
        "importance": dict(n=n, particles=particles, guided=False, ess=0),
        "bootstrap": dict(n=n, particles=particles, guided=False, ess=args.ess),
        "das": dict(n=n, particles=particles, max_shift=args.max_shift, ess=args.ess),
    }
    results = {}
    for method, option in options.items():
        print(f"{problem.name}: {method}", file=sys.stderr)
        results[method] = sample(problem, predict_noise, args, rng, **option)
    for method, out in results.items():
        out["w"] = selection_weights(out["log_w"], args.select if method != "reference" else "draw")
    x = problem.target.sample(n, rng)
    exact = dict(x=x, reward=problem.reward(x), w=torch.ones(n, 1).to(x), evaluations=0, seconds=0.0)
    base = dict(results["importance"], w=torch.full_like(results["importance"]["w"], 1 / particles))
    return dict(pretrained=base, target=exact, **results)


def selection_weights(log_w, how):
    """Weights within each group, log_w (G, P) -> (G, P) with sums 1: to draw from the particles, or their argmax."""
    return log_w.softmax(1) if how == "draw" else one_hot(log_w.argmax(1), log_w.shape[1]).to(log_w)


def mean_and_se(values):
    """Independent values (G,) -> their mean and its standard error (None for a single one)."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None


def log_mean_and_se(log_values):
    """Independent unbiased estimates of Z, as logarithms (G,) -> log of their mean, its standard error."""
    top = log_values.max().item()
    mean, se = mean_and_se((log_values.double() - top).exp())
    return top + math.log(mean), se and se / mean


def tilted_mean_and_se(log_w, values):
    """Self-normalised importance sampling: independent log_w (N,) and values (N,) -> mean, standard error."""
    w = (log_w.double() - log_w.max()).exp()
    mean = (w * values).sum() / w.sum()
    return mean.item(), ((w * (values - mean)).pow(2).sum().sqrt() / w.sum()).item()


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


def exact_mode_masses(mixture, n=1001):
    """What `mode_masses` tends to for samples of a mixture in 2D, by quadrature: not its weights, as modes overlap."""
    line = torch.linspace(-10, 10, n, dtype=torch.float64, device=mixture.means.device)
    grid = torch.cartesian_prod(line, line)
    return mode_masses(grid, mixture.log_prob(grid).exp(), mixture.means)


def measure(problem, results, args, rng):
    """The rows of all methods; z of E[r] and log Z is against the reference, so it is the method's error alone."""
    log_w = results["reference"]["log_w"].flatten()
    own = dict(mean_reward=tilted_mean_and_se(log_w, results["reference"]["reward"]), log_z=log_mean_and_se(log_w))
    exact = dict(mean_reward=problem.target_reward, log_z=problem.log_z, kl=problem.kl)
    axes = [f"var_{a}" for a in "xyz"[: len(problem.data.means.T)]]
    exact |= dict(zip(axes, problem.target.moments()[1].diagonal().tolist()))
    rows = [row(f"exact.{problem.name}.{key}", value) for key, value in exact.items()]
    rows += [row(f"reference.{problem.name}.{key}", *value, exact[key]) for key, value in own.items()]
    for method, out in results.items():

        def add(key, *numbers):
            rows.append(row(f"{method}.{problem.name}.{key}", *numbers))

        groups, particles = out["w"].shape
        x, w = out["x"], out["w"].flatten() / groups
        if method != "reference":
            average = mean_and_se((out["w"] * out["reward"].view_as(out["w"])).sum(1))
            if method in ("pretrained", "target"):
                add("mean_reward", *average, problem.data_reward if method == "pretrained" else problem.target_reward)
            else:
                add("mean_reward", *average, exact["mean_reward"], own["mean_reward"])
        if method in ("importance", "bootstrap", "das"):
            add("log_z", *log_mean_and_se(out["log_z"]), exact["log_z"], own["log_z"])
        whole = emd_to_target(x, w, problem.target, rng, args.subsamples)
        add("emd", *whole)  # its se is the standard deviation over subsamples
        if method in ("guidance", "importance", "bootstrap", "das"):
            for power in (5, 6, 7):  # at equal network evaluations: the first groups of the run
                first = 10**power // args.steps // particles * particles
                if 0 < first < len(x):
                    add(f"emd_at_1e{power}", *emd_to_target(x[:first], w[:first], problem.target, rng, args.subsamples))
                elif first == len(x):
                    add(f"emd_at_1e{power}", *whole)
        for axis, variance in zip(axes, (w @ (x - w @ x) ** 2).tolist()):
            add(axis, variance)
        if len(problem.target.means) < 10:
            error = mode_masses(x, w, problem.target.means) - exact_mode_masses(problem.target).to(x)
            add("mode_l1", error.abs().sum().item())
        if method in ("bootstrap", "das"):
            add("resamplings", sum(step[2] for step in out["history"]))
        add("network_evaluations", out["evaluations"])
        add("seconds", round(out["seconds"], 2))
    return rows


def measure_network(problem, predict_noise, rng, n=4000):
    """Root mean square error of the predicted noise against the exact score, under p_t, by time step."""
    rows, abar = [], noise_levels()
    for t in (10, 30, 100, 200, 400, 700, 999):
        x0 = problem.data.sample(n, rng)
        x = abar[t] ** 0.5 * x0 + (1 - abar[t]) ** 0.5 * torch.randn(x0.shape, generator=rng, device=rng.device)
        error = predict_noise(x, abar[t]) - problem.data.predict_noise(x, abar[t])
        rows.append(row(f"network.{problem.name}.eps_error_t{t}", error.pow(2).sum(1).mean().sqrt().item(), exact=0.0))
    return rows


def gather_without_twist(state, index):
    """The defect of the published samplers, for the figure: twist and gradient stay in their slots at resampling."""
    return {name: value if name in ("twist", "grad") else value[index] for name, value in state.items()}


def measure_convergence(args, rng):
    """Rows of E[r] and log Z on gmm2 with the exact score, against the particles in a group."""
    problem = make_problem("gmm2", args.kl_weight, rng.device)
    sizes, total = ([4, 30, 300], 1200) if args.quick else ([4, 10, 32, 100, 316, 1000, 3162, 10000], 10000)
    out = sample(problem, problem.data.predict_noise, args, rng, args.reference, 1, guided=False, ess=0)
    own = dict(mean_reward=tilted_mean_and_se(out["log_z"], out["reward"]), log_z=log_mean_and_se(out["log_z"]))
    exact = dict(mean_reward=problem.target_reward, log_z=problem.log_z)
    rows = [row(f"own.convergence.{key}", *own[key], exact[key]) for key in own]
    for done, particles in enumerate(sizes):
        for name, regroup in (("correct", gather), ("stale_twist", gather_without_twist)):
            n = particles * max(4, total // particles)
            out = sample(problem, problem.data.predict_noise, args, rng, n, particles, max_shift=args.max_shift,
                         ess=args.ess, regroup=regroup)
            r = (out["log_w"].softmax(1) * out["reward"].view(-1, particles)).sum(1)
            for key, value in dict(mean_reward=mean_and_se(r), log_z=log_mean_and_se(out["log_z"])).items():
                rows.append(row(f"{name}_{particles}.convergence.{key}", *value, exact[key], own[key]))
        progress("convergence", done + 1, len(sizes))
    return rows


# ---- the figures -----------------------------------------------------------------------------------------------------

TITLES = {"pretrained": "pretrained", "target": "exact target", "guidance": "guidance, 1 particle",
          "importance": "importance resampling", "bootstrap": "bootstrap SMC", "das": "DAS"}


def draw_panels(path, problems, rows, results, rng):
    """A line of panels a problem, contours of the exact target on each (a roll is shown from above)."""
    value = {r["name"]: r["estimate"] for r in rows}
    size = (len(problems), len(TITLES))
    figure, axes = plt.subplots(*size, figsize=(2.2 * size[1], 2.5 * size[0] + 0.1), squeeze=False,
                                layout="constrained")
    for line, problem in zip(axes, problems):
        span = torch.linspace(-9, 9, 181) if problem.name == "swiss_roll" else torch.linspace(-6.5, 6.5, 181)
        flat = GaussianMixture(problem.target.weights, problem.target.means[:, :2], problem.target.covs[:, :2, :2])
        points = torch.cartesian_prod(span, span).to(rng.device)
        log_p = torch.cat([flat.log_prob(part) for part in points.split(2000)]).view(len(span), -1).T.cpu()
        span, log_p = span.numpy(), log_p.numpy()
        for ax, (method, title) in zip(line, TITLES.items()):
            out = results[problem.name][method]
            x = out["x"][torch.multinomial(out["w"].flatten(), 1500, replacement=True, generator=rng)].cpu().numpy()
            ax.contour(span, span, log_p, [-9, -6, -3], colors="black", linewidths=0.4, linestyles="solid")
            ax.scatter(x[:, 0], x[:, 1], s=2, c="#555555" if method == "target" else "#0072B2", alpha=0.5, linewidths=0)
            numbers = [value[f"{method}.{problem.name}.{key}"] for key in ("mean_reward", "emd")]
            ax.set_title(f"{title}\nE[r] {numbers[0]:.2f}   EMD {numbers[1]:.2f}", fontsize=9)
            ax.set(xticks=[], yticks=[], aspect="equal", xlim=(span[0], span[-1]), ylim=(span[0], span[-1]))
        line[0].set_ylabel(problem.name)
    save_figure(figure, path)


def draw_convergence(path, rows, reference):
    """E[r] and log Z against the particles in a group. Bars are two standard errors of the mean over groups; the band

    is two standard errors of one run of importance sampling: those of `reference` draws, scaled to N.
    """
    table = {r["name"]: r for r in rows}
    sizes = [int(name.split(".")[0][8:]) for name in table if name.startswith("correct") and name.endswith("log_z")]
    curves = dict(correct=("#0072B2", "all state gathered"), stale_twist=("#D55E00", "twist left behind"))
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for ax, key, label in zip(axes, ("mean_reward", "log_z"), ("E[r]", "log Z")):
        own = table[f"own.convergence.{key}"]
        for name, (color, text) in curves.items():
            lines = [table[f"{name}_{size}.convergence.{key}"] for size in sizes]
            ax.errorbar(sizes, [r["estimate"] for r in lines], [2 * (r["se"] or 0) for r in lines], color=color,
                        label=text, marker="o", markersize=4, capsize=2)
        band = [[own["estimate"] + 2 * sign * own["se"] * (reference / n) ** 0.5 for n in sizes] for sign in (-1, 1)]
        ax.fill_between(sizes, *band, color="black", alpha=0.1, linewidth=0, label="N$^{-1/2}$, importance sampling")
        ax.axhline(own["estimate"], color="black", linestyle=":", label="exact, at this number of steps")
        ax.axhline(own["exact"], color="black", linewidth=0.6, label="exact, continuous time")
        ax.set(xscale="log", xlabel="particles in a group", ylabel=label)
    axes[1].set_yscale("symlog", linthresh=4)
    axes[1].set_yticks([-4, -3, -2, 0, 2, 10, 50], [-4, -3, -2, 0, 2, 10, 50])
    axes[0].legend(fontsize=8)
    figure.suptitle("gmm2, exact score: more particles help only where the twist follows its particle", fontsize=10)
    figure.tight_layout()
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


# ---- main ------------------------------------------------------------------------------------------------------------


def main(args):
    """Train or load, run every method, write both figures and numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "toy_das")
    rng = torch.Generator(args.device).manual_seed(args.seed)
    problems = [make_problem(name, args.kl_weight, rng.device) for name in args.problem]
    rows, results = [], {}
    for problem in problems:
        predict_noise = problem.data.predict_noise
        if args.score == "mlp":
            settings = dict(problem=problem.name, steps=args.train_steps, seed=args.seed)
            cache = args.out / "cache"
            predict_noise = cached_denoiser(cache, settings, problem.data.sample, noise_levels(), rng.device)
            rows += measure_network(problem, predict_noise, rng)
        results[problem.name] = run_methods(problem, predict_noise, args, rng)
        rows += measure(problem, results[problem.name], args, rng)
    rows += measure_convergence(args, rng)
    draw_panels(out / "figure.png", problems, rows, results, rng)
    draw_convergence(out / "convergence.png", rows, args.reference)
    evaluations = sum(r["evaluations"] for result in results.values() for r in result.values())
    write_numbers(out / "numbers.json", args, rows, evaluations, time.perf_counter() - start)
    for problem in problems:
        print_table(rows, problem.name, [f"eps_error_t{t}" for t in (10, 30, 100, 200, 400, 700, 999)])
        axes = [f"var_{a}" for a in "xyz"[: problem.data.means.shape[1]]]
        print_table(rows, problem.name, ["mean_reward", "log_z", "emd", "mode_l1", *axes])
        print_table(rows, problem.name, ["network_evaluations", "seconds", "resamplings"])
        print_table(rows, problem.name, ["emd_at_1e5", "emd_at_1e6", "emd_at_1e7"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
