"""Fine-tune a diffusion model for a reward by its gradient through the sampler (DRaFT), with and without a KL term.
Paper: Clark, Vicol, Swersky and Fleet, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", ICLR 2024,
arXiv 2309.17400; the direct-backpropagation baseline in Fig. 1 of DAS (arXiv 2501.05803). figure.png: that baseline.
Run    python toy/draft.py  one minute; --quick: 8 seconds; a lower temperature: --kl-weight 0.3
       as published (rows draft and draft_1): no KL term; draft_kl adds it, with a weight of one in nats
Read first: policy, paths, draft. Skip: Denoiser, measure, draw, checked, report.
Notation (here -> papers); N paths of T steps
    kl_weight -> alpha     reward temperature: the target is p(x) exp(r(x) / kl_weight) / Z
    abar -> abar_t         signal power: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps
    last -> K              the gradient runs through the last so many steps; DRaFT-1 is K = 1
    objective_paths        KL of the tuned paths from the pretrained ones - E[r] / kl_weight: at least -log Z, by Gibbs
Algorithm (draft), at every update
    1. paths: sample from noise with the network as it is; no gradient for the steps before the last K
    2. policy: a step is a Gaussian, so its KL from the pretrained network's step is a formula: see paths
    3. loss: mean of KL - r / kl_weight, or of -r / kl_weight alone, differentiated through all that was sampled
    4. descend: Adam on a copy of the network
Gaussian steps nearly reach the bound, with the kernel of das.py: row exact_score, the exact score of the target.
What you should see (seed 0): with KL the objective falls from 10.8 to 1.52 on gmm (exact score 1.45, -log Z 1.44) and
from 9.2 to 3.17 on gmm2 (3.06, 2.97); the modes have their shares within .01 and .09 in L1. Without KL all samples end
in a spot or two: E[r] is above the target's, -0.01 for -0.29 and -1.34, at objectives of 25 and 34. draft_1 ends
likewise, at 0.37 of the calls. To try: METHODS with draft_1=dict(last=1): with KL, the objective on gmm2 stays at 7.1.
"""
import argparse, copy, json, math, os, pathlib, time
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

METHODS = {"draft_kl": dict(), "draft": dict(kl=0.0), "draft_1": dict(kl=0.0, last=1)}  # options of draft()
COLORS = dict(draft_kl="#0072B2", draft="#D55E00", draft_1="#CC79A7")

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # updates of the base; updates, paths for each; paths and subsamples behind the table
    add, sizes = parser.add_argument, dict(const=(200, 24, 64, 500, 2), default=(1500, 120, 512, 10_000, 10))
    add("--quick", dest="size", action="store_const", **sizes, help="coarse, 8 seconds")
    add("--paper", dest="size", action="store_const", const=(5000, 500, 256, 40_000, 40), help="3 minutes; not run")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, default="out/toy_draft", help="folder of figure.png and numbers.json")
    add("--device", choices=["cpu", "cuda"][: 1 + torch.cuda.is_available()], default="cpu")
    add("--problem", nargs="+", choices=["gmm", "gmm2"], default=["gmm", "gmm2"])
    add("--kl-weight", type=float, default=1.0, help="reward temperature")
    add("--steps", type=int, default=20, help="of the sampler")
    add("--lr", type=float, default=3e-3, help="top of the cycle of the learning rate")
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
    """The data and the reward r(x) = -sum_d a (x - c)^2 of DAS, with the exact target, its log Z and E[r]."""
    def __init__(self, name, kl_weight):
        line, angle = torch.tensor([-4.0, 0.0, 4.0]), torch.arange(8) * math.pi / 4
        if name == "gmm":  # a 3 x 3 grid
            means, a, c = torch.cartesian_prod(line, line), [0.01, 1.0], [0.0, 0.0]
        else:  # "gmm2": a ring
            means, a, c = 4 * torch.stack([angle.cos(), angle.sin()], 1), [1.0, 0.1], [0.0, 1.0]
        # your own: data here, another reward below; what has no closed form is None: target, log_z, mean_reward
        self.name, self.kl_weight, self.data = name, kl_weight, Mixture(0 * means[:, 0], means, 0.3)
        a, c = torch.tensor(a), torch.tensor(c)
        self.reward = lambda x: -(a * (x - c) ** 2).sum(-1)  # (..., d) -> (...)
        self.target, log_z = self.data.tilt(2 * a * c / kl_weight, 2 * a / kl_weight)
        self.log_z = log_z - (a @ c**2).item() / kl_weight
        self.mean_reward = -a @ ((self.target.mean - c) ** 2 + self.target.variance)

# ---- the method ------------------------------------------------------------------------------------------------------

def kernel(x, x0_hat, var, a, b):
    """Mean and variance of x_{t-1} given x_t = x, signal powers b and a: DDPM's, averaged over x_0 ~ N(x0_hat, var)."""
    keep, fresh = (a / b) ** 0.5 * (1 - b) / (1 - a), b**0.5 * (1 - a / b) / (1 - a)
    return keep * x + fresh * x0_hat, (1 - b) / (1 - a) * (1 - a / b) + fresh**2 * var

def policy(net, x, a, b):
    """The step of the sampler from x (..., d) at signal power a to b -> Normal (..., d)."""
    mean, var = kernel(x, *net(x, a), a, b)
    return Normal(mean, var.clamp(1e-4, 4).sqrt())  # bounds that matter without KL: the best step then has no noise

def paths(net, base, x, abar):
    """Paths from x (N, d) along abar (T + 1,) -> list of T + 1 states (N, d), list of T KLs (N,): each step's from
    base, in nats, exact given the state. The mean of their sum is the KL of the paths."""
    states, kl = [x], []
    for a, b in zip(abar, abar[1:]):
        p, q = policy(net, states[-1], a, b), policy(base, states[-1], a, b)
        states.append(p.rsample())
        kl.append(kl_divergence(p, q).sum(-1))
    return states, kl

def draft(net, base, reward, x, abar, kl_weight=1.0, kl=1.0, last=None):
    """The loss of one update from noise x (N, d), in nats -> scalar, mean reward, objective_paths of these paths.
    With all steps its gradient is exact; a smaller `last` takes the states before those steps as given."""
    cut = len(abar) - 1 - (last or len(abar) - 1)
    with torch.no_grad():
        given, kl_given = paths(net, base, x, abar[: cut + 1])
    states, kl_tuned = paths(net, base, given[-1], abar[cut:])
    r, of_paths = reward(states[-1]) / kl_weight, sum(kl_given) + sum(kl_tuned)
    return (kl * of_paths - r).mean(), r.mean().item() * kl_weight, (of_paths - r).mean().item()

def run(method, problem, base, args):
    """Tune a copy of base by one of METHODS -> network, history of (update, reward, objective), calls: networks at one
    state, a backward pass counts as two. Without KL, those of base serve the history alone and do not count."""
    net, history, options = copy.deepcopy(base), [], METHODS[method]

    def loss():
        x = torch.randn(args.batch, len(problem.data.mean))
        value, *now = draft(net, base, problem.reward, x, args.abar, problem.kl_weight, **options)
        history.append((len(history), *now))
        return value

    descend(net, loss, args.updates, args.lr)
    networks, tuned = 1 + (options.get("kl", 1) > 0), min(options.get("last", args.steps), args.steps)
    return net, history, args.updates * args.batch * networks * (args.steps + 2 * tuned)

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

def measure(method, problem, net, base, args):
    """Fresh paths of net, or exact draws where it is None -> x (N, d), rows."""
    target = problem.target
    with torch.no_grad():
        states, kl = paths(net or base, base, torch.randn(args.samples, len(problem.data.mean)), args.abar)
    x = states[-1] if net else target.sample((args.samples,))
    r = problem.reward(x)
    values = dict(mean_reward=(r, problem.mean_reward))
    values |= dict(objective_paths=(sum(kl) - r / problem.kl_weight, target and -problem.log_z)) if net else {}
    if target:
        values["emd"] = emd(x, torch.ones(len(x)), target, args.subsamples), None
    rows = [(quantity, v.mean(), v.std() / len(v) ** 0.5, exact) for quantity, (v, exact) in values.items()]
    if target:
        shares = [torch.cdist(y, target.means).argmin(1).bincount(minlength=len(target.means)) / len(y)
                  for y in (x, target.sample((100_000,)))]  # of the modes
        rows += [("mode_l1", (shares[0] - shares[1]).abs().sum(), None, 0)]
    return x, [(problem.name, method, *row) for row in rows]

def draw(problems, samples, histories, rows):
    """Samples over contours of the exact target, then reward and objective of the paths behind every update."""
    distance, shown = {r[:2]: r[3] for r in rows if r[2] == "emd"}, ["pretrained", *METHODS, "exact"]
    figure = Figure(figsize=(9, 2.1 * len(problems)), layout="constrained")
    axes = figure.subplots(len(problems), len(shown) + 2, squeeze=False, width_ratios=[1] * len(shown) + [1.2] * 2)
    for problem, line in zip(problems, axes):
        half = 1.5 * problem.data.means.max().item()
        span = torch.linspace(-half, half, 161)
        for ax, method in zip(line, shown):
            key = problem.name, method
            x = samples.get(key, torch.zeros(0, 2))[:1500].cpu()
            ax.scatter(x[:, 0], x[:, 1], s=2, c=COLORS.get(method, "#888888"), alpha=0.5, linewidths=0)
            if problem.target:
                log_p = problem.target.log_prob(torch.cartesian_prod(span, span)).view(161, 161).T.cpu()
                ax.contour(span.cpu(), span.cpu(), log_p, [-9, -6, -3], colors="k", linewidths=0.5, linestyles="solid")
            ax.set_title(f"{problem.name}: {method}\nEMD {distance.get(key, math.nan):.2f}", fontsize=8)
            ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-half, half), ylim=(-half, half))
        for i, (ax, quantity) in enumerate(zip(line[-2:], ("mean_reward", "objective_paths")), 1):
            for method in METHODS:
                history = torch.tensor(histories[problem.name, method])
                ax.plot(history[:, 0], history[:, i], c=COLORS[method], linewidth=1)
            if problem.target:
                ax.axhline(float((problem.mean_reward, -problem.log_z)[i - 1]), c="k", linewidth=1, linestyle="dotted")
            ax.set_title(f"{quantity}\nby update", fontsize=8)
            ax.set_yscale("symlog")
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
    started, samples, histories, rows = time.time(), {}, {}, []
    train_steps, args.updates, args.batch, args.samples, args.subsamples = args.size
    print("COARSE: numbers mean nothing" if train_steps < 1500 else "se: over paths, of emd over subsamples")
    torch.manual_seed(args.seed)
    torch.set_default_device(args.device)
    args.abar = signal_power(torch.linspace(1, 0, 1 + args.steps)).tolist()
    for problem in (problems := [Problem(name, args.kl_weight) for name in args.problem]):
        base = pretrain(problem.data, train_steps)
        nets = dict(exact=None, exact_score=problem.target.denoise) if problem.target else {}
        nets |= dict(pretrained=base)
        for method in METHODS:
            nets[method], histories[problem.name, method], calls = run(method, problem, base, args)
            rows.append((problem.name, method, "calls", calls, None, None))
        for method, net in nets.items():
            samples[problem.name, method], found = measure(method, problem, net, base, args)
            rows += found
    report(args, rows, started, lambda: draw(problems, samples, histories, rows))

if __name__ == "__main__":
    main(parse_args())
