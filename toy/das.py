"""Sample p(x) exp(r(x) / kl_weight) / Z from a diffusion model p at test time, by sequential Monte Carlo (SMC).
Paper: Kim, Kim and Park, "Test-time Alignment of Diffusion Models without Reward Over-optimization" (DAS), ICLR 2025,
arXiv 2501.05803. figure.png: its Fig. 1, and a panel that is in no paper, on when SMC matters.
Run    python toy/das.py                       36 seconds; --quick: 8; --paper: its 100,000 particles, about 8 minutes
       python toy/das.py --gamma 0.008 --ddpm --steps 100      as published (row das_published)
Read first: smc, das, log_twist. Skip: Denoiser, draw, checked, report.
Notation (here -> paper); G independent groups of P interacting particles: x (G, P, d), log_w (G, P)
    kl_weight -> alpha     reward temperature; abar -> abar_t, signal power: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps
    x0_hat -> x0hat_t      forecast E[x_0 | x_t] (Tweedie); var is Var(x_0 | x_t), by coordinate
    log_twist              forecast of log E[exp(r(x_0) / kl_weight) | x_t]; the paper's: temper r(x0_hat) / kl_weight
Algorithm, at every level from noise to data
    1. look: the forecast of x_0 for every particle, its log twist, the gradient of that through the network
    2. smc: weight by the twist; where a group's effective sample size is low, resample: all that is known moves along
    3. step: draw x_{t-1} from q, the sampler's Gaussian p with its noise shifted by sigma times the gradient
    4. smc: divide the old twist out, multiply by p / q. The last twist is the reward itself: no forecast biases weights
Ours: the twist. Near x0_hat let r have slope g and curvature -k; x_0 ~ N(x0_hat, v); a = kl_weight. By completing the
    square in each coordinate, E exp((g u - k u^2 / 2) / a) = exp(g^2 v / (2 a (a + k v))) / sqrt(1 + k v / a) for
    u ~ N(0, v). Early forecasts count little, as v is large: no schedule has to temper them (--gamma: the paper's).
Ours: the kernel. DDPM's variance is that of a known x_0; Var(x_0 | x_t) is added (--ddpm: not), so that 50 steps do.
What you should see (seed 0): on gmm2 EMD 0.23 +- 0.02 for das (0.25 of exact draws), 0.51 guidance, 1.44 as published.
    In 32 dimensions one group's log Z is off by .07; das_gamma .2, bootstrap .5, importance 4. To try: --kl-weight 0.1.
"""
import argparse, json, math, os, pathlib, time
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

PLAIN = dict(guided=False, ess=0, gamma=0)  # samples of p, whose weights are exp(r / kl_weight)
METHODS = {  # options of das(), at equal calls of the network; the first three drop their weights
    "exact": PLAIN, "pretrained": PLAIN, "guidance": dict(ess=0, hold_var=False), "importance": PLAIN, "das": {},
    "bootstrap": dict(guided=False), "das_published": dict(gamma=0.008, ddpm=True), "das_gamma": dict(gamma=0.008)}
DIMENSIONS, COLORS = (2, 4, 8, 16, 32), dict(importance="k", bootstrap="#E69F00", das_gamma="#D55E00", das="#0072B2")

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, sizes = parser.add_argument, dict(const=(20, 300, 4), default=(100, 2000, 15))
    add("--quick", dest="size", action="store_const", **sizes, help="coarse, 8 seconds")
    add("--paper", dest="size", action="store_const", const=(1000, 10_000, 100), help="the paper's sizes, 8 minutes")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, default="out/toy_das", help="folder of figure.png and numbers.json")
    add("--device", choices=["cpu", "cuda"][: 1 + torch.cuda.is_available()], default="cpu")
    add("--problem", nargs="+", choices=["gmm", "gmm2", "swiss_roll"], default=["gmm", "gmm2"])
    add("--score", choices=["mlp", "exact"], default="mlp", help="trained network or closed form")
    add("--kl-weight", type=float, default=1.0, help="reward temperature")
    add("--particles", type=int, default=100, help="in a group")
    add("--steps", type=int, default=50, help="of the sampler")
    add("--gamma", type=float, help="the paper's twist, with a temper that grows at this rate: 0.008")
    add("--ddpm", action="store_true", help="the paper's kernel, without the variance of x_0")
    return checked(parser, parser.parse_args(argv))

# ---- the problem: data, reward, exact answer -------------------------------------------------------------------------
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
    """The paper's data and reward r(x) = -sum_d a (x - c)^2, with the exact target, its log Z and E[r]."""
    def __init__(self, name, kl_weight):
        line, angle, var = torch.tensor([-4.0, 0.0, 4.0]), torch.arange(8) * math.pi / 4, 0.3
        if name == "gmm":  # a 3 x 3 grid
            means, a, c = torch.cartesian_prod(line, line), [0.01, 1.0], [0.0, 0.0]
        elif name == "gmm2":  # a ring
            means, a, c = 4 * torch.stack([angle.cos(), angle.sin()], 1), [1.0, 0.1], [0.0, 1.0]
        elif name == "swiss_roll":  # blurred by 0.3: a lattice of Gaussians not much further apart than that
            turn, height = torch.cartesian_prod(math.pi * torch.linspace(1.5, 4.5, 120), torch.linspace(-3, 3, 16)).T
            means, var = torch.stack([turn * turn.cos() / 2, turn * turn.sin() / 2, height], 1), 0.09
            a, c = [0.01, 0.01, 1.0], [0.0, 0.0, 0.0]
        else:  # "8d": two Gaussians; every coordinate but the first adds -0.86 to log Z at kl_weight 1
            d = int(name[:-1])
            means, a, c = line[::2, None] / 2 * torch.eye(d)[0], [1.0] * d, [0.25] + [1.0] * (d - 1)
        # your own: data here, another reward below; what has no closed form is None: target, log_z, mean_reward
        self.name, self.kl_weight, self.data = name, kl_weight, Mixture(0 * means[:, 0], means, var)
        self.strength = 2.0 if name == "gmm2" else 1.0  # of guidance: its best of 0.7 1 1.4 2 2.8, by EMD
        a, c = torch.tensor(a), torch.tensor(c)
        self.reward = lambda x: -(a * (x - c) ** 2).sum(-1)  # (..., d) -> (...)
        self.target, log_z = self.data.tilt(2 * a * c / kl_weight, 2 * a / kl_weight)
        self.log_z = log_z - (a @ c**2).item() / kl_weight
        self.mean_reward = -a @ ((self.target.mean - c) ** 2 + self.target.variance)

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

def log_twist(reward, x0_hat, var, kl_weight):
    """log E exp(r(x_0) / kl_weight), x_0 ~ N(x0_hat, var), r to second order: (..., d) -> (...), derived at the top."""
    slope, curvature = torch.func.jvp(torch.func.grad(lambda x: reward(x).sum()), (x0_hat,), (torch.ones_like(x0_hat),))
    flat = 1 - curvature.clamp(max=0) * var / kl_weight  # row sums of the Hessian, its diagonal if r is a sum over d
    return reward(x0_hat) / kl_weight + (slope**2 * var / (kl_weight**2 * flat) - flat.log()).sum(-1) / 2

def das(denoise, reward, x, abar, kl_weight=1, gamma=None, ddpm=False, guided=True, ess=0.5, strength=1, hold_var=True):
    """Weighted samples of p exp(r / kl_weight) from noise x (G, P, d) along abar (T + 1,) -> x (G, P, d), log_w (G, P).
    denoise(x, abar) -> mean, variance of x_0 (G, P, d); reward: (..., d) -> (...), twice differentiable. guided=False
    is the bootstrap filter; ess=0 never resamples; with both, weights are exp(r / kl_weight) of samples of p."""
    steps = len(abar) - 1
    def look(x, i):
        if i == steps:
            return dict(x=x, log_twist=reward(x) / kl_weight)
        with torch.set_grad_enabled(guided):
            x = x.requires_grad_(guided)
            x0_hat, var = denoise(x, abar[i])
            if gamma is None:  # var is held fixed in the gradient: between modes it jumps, and p / q gets heavy tails
                twist = log_twist(reward, x0_hat, var.detach() if hold_var else var, kl_weight)
            else:  # the paper's schedule, stretched from its 100 steps to ours
                twist = min((1 + gamma) ** (100 * i / steps) - 1, 1) * reward(x0_hat) / kl_weight
            grad = torch.autograd.grad(twist.sum(), x)[0] if guided else torch.zeros_like(x)
        return {name: v.detach() for name, v in dict(x=x, x0_hat=x0_hat, var=var, grad=grad, log_twist=twist).items()}
    def step(state, i):
        mean, var = kernel(state["x"], state["x0_hat"], state["var"] * (not ddpm), abar[i], abar[i + 1])
        shift, z = var.sqrt() * strength * state["grad"], torch.randn_like(mean)
        log_ratio = -(shift * (z + shift / 2)).sum(-1)  # log p - log q
        return look(mean + var.sqrt() * (shift + z), i + 1), log_ratio
    state, log_w = smc(step, look(x, 0), steps, ess)
    return state["x"], log_w

# ---- the model -------------------------------------------------------------------------------------------------------
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
def emd(x, w, target, subsamples, size=500):
    """Earth mover's distance between `size` draws of x (N, d), weighted by w (N,), and of target -> (subsamples,)."""
    pairs = ((x[torch.multinomial(w, size, replacement=True)], target.sample((size,))) for _ in range(subsamples))
    costs = [torch.cdist(*pair).cpu() for pair in pairs]
    return torch.stack([cost[linear_sum_assignment(cost)].mean() for cost in costs])  # mean over the best matching

def measure(method, problem, denoise, args, subsamples=0):
    """A method on a problem -> x (N, d), w (N,), rows; standard errors over groups, of emd over subsamples."""
    target, weighted = problem.target, method not in ("exact", "pretrained", "guidance")
    options = dict(gamma=args.gamma, ddpm=args.ddpm, strength=problem.strength if method == "guidance" else 1)
    abar = signal_power(torch.linspace(1, 0, 1 + dict(das_published=100, exact=1).get(method, args.steps))).tolist()
    x = torch.randn(args.groups, args.particles, len(problem.data.mean))
    x, log_w = das(denoise, problem.reward, x, abar, problem.kl_weight, **options | METHODS[method])
    x = target.sample(x.shape[:2]) if method == "exact" else x
    w = (log_w * dict(das_published=1e9).get(method, weighted)).softmax(1)  # published: the heaviest particle alone
    r, log_z = (w * problem.reward(x)).sum(1), log_w.double().logsumexp(1) - math.log(args.particles)
    x, w, z = x.flatten(0, 1), w.flatten() / args.groups, log_z.exp()
    rows = [("mean_reward", r.mean(), r.std() / len(r) ** 0.5, problem.mean_reward)]
    rows += [("log_z", z.mean().log(), z.std() / z.mean() / len(z) ** 0.5, problem.log_z),  # the next is of one group
             ("error_of_log_z", (log_z - (problem.log_z or math.nan)).square().mean().sqrt(), None, 0)] * weighted
    if subsamples and target:  # mode_l1: error of the masses of the modes
        distance, log_p = emd(x, w, target, subsamples), target.component_distribution.log_prob(x[:, None])
        rows += [("emd", distance.mean(), distance.std() / subsamples**0.5, None),
                 ("mode_l1", (w @ (log_p + target.log_w).softmax(1) - target.log_w.exp()).abs().sum(), None, 0)]
    return x, w, [(problem.name, method, *row) for row in rows if (problem.name, row[0]) != ("swiss_roll", "mode_l1")]

def draw(problems, samples, rows):
    """Samples over contours of the exact target, where it is plane; errors by dimension."""
    number, shown = {r[:3]: r[3] for r in rows}, ("pretrained", "guidance", "importance", "das_published", "das")
    figure = Figure(figsize=(9, 1.9 * len(problems)), layout="constrained")
    axes = figure.subplot_mosaic([[*(p.name + method for method in shown), "panel"] for p in problems])
    for p, method in ((problem, method) for problem in problems for method in shown):
        ax, (x, w), half = axes[p.name + method], samples[p.name, method], 1.5 * p.data.means.max().item()
        ax.scatter(*x[w.multinomial(1500, replacement=True), :2].T.cpu(), s=2, c="#0072B2", alpha=0.5, linewidths=0)
        if p.target and x.shape[1] == 2:
            grid = torch.stack(torch.meshgrid(*2 * [torch.linspace(-half, half, 161)], indexing="ij"), 2)
            levels = dict(levels=[-9, -6, -3], colors="k", linewidths=0.5, linestyles="solid")
            ax.contour(*grid.movedim(2, 0).cpu(), p.target.log_prob(grid).cpu(), **levels)
        ax.set_title(f"{p.name}: {method}\nEMD {number.get((p.name, method, 'emd'), math.nan):.2f}", fontsize=8)
        ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-half, half), ylim=(-half, half))
    for method, color in COLORS.items():
        errors = [number[f"{d}d", method, "error_of_log_z"] for d in DIMENSIONS]
        axes["panel"].semilogy([*map(str, DIMENSIONS)], errors, ".-", color=color, label=method)
    axes["panel"].set_title("error of log Z\nby dimension", fontsize=8)
    axes["panel"].set_ylim(0.03, 90)
    axes["panel"].legend(fontsize=8, loc="upper left")
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
    started, samples, rows, (args.groups, train_steps, subsamples) = time.time(), {}, [], args.size
    torch.manual_seed(args.seed)
    torch.set_default_device(args.device)
    print("COARSE: numbers mean nothing" if subsamples < 15 else "se: over groups of particles, emd: over subsamples")
    for problem in (problems := [Problem(name, args.kl_weight) for name in args.problem]):
        denoise = problem.data.denoise if args.score == "exact" else pretrain(problem.data, train_steps)
        for method in list(METHODS)[0 if problem.target else 1 : -1]:
            *samples[problem.name, method], found = measure(method, problem, denoise, args, subsamples)
            rows += found
    study = argparse.Namespace(**vars(args) | dict(groups=args.groups // 2))  # enough for the error of one group
    for problem in (Problem(f"{d}d", args.kl_weight) for d in DIMENSIONS):
        rows += [row for method in COLORS for row in measure(method, problem, problem.data.denoise, study)[2]]
    report(args, rows, started, lambda: draw(problems, samples, rows))

if __name__ == "__main__":
    main(parse_args())
