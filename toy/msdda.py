"""Merge models tuned for one reward each into a model for any weighting of the rewards, in closed form, step by step.

Paper: Zhang, Wang and Zou, "Step-level Denoising-time Diffusion Alignment with Multiple Objectives" (MSDDA), 2026,
arXiv 2604.14379. Its text was not at hand: symbols are reconstructed, claims about it are those of its abstract.
gaussian.png: a world where every formula is exact. figure.png: the Pareto front of two rewards on a ring of 8
Gaussians, for this merge, the usual ones, and a reward-free weight that corrects the merge (not in the paper; close to
the Feynman-Kac correctors of Skreta et al. 2025).

Run    python toy/msdda.py                   both worlds, exact scores and small networks     3.5 CPU minutes
       python toy/msdda.py --quick           the same, coarse                                 10 seconds
       python toy/msdda.py --paper           4 x the samples, 2 x the steps                   about 20 minutes
       python toy/msdda.py --score exact     no networks: the error of the merge alone        1 minute
       python toy/msdda.py --tune-on own     models that know nothing outside their own law   as the default

Notation (here -> usual symbol)
       weights -> w_i        of the rewards; the reference (pretrained) model takes the rest, 1 - sum of the exponents
       kl_weight -> beta     temperature: a model tuned for r_i is p_ref exp(r_i / kl_weight); kl_ratio is beta_i / beta
       mean, variance        of a reverse kernel p_i(x_{t-1} | x_t) = N(mu_i, s_i^2), merged: mu_w, s_w^2
       log_c -> log C_t      log of the integral over x_{t-1} of the product of the p_i(x_{t-1} | x_t)^{w_i}

Algorithm (`msdda`)
       1. ask every model for its Tweedie mean and its posterior variance                       `tweedie_moments`
       2. turn both into a Gaussian kernel with an honest variance                              `reverse_kernel`
       3. multiply the kernels: precisions add, means are averaged by precision                 `merge`
       4. draw x_{t-1}; with particles, add log C_t to their log weights and resample           `resample_systematic`

What is exact. One step of policy improvement on the reference, with the value V(x) = E_ref[r(x_0) | x], has the optimum
p_ref exp(V / kl_weight); V is linear in r, so single-reward optima multiply (1e-15 in the Gaussian world). What is not:
- that optimum is not p_ref(x_0) exp(r(x_0) / kl_weight): it tilts too much, for any number of steps (gaussian.png);
- with equal variances the merge is the plain average of the noise predictions (Diffusion Blend), to the letter; on
  Gaussian data the average is off by O(1 / T^2) in KL, so variances matter when steps are few and curvatures differ;
- models that did reach p_ref exp(r_i / kl_weight) multiply as *paths*; the merged kernels drop C_t, and no variance
  formula makes up for it. Weighting by C_t does, without a reward or another network call. The ring has such models,
  by regression on exact noise predictions: an ideal fine-tuning, not the reinforcement learning of the paper;
- finite steps leave a bias in the weighted merge too, since kernels of a mixture are not Gaussian: O(1 / T).

What you should see (± is the standard deviation over 3 seeds). Gaussian world: merged kernels are off by at most 7e-16,
blended ones by 0.7 at 5 steps and 0.002 at 500, where the order of their KL is 1.99; the KL of the target from the
step-level optimum grows from 0.26 to 0.55. Ring at weights (1/2, 1/2), sliced W2 to the exact target: exact samples
0.011 ± 0.002, MSDDA with C_t 0.010 ± 0.003, without 0.299 ± 0.003, blend 0.278 ± 0.003, switching 0.370 ± 0.003, RGG
0.158 ± 0.002, CoDe 0.530 ± 0.007. The plain merges miss alike: near the Pareto front, away from the point asked for.
At any weights MSDDA with C_t averages at most 3 floors, single runs reach 4.2: interacting particles vary more than
independent draws, and at (1.2, -0.2) the bias of finite steps shows. With networks: with C_t 0.026 ± 0.012, without
0.296 ± 0.009, Rewarded Soup 0.39 ± 0.14, of LoRA factors 0.85 ± 0.15. With --tune-on own (one seed) these are 0.20,
0.38, 1.2 and 2.0: a merge asks every model about places where only the other one's samples are.
To try: --weights 0.5,0.5 1,1 2,2 (stronger than any model was tuned), --kl-weight 1, --steps 10, --ess 0.
"""
import argparse
import importlib.metadata
import io
import json
import math
import os
import pathlib
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
    "quick": dict(samples=1000, particles=500, steps=20, train_steps=300, tune_steps=100, weights=[(0.5, 0.5)]),
    "default": dict(samples=10000, particles=1000, steps=50, train_steps=2000, tune_steps=1000, weights=None),
    "paper": dict(samples=40000, particles=1000, steps=100, train_steps=5000, tune_steps=3000, weights=None),
}
SWEEP = [(0.0, 1.0), (0.2, 0.8), (0.5, 0.5), (0.8, 0.2), (1.0, 0.0), (1.2, -0.2), (0.75, 0.75)]
CORNERS = [(1.0, 0.0), (0.0, 1.0)]  # the two models that there are
CANDIDATES, BLOCK = 20, 5  # CoDe: published
GAMMA = 0.006  # RGG: growth of its strength in 1/100 of the run, tuned; published 0.024 in 1/50, which overshoots here


def parse_args(argv=None):
    parser = common_parser(__doc__)
    parser.add_argument("--score", nargs="+", choices=["exact", "mlp"], default=["exact", "mlp"])
    parser.add_argument("--weights", nargs="+", type=weight_pair, help="pairs like 0.5,0.5: a weight for each reward")
    parser.add_argument("--samples", type=positive(int), help="samples of each method")
    parser.add_argument("--particles", type=positive(int), help="particles in a group of the weighted merge")
    parser.add_argument("--steps", type=positive(int), help="sampling steps, at most 150")
    parser.add_argument("--kl-weight", type=positive(float), default=0.4, help="reward temperature beta")
    parser.add_argument("--ess", type=float, default=0.9, help="resample below this fraction of particles")
    parser.add_argument("--rank", type=positive(int), default=8, help="of the LoRA of every layer")
    parser.add_argument("--tune-on", choices=["both", "own"], default="both", help="where models are tuned: at points "
                        "of their own target alone, or at those of the pretrained model too")
    parser.add_argument("--train-steps", type=positive(int), help="training steps of the network, batch 2048")
    parser.add_argument("--tune-steps", type=positive(int), help="training steps of each LoRA, batch 2048")
    args = parser.parse_args(argv)
    for name, value in PRESETS["quick" if args.quick else "paper" if args.paper else "default"].items():
        if getattr(args, name) is None:
            setattr(args, name, value or SWEEP)
    if args.steps > 150 or not 0 <= args.ess <= 1:
        parser.error("--steps can be at most 150, --ess lies between 0 and 1")
    if args.samples % args.particles:
        parser.error(f"--samples {args.samples} must be a multiple of --particles {args.particles}")
    return args


def weight_pair(text):
    """An argparse type: two finite numbers, "0.5,0.5"."""
    values = tuple(float(v) for v in text.split(","))
    if len(values) != 2 or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"expected two numbers like 0.5,0.5, got {text}")
    return values


# ---- the problem: data, rewards, exact answers -----------------------------------------------------------------------


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


def pareto_problem(kl_weight, device):
    """Ring of 8 and two quadratic rewards: a namespace of data, rewards (N, 2) -> (N, 2), target, mean_rewards.

    target(weights) -> the mixture p exp((w_1 r_1 + w_2 r_2) / kl_weight) / Z, and log Z; fails where the weighted
    reward grows faster than the data decay, so that there is no such distribution.
    """
    angle = torch.arange(8, dtype=torch.float64, device=device) * math.pi / 4
    eye = torch.eye(2).to(angle)
    means = 3 * torch.stack([angle.cos(), angle.sin()], 1)
    data = GaussianMixture(torch.full_like(angle, 1 / 8), means, 0.36**2 * eye.expand(8, 2, 2))
    curvatures = torch.stack([0.5 * eye, eye * torch.tensor([0.15, 0.6]).to(angle)])  # (2, 2, 2)
    centers = 4 * eye

    def rewards(x):
        offset = x[:, None, :] - centers.to(x)
        return -torch.einsum("nrd,rde,nre->nr", offset, curvatures.to(x), offset)

    def target(weights):
        precision = eye / 0.36**2 + sum(2 * w * A / kl_weight for w, A in zip(weights, curvatures))
        if precision.diagonal().min() <= 0:
            fail(f"There is no target at weights {weights}: its density would not be normalisable.")
        mixture, log_z = data, 0.0
        for w, A, c in zip(weights, curvatures, centers):
            mixture, more = mixture.tilt(w * A, c, kl_weight)
            log_z += more
        return mixture, log_z

    def mean_rewards(mixture):
        mean, cov = mixture.moments()
        return [-((mean - c) @ A @ (mean - c) + (A * cov).sum()).item() for A, c in zip(curvatures, centers)]

    return types.SimpleNamespace(data=data, rewards=rewards, target=target, mean_rewards=mean_rewards)


def noise_levels():
    """abar of the 1000 training steps with linear beta from 1e-4 to 0.02 (Ho et al. 2020) -> list of float."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()


def signal_powers(steps):
    """abar before each step and after the last -> list of steps + 1 floats, evenly spaced in arccos sqrt(abar).

    From the noisiest training level to 1. Even steps in time would spend most of them where nothing is decided.
    """
    start = math.acos(noise_levels()[-1] ** 0.5)
    return [math.cos(start * (1 - i / steps)) ** 2 for i in range(steps + 1)]


# ---- the method ------------------------------------------------------------------------------------------------------


def merge(means, variances, weights, mean_ref=None, variance_ref=None, kl_ratio=1.0):
    """The Gaussian prod_i N(means_i, variances_i)^{w_i}, up to C -> mean, variance (N, ...), log C (N,).

    means: a list of tensors (N, ...); variances: numbers or tensors that broadcast to them; weights (m,) times kl_ratio
    (beta_i / beta, a number or (m,)) are the exponents, and the reference takes 1 - their sum: without it the merged
    model would be at another temperature. Fails where the merged precision is not positive, or without a reference.
    """
    kind = dict(dtype=means[0].dtype, device=means[0].device)
    weights = torch.as_tensor(weights, **kind) * torch.as_tensor(kl_ratio, **kind)
    rest = 1 - weights.sum()
    if mean_ref is not None:
        means, variances = [*means, mean_ref], [*variances, variance_ref]
        weights = torch.cat([weights, rest[None]])
    elif abs(rest) > 1e-6:
        fail(f"The exponents sum to {weights.sum():.6g} and not to 1: the merge needs the reference model.")
    w = weights.view(-1, *[1] * means[0].dim())
    means = torch.stack(list(means))  # (m, N, ...)
    variances = torch.stack([torch.as_tensor(v, **kind).expand_as(means[0]) for v in variances])
    precision = (w / variances).sum(0)
    if not (precision > 0).all():
        fail(f"The merged precision is not positive (down to {precision.min():.3g}): a model wider than the reference "
             "has too large a weight, or a narrower one a negative weight, and the product is no distribution.")
    # exercise 7: complete the square in prod_i N(x; means_i, variances_i)^w_i; the w_i sum to one. precision is known
    mean, variance = (w * means / variances).sum(0) / precision, 1 / precision
    log_c = variance.log() - (w * variances.log()).sum(0) - (w * (means - mean) ** 2 / variances).sum(0)
    return mean, variance, log_c.flatten(1).sum(1) / 2
    # end exercise


def tweedie_moments(predict_noise, x, t, abar):
    """x0_hat and eps (N, ...) of a model at x, and Var(x_0 | x_t), the mean over dimensions, (N, 1, ..., 1).

    Cov(x_0 | x_t) = (1 - abar) / sqrt(abar) d x0_hat / d x (Tweedie, second order); its trace takes a backward pass a
    dimension, which for images would be a few random probes, or a table by time step (Analytic-DPM, Bao et al. 2022).
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        eps = predict_noise(x, t)
        x0_hat = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
        total = x0_hat.flatten(1).sum(0)  # (D,): its gradients are those of the single samples
        rows = [torch.autograd.grad(v, x, retain_graph=True)[0].flatten(1)[:, k] for k, v in enumerate(total)]
    spread = (1 - abar) / abar**0.5 * sum(rows) / len(rows)
    spread = spread.clamp(min=0.01 * (1 - abar))  # a network's derivative can be negative
    return x0_hat.detach(), eps.detach(), per_particle(spread, x)


def reverse_kernel(x0_hat, eps, spread, abar, abar_next):
    """Mean and variance of p(x_{t-1} | x_t): the DDPM kernel given x_0, averaged over x_0 with mean x0_hat and
    variance `spread`. Without the spread, s_i would be the same for every model and the merge a plain average."""
    mean, sigma = ddim_kernel(x0_hat, eps, abar, abar_next, 1.0)
    slope = abar_next**0.5 - (max(1 - abar_next - sigma**2, 0.0) * abar / (1 - abar)) ** 0.5  # of the mean in x_0
    return mean, sigma**2 + slope**2 * spread


def resample_systematic(log_w, rng):
    """Ancestors of P new particles in each group, log_w (G, P) -> (G, P): floor(P w_n) copies of n or one more.

    One uniform in the first interval of length 1 / P, and its shifts by 1 / P, through the inverse of the cdf.
    """
    # exercise 6: one uniform number a group, in float64 from rng; torch.searchsorted inverts the distribution function
    groups, count = log_w.shape
    cdf = log_w.double().softmax(1).cumsum(1)
    u = torch.rand(groups, 1, generator=rng, dtype=cdf.dtype, device=cdf.device)
    u = (u + torch.arange(count, device=cdf.device)) / count
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=count - 1)
    # end exercise


def msdda(models, weights, x, timesteps, abar, rng, reference=None, kl_ratio=1.0, particles=1, ess=0.0):
    """Samples of the merged model: x (N, ...), log_w (G, P), log_z (G,), the share of groups that resampled by step.

    models: functions (n, ...), t -> eps, one a weight; reference: the pretrained one, needed where the exponents do not
    sum to 1; x (N, ...) standard normal, N = groups x particles, a group being contiguous; timesteps (T,) from noise
    to data; abar (T + 1,). Without log_w these are draws of the merged kernels. With log_w they are draws of the
    product of the path laws; if model i follows p_ref exp(r_i / beta_i), its x_0 follows
    p_ref exp(sum_i w_i r_i / beta) and E[exp(log_z)] is Z_w / prod_i Z_i^{w_i beta_i / beta}. Fails as `merge` does.
    """
    groups = len(x) // particles
    first_slot = torch.arange(groups, device=x.device)[:, None] * particles
    log_z, history, everyone = torch.zeros(groups, device=x.device), [], [*models, *([reference] if reference else [])]
    state = dict(x=x, log_w=torch.zeros_like(x.flatten(1)[:, 0]))
    for i, t in enumerate(timesteps):
        log_w = state["log_w"].view(groups, particles)
        due = effective_sample_size(log_w) < ess * particles  # (G,)
        if due.any():
            stay = torch.arange(particles, device=x.device)
            ancestors = torch.where(due[:, None], resample_systematic(log_w, rng), stay)
            state = gather(state, (first_slot + ancestors).flatten())
            state["log_w"] = torch.where(due[:, None], 0, log_w).flatten()
            log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)
        history.append(due.double().mean().item())
        moments = [tweedie_moments(model, state["x"], t, abar[i]) for model in everyone]
        kernels = [reverse_kernel(*m, abar[i], abar[i + 1]) for m in moments]
        means, variances = zip(*kernels[: len(models)])
        mean, variance, log_c = merge(means, variances, weights, *(kernels[-1] if reference else ()), kl_ratio=kl_ratio)
        z = torch.randn(mean.shape, generator=rng, device=x.device, dtype=mean.dtype)
        state = dict(x=mean + variance.sqrt() * z, log_w=state["log_w"] + log_c)
    log_w = state["log_w"].view(groups, particles)
    return dict(x=state["x"], log_w=log_w, log_z=log_z + log_mean_exp(log_w), history=history)


# ---- the baselines ---------------------------------------------------------------------------------------------------


def sample_ddpm(predict_noise, x, timesteps, abar, rng, pull=None, score=None):
    """Plain DDPM sampling x (N, ...) -> (N, ...), and two ways to use rewards r_w at test time.

    pull (x0_hat) -> grad r_w / kl_weight: reward-gradient guidance, RGG; the gradient skips the network, which leaves
    1 / sqrt(abar). score (x0_hat) -> r_w: CoDe, which every BLOCK steps draws CANDIDATES of x_{t-1} and keeps the one
    with the best forecast.
    """
    for i, t in enumerate(timesteps):
        eps = predict_noise(x, t)
        x0_hat = (x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5
        mean, sigma = ddim_kernel(x0_hat, eps, abar[i], abar[i + 1], 1.0)
        if pull:
            strength = min((1 + GAMMA) ** (100 * i / len(timesteps)) - 1, 1.0)
            mean = mean + strength * sigma**2 * pull(x0_hat) / abar[i] ** 0.5
        copies = CANDIDATES if score and i % BLOCK == 0 and sigma > 0 else 1
        mean = mean.repeat_interleave(copies, 0)
        x = mean + sigma * torch.randn(mean.shape, generator=rng, device=x.device, dtype=mean.dtype)
        if copies > 1:
            eps = predict_noise(x, timesteps[i + 1])
            best = score((x - (1 - abar[i + 1]) ** 0.5 * eps) / abar[i + 1] ** 0.5).view(-1, copies).argmax(1)
            x = x[torch.arange(len(best), device=x.device) * copies + best]
    return x


def blend(models, weights):
    """Diffusion Blend: the weighted average of the noise predictions (with a common variance, the merge itself)."""
    return lambda x, t: sum(w * model(x, t) for w, model in zip(weights, models))


def switch(models, weights, rng):
    """Per-step switching: every sample asks one model, drawn with probabilities `weights`, at every step."""

    def predict_noise(x, t):
        chosen = torch.multinomial(torch.tensor(weights, device=x.device), len(x), replacement=True, generator=rng)
        eps = torch.empty_like(x)
        for k, model in enumerate(models):
            eps[chosen == k] = model(x[chosen == k], t)
        return eps

    return predict_noise


def soup(net, loras, weights, average="product"):
    """Rewarded Soup: net with LoRAs [(up, down), ...] of several models averaged, as products or as factors.

    Averaging factors, as scripts do that average checkpoints, makes terms up_i down_j and keeps w_i^2 of up_i down_i.
    """
    changed = {}
    names = [name for name, _ in net.named_parameters() if name.endswith("weight")]
    for name, layer in zip(names, zip(*loras)):
        if average == "product":
            delta = sum(w * up @ down for w, (up, down) in zip(weights, layer))
        else:
            up, down = (sum(w * lora[k] for w, lora in zip(weights, layer)) for k in (0, 1))
            delta = up @ down
        changed[name] = net.get_parameter(name) + delta
    return lambda x, abar: torch.func.functional_call(net, changed, (x, abar))


# ---- the networks ----------------------------------------------------------------------------------------------------


def regress(predict, parameters, net, law, places, steps, rng, batch=2048, lr=8e-3):
    """Fit predict(x, abar) to the exact noise prediction of the mixture `law`, at noised draws of mixtures `places`.

    Least squares of the velocity, as `net` parametrises it. The places only decide where the fit is good.
    """
    optimizer = torch.optim.Adam(parameters, lr, betas=(0.9, 0.99), fused=True)
    warm = 0.051  # of the run; OneCycleLR divides by warm * steps - 1, which is never zero for this number
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=warm)
    levels = torch.tensor(noise_levels(), device=rng.device)[:, None]
    for step in range(steps):
        x0 = torch.cat([place.sample(batch // len(places), rng) for place in places])
        level = levels[torch.randint(len(levels), (batch,), generator=rng, device=rng.device)]  # (N, 1)
        x = level.sqrt() * x0 + (1 - level).sqrt() * torch.randn(x0.shape, generator=rng, device=rng.device)
        x.requires_grad_()
        score = torch.autograd.grad(law.log_prob(x, level[:, :, None]).sum(), x)[0]
        x = x.detach()
        error = (predict(x, level) + (1 - level).sqrt() * score) / net.normalise(x, level)[1]  # of the velocity
        optimizer.zero_grad()
        error.pow(2).mean().backward()
        optimizer.step()
        schedule.step()
        progress("training", step + 1, steps)


def pretrain(data, steps, rng):
    """A network that predicts the noise of the mixture `data`."""
    mean, cov = data.moments()
    net = Denoiser(mean.float(), cov.diagonal().mean().sqrt().float(), 96, rng)
    regress(net, net.parameters(), net, data, [data], steps, rng)
    return net.requires_grad_(False)


def tune_lora(net, law, places, rank, steps, rng):
    """LoRA [(up, down), ...], one a layer, with which net predicts the noise of the mixture `law`."""
    shapes = [value.shape for name, value in net.named_parameters() if name.endswith("weight")]
    lora = [(torch.zeros(n, rank, device=rng.device), torch.randn(rank, k, generator=rng, device=rng.device) / k**0.5)
            for n, k in shapes]
    factors = [value.requires_grad_() for pair in lora for value in pair]
    regress(lambda x, abar: soup(net, [lora], [1.0])(x, abar), factors, net, law, places, steps, rng)
    return [(up.detach(), down.detach()) for up, down in lora]


# ---- the Gaussian world: everything in closed form -------------------------------------------------------------------
# A chain is (gain, offset, variance), each (T, d): x_{t-1} | x_t ~ N(gain x_t + offset, variance), x_T ~ N(0, 1).
# A reward is (P, q), each (d,): r(x) = sum(-P x^2 + q x), as models differ in what depends on x alone.


def reference_chain(mean, var, abar):
    """The exact reverse chain of data N(mean, var), each (d,)."""
    kernels, x = [], torch.stack([torch.zeros_like(mean), torch.ones_like(mean)])  # affine: two points determine it
    for a, b in zip(abar, abar[1:]):
        x0_hat = mean + a**0.5 * var / (a * var + 1 - a) * (x - a**0.5 * mean)
        eps = (x - a**0.5 * x0_hat) / (1 - a) ** 0.5
        (offset, end), variance = reverse_kernel(x0_hat, eps, var * (1 - a) / (a * var + 1 - a), a, b)
        kernels.append((end - offset, offset, variance))
    return tuple(map(torch.stack, zip(*kernels)))


def optimal_chain(chain, reward, kl_weight, soft=False):
    """Kernels p_ref(x_{t-1} | x_t) exp(V(x_{t-1}) / kl_weight), normalised: V(x) = E_ref[r(x_0) | x], the step-level
    optimum; soft: kl_weight log E_ref[exp(r(x_0) / kl_weight) | x], the optimum of the trajectory."""
    (P, q), kernels = reward, []
    for gain, offset, var in reversed(list(zip(*chain))):
        shrink = 1 / (1 + 2 * P * var / kl_weight)
        kernels.append((shrink * gain, shrink * (offset + var * q / kl_weight), shrink * var))
        if soft:
            P, q = P * shrink, q * shrink
        P, q = P * gain**2, gain * (q - 2 * P * offset)
    return tuple(map(torch.stack, zip(*reversed(kernels))))


def merged_chain(chains, weights, reference=None, kl_ratio=1.0):
    """`merge` of chains: the merged mean is affine in x too, so two points determine it."""
    points = [(torch.stack([offset, offset + gain]), var) for gain, offset, var in [*chains, reference or chains[0]]]
    means, variances = zip(*points[:-1])
    mean, variance, _ = merge(means, variances, weights, *(points[-1] if reference else ()), kl_ratio=kl_ratio)
    return mean[1] - mean[0], mean[0], variance[0]


def chain_error(chain, other):
    """Largest difference of two chains' gains, offsets and variances."""
    return max((a - b).abs().max().item() for a, b in zip(chain, other))


def terminal(chain):
    """Mean and variance (d,) of x_0."""
    mean, var = torch.zeros_like(chain[0][0]), torch.ones_like(chain[0][0])
    for gain, offset, variance in zip(*chain):
        mean, var = gain * mean + offset, gain**2 * var + variance
    return mean, var


def gaussian_kl(mean, var, mean_other, var_other):
    """KL of N(mean, var) from N(mean_other, var_other), diagonal, nats."""
    return 0.5 * ((var + (mean - mean_other) ** 2) / var_other - 1 + (var_other / var).log()).sum().item()


def gaussian_world():
    """Rows of the Gaussian world; the terminal laws of its chains and the target at each number of steps."""
    make = lambda *v: torch.tensor(v, dtype=torch.float64)
    mean, var, kl_weight, weights = make(0, 0), make(1, 1), 0.3, (0.5, 0.5)
    rewards = [(A, 2 * A * c) for A, c in ((make(3, 0.2), make(1.5, 0)), (make(0.2, 2), make(0, 1.5)))]
    P, q = (sum(w * r[k] for w, r in zip(weights, rewards)) for k in (0, 1))
    precision = 1 / var + 2 * P / kl_weight
    target = ((mean / var + q / kl_weight) / precision, 1 / precision)
    rows, laws = [], {}
    for steps in (5, 10, 20, 50, 100, 200, 500):
        reference = reference_chain(mean, var, signal_powers(steps))
        single = [optimal_chain(reference, r, kl_weight) for r in rewards]
        common = [(gain, offset, reference[2]) for gain, offset, _ in single]  # noise predictions alone
        chains = dict(pretrained=reference, step=optimal_chain(reference, (P, q), kl_weight),
                      soft=optimal_chain(reference, (P, q), kl_weight, soft=True),
                      msdda=merged_chain(single, weights), blend=merged_chain(common, weights))
        laws[steps] = dict(target=target, **{name: terminal(chain) for name, chain in chains.items()})
        for name, chain in chains.items():
            add = lambda key, value, exact=None: rows.append(row(f"{name}.gaussian.{key}_t{steps}", value, exact=exact))
            if name in ("msdda", "blend"):
                add("kernel_error", chain_error(chain, chains["step"]), 0.0)
                add("kl", gaussian_kl(*terminal(chain), *laws[steps]["step"]), 0.0)
            add("kl_of_target", gaussian_kl(*target, *terminal(chain)))
    kl = [gaussian_kl(*laws[steps]["blend"], *laws[steps]["step"]) for steps in (200, 500)]
    rows.append(row("blend.gaussian.order_of_kl", math.log(kl[0] / kl[1]) / math.log(2.5), exact=2.0))
    return rows, laws


# ---- the ring: methods and measures ----------------------------------------------------------------------------------


def weights_tag(weights):
    """A pair of weights as a word for numbers.json: (1.2, -0.2) -> w120_m20."""
    return "w" + "_".join(f"{'m' * (w < 0)}{abs(100 * w):g}".replace(".", "p") for w in weights)


def ring_world(problem, score, args, rng):
    """Every method at every pair of weights -> {weights: {method: dict(x, calls, seconds, groups, log_z)}}.

    x (N, 2) counts alike, in `groups` independent groups; calls is the number of noise predictions.
    """
    n, abar, calls, results = args.samples, signal_powers(args.steps), [], {}

    def counted(model):
        def predict_noise(x, t):
            calls.append(len(x))
            return model(x, t)
        return predict_noise

    if score == "mlp":
        net, loras = pretrain(problem.data, args.train_steps, rng), {}
        for w in dict.fromkeys([*CORNERS, *args.weights]):
            places = [problem.target(w)[0], problem.data][: 1 if args.tune_on == "own" else 2]
            loras[w] = tune_lora(net, places[0], places, args.rank, args.tune_steps, rng)
        reference, tuned = counted(net), {w: counted(soup(net, [lora], [1.0])) for w, lora in loras.items()}
    else:
        reference = counted(problem.data.predict_noise)
        tuned = {w: counted(problem.target(w)[0].predict_noise) for w in [*CORNERS, *args.weights]}
    models, base = [tuned[w] for w in CORNERS], None
    for done, weights in enumerate(args.weights):
        mixture, rest = problem.target(weights)[0], 1 - sum(weights)
        grid = dict(timesteps=abar[:-1], abar=abar, rng=rng)  # these models take the signal power for the time
        merged = dict(reference=reference if abs(rest) > 1e-6 else None, **grid)
        everyone = [*models, reference] if merged["reference"] else models
        shares = [*weights, rest][: len(everyone)]

        def reward(x, weights=torch.tensor(weights, device=rng.device)):
            return problem.rewards(x) @ weights

        def pull(x):
            return torch.autograd.grad(reward(x.requires_grad_()).sum(), x)[0] / args.kl_weight

        methods = {
            "target": lambda x: mixture.sample(n, rng),
            "pretrained": lambda x: sample_ddpm(reference, x, **grid) if base is None else base,
            "rgg": lambda x: sample_ddpm(reference, x, pull=pull, **grid),
            "code": lambda x: sample_ddpm(reference, x, score=reward, **grid),
            "switch": lambda x: sample_ddpm(switch(everyone, shares, rng), x, **grid),
            "blend": lambda x: sample_ddpm(blend(everyone, shares), x, **grid),
            "msdda": lambda x: msdda(models, weights, x, **merged),
            "msdda_smc": lambda x: msdda(models, weights, x, particles=args.particles, ess=args.ess, **merged),
            "oracle": lambda x: msdda([tuned[weights]], [1.0], x, **grid),
        }
        if score == "mlp":
            pair = [loras[w] for w in CORNERS]
            for name, average in (("soup", "product"), ("soup_factor", "factor")):
                model = counted(soup(net, pair, weights, average))
                methods[name] = lambda x, model=model: sample_ddpm(model, x, **grid)
        if min(shares) < -1e-6:
            del methods["switch"]  # these are no probabilities
        results[weights] = {}
        for name, method in methods.items():
            calls.clear()
            start = time.perf_counter()
            try:
                out = method(torch.randn(n, 2, generator=rng, device=rng.device))
            except SystemExit:  # a merged precision is not positive, as `merge` has said: left out at these weights
                continue
            out = dict(groups=n, **(out if isinstance(out, dict) else dict(x=out)))
            out.update(calls=sum(calls), seconds=time.perf_counter() - start)
            if name == "msdda_smc":
                drawn = resample_systematic(out["log_w"], rng)
                first_slot = torch.arange(len(drawn), device=rng.device)[:, None] * args.particles
                out.update(x=out["x"][(first_slot + drawn).flatten()], groups=len(drawn))
            results[weights][name] = out
        base = results[weights]["pretrained"]["x"]  # the same at all weights
        progress(f"ring, {score}", done + 1, len(args.weights))
    return results


def projected_quantiles(mixture, n, directions):
    """Quantiles (i + 1/2) / n of a mixture's projections on directions (D, d) -> (n, D), from their exact cdf."""
    mean = mixture.means @ directions.T  # (K, D)
    std = torch.einsum("de,kef,df->kd", directions, mixture.covs, directions).sqrt()
    line = torch.linspace(-12, 12, 20001, dtype=mean.dtype, device=mean.device)
    level = ((torch.arange(n, device=mean.device) + 0.5) / n).expand(len(directions), n).contiguous()
    cdf = torch.stack([torch.special.ndtr((line[:, None] - m) / s) @ mixture.weights for m, s in zip(mean.T, std.T)])
    right = torch.searchsorted(cdf, level).clamp(1, len(line) - 1)
    low, high = cdf.gather(1, right - 1), cdf.gather(1, right)
    return (line[right - 1] + (level - low) / (high - low) * (line[1] - line[0])).T


def sliced_w2(x, exact, directions):
    """Sliced 2-Wasserstein distance of points x (N, d) from a law with these quantiles (N, D) along directions."""
    return ((x.to(exact) @ directions.T).sort(0)[0] - exact).pow(2).mean().sqrt().item()


def measure_ring(problem, score, results, args, rng, repeats=10):
    """Rows of E[r_1], E[r_2], log Z and the sliced W2 from the exact target; `target` has that of its own samples, the
    noise floor, on average over `repeats` draws."""
    angle = torch.arange(32, dtype=torch.float64, device=rng.device) * math.pi / 32
    directions, rows = torch.stack([angle.cos(), angle.sin()], 1), []
    log_zs = [problem.target(corner)[1] for corner in CORNERS]
    for weights, outs in results.items():
        mixture, log_z = problem.target(weights)
        exact = projected_quantiles(mixture, args.samples, directions)
        floor = torch.tensor([sliced_w2(mixture.sample(args.samples, rng), exact, directions) for _ in range(repeats)])
        for method, out in outs.items():

            def add(key, *numbers):
                rows.append(row(f"{method}.{score}.{key}_{weights_tag(weights)}", *numbers))

            r = problem.rewards(out["x"]).view(out["groups"], -1, 2).mean(1)  # (G, 2)
            for k, mean in enumerate(problem.mean_rewards(mixture)):
                add(f"reward_{k + 1}", *mean_and_se(r[:, k]), mean if method != "pretrained" else None)
            if method == "target":
                add("sw2", *mean_and_se(floor))
            else:
                add("sw2", sliced_w2(out["x"], exact, directions))
            if method == "msdda_smc":
                add("log_z", *log_mean_and_se(out["log_z"]), log_z - sum(w * z for w, z in zip(weights, log_zs)))
    for method in dict.fromkeys(name for outs in results.values() for name in outs):
        made = [outs[method] for outs in results.values() if method in outs]
        rows.append(row(f"{method}.{score}.network_evaluations", sum(out["calls"] for out in made)))
        rows.append(row(f"{method}.{score}.seconds", round(sum(out["seconds"] for out in made), 2)))
    return rows


# ---- the figures -----------------------------------------------------------------------------------------------------

STYLES = {  # method -> label, colour (Okabe and Ito), marker
    "oracle": ("tuned for each weight", "#000000", "x"),
    "rgg": ("reward gradients (RGG)", "#999999", "v"),
    "code": ("best of 20 (CoDe)", "#999999", "^"),
    "soup_factor": ("soup of factors", "#CC79A7", "P"),
    "soup": ("Rewarded Soup", "#D55E00", "s"),
    "switch": ("switch", "#56B4E9", "D"),
    "blend": ("blend", "#E69F00", "o"),
    "msdda": ("MSDDA", "#0072B2", "o"),
    "msdda_smc": ("MSDDA + C$_t$", "#009E73", "*"),
}


def draw_gaussian(path, rows, laws):
    """Error of the kernels and of the sampler against the number of steps, and the terminal laws at the fewest."""
    value, steps = {r["name"]: r["estimate"] for r in rows}, list(laws)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8))
    for ax, name, key, color, label in (
            (axes[0], "blend", "kernel_error", "#E69F00", "blend of noise predictions"),
            (axes[0], "msdda", "kernel_error", "#0072B2", "MSDDA"),
            (axes[1], "blend", "kl", "#E69F00", "blend from the step-level optimum"),
            (axes[1], "msdda", "kl_of_target", "#0072B2", "target from the step-level optimum"),
            (axes[1], "soft", "kl_of_target", "#000000", "target from the trajectory optimum")):
        ax.plot(steps, [value[f"{name}.gaussian.{key}_t{s}"] for s in steps], "o-", color=color, ms=4, label=label)
    last = value[f"blend.gaussian.kl_t{steps[-1]}"]
    axes[1].plot(steps, [last * (steps[-1] / s) ** 2 for s in steps], ":", color="black", label="exact slope, T$^{-2}$")
    for ax, title, place in ((axes[0], "largest error of a kernel", "center"),
                             (axes[1], "KL of the terminal laws, nats", "lower center")):
        ax.set(xscale="log", yscale="log", xlabel="steps T", title=title, ylim=(1e-17, 10))
        ax.set_xticks(steps, steps)
        ax.minorticks_off()
        ax.legend(fontsize=8, loc=place)
    angle = torch.linspace(0, 2 * math.pi, 200, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    for name, color, style, label in (
            ("pretrained", "#999999", "-", "pretrained"), ("target", "#000000", "-", "trajectory target"),
            ("step", "#56B4E9", "-", "step-level optimum"), ("msdda", "#0072B2", "--", "MSDDA"),
            ("blend", "#E69F00", "-", "blend")):
        mean, var = laws[steps[0]][name]
        axes[2].plot(*(mean + var.sqrt() * circle).T, style, color=color, label=label)
    axes[2].set(title=f"one-sigma ellipses at T = {steps[0]}", aspect="equal", xlim=(-1.2, 2.3), ylim=(-1.2, 2.7))
    axes[2].legend(fontsize=8, loc="upper left", ncols=2)
    figure.tight_layout()
    save_figure(figure, path)


def draw_ring(path, problem, rows, results, args):
    """Samples at the weights nearest to (1/2, 1/2), and for each kind of score the Pareto front and the errors.

    On the front a line joins every method's rewards to those of the exact target at the same weights, a circle.
    """
    value, tags = {r["name"]: r["estimate"] for r in rows}, [weights_tag(w) for w in args.weights]
    figure = plt.figure(figsize=(12, 2.3 + 3.9 * len(args.score)), layout="constrained")
    top, *below = figure.subfigures(1 + len(args.score), 1, height_ratios=[2.3] + [3.9] * len(args.score))
    middle, last = min(args.weights, key=lambda w: abs(w[0] - 0.5) + abs(w[1] - 0.5)), args.score[-1]
    titles = dict(pretrained=("pretrained", "#555555"), target=("exact target", "#555555"), **STYLES)
    hidden = ("rgg", "code", "oracle", "soup_factor")
    outs = {name: results[last][middle][name] for name in titles if name in results[last][middle].keys() - hidden}
    span = torch.linspace(-5, 5, 161, dtype=torch.float64)
    grid = torch.cartesian_prod(span, span).to(problem.data.means)
    log_p = problem.target(middle)[0].log_prob(grid).view(161, 161).T.cpu()
    for ax, (name, out) in zip(top.subplots(1, len(outs), squeeze=False)[0], outs.items()):
        ax.contour(span, span, log_p, [-9, -6, -3], colors="black", linewidths=0.4, linestyles="solid")
        ax.scatter(*out["x"][:: max(1, args.samples // 1500)].T.cpu(), s=2, c=titles[name][1], alpha=0.5, linewidths=0)
        ax.set_title(f"{titles[name][0]}\nSW$_2$ {value[f'{name}.{last}.sw2_{weights_tag(middle)}']:.3f}", fontsize=9)
        ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-5, 5), ylim=(-5, 5))
    means = lambda sweep: -torch.tensor([problem.mean_rewards(problem.target(w)[0]) for w in sweep])
    exact, front = means(args.weights), means([(k / 50, 1 - k / 50) for k in range(51)])
    for part, score in zip(below, args.score):
        left, right = part.subplots(1, 2)
        left.plot(*front.T, color="black", linewidth=1)
        left.plot(*exact.T, "o", color="black", markersize=9, fillstyle="none")
        right.plot([value[f"target.{score}.sw2_{tag}"] for tag in tags], ".:", color="black", label="noise floor")
        for name, (label, color, marker) in STYLES.items():
            known = [k for k, tag in enumerate(tags) if f"{name}.{score}.sw2_{tag}" in value]
            style = dict(color=color, markersize=5, linewidth=0.8)
            errors = [value[f"{name}.{score}.sw2_{tags[k]}"] for k in known]
            right.plot(known, errors, marker + "-", label=label, **style)
            points = -torch.tensor([[value[f"{name}.{score}.reward_{r}_{tags[k]}"] for r in (1, 2)] for k in known])
            left.plot(*torch.stack([exact[known], points.view(-1, 2)]).permute(2, 0, 1), **style)
            left.plot(*points.view(-1, 2).T, marker, **style)
        left.set(xscale="log", yscale="log", xlabel="-E r$_1$", ylabel="-E r$_2$", xlim=(20, 0.2), ylim=(20, 0.2),
                 title="Pareto front (up and right is better)")
        right.set(yscale="log", title="sliced W$_2$ to the exact target", xlabel="weights of the rewards")
        right.set_xticks(range(len(tags)), [f"{w[0]:g}\n{w[1]:g}" for w in args.weights])
        names = dict(exact="exact tilted scores", mlp="networks with LoRAs")
        right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title=names[score])
    save_figure(figure, path)


# ---- shared ----------------------------------------------------------------------------------------------------------


def per_particle(v, x):
    """v (N,) -> (N, 1, ..., 1), to multiply x (N, ...)."""
    return v.view(-1, *[1] * (x.dim() - 1))


def effective_sample_size(log_w):
    """log_w (G, P) -> (sum w)^2 / sum w^2 (G,), between 1 and P."""
    return (2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)).exp()


def log_mean_exp(log_w):
    """log_w (G, P) -> log of the mean weight (G,)."""
    return log_w.logsumexp(1) - math.log(log_w.shape[1])


def gather(state, index):
    """All per-particle state after resampling: every tensor of the dict, leading dimension N, at index (N,)."""
    return {name: value[index] for name, value in state.items()}


def ddim_kernel(x0_hat, eps, abar, abar_next, eta):
    """Mean (N, ...) and standard deviation (float) of p(x_{t-1} | x_t); eta = 1 is DDPM. DDIM (Song 2021) eq. 12."""
    sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
    return abar_next**0.5 * x0_hat + max(1 - abar_next - sigma**2, 0.0) ** 0.5 * eps, sigma


def mean_and_se(values):
    """Independent values (G,) -> their mean and its standard error (None for a single one)."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None


def log_mean_and_se(log_values):
    """Independent unbiased estimates of Z, as logarithms (G,) -> log of their mean, its standard error."""
    top = log_values.max().item()
    mean, se = mean_and_se((log_values.double() - top).exp())
    return top + math.log(mean), se and se / mean


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
    """Both worlds, their figures and numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "toy_msdda")
    problem = pareto_problem(args.kl_weight, args.device)
    for weights in args.weights:
        problem.target(weights)  # bad weights end here, not after the training
    (rows, laws), results = gaussian_world(), {}
    for score in args.score:
        rng = torch.Generator(args.device).manual_seed(args.seed)  # a world does not depend on what ran before
        results[score] = ring_world(problem, score, args, rng)
        rows += measure_ring(problem, score, results[score], args, rng)
    draw_gaussian(out / "gaussian.png", rows, laws)
    draw_ring(out / "figure.png", problem, rows, results, args)
    evaluations = sum(o["calls"] for result in results.values() for outs in result.values() for o in outs.values())
    write_numbers(out / "numbers.json", args, rows, evaluations, time.perf_counter() - start)
    worst = max(r["estimate"] for r in rows if r["name"].startswith("msdda.gaussian.kernel_error"))
    print(f"\nGaussian world: merged kernels are the step-level optimum to {worst:.1e}\n")
    print_table(rows, "gaussian", [f"{key}_t{t}" for key in ("kl", "kl_of_target") for t in (5, 50, 500)])
    for score in args.score:
        for key in ("reward_1", "reward_2", "sw2", "log_z"):
            print_table(rows, score, [f"{key}_{weights_tag(w)}" for w in args.weights])
        print_table(rows, score, ["network_evaluations", "seconds"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
