"""Align a masked diffusion model of DNA under constraints: the least KL from it that is active and GC-rich enough.
Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104. figure.png: its Fig. 3 on DNA: rewards and multipliers by round, the KL of all methods.
Run    python dna/constrained_alignment.py      both problems; 5 CPU minutes, --quick: 20 s
       python dna/constrained_alignment.py --problem hepg2 --threshold -1 0.5         of activity, of the share of GC
       python dna/constrained_alignment.py --paper --device cuda                      longer; not run here
Read first: lagrangian_update, align, dual_step, best_multipliers. Skip: World, the networks, report, draw.
Problems, and your own reward or table: as in das.py. On hepg2 a higher reward goes with less G and C.
Notation (here -> paper): b, dual -> b_i, lambda, thresholds E[r_i] >= b_i and multipliers, nats per unit of reward;
    tilt -> q_rw, q exp(dual' r) / Z, the best model at these multipliers
Algorithm
    1. reweighted, without training: sequences of the base model, weighted by exp(dual' r)       best_multipliers
    2. constrained: a network, and multipliers that start at those of 1. A round descends KL - dual' r    align
    3. dual_step: raise the multipliers of rewards below their thresholds, lower the others; repeat
equal_weights counts a standard deviation of each reward alike, at the KL of reweighted.
Ours: 1; the gradient of r (published: the score function); Newton steps of the multipliers.
What you should see (seed 0): mpsa, multipliers 1.94 and 5.10 (exact 1.73, 4.72), activity 1.29 +- .02 for 1.2, GC .600
    for .6, 2.13 nats where 1.53 would do; reweighted 1.63, 4.08, 1.44 nats; equal_weights has an activity of 1.06 +-
    .07. hepg2, activity .10 +- .11 for 0, by oracle B .23, GC .473 for .5: after 60 rounds the multipliers still rise.
Why multipliers of a network are larger: it is short of training. At the exact ones, held fixed, maximum likelihood on
    exact draws of the optimum of mpsa reaches an activity of .86 in 600 updates of 128 sequences, 1.01 of 1,024.
"""
import argparse, copy, functools, json, math, os, pathlib, runpy, sys, time
import numpy as np
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
from matplotlib.figure import Figure
from scipy.optimize import brentq, minimize
from torch import nn
from torch.nn import functional as F
from tqdm import trange

HERE, MASK, PROBLEMS = pathlib.Path(__file__).resolve().parent, 4, ["mpsa", "hepg2", "data"]
NAMES = ["activity", "gc"]
THRESHOLD = dict(mpsa=[1.2, 0.6], hepg2=[0.0, 0.5], data=[0.0, 0.5])
METHODS = ["pretrained", "reweighted", "equal_weights", "constrained"]

def parse_args(argv=None):
    # rounds, paths in a round and sequences that measure, of mpsa; then of the others
    parser = common_flags(__doc__, size=(150, 128, 2000, 60, 16, 300), quick=(3, 16, 200, 2, 4, 100),
                          paper=(5000, 256, 20_000, 5000, 128, 4000))
    add = parser.add_argument
    add("--reward", default="activity", help="or my.py:function of letters (n, L, 4), probabilities of A C G T -> (n,)")
    add("--threshold", nargs=2, type=float, help="of activity, and of the share of G and C; with one --problem")
    add("--lag", type=float, default=6.0, help="divides the steps of the multipliers")
    add("--updates", type=int, default=3, help="of the network in a round")
    add("--lr", type=float, help="1e-3 for mpsa, else 3e-4")
    args = checked(parser, parser.parse_args(argv))
    if args.threshold and (len(args.problem) > 1 or not all(map(math.isfinite, args.threshold))):
        parser.error("--threshold: two finite numbers, for one --problem")
    return args

def common_flags(doc, size, quick, paper):
    """The flags of every script of this folder -> parser. What the tuples of sizes count is each script's own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", dest="size", action="store_const", const=quick, default=size, help="coarse, seconds")
    add("--paper", dest="size", action="store_const", const=paper, help="the paper's sizes; needs a GPU")
    add("--seed", type=int, default=0, help="the k-th problem has the seed SEED + 100 k")
    add("--out", type=pathlib.Path, default=f"out/dna_{pathlib.Path(__file__).stem}", help="folder of results")
    add("--device", choices=["cpu", "cuda"][: 1 + torch.cuda.is_available()], default="cpu")
    add("--problem", nargs="+", choices=PROBLEMS, default=PROBLEMS[:2], help="data: a table given to pretrain.py")
    add("--checkpoints", type=pathlib.Path, default=HERE / "checkpoints", help="networks that pretrain.py made")
    add("--steps", type=int, help="of the sampler; 64 for mpsa, else 32")
    add("--chunk", type=int, default=256, help="sequences in one call, this sets the memory")
    return parser

def checked(parser, args):
    """The flags; what cannot work, as a folder that cannot be written, is said in one sentence before any work."""
    for name, value in vars(args).items():
        if type(value) in (int, float) and not 0 < value + (name == "seed") < 1e9:
            parser.error(f"--{name.replace('_', '-')}: {value} is not between 0 and 1e9")
    if len(set(args.problem)) < len(args.problem):
        parser.error("--problem names one twice")
    loaded("--out", lambda: (args.out.mkdir(parents=True, exist_ok=True), (args.out / ".writable").touch()))
    return args
# ---- the problem: model, rewards, exact multipliers ------------------------------------------------------------------
class World:
    """A masked diffusion model of sequences, frozen: all that a method asks of a problem. length L, steps, kl_weight:
    defaults; net: the trained MaskedDenoiser; denoiser: tokens x (n, L) -> log_p (n, L, 4), for mpsa the exact one.
    Of mpsa p, r, held_r (4^9,): distribution, inclusion and its replicate, of all sequences, from AAAAAAAAA on."""
    def __init__(self, args, name):
        self.name, self.p = name, None
        self.steps, self.kl_weight = (args.steps or 64, 0.5) if name == "mpsa" else (args.steps or 32, 0.25)
        self.net, self.length = load_network(args.checkpoints / f"{name}_base.pt", MaskedDenoiser)
        self.denoiser = self.net
        if name == "mpsa":
            table, self.length = loaded(HERE / "splice_sites.npz", np.load, HERE / "splice_sites.npz"), 9
            self.p, self.r, self.held_r = torch.tensor(np.stack([table["p"], *table["rewards"]]))
            self.denoiser = ExactDenoiser(self.p)

class Rewarded(World):
    """A world with reward and held_out: letters (n, L, 4), probabilities or one-hot, -> (n,)."""
    def __init__(self, args, name):
        super().__init__(args, name)
        if name == "mpsa":
            self.reward, self.held_out = table_reward(self.r), table_reward(self.held_r)
        else:
            files = [args.checkpoints / f"{name}_oracle_{k}.pt" for k in "ab"]
            self.reward, self.held_out = (load_network(file, Oracle)[0].score for file in files)
        if args.reward != "activity":  # your own
            path, _, own = args.reward.rpartition(":")
            self.reward = loaded(args.reward, lambda: runpy.run_path(path or own)[own])
            found = self.reward(torch.stack([torch.full((self.length, 4), 0.25), torch.eye(4)[[0] * self.length]]))
            if found.shape != (2,) or not found.isfinite().all():
                raise Refused(f"--reward {args.reward}: two sequences did not get two finite numbers")
            if name == "mpsa":
                letters = F.one_hot(torch.cartesian_prod(*[torch.arange(4)] * 9), 4).float()
                self.r = torch.cat([self.reward(part).detach() for part in letters.split(2**14)]).double()

class ExactDenoiser:
    """The denoiser of a distribution p (4^L,), by enumeration: x (n, L) tokens -> log p(x_0 | x) (n, L, 4), float64.
    A table holds, for all 5^L masked sequences, the probability of those that agree with them."""
    def __init__(self, p):
        length = round(math.log(len(p), 4))
        mass = p.view([4] * length)
        for axis in range(length):
            mass = torch.cat([mass, mass.sum(axis, keepdim=True)], axis)
        self.log_mass, self.place = mass.log().flatten(), 5 ** torch.arange(length - 1, -1, -1)
    def __call__(self, x):
        state = (x * self.place).sum(1)[:, None, None]
        letter = (torch.arange(4) - x[:, :, None]) * self.place[:, None]  # (n, L, 4): what it changes
        return self.log_mass[state + letter] - self.log_mass[state]

def table_reward(value):
    """A table of all sequences, value (4^L,), as a function of letters (n, L, 4): its mean, if they are independent."""
    half = round(math.log(len(value), 4)) // 2
    joint = lambda part: functools.reduce(lambda a, b: (a[:, :, None] * b[:, None]).flatten(1), part.float().unbind(1))
    def reward(letters):
        return (joint(letters[:, :half]) @ value.float().view(4**half, -1) * joint(letters[:, half:])).sum(1)
    return reward

def rewards(world, letters):
    """What has a threshold, of letters (n, L, 4): the activity, and the share of G and C, which a synthesis has limits
    for -> (n, m)."""  # your own: a column more, here and in NAMES and THRESHOLD
    return torch.stack([world.reward(letters), letters[:, :, 1:3].sum((1, 2)) / world.length], 1)

def moments(log_q, r, dual):
    """The tilt q exp(dual' r) / Z of q, log masses (N,) of points with rewards r (m, N): its log masses up to a
    constant; mean rewards (m,), their covariance (m, m), KL from q, and log Z."""
    log_p = log_q + dual @ r
    log_z, p = log_p.logsumexp(0), log_p.softmax(0)
    apart = r - (r @ p)[:, None]
    return log_p, r @ p, (apart * p) @ apart.T, dual @ (r @ p) - log_z, log_z

def best_multipliers(log_q, r, b):
    """The multipliers (m,) of the tilt with the least KL from q that meets the thresholds b (m,): dual steps on moments
    of the tilt itself."""
    dual = 0 * b
    for _ in range(40):
        _, mean, covariance, *_ = moments(log_q, r, dual)
        dual = dual_step(dual, b - mean, covariance, simplex=False)
    if not (b - mean).max() < 1e-3:  # the dual function has no maximum
        raise Refused(f"--threshold {b.tolist()}: no weights of the {len(log_q)} sequences at hand meet it")
    return dual

def enumerated(world, b):
    """Means of the optimum, its multipliers and its KL, by enumeration; nothing where that cannot be done."""
    if world.p is None:
        return {}
    x = torch.cartesian_prod(*[torch.arange(4)] * world.length)
    log_q, r = world.p.log().cpu(), torch.stack([world.r, ((x == 1) | (x == 2)).double().mean(1)]).cpu()
    dual = best_multipliers(log_q, r, b)
    log_p, mean, _, kl, _ = moments(log_q, r, dual)
    values = dict(zip(NAMES, mean)) | dict(held_out=log_p.softmax(0) @ world.held_r.cpu(), kl=kl)
    return values | {f"multiplier_{name}": v for name, v in zip(NAMES, dual)}

def equal_weights(log_q, r, kl):
    """Weights (m,) that count standard deviations of all rewards alike, of the tilt with this KL."""
    unit = moments(log_q, r, torch.zeros_like(r[:, 0]))[2].diag().rsqrt()
    return brentq(lambda size: float(moments(log_q, r, size * unit)[3] - kl), 0, 100) * unit

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

def unmask(log_q, x, left):
    """Set each masked token of x (..., L) with probability 1 / left, its letter from log_q (..., L, 4) -> tokens, newly
    set (..., L). In float64: Gumbel noise in float32 is cut off, which lowers the temperature (Zheng et al. 2024)."""
    new = (x == MASK) & (torch.rand(x.shape, dtype=torch.float64) < 1 / left)
    cdf = log_q[new].double().exp().cumsum(1)
    letters = (cdf <= torch.rand(len(cdf), 1, dtype=torch.float64) * cdf[:, -1:]).sum(1).clamp(max=3)
    return x.masked_scatter(new, letters), new

def lagrangian_update(args, world, denoiser, dual, step, batch):
    """A round of --updates steps down KL - E[dual' r], at states of `batch` new paths -> r (batch, m), KL (batch,).
    The gradient of r in the letters of a path's end says what another letter would change there, if those that are set
    after it stayed as they are."""
    path, kl = sample_paths(world, denoiser, batch, args.chunk)
    letters = F.one_hot(path[-1], 4).float().requires_grad_(True)
    r = rewards(world, letters)
    gain = torch.autograd.grad((r @ dual.to(r)).sum(), letters)[0]
    for _ in range(args.updates):
        for n in (torch.arange(4 * batch) % batch).split(args.chunk):
            t = torch.randint(world.steps, n.shape)  # each state stands for all steps: times T, set with 1 / (T - t)
            x = path[t, n]
            log_p, base = denoiser(x), world.denoiser(x).detach()
            loss = torch.where(x == MASK, (log_p.exp() * (log_p - base - gain[n])).sum(2), 0).sum(1)
            (loss @ (world.steps / (world.steps - t)).to(loss) / (4 * batch)).backward()
        step()
    return r.detach().double().cpu(), kl

def align(args, world, net, name, dual, b, rounds, batch):
    """Algorithm 1 for net, a copy of the base, from the multipliers dual (m,) on -> multipliers and mean rewards
    (rounds, m), KL (rounds,)."""
    if not world.reward(torch.full((1, world.length, 4), 0.25, requires_grad=True)).requires_grad:
        raise Refused("--reward: no gradient, which this method needs; dna/ddpo.py and dna/das.py do without")
    def update(step, trace):
        now = trace[-1][0] if trace else dual
        r, kl = lagrangian_update(args, world, tuned(world, net), now, step, batch)
        # the step counts on a model that follows at once; a network takes some rounds
        return dual_step(now, b - r.mean(0), args.lag * torch.cov(r.T), simplex=False), r.mean(0), kl.mean()
    args = argparse.Namespace(**vars(args) | dict(lr=args.lr or (1e-3 if world.p is not None else 3e-4)))
    return [torch.stack(v) for v in zip(*train(args, net, name, rounds, update))]

def train(args, net, name, rounds, update):
    """`rounds` times update(step, trace), which back-propagates and calls step() -> trace: what they return.
    The network net, a copy of the base trained as a whole, is saved in args.out/name.pt."""
    net.requires_grad_(True)
    optimizer, trace = torch.optim.Adam(net.parameters(), args.lr, betas=(0.9, 0.99)), []
    def step():
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for i in trange(rounds, desc=name):
        torch.manual_seed(args.seed + 1000 * (i + 1))
        trace.append(update(step, trace))
    torch.save(net.requires_grad_(False).state_dict(), args.out / f"{name}.pt")
    return trace

def tuned(world, net):
    """The denoiser of net, a trained copy of world.net: tokens x (n, L) -> log_p (n, L, 4). Of mpsa the exact denoiser
    times what the training changed, so that it starts at p itself."""
    if world.p is None:
        return net
    return lambda x: (world.denoiser(x) + net(x) - world.net(x)).log_softmax(2)

@torch.no_grad()
def sample_paths(world, denoiser, n, chunk):
    """n sampling paths -> tokens (T + 1, n, L), from all masked on, and kl (n,), nats: of the kernels from those of the
    base model, summed over the steps. A masked letter is set with probability 1 / left whatever the model."""
    x, kl = torch.full((n, world.length), MASK), torch.zeros(n, dtype=torch.float64)
    path, nets = [x], (denoiser, world.denoiser)
    log_p, base = (net(x[:1]).repeat(n, 1, 1) for net in nets)
    for left in range(world.steps, 0, -1):
        kl += torch.where(x == MASK, (log_p.exp() * (log_p - base)).sum(2), 0).sum(1) / left
        x, new = unmask(log_p, x, left)
        path.append(x)
        due = new.any(1) & (left > 1)  # where no letter was set, nothing has changed
        for known, net in zip((log_p, base), nets) if due.any() else ():
            known[due] = torch.cat([net(part) for part in x[due].split(chunk)])
    return torch.stack(path), kl
# ---- the networks ----------------------------------------------------------------------------------------------------
class Refused(ValueError):
    """What a user can mend, said in one sentence."""

def loaded(source, load, *args, **options):
    """load(...), where the library's own first line about a file, a folder or a hub id becomes the sentence."""
    try:
        return load(*args, **options)
    except Exception as error:  # every library raises its own
        raise Refused(f"{source}: {type(error).__name__}: {error}".splitlines()[0]) from error

class MaskedDenoiser(nn.Module):
    """Dilated residual convolutions: tokens x (n, L), or a soft one-hot of them (n, L, 5), -> log_p (n, L, 4). It means
    something at masked places alone, and the mask has no probability (SUBS). The exact one does not know the time."""
    def __init__(self, width, kernel, dilations):
        super().__init__()
        self.architecture = dict(width=width, kernel=kernel, dilations=dilations)
        self.embed, self.head = nn.Conv2d(5, width, (1, 9), padding="same"), nn.Linear(width, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in [*dilations, 1])
        self.layers = nn.ModuleList(
            nn.Conv2d(width, width, (1, kernel), padding="same", dilation=(1, d)) for d in dilations)
    def forward(self, x):
        x = x if x.is_floating_point() else F.one_hot(x, 5).to(self.head.weight)
        h = self.embed(x[:, None].movedim(3, 1))  # (n, width, 1, L): on a CPU faster than in one dimension
        for norm, layer in zip(self.norms, self.layers):
            h = h + F.silu(layer(norm(h.movedim(1, 3)).movedim(3, 1)))
        return self.head(self.norms[-1](h.movedim(1, 3)[:, 0])).log_softmax(2)

class Oracle(nn.Module):
    """Convolutions and pooling: letters (n, L, 4) -> outputs (n, C) of names. kind: "classes", logits of cell types
    that exclude each other; "activity", measured values; "open", logits that each stand alone."""
    def __init__(self, names, kind, width):
        super().__init__()
        self.architecture = dict(names=names, kind=kind, width=width)
        sizes = ((4, 15), (width, 7), (width, 5))
        self.layers = nn.ModuleList(nn.Conv2d(n, width, (1, kernel), padding="same") for n, kernel in sizes)
        self.norms, self.head = nn.ModuleList(nn.BatchNorm2d(width) for _ in sizes), nn.Linear(2 * width, len(names))
    def forward(self, letters):
        h = letters[:, None].movedim(3, 1)  # (n, 4, 1, L)
        for layer, norm, window in zip(self.layers, self.norms, (4, 2, 1)):
            h = F.max_pool2d(F.silu(norm(layer(h))), (1, window))
        return self.head(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1))
    def score(self, letters, name="hepg2"):
        """A cell type's log odds against the others (n,), nats; activity or log odds of being open as they are."""
        out, k = self(letters), self.architecture["names"].index(name)
        others = [j for j in range(out.shape[1]) if j != k]
        return out[:, k] - (out[:, others].logsumexp(1) if self.architecture["kind"] == "classes" else 0)

def load_network(path, kind):
    """A MaskedDenoiser or Oracle that pretrain.py saved -> network, frozen; length of its sequences."""
    saved = loaded(path, torch.load, path, torch.get_default_device(), weights_only=True)
    net = kind(**saved["architecture"])
    net.load_state_dict(saved["weights"])
    return net.eval().requires_grad_(False), saved["settings"].get("length", 200)

# ---- measures, figure, main ------------------------------------------------------------------------------------------
@torch.no_grad()
def scored(world, x, chunk):
    """Sequences x (n, L) -> as a group of n particles: x (1, n, L), activity, gc, held_out, log_w (1, n)."""
    parts = [F.one_hot(part, 4).float() for part in x.split(chunk)]
    r = torch.cat([rewards(world, part) for part in parts]).double().cpu().T[:, None]
    held_out = torch.cat([world.held_out(part) for part in parts])[None].double().cpu()
    return dict(zip(NAMES, r), x=x[None], held_out=held_out, log_w=0 * held_out)

def measure(problem, method, out, dual, kl, exact):
    """Rows of a method: weighted means of its sequences, its multipliers, its KL."""
    w = out["log_w"].softmax(1)
    means = {name: (w * out[name]).sum() for name in (*NAMES, "held_out")}
    rows = [(name, v, (w * (out[name] - v)).norm(), exact.get(name)) for name, v in means.items()]
    rows += [(f"multiplier_{name}", v, None, exact.get(f"multiplier_{name}")) for name, v in zip(NAMES, dual)]
    return [(problem, method, *row) for row in rows + [("kl", *kl, exact.get("kl"))]]

def save_sequences(args, found):
    """found {(problem, method): x (G, P, L), log_w, reward and the like (G, P)} -> sequences.npz, of all particles."""
    arrays = {"/".join((*names, key)): (v.byte() if key == "x" else v).cpu().numpy()
              for names, f in found.items() for key, v in f.items()}
    np.savez_compressed(args.out / "sequences.npz", **arrays)

def report(args, rows, started, draw):
    """Print and save rows (problem, method, quantity, estimate, standard error, exact), then the figure of draw()."""
    names, part = ("problem", "method", "quantity", "estimate", "se", "exact"), args.out / f"{time.time_ns()}.part"
    rows = [(*r[:3], *(None if v is None or not math.isfinite(v) else float(v) for v in r[3:])) for r in rows]
    for r in [names, *rows]:
        cells = ("" if v is None else v if r is names else f"{v:.3f}" for v in r[3:])
        print(("{:16} {:22} {:20}" + 3 * "{:>10}").format(*r[:3], *cells))
    record = dict(args=vars(args), rows=[dict(zip(names, r)) for r in rows], seconds=round(time.time() - started, 1))
    part.write_text(json.dumps(record | {"torch": torch.__version__}, indent=1, default=str, allow_nan=False))
    part.replace(args.out / "numbers.json")  # files are whole or absent, also when two runs share a folder
    draw().savefig(part, dpi=100, format="png")
    part.replace(args.out / "figure.png")

def draw(args, rows, traces):
    """Of every problem: rewards and multipliers by round, KL of all methods."""
    number, figure = {r[:3]: r[3:] for r in rows}, Figure((9, 2.5 * len(args.problem)), layout="constrained")
    for axes, problem in zip(figure.subplots(len(args.problem), 4, squeeze=False), args.problem):
        dual, mean, _ = traces[problem]
        for i, (name, color) in enumerate(zip(NAMES, ("#0072B2", "#D55E00"))):
            found, _, exact = number[problem, "reweighted", f"multiplier_{name}"]
            axes[i].plot(mean[:, i], color=color)
            axes[i].axhline((args.threshold or THRESHOLD[problem])[i], color="k", linestyle=":")
            axes[i].set_title(f"{problem}: {name} by round\nthreshold dotted", fontsize=9)
            axes[2].plot(dual[:, i] / (found if exact is None else exact), color=color, label=name)
        axes[2].axhline(1, color="k", linestyle=":")
        axes[2].set_title(f"multipliers by round, over\n{'reweighted' if exact is None else 'exact'}", fontsize=9)
        axes[2].legend(fontsize=8)
        axes[3].barh(METHODS[::-1], [float(number[problem, m, "kl"][0]) for m in METHODS[::-1]], color="#999999")
        axes[3].set_title("KL from the base\nmodel, nats", fontsize=9)
    return figure

def main(args):
    started, rows, found, traces = time.time(), [], {}, {}
    torch.set_default_device(args.device)
    torch.set_flush_denormal(True)  # or a backward pass takes up to five times as long on a CPU
    print("COARSE: numbers mean nothing" if args.size[0] < 9 else "activity, gc, held_out: weighted means, se: over "
          "sequences; kl: nats, of constrained that of its paths; exact: of the optimum, by enumeration")
    for problem in args.problem:
        world, b = Rewarded(args, problem), torch.tensor(args.threshold or THRESHOLD[problem]).double().cpu()
        (rounds, batch, n), exact = args.size[:3] if problem == "mpsa" else args.size[3:], enumerated(world, b)
        torch.manual_seed(args.seed + 100 * PROBLEMS.index(problem))
        out = scored(world, sample_paths(world, world.denoiser, n, args.chunk)[0][-1], args.chunk)
        log_q, r = torch.full((n,), -math.log(n)).double().cpu(), torch.cat([out[name] for name in NAMES])
        duals = dict(pretrained=0 * b, reweighted=best_multipliers(log_q, r, b))
        duals["equal_weights"] = equal_weights(log_q, r, moments(log_q, r, duals["reweighted"])[3])
        for method, dual in duals.items():
            log_w, _, _, kl, _ = moments(log_q, r, dual)
            tilted = found[problem, method] = out | dict(log_w=log_w[None])
            rows += measure(problem, method, tilted, dual, (kl, None), exact if method == "reweighted" else {})
        net = copy.deepcopy(world.net)
        traces[problem] = align(args, world, net, f"{problem}_constrained", duals["reweighted"], b, rounds, batch)
        path, kl = sample_paths(world, tuned(world, net), n, args.chunk)
        out = found[problem, "constrained"] = scored(world, path[-1], args.chunk)
        dual = traces[problem][0][-(rounds // 4) - 1 :].mean(0)  # over the last quarter
        rows += measure(problem, "constrained", out, dual, (kl.mean(), kl.std() / n**0.5), exact)
    save_sequences(args, found)
    report(args, rows, started, lambda: draw(args, rows, traces))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
