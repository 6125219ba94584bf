"""One diffusion model for several data sets (OR): trained on their mixture, weighted for the one served worst.
Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104. figure.png: its Fig. 2 (row paper, panels equal_weights and elbo), exact weights beside.
Run    python toy/or_composition.py              1 minute; --quick: 8 seconds; --paper: its 6000 steps, 4 minutes
       as published: --problem paper --objective elbo. To try: --objective kl, which data set gets less than half?
Read first: fit, look, nats, dual_step. Skip: Denoiser, draw, checked, report.
Notation (here -> paper)
    q_i, dual -> q^i, lambda   data sets; multipliers, which are also the shares of the data sets in the training
    mixture -> q_mix^lambda    sum_i dual_i q_i, the best model at these multipliers
    kl -> (UF-C)               min over p of max_i KL(q_i || p), the problem as written
    elbo -> (70)               min over p of max_i E_{q_i}[-log p], the problem that is solved, and its figure
The two differ by the entropy of q_i, not the same for all i, and so do their solutions: `kl` ends at the largest mutual
information of point and data set, `elbo` at the mixture of largest entropy: (1/2, 1/2) and (1/3, 2/3) on `paper`.
Algorithm 1. fit: descend on the denoising losses of the data sets, each times its multiplier
          2. look, nats: the same errors with other weights add up to the cross entropy, or to KL(q_i || p)
          3. dual_step: raise the multipliers of the worse ones, on the simplex; repeat
What you should see (seed 0): weight of data set 1 for kl and elbo .492 (exact .500), .327 (.333) on paper, .468 (.475),
.847 (.860) on overlap: its network is further above the mixture on narrow data set 2. --score exact .50 .35 .48 .858.
Modes have variance .027 for .025; the published notebook stores only samples of its constrained run: .07 to .10.
On paper the weights of elbo have a largest KL of log 3, more than the log 2 of equal weights: say which objective.
"""
import argparse, json, math, pathlib, time

import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

METHODS = dict(equal_weights="#E69F00", kl="#009E73", elbo="#0072B2")  # the last two move their weights

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, sizes = parser.add_argument, dict(const=(120, 1000), default=(1600, 10_000))
    add("--quick", dest="size", action="store_const", **sizes, help="coarse, 8 seconds")
    add("--paper", dest="size", action="store_const", const=(6000, 20_000), help="6000 steps, 4 minutes (not run)")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, default="out/toy_or_composition", help="folder of figure.png and numbers.json")
    add("--device", choices=["cpu", "cuda"][: 1 + torch.cuda.is_available()], default="cpu")
    add("--problem", nargs="+", choices=["paper", "overlap"], default=["paper", "overlap"])
    add("--objective", nargs="+", choices=["kl", "elbo"], default=["kl", "elbo"])
    add("--score", choices=["mlp", "exact"], default="mlp", help="trained network, or its mixture in closed form")
    add("--steps", type=int, default=50, help="of the sampler")
    return checked(parser, parser.parse_args(argv))

# ---- the problem: data sets, exact weights ---------------------------------------------------------------------------
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
    """Data sets q_i, their log densities on a grid, and what follows from sums over it."""
    def __init__(self, name):
        # your own: for every data set, Gaussians of equal weight (mean x, mean y, variance)
        sets = dict(paper=[[(0.75, 0.0, 0.025)], [(-0.75, 0.75, 0.025), (-0.75, -0.75, 0.025)]],
                    overlap=[[(0.0, 0.0, 0.3)], [(0.6, 0.0, 0.03), (-0.9, 0.9, 0.03), (-0.9, -0.9, 0.03)]])[name]
        self.name, self.data = name, [Mixture(0 * t[:, 0], t[:, :2], t[:, 2:]) for t in map(torch.tensor, sets)]
        self.gaussians = [Mixture(torch.zeros(1), q.mean[None], q.variance[None]) for q in self.data]
        self.equal = torch.full((len(sets),), 1 / len(sets), dtype=torch.float64, device="cpu")
        self.modes = torch.cat([q.means for q in self.data])
        half = max((q.means.abs() + 6 * q.vars.sqrt()).max().item() for q in self.data)
        line = torch.linspace(-half, half, 201, dtype=torch.float64)
        self.grid, log_cell = torch.cartesian_prod(line, line), 2 * math.log(2 * half / 200)
        self.log_q = torch.stack([q.log_prob(self.grid) for q in self.data]) + log_cell  # of a cell's mass
        self.entropy = -(self.log_q.exp() * (self.log_q - log_cell)).sum(1).cpu()
    def mixture(self, weights):
        """sum_i weights_i q_i -> Mixture: the best model at these multipliers."""
        log_w = [w.log() + q.mixture_distribution.logits for w, q in zip(weights.to(self.modes), self.data)]
        return Mixture(torch.cat(log_w), self.modes, torch.cat([q.vars for q in self.data]))
    def slack(self, weights, objective):
        """KL(q_i || mixture), or the cross entropies of the mixture, exactly (m,): the dual function's gradient."""
        log_mix = (self.log_q + weights.to(self.log_q).log()[:, None]).logsumexp(0)
        return (self.log_q.exp() * (self.log_q - log_mix)).sum(1).cpu() + (self.entropy if objective == "elbo" else 0)
    def shape(self, x, mass):
        """Points x (N, 2) of mass (N,), each put to its nearest mode -> masses (K,), squared offsets (N,)."""
        near = torch.cdist(x, self.modes.to(x)).argmin(1)
        share = mass.new_zeros(len(self.modes)).index_add(0, near, mass)
        centre = mass.new_zeros(len(self.modes), 2).index_add(0, near, mass[:, None] * x) / share[:, None]
        return share, (x - centre[near]).square().mean(1)

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

def curvature(dual):
    """Minus the dual function's Hessian is E_mix[u u'], u_i = q_i / mixture; diag(1 / dual) bounds it from above by
    Cauchy-Schwarz, as sum_i dual_i u_i = 1."""
    return (1 / dual.clamp(min=1e-3)).diag()

def optimum(problem, objective, rounds=100):
    """The exact multipliers (m,): the dual step on exact slacks."""
    dual = problem.equal
    for _ in range(rounds):
        dual = dual_step(dual, problem.slack(dual, objective), curvature(dual), simplex=True)
    return dual

def nats(x0_hat, other, x0, abar):
    """-log p(x0) by one denoiser minus that by another, in nats, from one random level each -> (...):
    half the difference of the squared errors, integrated over the signal-to-noise ratio abar / (1 - abar)."""
    rate = 1.5645 * abar.sqrt() / (1 - abar) ** 1.5  # half its derivative by the argument of signal_power
    return (rate * ((x0_hat - x0) ** 2 - (other - x0) ** 2)).sum(-1)

def look(problem, net, objective, n):
    """n points of each data set at levels spread evenly -> x0, mean and var of net, abar, estimated slacks (m, n)."""
    x0 = torch.stack([q.sample((n,)) for q in problem.data])
    abar = signal_power(((torch.arange(n) + torch.rand(n))[:, None] / n).clamp(min=0.003))
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * torch.randn_like(x0)
    mean, var = net(x, abar)
    # kl: against the data set's own denoiser. elbo: against that of a Gaussian, of which log p is known
    others = problem.data if objective == "kl" else problem.gaussians
    known = torch.stack([q.denoise(v, abar[..., None])[0] for q, v in zip(others, x)])
    offset = 0 if objective == "kl" else -torch.stack([q.log_prob(v) for q, v in zip(others, x0)])
    return x0, mean, var, abar, offset + nats(mean.detach(), known, x0, abar)

def fit(problem, objective, steps, score="mlp", every=50, batch=256):
    """One network, the loss of each data set times its multiplier -> net, path of the multipliers (n, m), mean (m,) of
    the path's last quarter. A dual step has the slacks of `every` batches. The first sixth of the training has none: a
    network that has just begun is further from some data sets than from others for no other reason."""
    net, path, slacks = Denoiser(problem.mixture(problem.equal)), [problem.equal], []

    def loss():
        x0, mean, var, abar, slack = look(problem, net, "kl" if objective == "kl" else "elbo", batch)
        slacks.append(slack.double().mean(1).cpu())
        if objective != "equal_weights" and len(slacks) > steps // 6 and len(slacks) % every == 0:
            recent = torch.stack(slacks[-every:]).mean(0)
            path.append(dual_step(path[-1], recent, curvature(path[-1]), simplex=True))
        of_velocity = (mean - x0) ** 2 * (abar / (1 - abar) + 1 / net.std**2)
        of_var = nn.functional.gaussian_nll_loss(mean.detach(), x0, var, reduction="none")
        return path[-1].to(mean) @ (of_velocity + of_var).mean((1, 2))

    if score == "exact":  # nothing to train: the network is the mixture of the multipliers as they are
        net.forward = lambda x, abar: problem.mixture(path[-1]).denoise(x, torch.as_tensor(abar)[..., None])
        for _ in range(steps):
            loss()
    else:
        descend(net, loss, steps, 6e-3)
    return net, torch.stack(path), torch.stack(path[-len(path) // 4 :]).mean(0)

def generate(net, n, steps):
    """Points (n, 2) of the network: the reverse chain with the variance of x_0."""
    x, abar = torch.randn(n, 2), signal_power(torch.linspace(1, 0, steps + 1)).tolist()
    for a, b in zip(abar, abar[1:]):
        mean, var = kernel(x, *net(x, a), a, b)
        x = mean + var.sqrt() * torch.randn_like(x)
    return x

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

# ---- measures, figure, main ------------------------------------------------------------------------------------------
def measure(problem, method, net, found, args):
    """A network's samples, the exact multipliers, rows. Exact values are those of the mixture at these multipliers."""
    n, exact = args.size[1], problem.equal if method == "equal_weights" else optimum(problem, method)
    rows = [(f"weight_{i + 1}", a, None, b) for i, (a, b) in enumerate(zip(found, exact))]
    for objective, quantity in dict(kl="largest_kl", elbo="largest_cross_entropy").items():
        if method in ("equal_weights", objective):
            slack = look(problem, net, objective, 10 * n)[-1].double()
            worst, true = slack[slack.mean(1).argmax()], problem.slack(exact, objective).max()
            rows.append((quantity, worst.mean(), worst.std() / len(worst) ** 0.5, true))
    x, mass = generate(net, n, args.steps), exact.to(problem.grid) @ problem.log_q.exp()
    share, squares = problem.shape(x.double(), torch.full_like(x[:, 0], 1 / n).double())
    true_share, true_squares = problem.shape(problem.grid, mass)
    rows.append(("variance", squares.mean(), squares.std() / n**0.5, mass @ true_squares))
    rows += [(f"mass_{i + 1}", p, (p * (1 - p) / n) ** 0.5, q) for i, (p, q) in enumerate(zip(share, true_share))]
    return x, exact, [(problem.name, method, *row) for row in rows]

def draw(problems, results, methods):
    """Samples over contours of the exact mixture; the path of the first multiplier."""
    figure, span = Figure(figsize=(9, 2.4 * len(problems)), layout="constrained"), torch.linspace(-1.8, 1.8, 161)
    for axes, problem in zip(figure.subplots(len(problems), len(methods) + 1, squeeze=False), problems):
        for ax, method in zip(axes, methods):
            x, exact, path, found = results[problem.name, method]
            p = problem.mixture(exact).log_prob(torch.cartesian_prod(span, span)).view(161, 161).T.exp().cpu()
            ax.scatter(*x[:1500].T.cpu(), s=2, c=METHODS[method], alpha=0.5, linewidths=0)
            ax.contour(span.cpu(), span.cpu(), p, [0.01, 0.1, 0.5], colors="k", linewidths=0.5)
            ax.set_title(f"{problem.name}: {method}\nweights " + ", ".join(f"{w:.2f}" for w in found), fontsize=8)
            ax.set(xticks=[], yticks=[], aspect="equal")
            if method != "equal_weights":
                axes[-1].plot(path[:, 0], c=METHODS[method], label=method)
                axes[-1].axhline(exact[0], c=METHODS[method], linestyle=":")
        axes[-1].set(ylim=(0, 1), box_aspect=1)
        axes[-1].set_title("weight of data set 1\nby dual step, exact dotted", fontsize=8)
        axes[-1].legend(fontsize=8)
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
    if args.size[0] < 1600:
        print("COARSE: --quick shows that everything runs; its numbers mean nothing.")
    torch.manual_seed(args.seed)
    torch.set_default_device(args.device)
    problems, methods = [Problem(name) for name in args.problem], ["equal_weights", *args.objective]
    for problem, method in ((problem, method) for problem in problems for method in methods):
        net, path, found = fit(problem, method, args.size[0], args.score)
        x, exact, new = measure(problem, method, net, found, args)
        results[problem.name, method], rows = (x, exact, path, found), rows + new
    report(args, rows, started, lambda: draw(problems, results, methods))

if __name__ == "__main__":
    main(parse_args())
