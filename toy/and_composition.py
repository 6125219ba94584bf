"""Compose diffusion models by AND: sample the product of their densities whose worst KL from them is least.
Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104. figure.png: its Fig. 1 (paper), and two problems of its notebook (pair, ring).
Run    python toy/and_composition.py                  a minute; --quick: 8 seconds; --paper: larger, not run here
       python toy/and_composition.py --score exact    no networks; as published but for step and kernel: row algorithm_3
Read first: compose, run, dual_step. Skip: Mixture, Denoiser, draw, checked, report.
Notation (here -> paper): dual -> lambda, multipliers, of sum one; abar -> abar_t; -log Z -> D_AND, the dual function
Algorithm: 1. compose: draw steps from the product of the models' reverse kernels; its normaliser C_t is smc's weight
    2. run: the KLs, the gradient of -log Z, are means of -log_q but for what all share. Lemma 1: a KL of paths is a sum
       over steps; with Var(x_0 | x_t) in the kernel it is the KL of the samples, with DDPM's variance it is larger
    3. dual_step: the Hessian of -log Z is -cov(log_q); back to 1. The second half of the rounds is averaged
    algorithm_3 takes the summed forecast for the product's, without C_t. Its KLs are by Lemma 2, from the forecasts at
    all noise levels: of two, KL_i is (1 - dual_i)^2 times one number. algorithm_2 has a network learn 1's samples.
What you should see (seed 0): on paper, equal weights have a worst KL of 17.8 nats, the others 10.3 to 10.4, the best is
    10.2. On pair algorithm_3 stays at (1/2, 1/2), mean_x .58 for .90; the others find (.22, .78), KL 3.69 for 3.64. On
    ring_0_1_4 the model between is left out: (.50, .00, .50), worst KL 60.1 to 60.4 for 86.5. Try --positions 0 4 8.
"""
import argparse, json, math, os, pathlib, time
from types import SimpleNamespace
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

METHODS = dict(equal_weights="#E69F00", algorithm_3="#D55E00", smc="#0072B2", algorithm_2="#009E73", exact="k")
MODELS = {  # a Gaussian each: mean x, mean y, variance; the ring's are at the hours of a clock  # your own: a line here
    "paper": [(1.0, 0.0, 0.05), (-1.0, 0.2, 0.05), (-1.0, -0.2, 0.05)], "pair": [(1.0, 0.0, 0.025), (-1.0, 0.0, 0.5)],
    "ring": [(2 * math.sin(math.pi * hour / 6), 2 * math.cos(math.pi * hour / 6), 0.025) for hour in range(12)]}

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, sizes = parser.add_argument, dict(const=(5, 50, 8, 3, 50, 25), default=(10, 100, 20, 12, 800, 120))
    add("--quick", dest="size", action="store_const", **sizes, help="coarse, 5 seconds")
    add("--paper", dest="size", action="store_const", const=(40, 500, 100, 100, 3000, 1000), help="the paper's sizes")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, default="out/toy_and_composition", help="folder of figure.png and numbers.json")
    add("--device", choices=["cpu", "cuda"][: 1 + torch.cuda.is_available()], default="cpu")
    add("--problem", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--positions", nargs=3, type=int, default=[0, 1, 4], help="of the ring's Gaussians: hours of a clock, 0 to 11")
    add("--score", choices=["mlp", "exact"], default="mlp", help="trained networks or closed form")
    args = parser.parse_args(argv)
    if len({*args.positions} & {*range(12)}) < 3:
        parser.error(f"--positions: {args.positions} are not three different hours of 0 to 11")
    return checked(parser, args)

# ---- the problem: models, exact product, exact multipliers -----------------------------------------------------------

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
    """Gaussian models q_i; in closed form their product, its KLs, and the multipliers whose largest KL is least."""
    def __init__(self, name, positions):
        table = [MODELS[name][hour] for hour in positions] if name == "ring" else MODELS[name]
        self.name = "_".join([name, *map(str, positions * (name == "ring"))])
        self.models = [Mixture(torch.zeros(1), torch.tensor([[x, y]]), var) for x, y, var in table]
        table = torch.tensor(table, dtype=torch.float64, device="cpu")
        self.gaussians = Normal(table[:, :2], table[:, 2:].sqrt())
        found = minimize(lambda v: -v @ self.product(torch.from_numpy(v))[1].numpy(), [1 / len(table)] * len(table),
                         tol=1e-14, bounds=[(0, 1)] * len(table), constraints=dict(type="eq", fun=lambda v: sum(v) - 1))
        self.dual = torch.from_numpy(found.x)
    def product(self, dual):
        """prod_i q_i^dual_i / Z as a Normal (2,), KL(it || q_i) (m,), nats. Precisions add; -log Z = dual @ KLs."""
        precision = dual[:, None] / self.gaussians.variance
        p = Normal((precision * self.gaussians.mean).sum(0) / precision.sum(0), precision.sum(0).rsqrt())
        return p, kl_divergence(p, self.gaussians).sum(1)

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

def compose(models, dual, abar, shape):
    """Samples of prod_i q_i^dual_i / Z in groups: x (G, P, 2), log_q (G, P, m) of their paths by models, log Z (G,).
    prod_i N(mean_i, var_i)^dual_i = C_t N(mean, var): draws are from N, and C_t(x_t) is the weight of the step."""
    share = dual.to(torch.ones(())).view(-1, 1, 1, 1)

    def step(state, i):
        x0_hat, var = map(torch.stack, zip(*(q(state["x"], abar[i]) for q in models)))  # (m, G, P, 2)
        means, vars = kernel(state["x"], x0_hat, var, abar[i], abar[i + 1])
        var = 1 / (share / vars).sum(0)
        mean = var * (share * means / vars).sum(0)
        log_c = (var.log() - (share * (vars.log() + (means - mean) ** 2 / vars)).sum(0)).sum(-1) / 2
        x = mean + var.sqrt() * torch.randn_like(mean)
        log_q = Normal(means, vars.sqrt()).log_prob(x).sum(-1).movedim(0, -1)
        return dict(state, x=x, log_q=state["log_q"] + log_q), log_c
    start = dict(x=torch.randn(*shape, 2), log_twist=torch.zeros(shape), log_q=torch.zeros(*shape, len(dual)).double())
    state, log_w = smc(step, start, len(abar) - 1)
    equal = torch.arange(shape[0])[:, None], systematic(log_w)  # resampled once more: all weights are equal
    return state["x"][equal], state["log_q"][equal], log_w.double().logsumexp(1) - math.log(shape[1])

def pointwise_kl(forecast, models, x0):
    """Lemma 2: KL(p || q_i) -> (m,), from samples x0 (N, 2) of p and its forecast(x, abar) of x_0: the integral of
    E|x0_hat - x0_hat_i|^2 / 2 over the signal-to-noise ratio abar / (1 - abar), at points even in its logarithm."""
    kls = 0
    for a in torch.arange(-8.0, 9.0).sigmoid().tolist():
        x = a**0.5 * x0 + (1 - a) ** 0.5 * torch.randn_like(x0)
        gaps = torch.stack([forecast(x, a)[0] - q(x, a)[0] for q in models])
        kls += gaps.square().sum(2).mean(1).double().cpu() / 2 * a / (1 - a)
    return kls

def run(method, problem, models, abar, shape, rounds, net_steps):
    """One method -> multipliers by round (rounds + 1, m), their average (m,), its samples (G, P, 2) and log Z (G,)."""
    path, forecast = [problem.dual if method == "exact" else torch.full_like(problem.dual, 1 / len(models))], None
    for left in reversed(range(1 if method in ("equal_weights", "exact") else 1 + rounds)):
        dual = path[-1] if left else torch.stack(path[len(path) // 2 :]).mean(0)
        x, log_q, log_z = compose(models, dual, abar, shape)
        if method == "algorithm_2":  # a network that learns the product from its samples
            x0 = x.flatten(0, 1)
            data = SimpleNamespace(mean=x0.mean(0), variance=x0.var(0), sample=lambda n: x0[torch.randint(len(x0), n)])
            forecast = pretrain(data, net_steps, 256)
        elif method == "algorithm_3":  # the summed score, as if it were the product's
            def forecast(x, a):
                return [sum(w * v for w, v in zip(dual.tolist(), values)) for values in zip(*(q(x, a) for q in models))]
        if forecast:
            x = compose([forecast], torch.ones(1), abar, shape)[0]
        if left:
            kls = pointwise_kl(forecast, models, x.flatten(0, 1)) if forecast else -log_q.mean((0, 1)).cpu()
            path.append(dual_step(dual, kls, log_q.flatten(0, 1).T.cov().cpu(), simplex=True))
    return torch.stack(path), dual, x, log_z

def dual_step(dual, slack, curvature, simplex):
    """Multipliers (m,) half way to the maximum of the dual function's quadratic expansion: slack (m,) is its gradient,
    -curvature (m, m) its Hessian; over dual >= 0, of sum one on the simplex. Half way halves the noise of estimates."""
    start, a, b = (v.numpy() for v in (dual, curvature, slack))
    unit = abs(a).max() + abs(b).max()  # the solver wants numbers of order one
    loss = lambda v: ((v - start) @ a @ (v - start) / 2 - (v - start) @ b) / unit
    found = minimize(loss, start, method="SLSQP", bounds=[(0, None)] * len(start), options=dict(ftol=1e-12),
                     constraints=[dict(type="eq", fun=lambda v: v.sum() - 1)] * simplex)
    return (dual + torch.from_numpy(found.x).clamp(min=0)) / 2

# ---- the network; measures, figure, main -----------------------------------------------------------------------------

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

def measure(method, problem, dual, x, log_z):
    """Rows of a method. Exact are the best multipliers and their worst KL; else the product's at the method's own."""
    p, kls = problem.product(dual)
    rows = [(f"multiplier_{i + 1}", v, None, e) for i, (v, e) in enumerate(zip(dual, problem.dual))]
    rows += [("worst_kl", kls.max(), None, problem.product(problem.dual)[1].max())]
    for name, v, exact in ("mean_x", x, p.mean), ("var_x", (x - x.mean((0, 1))) ** 2, p.variance):
        rows += [(name, v[..., 0].mean(), v[..., 0].mean(1).std() / len(v) ** 0.5, exact[0])]
    se = log_z.std() / len(log_z) ** 0.5  # says nothing where the variances agree: C_t is a constant
    rows += [("dual_value", math.log(len(log_z)) - log_z.logsumexp(0), se if se > 0.01 else None, dual @ kls)]
    return [(problem.name, method, *row) for row in rows]

def draw(results):
    """Samples of each method over the best product (line) and the models (dotted), two sigma; multipliers by round."""
    figure, angle = Figure((9, 2.1 * len(results)), layout="constrained"), torch.linspace(0, 7, 99, device="cpu")
    circle = 2 * torch.stack([angle.cos(), angle.sin()], 1)[:, None]
    for line, (problem, found) in zip(figure.subplots(len(results), len(METHODS), squeeze=False), results.items()):
        for ax, (method, (path, dual, x, _)) in zip(line, list(found.items())[:-1]):
            ax.scatter(*x.flatten(0, 1)[:1000].T.cpu(), s=2, c=METHODS[method], alpha=0.5, linewidths=0)
            for q, style in [(problem.product(problem.dual)[0], "k-"), (problem.gaussians, "k:")]:
                ax.plot(*(q.mean + q.stddev * circle).movedim(2, 0), style, linewidth=0.7)
            ax.set_title(f"{method}\nworst KL {problem.product(dual)[1].max():.1f}")
            ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-2.7, 2.7), ylim=(-2.7, 2.7))
            line[-1].plot(path, c=METHODS[method])
        line[-1].hlines(problem.dual, 0, len(path) - 1, "k", "dotted")
        line[-1].set(title="multipliers\nby round", ylim=(0, 1))
        line[0].set(ylabel=problem.name)
    return figure

def main(args):
    started, results, rows, (*shape, steps, rounds, train_steps, net_steps) = time.time(), {}, [], args.size
    torch.manual_seed(args.seed)
    torch.set_default_device(args.device)
    if rounds < 12:
        print("COARSE: --quick shows that everything runs; its numbers mean nothing.")
    abar = signal_power(torch.linspace(1, 0, steps + 1)).tolist()
    for problem in (Problem(name, args.positions) for name in args.problem):
        models = [q.denoise if args.score == "exact" else pretrain(q, train_steps, 256) for q in problem.models]
        results[problem] = {method: run(method, problem, models, abar, shape, rounds, net_steps) for method in METHODS}
        rows += [row for method, found in results[problem].items() for row in measure(method, problem, *found[1:])]
    report(args, rows, started, lambda: draw(results))

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

if __name__ == "__main__":
    main(parse_args())
