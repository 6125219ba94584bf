"""Merge models that were tuned for one reward each into a model for any weighting of the rewards, kernel by kernel.
Paper: Zhang, Wang and Zou, "Step-level Denoising-time Diffusion Alignment with Multiple Objectives" (MSDDA), 2026,
arXiv 2604.14379; its text was not at hand. figure.png: the Pareto front of two rewards, and the theorem's own case.
Run    python toy/msdda.py     45 seconds; --quick: 8; --paper: ten times the samples; --score exact: no networks
Read first: merge, terminal, msdda. Skip: the network, the figure. The soup of LoRA factors is in sd/msdda.py.
Notation (here -> usual symbol): weights -> w_i, of the rewards; the pretrained p takes the rest, 1 - sum_i w_i
    kl_weight -> beta      reward temperature; abar -> abar_t, signal power: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps
Algorithm: 1. msdda: at every level ask all models for mean and variance of x_0: this makes a kernel p_i(x_{t-1} | x_t)
    2. merge: multiply the kernels: precisions add, means are averaged by precision (blend: a plain average)
    3. msdda: draw x_{t-1}. Ours (row msdda_ct): smc adds log C_t to the weights and resamples, at no call of a network
The theorem: let V_i(x) = E[r_i(x_0) | x] under p. Best for one step is p(x_{t-1} | x_t) exp(V_i(x_{t-1}) / kl_weight).
    V is linear in r: these kernels multiply to that for sum_i w_i r_i, and Gaussian ones by merge without error.
Its limit: best over whole paths is p exp(r_i / kl_weight), and the ring's models reach it. They multiply as paths:
    the merge drops C_t(x_t), the integral over x_{t-1} of prod_i p_i(x_{t-1} | x_t)^w_i.
What you should see (seed 0): on Gaussian data msdda is exact to rounding, blend off by a KL that falls as 1 / steps^2,
    p exp(r / kl_weight) by 1.1 nats. On the ring E[r1], E[r2] at (1/2, 1/2) are -3.82, -3.02; the sliced W2 of msdda
    (-3.66, -3.67) is 0.28, of soup 0.44 (seeds: 0.38 to 0.66), of msdda_ct (-3.82, -3.02) 0.03. To try: --kl-weight 1.
"""
import argparse, copy, json, math, os, pathlib, time
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

METHODS = dict(exact="k", soup="#CC79A7", blend="#E69F00", msdda="#D55E00", msdda_ct="#0072B2", rgg="0.3", code="0.6")
SWEEP, LENGTHS = [(0.5, 0.5), (0.2, 0.8), (0.8, 0.2), (1.2, -0.2), (0.75, 0.75)], [5, 20, 100, 500]  # weights; steps

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, sizes = parser.add_argument, dict(const=(2, 100, 1), default=(10, 1000, 5))
    add("--quick", dest="size", action="store_const", **sizes, help="coarse, 8 seconds")
    add("--paper", dest="size", action="store_const", const=(100, 3000, 5), help="ten times the samples, 5 minutes")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, default="out/toy_msdda", help="folder of figure.png and numbers.json")
    add("--device", choices=["cpu", "cuda"][: 1 + torch.cuda.is_available()], default="cpu")
    add("--problem", nargs="+", choices=["gaussian", "ring"], default=["gaussian", "ring"])
    add("--score", choices=["mlp", "exact"], default="mlp", help="of the ring: trained networks or closed form")
    add("--kl-weight", type=float, default=0.4, help="reward temperature")
    add("--steps", type=int, default=50, help="of the sampler on the ring")
    return checked(parser, parser.parse_args(argv))

# ---- the problem: data, rewards, exact answers -----------------------------------------------------------------------
class Mixture(MixtureSameFamily):
    """sum_k w_k N(means_k, diag(vars_k)): log_w (K,), normalised here; means (K, d); vars (K, d) or broadcast to it."""
    def __init__(self, log_w, means, vars):
        self.log_w, self.means, self.vars = log_w.log_softmax(0), means, vars + 0 * means
        super().__init__(Categorical(logits=log_w), Independent(Normal(means, self.vars.sqrt()), 1))
    def denoise(self, x, abar):
        """Mean and variance of x_0 given x_t = x (..., d), by coordinate -> twice (..., d)."""
        noised = abar * self.vars + 1 - abar  # of x_t in each component
        log_p = Independent(Normal(abar**0.5 * self.means, noised.sqrt()), 1).log_prob(x[..., None, :])
        share = (self.log_w + log_p).softmax(-1)[..., None]  # (..., K, 1)
        means = (abar**0.5 * self.vars * x[..., None, :] + (1 - abar) * self.means) / noised
        mean = (share * means).sum(-2)
        return mean, (share * ((means - mean[..., None, :]) ** 2 + (1 - abar) * self.vars / noised)).sum(-2)
    def tilt(self, slope, curvature):
        """The mixture times exp(sum_d slope x - curvature x^2 / 2), slope and curvature (d,) -> Mixture, log Z."""
        grow = 1 + curvature * self.vars  # by completing the square
        means = (self.means + slope * self.vars) / grow
        log_w = self.log_w + ((means**2 * grow - self.means**2) / self.vars - grow.log()).sum(1) / 2
        return Mixture(log_w, means, self.vars / grow), log_w.logsumexp(0).item()

class Problem:
    """A ring of 8 Gaussians, two rewards r_i(x) = -sum_d a_i (x - c_i)^2, and the exact target of every weighting."""
    def __init__(self, kl_weight):
        angle, self.kl_weight = torch.arange(8) * math.pi / 4, kl_weight  # your own: data and rewards below
        self.data = Mixture(0 * angle, 3 * torch.stack([angle.cos(), angle.sin()], 1), 0.36**2)
        self.a, self.c = torch.tensor([[0.5, 0.5], [0.15, 0.6]]), torch.tensor([[4.0, 0.0], [0.0, 4.0]])
        self.rewards = lambda x: -(self.a * (x[..., None, :] - self.c) ** 2).sum(-1)  # (..., 2) -> (..., 2)
        self.tilts = torch.stack([self.a * self.c, self.a]) * 2 / kl_weight  # slope, curvature of r_i / kl_weight at 0
    def target(self, weights):
        """p exp(sum_i w_i r_i / kl_weight) / Z -> Mixture, E[r_i] (2,)."""
        mixture = self.data.tilt(*torch.tensor(weights) @ self.tilts)[0]
        return mixture, -(self.a * ((mixture.mean - self.c) ** 2 + mixture.variance)).sum(1)

# ---- the method ------------------------------------------------------------------------------------------------------
def systematic(log_w):
    """Ancestors of P new particles in each group, (G, P) -> (G, P): P w_n copies of n, rounded without bias."""
    cdf = log_w.double().softmax(1).cumsum(1)
    u = (torch.rand(len(cdf), 1).double() + torch.arange(cdf.shape[1])) / cdf.shape[1]
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)

def smc(step, state, steps, ess=0.5):
    """Sequential Monte Carlo in G independent groups of P particles -> state, log_w (G, P).
    state: all that is known of each particle, tensors (G, P, ...); its log_twist (G, P) forecasts the final log weight.
    step(state, i) -> the next state, log_ratio (G, P): log p - log q of a draw from q, or any other weight of the step.
    exp(log_w) averages to Z over groups, without bias for any P and twist, if the last twist is exact, no forecast."""
    log_w = state["log_twist"]
    groups, slots = torch.arange(len(log_w))[:, None], torch.arange(log_w.shape[1])
    for i in range(steps):
        due = 1 / log_w.softmax(1).square().sum(1, keepdim=True) < ess * len(slots)  # (G, 1): low effective size
        ancestors = torch.where(due, systematic(log_w), slots)
        log_w = torch.where(due, log_w.logsumexp(1, keepdim=True) - math.log(len(slots)), log_w)  # keep the mean, Z
        state = {name: value[groups, ancestors] for name, value in state.items()}  # what is known moves along
        before = state["log_twist"]
        state, log_ratio = step(state, i)
        log_w = log_w - before + log_ratio + state["log_twist"]
    return state, log_w

def kernel(x, x0_hat, var, a, b):
    """Mean and variance of x_{t-1} given x_t = x, signal powers b and a: DDPM's, averaged over x_0 ~ N(x0_hat, var)."""
    keep, fresh = (a / b) ** 0.5 * (1 - b) / (1 - a), b**0.5 * (1 - a / b) / (1 - a)
    return keep * x + fresh * x0_hat, (1 - b) / (1 - a) * (1 - a / b) + fresh**2 * var

def merge(mean, var, weights):
    """prod_i N(mean_i, var_i)^w_i = C N(mean, var), sum_i w_i = 1: mean, var (m, ..., d) -> the merged, log C (...)."""
    w = mean.new_tensor(weights).view(-1, *[1] * (mean.dim() - 1))
    precision = torch.maximum((w / var).sum(0), 0.1 / var.amax(0))  # with negative weights it need not be positive
    merged = (w * mean / var).sum(0) / precision
    log_c = precision.log() + (w * var.log()).sum(0) + (w * (mean - merged) ** 2 / var).sum(0)
    return merged, 1 / precision, -log_c.sum(-1) / 2

def blend(mean, var, weights):
    """The average of the forecasts, hence of the means: `merge` with one variance for all, the mean of theirs."""
    return merge(mean, var.mean(0).expand_as(mean), weights)

def terminal(tilts, rule, weights, abar):
    """Step-level optima for rewards (slope x - curvature x^2 / 2) kl_weight and data N(0, 1), combined kernel by kernel
    by merge or blend: tilts, slope and curvature (2, m, d); abar (T + 1,) -> the distribution of x_0, Normal (d,)."""
    slope, curvature = tilts[:, :, None]
    x = torch.tensor([[0.0], [1.0]]).to(tilts).expand(2, tilts.shape[2])  # mean, mean + standard deviation of x_t
    for a, b in zip(abar, abar[1:]):  # V / kl_weight at level b: slope sqrt(b) x - curvature b x^2 / 2 + a constant
        mean, var = kernel(x, a**0.5 * x, 1 - a, a, b)
        shrink = 1 / (1 + curvature * b * var)  # (m, 1, d): complete the square
        mean, var, _ = rule(shrink * (mean + slope * b**0.5 * var), shrink * var, weights)
        x = torch.stack([mean[0], mean[0] + ((mean[1] - mean[0]) ** 2 + var[0]).sqrt()])
    return Normal(x[0], x[1] - x[0])

def msdda(models, weights, x, abar, rule=merge, corrected=False, twist=None, ess=0.5):
    """From noise x (G, P, d), in G groups of P particles, along abar (T + 1,) -> x (G, P, d), log_w (G, P). models:
    (x, abar) -> mean, variance of x_0. corrected: C_t in log_w. twist(x, i): log twist (G, P) at level i, for CoDe."""
    def step(state, i):
        mean, var = map(torch.stack, zip(*(model(state["x"], abar[i]) for model in models)))
        mean, var, log_c = rule(*kernel(state["x"], mean, var, abar[i], abar[i + 1]), weights)
        x = mean + var.sqrt() * torch.randn_like(mean)
        return dict(x=x, log_twist=twist(x, i + 1) if twist else 0 * log_c), log_c * corrected
    state, log_w = smc(step, dict(x=x, log_twist=torch.zeros(x.shape[:2])), len(abar) - 1, ess)
    return state["x"], log_w

# ---- the models ------------------------------------------------------------------------------------------------------
def signal_power(u):
    """abar at u, from 1 (noise, abar = 4e-5) to 0 (data, abar = 1), even in the angle arccos sqrt(abar)."""
    return (1.5645 * u).cos() ** 2

class Denoiser(nn.Module):
    """(x (..., d), abar) -> mean, variance of x_0 given x_t (..., d). Learns the velocity: so x0_hat stays bounded."""
    def __init__(self, data, width=96):
        super().__init__()
        self.mean, self.std, d = data.mean, data.variance.mean().sqrt(), len(data.mean)
        self.mlp = nn.Sequential(nn.Linear(d + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                 nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * d))
    def forward(self, x, abar):
        abar = torch.as_tensor(abar, dtype=x.dtype).expand(*x.shape[:-1], 1)
        scale = (abar * self.std**2 + 1 - abar).rsqrt()
        cos, sin = abar.sqrt() * self.std * scale, (1 - abar).sqrt() * scale
        x = scale * (x - abar.sqrt() * self.mean)  # = cos (x_0 - mean) / std + sin eps
        v, log_var = self.mlp(torch.cat([4 * x, (cos / sin).log() / 2], -1)).chunk(2, -1)
        return self.mean + self.std * (cos * x - sin * v), (self.std * sin) ** 2 * log_var.exp()

def descend(net, loss, steps, lr):
    """Adam on loss(), a function without arguments, with one cycle of the learning rate -> net, frozen."""
    optimizer = torch.optim.Adam(net.requires_grad_(True).parameters(), lr, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.051)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False)

def regress(net, mixture, data, steps, lr):
    """Fit a mixture's exact forecasts of x_0 at noised samples of the data: an ideal training or tuning -> net."""
    def loss():
        x0, abar = data.sample((1024,)), signal_power(torch.rand(1024, 1).clamp(min=0.01))
        x = abar.sqrt() * x0 + (1 - abar).sqrt() * torch.randn_like(x0)
        (mean, var), (exact, exact_var) = net(x, abar), mixture.denoise(x, abar[..., None])
        return ((mean - exact) ** 2 * (abar / (1 - abar) + 1 / net.std**2) + (var / exact_var).log() ** 2).mean()
    return descend(net, loss, steps, lr)

def soup(nets, weights):
    """Rewarded soup: one network, its weights the average of those tuned from one. They have no LoRA factors here."""
    net, states = copy.deepcopy(nets[0]), [net.state_dict() for net in nets]
    net.load_state_dict({name: sum(w * s[name] for w, s in zip(weights, states)) for name in states[0]})
    return net

# ---- measures, figure, main ------------------------------------------------------------------------------------------
def measure(method, problem, weights, models, args):
    """One of METHODS at one pair of weights -> x (N, 2), rows: standard errors over groups, calls for one sample.
    code is CoDe: after every 5 steps the particle of the best forecast, of 4 in a group, takes all their places."""
    (target, exact), calls, code = problem.target(weights), [], method == "code"
    abar, shares = signal_power(torch.linspace(1, 0, args.steps + 1)).tolist(), [*weights, 1 - sum(weights)]
    reward = lambda x: problem.rewards(x) @ torch.tensor(weights) / problem.kl_weight
    counted = lambda model: lambda x, abar: calls.append(x.numel()) or model(x, abar)
    asked, pretrained = [(counted(f), w) for f, w in zip(models, shares) if abs(w) > 1e-6], counted(models[2])
    def guided(x, abar):  # RGG: the forecast moves along the gradient of its reward, in proportion to its variance
        x0_hat, var = pretrained(x, abar)
        return x0_hat + var.mean(-1, keepdim=True) * torch.func.grad(lambda x0: reward(x0).sum())(x0_hat), var
    best = lambda x, i: torch.zeros(x.shape[:2]) if i % 5 else 1e4 * reward(pretrained(x, min(abar[i], 0.9999))[0])
    if method in ("soup", "rgg", "code"):
        asked = [(dict(rgg=guided, code=pretrained).get(method) or counted(soup(models, shares)), 1.0)]
    x, rule = torch.randn(args.groups, 500, 2).view(-1, 4 if code else 500, 2), blend if method == "blend" else merge
    x, log_w = msdda(*zip(*asked), x, abar, rule, method == "msdda_ct", best if code else None)
    x = x[torch.arange(len(x))[:, None], systematic(log_w)[:, : 1 if code else None]].view(args.groups, -1, 2)
    x, calls = (target.sample(x.shape[:2]), []) if method == "exact" else (x, calls)  # all of equal weight
    r, angle = problem.rewards(x).mean(1), torch.arange(32) * math.pi / 32  # (G, 2), (32,)
    x, lines = x.flatten(0, 1), torch.stack([angle.cos(), angle.sin()])
    gap = (x @ lines).sort(0)[0] - (target.sample(x.shape[:1]) @ lines).sort(0)[0]
    rows = [(f"mean_reward_{i + 1}", r[:, i].mean(), r[:, i].std() / len(r) ** 0.5, exact[i]) for i in (0, 1)]
    rows += [("sliced_w2", gap.square().mean().sqrt(), None, None), ("calls", sum(calls) / x.numel(), None, None)]
    return x, [("ring_{:g}_{:g}".format(*weights), method, *row) for row in rows[: 3 + (weights == SWEEP[0])]]

def draw(problem, samples, rows):
    """Samples at equal weights over contours of the exact target; the Pareto front; KLs on Gaussian data."""
    figure, span = Figure(figsize=(9, 5.6), layout="constrained"), torch.linspace(-2, 5, 161)
    shown = [method for method in METHODS if (SWEEP[0], method) in samples or not samples][:5]
    axes = figure.subplot_mosaic([shown, ["front"] * 3 + ["kl"] * 2], height_ratios=[2, 3.4])
    log_p = problem.target(SWEEP[0])[0].log_prob(torch.cartesian_prod(span, span)).view(161, 161).T.cpu()
    for method in shown:
        ax, x = axes[method], samples.get((SWEEP[0], method), torch.zeros(0, 2))
        ax.contour(span.cpu(), span.cpu(), log_p, [-9, -6, -3], colors="k", linewidths=0.5, linestyles="solid")
        ax.scatter(*x[:1500].T.cpu(), s=2, c=METHODS[method], alpha=0.5, linewidths=0)
        ax.set_title("{}\nE[r] {:.2f}, {:.2f}".format(method, *problem.rewards(x).mean(0)), fontsize=8)
        ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-2, 5), ylim=(-2, 5))
    front = zip(*((-problem.target((k / 50, 1 - k / 50))[1]).tolist() for k in range(51)))
    axes["front"].loglog(*front, "k:", label="exact front")
    for (weights, method), x in samples.items():  # with a line to the point that was asked for
        ends = -torch.stack([problem.rewards(x).mean(0), problem.target(weights)[1]]).T.cpu()
        axes["front"].plot(*ends, ".-", c=METHODS[method], lw=0.8, markevery=[0], label=method * (weights == SWEEP[0]))
    for method in ("exact", "blend", "msdda"):
        kls = [row[3] for row in rows if row[1:3] == (method, "log10_kl")]
        axes["kl"].semilogx(LENGTHS[: len(kls)], kls, "o-", c=METHODS[method])
    axes["front"].set(xlabel="-E[r1]", ylabel="-E[r2]", xlim=(16, 0.25), ylim=(16, 0.8))
    axes["kl"].set(xlabel="steps on Gaussian data; -16 is rounding", ylabel="log10 KL from the step-level optimum")
    axes["front"].legend(fontsize=8, loc="lower left")
    return figure

def checked(parser, args):
    """The flags; what cannot work is said in one sentence before any work."""
    for name, value in vars(args).items():
        if type(value) in (int, float) and not 0 < value + (name == "seed") < 1e9:
            parser.error(f"--{name.replace('_', '-')}: {value} is not between 0 and 1e9")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / ".writable").touch()  # or it is said now, not after all the work
    except OSError as error:
        parser.error(f"--out: {error}")
    return args

def report(args, rows, started, draw):
    """Print and save rows (problem, method, quantity, estimate, standard error, exact), then the figure of draw()."""
    names, part = ("problem", "method", "quantity", "estimate", "se", "exact"), args.out / f"{time.time_ns()}.part"
    rows = [(*r[:3], *(None if v is None or not math.isfinite(v) else float(v) for v in r[3:])) for r in rows]
    print(("{:12} {:20} {:16}" + 4 * "{:>11}").format(*names, "z"))
    for *words, estimate, se, exact in rows:
        z = (estimate - exact) / se if se and None not in (estimate, exact) else None
        cells = ("" if v is None else f"{v:.3f}" for v in (estimate, se, exact, z))
        print(("{:12} {:20} {:16}" + 4 * "{:>11}").format(*words, *cells))
    record = dict(args=vars(args), rows=[dict(zip(names, r)) for r in rows], seconds=round(time.time() - started, 1))
    part.write_text(json.dumps(record | {"torch": torch.__version__}, indent=1, default=str, allow_nan=False))
    part.replace(args.out / "numbers.json")  # files are whole or absent, also when two runs share a folder
    draw().savefig(part, dpi=100, format="png")
    part.replace(args.out / "figure.png")

def main(args):
    started, samples, rows, (args.groups, steps, count) = time.time(), {}, [], args.size
    torch.manual_seed(args.seed)
    torch.set_default_device(args.device)
    print("COARSE: numbers mean nothing" if steps < 1000 else "se: over groups; rgg, code and calls only at 0.5 0.5")
    problem, half = Problem(args.kl_weight), SWEEP[0]
    tilts, data, tuned = problem.tilts.double(), problem.data, [problem.target(w)[0] for w in ((1.0, 0.0), (0.0, 1.0))]
    slope, curvature = mixed = tilts.new_tensor(half) @ tilts
    for n in LENGTHS * ("gaussian" in args.problem):
        abar = signal_power(torch.linspace(1, 0, n + 1).double()).tolist()
        ends = dict(msdda=terminal(tilts, merge, half, abar), blend=terminal(tilts, blend, half, abar),
                    exact=Normal(slope / (1 + curvature), (1 + curvature) ** -0.5))
        kls = {name: kl_divergence(p, terminal(mixed[:, None], merge, [1.0], abar)).sum() for name, p in ends.items()}
        rows += [(f"gaussian_{n}", k, "log10_kl", kl.clamp(min=1e-16).log10(), None, None) for k, kl in kls.items()]
    models = [mixture.denoise for mixture in [*tuned, data]]
    if args.score == "mlp" and "ring" in args.problem:
        net = regress(Denoiser(data), data, data, 3 * steps // 2, 6e-3)
        models = [regress(copy.deepcopy(net), mixture, data, steps, 2e-3) for mixture in tuned] + [net]
    runs = [(w, method) for w in SWEEP[:count] for method in list(METHODS)[: None if w == half else -2]
            if method != "soup" or args.score == "mlp"]
    for weights, method in runs * ("ring" in args.problem):
        samples[weights, method], found = measure(method, problem, weights, models, args)
        rows += found
    report(args, rows, started, lambda: draw(problem, samples, rows))

if __name__ == "__main__":
    main(parse_args())
