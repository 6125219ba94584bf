"""Align a diffusion model by expectation maximisation: a search finds rewarded trajectories, the model learns them.
Paper: Lee et al., "Diffusion Alignment as Variational Expectation-Maximization" (DAV), ICLR 2026, arXiv 2510.00502.
figure.png: samples, E[r], ELBO (as its Fig. 4) and mode masses by round; a ring of Gaussians (ours) makes them exact.
Run    python toy/dav.py   75 seconds; --quick: 8; --paper: 8 x the particles, not run. As published: dav_local
Read first: search, m_step, dav. Skip: Denoiser, draw, checked, report.
Notation (here -> paper); G independent groups of P particles: x (G, P, d), log_w (G, P)
    kl_weight -> alpha, kl -> lambda, children -> M, abar -> abar_t: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps
    log_twist -> Q / alpha = r(x0_hat) / kl_weight, a forecast of the final log weight; x0_hat is E[x_0 | x_t]
Algorithm, a round of `dav`
    1. search (E-step): draw children of each state from q, choose one in proportion to twist x p / q. Population
       (ours): one child, q = p; smc weights the particles. Local (the paper's): q is shifted by sigma^2 grad log_twist;
       the choices' weights are dropped. Either way a transition weighs as much as its surviving descendants
    2. m_step: raise the weighted log-likelihood of the transitions, less kl times the KL of the kernels
    3. the tuned model is the next round's p. The search on a tuned model is DAV posterior
Ours: the M-step. Up to a constant E[-w log p_new(x_next)] = E[(1 - w) log p_new(x_next) + KL(p_old, p_new)]: weights of
    one change nothing, and the noise of x_next, which is all of the paper's loss there, is gone.
Exact: round k of DAV samples p_0 exp(k r / kl_weight). It keeps modes of equal reward, and has to leave the others.
    DAV-KL ends at the score of p_0 plus grad log E_0[exp(c r / kl_weight) | x_t] / (kl + 2), c = 1 + 2 / kl: in units
    of noise EM takes a drift u to (u + grad V) / (1 + kl), so u = grad V / kl; V solves a Hamilton-Jacobi equation.
What you should see (seed 0; equal, unequal): round 8 of dav has E[r] 3.79, 3.49 (exact 3.83, 3.58), ELBO .95,
    .88 (.96, .90); dav_kl ends at 3.24, 2.67 (3.23, 2.72); dav_published_m_step lags: 3.58, 3.14; the ELBO of
    dav_local falls below 0, modes are off by .03, .22 (dav: .02, .05). To try: --kl 1, --children 16, --problem coarse.
"""
import argparse, copy, json, math, os, pathlib, time
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
METHODS = dict(zip(("dav", "dav_kl", "dav_posterior", "dav_local", "dav_published_m_step"), COLORS))
REWARDS = {"equal": (4.0, 4.0, 4.0, 4.0), "unequal": (4.0, 3.0, 3.5, 2.5), "coarse": (4.0, 3.0, 3.5, 2.5)}
HALF, POINTS, ORDERS = 6.0, 121, ((0, 0), (1, 0), (0, 1), (2, 0), (0, 2))  # grid and moments for exact answers

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, sizes = parser.add_argument, dict(const=(1, 256, 22, 100, 8), default=(8, 4096, 80, 2000, 32))
    add("--quick", dest="size", action="store_const", **sizes, help="coarse, 8 seconds")
    add("--paper", dest="size", action="store_const", const=(8, 32768, 400, 5000, 128), help="large, not run here")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, default="out/toy_dav", help="folder of figure.png and numbers.json")
    add("--device", choices=["cpu", "cuda"][: 1 + torch.cuda.is_available()], default="cpu")
    add("--problem", nargs="+", choices=list(REWARDS), default=["equal", "unequal"])
    add("--kl-weight", type=float, default=4.0, help="reward temperature of a round")
    add("--kl", type=float, default=0.3, help="lambda of dav_kl")
    add("--children", type=int, default=4, help="of each state, in the local search")
    return checked(parser, parser.parse_args(argv))

# ---- the problem: data, reward, exact answer -------------------------------------------------------------------------
class Problem:
    """A ring of 8 Gaussians (radius 4, std 0.3), every second with a bump of reward; exact: sums over a grid."""
    def __init__(self, name, kl_weight):
        angle, heights = torch.arange(8) * math.pi / 4, torch.tensor(REWARDS[name])
        self.name, self.kl_weight, self.means = name, kl_weight, 4 * torch.stack([angle.cos(), angle.sin()], 1)
        def reward(x):  # (..., 2) -> (...)
            r = (heights.expm1() * (-((x[..., None, :] - self.means[::2]) ** 2).sum(-1) / 0.72).exp()).sum(-1).log1p()
            return (2 * r).round() / 2 if name == "coarse" else r
        self.reward, self.line = reward, torch.linspace(-HALF, HALF, POINTS)  # your own: another reward, other data
        self.data = MixtureSameFamily(Categorical(torch.ones(8)), Independent(Normal(self.means, 0.3), 1))
        self.grid = torch.cartesian_prod(self.line, self.line)  # (POINTS^2, 2)
    def tilted(self, strength):
        """p_0 exp(strength r / kl_weight) at the points of the grid, where a strength of k is round k of DAV."""
        return (self.data.log_prob(self.grid) + strength * self.reward(self.grid) / self.kl_weight).softmax(0)
    def moments(self, x, w):
        """E[r], masses of the modes (8,), log E[exp(r / kl_weight)] of samples x (N, 2) with weights w (N,)."""
        r, masses = self.reward(x), torch.bincount(torch.cdist(x, self.means).argmin(1), w, len(self.means))
        return dict(x=x, mean_reward=(w @ r).item(), masses=masses, elbo=(w @ (r / self.kl_weight).exp()).log().item())
    def fixed_point(self, kl):
        """Where DAV-KL ends -> denoise(x, abar), from E[x_0 | x_t] under p_0 and under it tilted, by quadrature."""
        priors = torch.stack([self.tilted(strength) for strength in (0, 1 + 2 / kl)]).view(2, POINTS, POINTS)
        def denoise(x, a):
            noised = (-((self.line[:, None] - a**0.5 * self.line) ** 2) / (2 * (1 - a))).exp()  # (x_t, x_0), an axis
            sums = torch.stack([noised * self.line**i @ priors @ (noised * self.line**j).T for i, j in ORDERS])
            moments = (sums[1:] / (sums[0] + 1e-30)).view(1, 8, POINTS, POINTS)
            at_x = nn.functional.grid_sample(moments, x.view(1, 1, -1, 2).flip(3) / HALF, align_corners=True)
            (plain, tilted), (squares, _) = at_x.view(2, 2, 2, -1).movedim(1, 3)  # order, coordinate, prior, point
            return (plain + (tilted - plain) / (kl + 2)).view_as(x), (squares - plain**2).clamp(min=0).view_as(x)
        return denoise

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

def search(denoise, reward, x, abar, kl_weight, children=0, ess=0.5):
    """E-step from noise x (G, P, d), along abar (T + 1,); local with children -> x (G, P, d), log_w (G, P), elbo:
    mean log Z of a group; transitions: x_t, x_next, mean and std of p (T, G, P, d), weights (T, G, P) of mean 1."""
    trace, groups, slots = [], torch.arange(len(x))[:, None], torch.arange(x.shape[1])
    def look(x, i):
        state = dict(x=x, slot=slots.expand(x.shape[:-1]))  # moves with the particle: after resampling, its ancestor
        if i == len(abar) - 1:
            return state | dict(log_twist=reward(x) / kl_weight)
        with torch.set_grad_enabled(children > 0):
            x0_hat, var = denoise(x.requires_grad_(children > 0), abar[i])
            twist = reward(x0_hat) / kl_weight
            grad = torch.autograd.grad(twist.sum(), x)[0] if children else torch.zeros_like(x)
        return {n: v.detach() for n, v in dict(state, x0_hat=x0_hat, var=var, grad=grad, log_twist=twist).items()}
    def step(state, i):
        mean, var = kernel(state["x"], state["x0_hat"], state["var"], abar[i], abar[i + 1])
        std, shift, z = var.sqrt(), var.sqrt() * state["grad"], torch.randn(max(children, 1), *x.shape)
        shift = shift / shift.norm(dim=-1, keepdim=True).clamp(min=1)  # ours: without it paths run away, to |x| = 500
        new = look(mean + std * (shift + z), i + 1)
        log_v = new["log_twist"] - (shift * (z + shift / 2)).sum(-1)  # twist x p / q, (M, G, P)
        chosen = Categorical(logits=log_v.movedim(0, -1)).sample()
        new = {name: value[chosen, groups, slots] for name, value in new.items()}
        trace.append((state["x"], new["x"], mean, std, state["slot"]))
        return new, log_v.logsumexp(0) - math.log(len(z)) - new["log_twist"]  # of one child: log p - log q
    state, log_w = smc(step, look(x, 0), len(abar) - 1, ess)
    *transitions, ancestors = map(torch.stack, zip(*trace))
    log_z = log_w.logsumexp(1, keepdim=True) - math.log(len(slots))
    weights = [(log_w - log_z).exp()]  # of a particle in its group: one, where the group is one path
    for slot in reversed(ancestors[1:]):
        weights.insert(0, torch.zeros_like(log_w).scatter_add(1, slot, weights[0]))
    return dict(x=state["x"], log_w=log_w, elbo=log_z.mean().item(), transitions=(*transitions, torch.stack(weights)))

def m_step(net, base, found, abar, updates, kl=0.0, ours=1, batch=1024):
    """The network that makes found transitions likely, from net on; kl times the KL of its kernels from base's."""
    new, abar = copy.deepcopy(net), torch.tensor(abar)[:, None]
    x_t, x_next, mean, std, weights = (value.flatten(1, 2) for value in found["transitions"])  # (T, G P, ...)
    def loss():
        t, n = torch.randint(len(x_t), (batch,)), torch.randint(x_t.shape[1], (batch,))
        x, w, a, b = x_t[t, n], weights[t, n][:, None], abar[t], abar[t + 1]
        models = (kernel(x, *model(x, a), a, b) for model in ((new, base) if kl else (new,)))
        p_old, p_new, *p_base = (Normal(mean[t, n], std[t, n]), *(Normal(mu, var.sqrt()) for mu, var in models))
        learn = (ours - w) * p_new.log_prob(x_next[t, n]) + ours * kl_divergence(p_old, p_new)
        return (learn + sum(kl * w * kl_divergence(p_new, p) for p in p_base)).sum(1).mean()
    return descend(new, loss, updates, 4e-3 if ours else 2e-3)  # each its best of .001 to .006

def dav(net, reward, abar, args, kl=0.0, children=0, ours=1):
    """Yield (network, search on it) before and after each round; args: kl_weight, rounds, particles, updates."""
    base, shape = net, (max(args.particles // children, 1), 1, 2) if children else (1, args.particles, 2)  # equal calls
    for k in range(args.rounds + 1):
        found = search(net, reward, torch.randn(shape), abar, args.kl_weight, children)
        yield net, found
        if k < args.rounds:  # after the paper's search its own M-step: ours needs the weights
            net = m_step(net, base, found, abar, args.updates, kl, 0 if children else ours)

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
def sample(problem, denoise, n, abar):
    """Moments of n samples of a model alone."""
    x = search(denoise, lambda x: 0 * x[..., 0], torch.randn(1, n, 2), abar, 1)["x"][0]
    return problem.moments(x, torch.full((n,), 1 / n))

def run(problem, net, args):
    """Every method on a problem -> {method: [(found, exact) by round]}, each as of `Problem.moments`; rows."""
    abar, fine = (signal_power(torch.linspace(1, 0, n + 1)).tolist() for n in (args.steps, 10 * args.steps))
    exact = [problem.moments(problem.grid, problem.tilted(k)) for k in range(args.rounds + 2)]
    end, runs = sample(problem, problem.fixed_point(args.kl), 10_000, fine), {method: [] for method in METHODS}
    rows, options = [], dict(dav={}, dav_kl=dict(kl=args.kl), dav_local=dict(children=args.children))
    for method, option in (options | dict(dav_published_m_step=dict(ours=0))).items():
        for k, (model, found) in enumerate(dav(net, problem.reward, abar, args, **option)):
            sampled = sample(problem, model, args.particles, abar) | dict(elbo=found["elbo"])
            runs[method] += [(sampled, end if method == "dav_kl" else exact[k])]
            if method == "dav":
                runs["dav_posterior"] += [(problem.moments(found["x"][0], found["log_w"][0].softmax(0)), exact[k + 1])]
    for method, pairs in runs.items():
        for k, (found, exact) in enumerate(pairs):
            rows += [(problem.name, method, f"mean_reward_round_{k}", found["mean_reward"], None, exact["mean_reward"])]
        rows += [(problem.name, method, "worst_mode_error", (found["masses"] - exact["masses"]).abs().max(), None, 0),
                 (problem.name, method, "elbo", found["elbo"], None, exact["elbo"])]  # both of the last round
    return runs, rows

def draw(problems, runs):
    """Samples of the last problem over contours of the exact distribution; curves by round."""
    p, figure = problems[-1], Figure(figsize=(9, 5.4 + 2.2 * len(problems)), layout="constrained")
    axes, span = figure.subplots(2 + len(problems), 4), p.line.cpu()
    for ax, (method, k) in zip(axes.flat, [(method, k) for method in ("dav", "dav_local") for k in (0, 1, 4, 8)]):
        now, exact = runs[-1][method][: k + 1][-1]
        ax.scatter(*now["x"][:500].T.cpu(), s=2, c=METHODS[method], alpha=0.5, linewidths=0)
        density = p.tilted(k).view(POINTS, -1).T.cpu() / (span[1] - span[0]) ** 2
        ax.contour(span, span, density.log(), [-9, -6, -3], colors="k", linewidths=0.5, linestyles="solid")
        ax.set_title(f"{method}, round {k}\nE[r] {now['mean_reward']:.2f} (exact {exact['mean_reward']:.2f})", size=8)
        ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-5.5, 5.5), ylim=(-5.5, 5.5), ylabel=p.name)
    for p, found, row in zip(problems, runs, axes[2:]):
        for ax, key, (method, color) in ((*i, j) for i in zip(row, ("mean_reward", "elbo")) for j in METHODS.items()):
            ax.plot([now[key] for now, exact in found[method]], ".-", c=color, lw=1, label=method)
            ax.plot([exact[key] for now, exact in found[method]], ":", c=color if method == "dav_kl" else "k", lw=1)
        for ax, method in zip(row[2:], ("dav", "dav_local")):
            ax.set_prop_cycle(color=COLORS[:4])
            ax.set_ylim(0, 0.7)
            ax.plot([now["masses"][::2].tolist() for now, exact in found[method]], ".-", lw=1)
            ax.plot([exact["masses"][::2].tolist() for now, exact in found[method]], "k:", lw=1)
        for ax, title in zip(row, ("E[r] by round", "ELBO by round, nats", "dav: modes", "dav_local: modes")):
            ax.set_title(f"{p.name}, {title}\n(dotted: exact)", size=8)
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
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
    started = time.time()
    args.rounds, args.particles, args.updates, train_steps, args.steps = args.size
    torch.manual_seed(args.seed)
    torch.set_default_device(args.device)
    print("COARSE: numbers mean nothing" if args.rounds < 8 else "one run: no se; exact of dav_kl is its fixed point")
    problems = [Problem(name, args.kl_weight) for name in dict.fromkeys(args.problem)]
    net = pretrain(problems[0].data, train_steps)  # the data are the same for all rewards
    runs, rows = zip(*(run(problem, net, args) for problem in problems))
    report(args, sum(rows, []), started, lambda: draw(problems, runs))

if __name__ == "__main__":
    main(parse_args())
