"""Align a diffusion model under constraints: the least KL from the pretrained model that meets all thresholds.
Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104. figure.png: its Fig. 3 and 4 in two dimensions, the exact answer beside.
Run    python toy/constrained_alignment.py                  1 minute; --quick: 10 seconds; --paper: 5 minutes
       --problem bump --hold-variance --steps 10            what a coarse path costs. To try: --threshold 0.9, or 1.1
Read first: Problem.moments, align, rollout, dual_step. Skip: Denoiser, draw, checked, report.
Notation (here -> paper): q, p -> q, p  pretrained, aligned model;  b -> b_i  thresholds of E[r_i];  dual -> lambda
    multipliers >= 0;  tilt -> q_rw  q exp(dual' r) / Z, the best model at these;  dual' b - log Z -> D(lambda), whose
    maximum is the least KL (the paper's print has no dual' b). equal_weights is the tilt at one weight for all rewards.
Algorithm 1. rollout: the network's points with the KL of its paths from the pretrained model's
          2. align: descend KL - dual' r through all of the path (the paper drops the part through the points)
          3. dual_step: raise the multipliers of rewards below their thresholds, lower those of the others; repeat
`combined` wants to be near two models: E[log q_2 - log q_1] >= 0 makes the KLs equal, its multiplier weighs q_2.
What you should see (seed 0): multipliers 2.46, 2.07 (exact 2.44, 2.06), 3.18 (2.96; seeds 1, 2: 3.00, 2.91), 2.49,
.48 (2.46, .48); one weight for all misses reward 1 of competing (.42 for .6). The KL of bump's network is .54 for .50.
Why it is larger: a step draws a Gaussian, the exact tilt of a step is none. With the pretrained variances held fixed,
bump's multiplier is 3.67, 3.29, 3.00 at 10, 20, 40 steps: discretisation; with --score exact the KL is still .52.
"""
import argparse, copy, json, math, os, pathlib, time
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, sizes = parser.add_argument, dict(const=(100, 25, 1000), default=(800, 250, 10_000))
    add("--quick", dest="size", action="store_const", **sizes, help="coarse, 10 seconds")
    add("--paper", dest="size", action="store_const", const=(5000, 1000, 100_000), help="longer, 5 minutes (not run)")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, default="out/toy_constrained_alignment", help="for figure.png and numbers.json")
    add("--device", choices=["cpu", "cuda"][: 1 + torch.cuda.is_available()], default="cpu")
    add("--problem", nargs="+", choices="linear competing inactive bump objective combined".split(),
        default=["competing", "bump", "combined"])
    add("--threshold", nargs="+", type=float, help="those of the one --problem, for all its rewards")
    add("--weight", type=float, default=1.5, help="of equal_weights, in units of 1 / deviation of a reward")
    add("--score", choices=["mlp", "exact"], default="mlp", help="of the pretrained model: network or closed form")
    add("--steps", type=int, default=20, help="of the sampler")
    add("--hold-variance", action="store_true", help="the aligned kernels keep the variance of the pretrained ones")
    args = checked(parser, parser.parse_args(argv))
    try:  # thresholds that nothing meets are found before any training
        [Problem(name, args.threshold) for name in args.problem]
    except ValueError as error:
        parser.error(str(error))
    return args

# ---- the problem: model, rewards, exact multipliers ------------------------------------------------------------------
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
    """A pretrained model, rewards, thresholds; what is exact, by sums over a grid."""
    def __init__(self, name, thresholds=None, weight=1.5):
        two, near = [(-1.0, 0.0, 0.1), (1.0, 0.0, 0.1)], lambda x: -x.square().sum(-1) / 2
        along = lambda a, b: lambda x: a * x[..., 0] + b * x[..., 1]
        bump = lambda a, b, s: lambda x: (-((x - torch.tensor([a, b]).to(x)) ** 2).sum(-1) / (2 * s**2)).exp()
        # your own: equally weighted Gaussians (mean x, mean y, variance); rewards (..., 2) -> (...), their thresholds
        gaussians, self.rewards, limits = dict(
            linear=(two, [along(1, 0)], [0.5]),
            competing=([(0.0, 0.0, 0.5)], [along(1, 0), along(-0.6, 0.8)], [0.6, 0.3]),
            inactive=(two, [along(1, 0), near], [0.5, -1.0]),
            bump=(two, [bump(1, 0.5, 0.6)], [0.65]),
            objective=([(0.0, 0.0, 0.4), (1.2, 0.0, 0.2)],
                       [bump(0.8, 0.8, 0.5), along(0, -1), near], [0.6, -0.45, -0.55]),
            combined=([(-0.6, 0.0, 0.3)], [along(0, 1)], [0.5]))[name]
        means, var = torch.tensor(gaussians).split([2, 1], 1)
        self.name, self.data, limits = name, Mixture(0 * means[:, 0], means, var), thresholds or limits
        if len(limits) != len(self.rewards) or not all(map(math.isfinite, limits)):
            raise ValueError(f"--threshold: {name} wants {len(self.rewards)} finite numbers (and one --problem).")
        if name == "combined":  # no further from a second model than from the first: E[log q_2 - log q_1] >= 0
            second = Mixture(torch.zeros(1), torch.tensor([[0.6, 0.0]]), 0.15)
            self.rewards.append(lambda x: second.log_prob(x) - self.data.log_prob(x))
            limits = [*limits, 0.0]
        self.line = torch.linspace(-6, 6, 241, dtype=torch.float64)
        self.grid = torch.cartesian_prod(self.line, self.line)
        self.b = torch.tensor(limits, dtype=torch.float64, device="cpu")
        self.log_q = self.data.log_prob(self.grid).cpu() + 2 * math.log(12 / 240)  # log mass of a cell
        self.r = torch.stack([reward(self.grid) for reward in self.rewards]).cpu()  # (m, cells)
        self.penalty = weight / self.moments(0 * self.b)[2].diag().sqrt()  # equal weights, for rewards of deviation 1
        self.best = 0 * self.b  # the exact multipliers, by the dual step on moments of the exact tilt
        for _ in range(40):
            _, mean, cov, *_ = self.moments(self.best)
            self.best = dual_step(self.best, self.b - mean, cov, simplex=False)
        if not (self.b - mean).max() < 1e-3:  # the dual function has no maximum
            raise ValueError(f"no model within 6 of the origin was found to meet thresholds {limits}: by "
                             f"{(self.b - mean).max():.2g} they are missed, and multipliers would grow for ever.")
    def moments(self, dual):
        """Of the tilt q exp(dual' r) / Z, the best model at these multipliers: masses of the cells, mean rewards (m,),
        their covariance (m, m), KL from q; and the dual function dual' b - log Z, whose gradient is b - mean."""
        log_p = self.log_q + dual @ self.r
        log_z, p = log_p.logsumexp(0), log_p.softmax(0)
        mean = self.r @ p
        apart = self.r - mean[:, None]
        return p, mean, (apart * p) @ apart.T, dual @ mean - log_z, dual @ self.b - log_z

# ---- the method ------------------------------------------------------------------------------------------------------
def dual_step(dual, slack, curvature, simplex):
    """Multipliers (m,) half way to the maximum of the dual function's quadratic expansion: slack (m,) is its gradient,
    -curvature (m, m) its Hessian; over dual >= 0, of sum one on the simplex. Half way halves the noise of estimates."""
    start, a, b = (v.numpy() for v in (dual, curvature, slack))
    unit = abs(a).max() + abs(b).max()  # the solver wants numbers of order one
    loss = lambda v: ((v - start) @ a @ (v - start) / 2 - (v - start) @ b) / unit
    found = minimize(loss, start, method="SLSQP", bounds=[(0, None)] * len(start), options=dict(ftol=1e-12),
                     constraints=[dict(type="eq", fun=lambda v: v.sum() - 1)] * simplex)
    return (dual + torch.from_numpy(found.x).clamp(min=0)) / 2

def rollout(p, q, x, abar, hold_variance=False):
    """Points x_0 of p (N, 2) from noise x, and samples (N,) of the KL of p's paths from q's (Lemma 1): a step adds the
    KL of two Gaussian kernels. The last step counts too, as its variance is Var(x_0 | x_t): without noise, no KL."""
    kl = 0
    for a, b in zip(abar, abar[1:]):
        (mean, var), (mean_q, var_q) = kernel(x, *p(x, a), a, b), kernel(x, *q(x, a), a, b)
        var = var_q if hold_variance else var
        kl = kl + (((mean - mean_q) ** 2 + var) / var_q - 1 - (var / var_q).log()).sum(-1) / 2
        x = mean + var.sqrt() * torch.randn_like(x)
    return x, kl

def align(problem, net, q, rounds, abar, hold_variance=False, lag=10, batch=256):
    """Algorithm 1 from net, trained for model q -> aligned net, multipliers (rounds + 1, m), mean rewards (rounds, m).
    The dual step counts on a model that follows at once. A network takes some rounds: `lag` divides the steps."""
    p, path, trace = copy.deepcopy(net), [torch.zeros_like(problem.b)], []

    def loss():
        x, kl = rollout(p, q, torch.randn(batch, 2), abar, hold_variance)
        r, dual = torch.stack([reward(x) for reward in problem.rewards]), path[-1]  # (m, batch)
        value = r.detach().double().cpu()
        trace.append(value.mean(1))
        path.append(dual_step(dual, problem.b - trace[-1], lag * torch.cov(value).view(len(r), -1), simplex=False))
        return kl.mean() - dual.to(r) @ r.mean(1)

    return descend(p, loss, rounds, 1e-2), torch.stack(path), torch.stack(trace)

# ---- the model -------------------------------------------------------------------------------------------------------
def kernel(x, x0_hat, var, a, b):
    """Mean and variance of x_{t-1} given x_t = x, signal powers b and a: DDPM's, averaged over x_0 ~ N(x0_hat, var)."""
    keep, fresh = (a / b) ** 0.5 * (1 - b) / (1 - a), b**0.5 * (1 - a / b) / (1 - a)
    return keep * x + fresh * x0_hat, (1 - b) / (1 - a) * (1 - a / b) + fresh**2 * var

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

def pretrain(data, steps, batch=1024):
    """Least squares of the velocity, likelihood for the variance on the detached mean, at random levels -> Denoiser."""
    net = Denoiser(data)
    def loss():
        x0, abar = data.sample((batch,)), signal_power(torch.rand(batch, 1).clamp(min=0.01))
        mean, var = net(abar.sqrt() * x0 + (1 - abar).sqrt() * torch.randn_like(x0), abar)
        of_velocity = (mean - x0) ** 2 * (abar / (1 - abar) + 1 / net.std**2)
        return of_velocity.mean() + nn.functional.gaussian_nll_loss(mean.detach(), x0, var)
    return descend(net, loss, steps, 6e-3)

# ---- measures, figure, main ------------------------------------------------------------------------------------------
@torch.no_grad()
def measure(problem, p, q, path, abar, args):
    """Samples of the aligned network, and rows. Exact values, and equal_weights altogether, are sums over the grid."""
    x, kl = rollout(p, q, torch.randn(args.size[2], 2), abar, args.hold_variance)
    (_, mean, _, least, value), (_, other, _, kl_other, _) = map(problem.moments, (problem.best, problem.penalty))
    rows = [("exact", "dual_value", value, None, least)]
    rows += [("equal_weights", f"reward_{i + 1}", v, None, None) for i, v in enumerate(other)]
    rows += [("equal_weights", "kl", kl_other, None, None)]
    found = path[-len(path) // 4 :].mean(0)  # over the last quarter of the training
    for i, r in enumerate([reward(x) for reward in problem.rewards]):
        rows.append(("constrained", f"multiplier_{i + 1}", found[i], None, problem.best[i]))
        rows.append(("constrained", f"reward_{i + 1}", r.mean(), r.std() / len(x) ** 0.5, mean[i]))
    rows.append(("constrained", "kl", kl.mean(), kl.std() / len(x) ** 0.5, least))
    return x, [(problem.name, *row) for row in rows]

def draw(problems, results):
    """Points of equal weights (drawn on the grid) and of the network, over contours of q and the optimum; training."""
    figure = Figure(figsize=(9, 2.5 * len(problems)), layout="constrained")
    for axes, problem in zip(figure.subplots(len(problems), 4, squeeze=False), problems):
        x, path, trace = results[problem.name]
        best, penalty = problem.moments(problem.best)[0], problem.moments(problem.penalty)[0]
        cells = torch.multinomial(penalty, 1500, replacement=True)
        x = problem.grid[cells] + 0.05 * torch.rand(1500, 2) - 0.025, x[:1500]
        for ax, points, method in zip(axes, x, ("equal_weights", "constrained")):
            for p, shade in ((problem.log_q.exp(), "#999999"), (best, "k")):
                axis, levels = problem.line.cpu(), [0.02 * p.max().item(), 0.3 * p.max().item()]
                ax.contour(axis, axis, p.view(241, 241).T, levels, colors=shade, linewidths=0.6)
            ax.scatter(*points.T.cpu(), s=2, c="#56B4E9", alpha=0.5, linewidths=0)
            values = ", ".join(f"{reward(points).mean():.2f}" for reward in problem.rewards)
            ax.set_title(f"{problem.name}: {method}\nrewards {values}", fontsize=8)
            ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
        for ax, curves, exact, title in ((axes[2], trace, problem.b, "rewards by round\nthresholds dotted"),
                                         (axes[3], path, problem.best, "multipliers by round\nexact dotted")):
            for curve, level, color in zip(curves.T, exact, ("#0072B2", "#D55E00", "#009E73")):
                ax.plot(curve, c=color, linewidth=1)
                ax.axhline(level, c=color, linestyle=":")
            ax.set(ylim=(-0.5, 1) if ax is axes[2] else None, box_aspect=1)
            ax.set_title(title, fontsize=8)
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
    started, results, rows = time.time(), {}, []
    if args.size[1] < 250:
        print("COARSE: --quick shows that everything runs; its numbers mean nothing.")
    torch.manual_seed(args.seed)
    torch.set_default_device(args.device)
    abar = signal_power(torch.linspace(1, 0, args.steps + 1)).tolist()
    problems = [Problem(name, args.threshold, args.weight) for name in args.problem]
    for problem in problems:
        net = pretrain(problem.data, args.size[0])  # with --score exact only where the aligned model starts
        q = problem.data.denoise if args.score == "exact" else net
        p, path, trace = align(problem, net, q, args.size[1], abar, args.hold_variance)
        x, found = measure(problem, p, q, path, abar, args)
        results[problem.name], rows = (x, path, trace), rows + found
    report(args, rows, started, lambda: draw(problems, results))

if __name__ == "__main__":
    main(parse_args())
