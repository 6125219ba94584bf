"""Fine-tune a diffusion sampler by reinforcement learning on the rewards of its samples (DDPO), with and without KL.

Method: Black, Janner, Du, Kostrikov and Levine, "Training Diffusion Models with Reinforcement Learning", ICLR 2024,
arXiv 2305.13301; its KL-regularised form is DPOK (arXiv 2305.16381). It is the RL baseline in Fig. 1 of DAS
(arXiv 2501.05803) and in Fig. 2 of DAV.

Run    python toy/ddpo.py                        gmm and gmm2: the figure and the table            1 minute of CPU
       python toy/ddpo.py --quick                the same, coarse                                  15 seconds
       python toy/ddpo.py --ratio-clip 1e-4      the clip of the published code                    1 minute
       python toy/ddpo.py --paper                100 steps, 4 x the batch, longer training    some 30 times that

Notation (here -> papers)
       kl_weight -> alpha    reward temperature: the target is p(x) exp(r(x) / kl_weight) / Z
       abar      -> abar_t   signal power: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps
       path                  x_T, ..., x_0: states and actions of the decision process, with the kernel as its policy
       advantage -> A        r - kl_weight (KL of the later steps), less the mean over the others of the same prompt
       ratio                 p_new / p_old of a step: exp of the difference of log densities *summed* over dimensions
       path KL               of the whole sampling path from that of the pretrained network: each step has two Gaussian
                             kernels of one width, so it is the mean of sum |mean - mean_base|^2 / (2 sigma^2), nats

Objective. Minimise path KL - E[r] / kl_weight. By Gibbs' bound no sampler gets below -log Z, and a sampler that reaches
it has the target as its law. The printed estimate is a mean over fresh paths, of exact KLs given the path. A chain with
few Gaussian steps cannot reach the bound: the kernel of a mixture is no Gaussian. What the exact score of the target
reaches in as many steps is the row `exact_score`; fine-tuning may do a little better, as it knows the steps. The KL of
the samples alone, from the data, by a histogram, is at most that of the path (but for the pretrained network's error):
`terminal_objective` has the same bound -log Z, and is not what is trained.

Algorithm (`ddpo`; the reward needs no gradient)
       1. sample paths and the KL of each step                                         `sample_path`, `kernel`
       2. what each step was worth: reward less the KL still to come                   `step_advantages`
       3. in minibatches: clipped surrogate, plus the KL of the step itself            `log_density`, `ddpo_loss`
       4. judge each epoch by the paths it starts with; keep the best                  `follow`

The KL has two parts in the gradient: a step's own, differentiated directly, and that of the steps it leads to, which
acts through the advantage. The notebook of DAS adds the KL to the reward instead of subtracting it, leaves out the
second part, and clips ratios of averaged log densities at 1e-4. A problem here has one prompt, so statistics per prompt
are those of the batch; `step_advantages` takes any number of prompts, and divides KL and reward of a prompt by one
scale: z-scoring the reward alone would change the kl_weight with every prompt and every epoch.
The sampler has 30 steps evenly spaced in log SNR and ends at 5, where the noise is 0.08 wide: then every kernel has a
density. Training without KL is the published default.

What you should see: with KL the objective falls from 9 to 3.36±0.03 (3 seeds) on gmm2, where the exact score of the
target reaches 3.3 and the optimum is 2.97; the EMD is 0.5±0.1 (exact samples 0.26). Without KL all samples end in a
point in 20 epochs (E[r] near 0, path KL 36 and more); stopped at its best, the objective is still 4.7±0.1.
To try: --ratio-clip 10 --inner 20 (what does the clip prevent?), --kl-weight 0.3, --batch 64.
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
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch.nn.functional import one_hot

PRESETS = {  # what the size flags default to
    "quick": dict(epochs=16, batch=256, steps=15, samples=2000, train_steps=500, subsamples=4),
    "default": dict(epochs=40, batch=512, steps=30, samples=10000, train_steps=2000, subsamples=10),
    "paper": dict(epochs=100, batch=2048, steps=100, samples=40000, train_steps=5000, subsamples=100),
}


def parse_args(argv=None):
    parser = common_parser(__doc__)
    parser.add_argument("--problem", nargs="+", choices=["gmm", "gmm2"], default=["gmm", "gmm2"])
    parser.add_argument("--kl-weight", type=positive(float), default=1.0, help="reward temperature alpha")
    parser.add_argument("--ratio-clip", type=positive(float), default=0.2, help="PPO: ratios count within 1 +- this")
    parser.add_argument("--inner", type=positive(int), default=2, help="passes over the paths of an epoch")
    parser.add_argument("--minibatches", type=positive(int), default=4, help="updates in a pass")
    parser.add_argument("--lr", type=positive(float), default=1e-3, help="of Adam, falling to a tenth by a cosine")
    parser.add_argument("--clip", type=positive(float), default=1.0, help="cap on the norm of the gradient, or inf")
    parser.add_argument("--patience", type=positive(int), default=15, help="epochs without gain before an early stop")
    parser.add_argument("--epochs", type=positive(int), help="rounds of sampling and learning, at most")
    parser.add_argument("--batch", type=positive(int), help="paths in an epoch")
    parser.add_argument("--steps", type=positive(int), help="sampling steps, at most 1000")
    parser.add_argument("--samples", type=positive(int), help="samples behind the final numbers")
    parser.add_argument("--train-steps", type=positive(int), help="training steps of the network, batch 2048")
    parser.add_argument("--subsamples", type=positive(int), help="EMDs (500 against 500 points) behind each mean")
    args = parser.parse_args(argv)
    for name, value in PRESETS["quick" if args.quick else "paper" if args.paper else "default"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not 1 < args.steps <= 1000 or args.samples < 2 or args.batch < 2 * args.minibatches:
        parser.error("--steps must be 2 to 1000, --samples at least 2 and --batch at least twice --minibatches")
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


def kernel(eps, x, a, b):
    """Mean (N, ...) and standard deviation of the DDPM step from signal power a to b, with predicted noise eps."""
    return ddim_kernel((x - (1 - a) ** 0.5 * eps) / a**0.5, eps, a, b, 1.0)


def sample_path(net, base, x, abar, rng, horizon=None):
    """Sample the chain of `net` from noise x (N, ...) -> path (T + 1, N, ...), KL of its steps from `base` (T, N).

    net and base (n, ...), abar -> eps (n, ...); abar (T + 1,) from noise to data, below 1, so that every kernel has a
    density. Kernels of one width differ by their means: |mean - mean_base|^2 / (2 sigma^2) nats; the mean over paths of
    the sum over steps is the KL of the path. Gradients run through the last `horizon` steps, or through all.
    """
    path, kl, steps, learning = [x], [], len(abar) - 1, torch.is_grad_enabled()
    for i, (a, b) in enumerate(zip(abar, abar[1:])):
        with torch.set_grad_enabled(learning and (horizon is None or i >= steps - horizon)):
            (mean, sigma), (anchor, _) = (kernel(f(x, a), x, a, b) for f in (net, base))
            kl.append((mean - anchor).flatten(1).pow(2).sum(1) / (2 * sigma**2))
            x = mean + sigma * torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
        path.append(x)
    return torch.stack(path), torch.stack(kl)


def kernel_means(net, path, abar):
    """Means (T, N, ...) and standard deviations (T, 1) of the kernels of `net` at path (T + 1, N, ...), in one call."""
    n, x = path.shape[1], path[:-1]
    levels = torch.tensor(abar[:-1], device=path.device, dtype=path.dtype).repeat_interleave(n)[:, None]
    eps = net(x.flatten(0, 1), levels).view_as(x)
    means, sigma = zip(*(kernel(*step) for step in zip(eps, x, abar, abar[1:])))
    return torch.stack(means), torch.tensor(sigma, device=path.device, dtype=path.dtype)[:, None]


def log_density(path, mean, sigma):
    """log p(x_{t-1} | x_t), summed over the dimensions of x, up to a constant that no ratio sees -> (T, N)."""
    return -(path[1:] - mean).flatten(2).pow(2).sum(2) / (2 * sigma**2)


def step_advantages(reward, kl, prompt, kl_weight):
    """What each step was worth -> advantage (T, N), and the scale (N,) of the returns of its prompt.

    reward (N,), kl (T, N), prompt (N,) integers. The return of a step is r - kl_weight (KL of the later steps): the
    earlier ones it cannot change, and its own is differentiated directly. From this is taken the mean of the *other*
    samples of the same prompt, which leaves the gradient unbiased. The scale is the standard deviation, within the
    prompt, of r - kl_weight KL; dividing the KL by it as well as the advantage keeps the objective what it was.
    """
    same = one_hot(prompt).to(kl)  # (N, prompts)
    count = same.sum(0)[prompt]

    def others(value):  # (..., N), less the mean of the others of the prompt
        return (value - (value @ same / same.sum(0).clamp(min=1))[..., prompt]) * count / (count - 1)

    total = others(reward - kl_weight * kl.sum(0))
    scale = ((total**2) @ same / same.sum(0).clamp(min=1))[prompt].sqrt()
    return others(reward - kl_weight * (kl.flip(0).cumsum(0).flip(0) - kl)), scale.clamp(min=1e-6)


def ddpo_loss(net, path, anchor, old_log_p, advantage, scale, abar, kl_weight, clip):
    """Clipped surrogate of PPO plus the KL from the means `anchor` (T, N, ...) of the base -> loss, clipped share.

    advantage and old_log_p (T, N), scale (N,). On the paths of `net` itself its gradient is, divided by the scale, that
    of kl_weight KL - E[r], exactly; after some updates the ratio corrects the steps, not the states they start from.
    """
    mean, sigma = kernel_means(net, path, abar)
    # exercise 9: ratio, gain and kl (T, N): of densities, of PPO, of Gaussian kernels from those with means `anchor`
    ratio = (log_density(path, mean, sigma) - old_log_p).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    kl = (mean - anchor).flatten(2).pow(2).sum(2) / (2 * sigma**2)
    # end exercise
    return ((kl_weight * kl - gain) / scale).sum(0).mean(), ((ratio - 1).abs() > clip).float().mean().item()


def ddpo(problem, base, abar, rng, kl_weight=1.0, epochs=40, batch=512, inner=2, minibatches=4, lr=1e-3, clip=0.2,
         grad_clip=1.0):
    """Fine-tune a copy of the network `base` by the rewards of its samples alone; kl_weight 0 leaves the KL out.

    Yields epochs + 1 times, from before the first update to after the last: dict(net, the tuned network itself, copy it
    to keep it; x (batch, d), reward (batch,), kl (batch,) of the paths that the next update learns from; evaluations,
    of either network at a point while training, so far; clipped, the share of clipped ratios). Errors: batch below 2.
    """
    net, like = copy.deepcopy(base).requires_grad_(), next(base.parameters())
    optimizer = torch.optim.Adam(net.parameters(), lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, lr / 10)
    prompt, share, steps = torch.zeros(batch, dtype=torch.long, device=like.device), 0.0, len(abar) - 1
    for epoch in range(epochs + 1):
        noise = torch.randn(batch, problem.data.means.shape[1], generator=rng, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            path, kl = sample_path(net, base, noise, abar, rng)
            reward = checked(problem.reward(path[-1]), (batch,))
            advantage, scale = step_advantages(reward, kl, prompt, kl_weight)
            anchor, _ = kernel_means(base, path, abar)
            old_log_p = log_density(path, *kernel_means(net, path, abar))
        yield dict(net=net, x=path[-1], reward=reward, kl=kl.sum(0), clipped=share,
                   evaluations=epoch * batch * steps * (4 + inner))
        for _ in range(inner if epoch < epochs else 0):
            for i in torch.randperm(batch, generator=rng, device=like.device).chunk(minibatches):
                loss, share = ddpo_loss(net, path[:, i], anchor[:, i], old_log_p[:, i], advantage[:, i], scale[i], abar,
                                        kl_weight, clip)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip)
                optimizer.step()
        schedule.step()


def follow(label, run, problem, kl_weight, patience=None):
    """Run training to its end, a line an epoch -> dict of `last` and `best` network, and the history of both.

    The objective is KL - E[r] / kl_weight in nats, of the whole path; its least value is -log Z. Each epoch is judged
    by fresh samples; `best` is the latest one within a standard error of the least, lest noise should choose, and is
    measured again later. It is where an early stop ends: with patience, training stops so many epochs after it.
    """
    history, best, least = [], None, math.inf
    for epoch, now in enumerate(run):
        loss, se = mean_and_se(now["kl"] - now["reward"] / kl_weight)
        history.append((now["evaluations"], now["reward"].mean().item(), now["kl"].mean().item(), loss))
        print(f"{label} epoch {epoch}: E[r] {history[-1][1]:.3f}, path KL {history[-1][2]:.3f} nats, "
              f"objective {loss:.3f}±{se:.3f} (optimum {-problem.log_z:.3f})", file=sys.stderr)
        if loss < least + se:
            best, since, least = copy.deepcopy(now["net"]), epoch, min(loss, least)
        if patience and epoch - since >= patience:
            break
    return dict(last=now["net"], best=best.requires_grad_(False), best_epoch=since, history=history)


def run_methods(problem, base, abar, args, rng):
    """With and without KL -> {method: network}, {method: (history, best epoch)}; `stopped` is the best without."""
    nets, histories = {}, {}
    for method, kl_weight in dict(ddpo=args.kl_weight, ddpo_no_kl=0.0).items():
        run = ddpo(problem, base, abar, rng, kl_weight, args.epochs, args.batch, args.inner, args.minibatches, args.lr,
                   args.ratio_clip, args.clip)
        out = follow(f"{problem.name}: {method}", run, problem, args.kl_weight, args.patience if kl_weight else None)
        nets[method], histories[method] = out["best" if kl_weight else "last"], (out["history"], out["best_epoch"])
    return nets | dict(ddpo_no_kl_stopped=out["best"]), histories


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


def measure(problem, nets, base, abar, args, rng):
    """Samples and rows of every network -> {method: samples (N, 2)}, {method: rows}; `target` is exact samples."""
    samples, rows = {}, {}
    for method, net in nets.items():
        name = f"{method}.{problem.name}"
        with torch.no_grad():
            path, kl = sample_path(net, base, torch.randn(args.samples, 2, generator=rng, device=rng.device), abar, rng)
        samples[method], rows[method] = path[-1], sample_rows(name, path[-1], kl.sum(0), problem, args, rng)
        if method == "pretrained":  # the optimum of the chain itself: finite steps and a network, not the mixture
            log_w = problem.reward(path[-1]) / args.kl_weight
            rows[method].append(row(f"{name}.log_z", *log_mean_and_se(log_w), problem.log_z))
    samples["target"] = problem.target.sample(args.samples, rng)
    rows["target"] = sample_rows(f"target.{problem.name}", samples["target"], None, problem, args, rng)
    return samples, rows


# ---- the figure ------------------------------------------------------------------------------------------------------

TITLES = {"pretrained": "pretrained", "target": "exact target", "ddpo": "with KL", "ddpo_no_kl": "no KL",
          "ddpo_no_kl_stopped": "no KL, early stop"}


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
    """A line a problem: samples of every method over contours of the exact target, and the objective by epoch."""
    columns = len(TITLES) + 1
    figure, axes = plt.subplots(len(problems), columns, squeeze=False, width_ratios=[1] * (columns - 1) + [1.3],
                                figsize=(1.75 * columns + 1, 2.3 * len(problems) + 0.4), layout="constrained")
    for line, problem in zip(axes, problems):
        samples, rows, histories = results[problem.name]
        for ax, (method, title) in zip(line, TITLES.items()):
            panel(ax, title, samples[method], problem, rows[method], "#555555" if method == "target" else "#0072B2")
        line[0].set_ylabel(problem.name)
        for (method, (history, _)), color in zip(histories.items(), ("#0072B2", "#E69F00", "#D55E00", "#CC79A7")):
            line[-1].plot([epoch[-1] for epoch in history], color=color, label=TITLES[method])
        reached = {r["name"].split(".")[-1]: r["estimate"] for r in rows["exact_score"]}["path_objective"]
        line[-1].axhline(reached, color="black", linewidth=0.6, label="exact score of the target, in as many steps")
        line[-1].axhline(-problem.log_z, color="black", linestyle=":", label="optimum, -log Z")
        line[-1].set(yscale="log", xlabel="epoch")
        line[-1].set_yticks([2, 3, 5, 10, 20, 30], [2, 3, 5, 10, 20, 30], fontsize=8)
        line[-1].set_yticks([], minor=True)
        line[-1].set_title("path KL - E[r] / kl_weight", fontsize=9)
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside lower right", ncols=6, fontsize=8)
    save_figure(figure, path)


# ---- the network -----------------------------------------------------------------------------------------------------


def ddim_kernel(x0_hat, eps, abar, abar_next, eta):
    """Mean (N, ...) and standard deviation (float) of p(x_{t-1} | x_t); eta = 1 is DDPM. DDIM (Song 2021) eq. 12."""
    sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
    return abar_next**0.5 * x0_hat + max(1 - abar_next - sigma**2, 0.0) ** 0.5 * eps, sigma


def noise_levels():
    """abar of the 1000 training steps with linear beta from 1e-4 to 0.02 (Ho et al. 2020) -> list of float."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()


def log_snr_levels(count, end=None):
    """`count` signal powers from noise to data, evenly spaced in log SNR: from -end to end, or all of the schedule."""
    top, bottom = (math.log(a / (1 - a)) for a in (noise_levels()[0], noise_levels()[-1]))
    return torch.linspace(-end if end else bottom, end or top, count, dtype=torch.float64).sigmoid().tolist()


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
    """Train or load, run every method, write the figure and numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "toy_ddpo")
    rng = torch.Generator(args.device).manual_seed(args.seed)
    problems = [make_problem(name, args.kl_weight, rng.device) for name in args.problem]
    abar, results, rows, evaluations = log_snr_levels(args.steps + 1, 5.0), {}, [], 0
    for problem in problems:
        settings = dict(problem=problem.name, steps=args.train_steps, seed=args.seed)
        base = cached_denoiser(args.out / "cache", settings, problem.data.sample, noise_levels(), rng.device)
        nets, histories = run_methods(problem, base, abar, args, rng)
        nets = {"pretrained": base, "exact_score": problem.target.predict_noise} | nets
        samples, found = measure(problem, nets, base, abar, args, rng)
        results[problem.name] = samples, found, histories
        rows += [r for part in found.values() for r in part]
        for method, (history, best_epoch) in histories.items():
            evaluations += history[-1][0]
            rows.append(row(f"{method}.{problem.name}.network_evaluations", history[-1][0]))
            rows.append(row(f"{method}.{problem.name}.best_epoch", best_epoch))
    draw_panels(out / "figure.png", problems, results)
    write_numbers(out / "numbers.json", args, rows, evaluations, time.perf_counter() - start)
    for problem in problems:
        exact = dict(mean_reward=problem.target_reward, path_kl=problem.kl, path_objective=-problem.log_z,
                     terminal_kl=problem.kl, terminal_objective=-problem.log_z, emd=0.0, mode_l1=0.0,
                     modes_covered=int((problem.masses > 0.05).sum()), spread=problem.spread)
        shown = rows + [row(f"exact.{problem.name}.{key}", value) for key, value in exact.items()]
        print_table(shown, problem.name, list(exact))
        print_table(rows, problem.name, ["log_z", "network_evaluations", "best_epoch"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())

