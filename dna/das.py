"""Sample DNA from p(x) exp(r(x) / kl_weight) / Z at test time: sequential Monte Carlo (SMC) with masked diffusion.
Paper: Kim, Kim and Park, "Test-time Alignment of Diffusion Models without Reward Over-optimization" (DAS), ICLR 2025,
arXiv 2501.05803, of images; for letters see Pani, Ou and Li, arXiv 2505.22524. figure.png: rewards (its Fig. 2), and
the error by particles, which an enumerated problem can show. compare.py measures the sequences.
Run    python dna/das.py                              both problems; 3 CPU minutes, --quick: 15 s
       python dna/das.py --problem hepg2 --reward my.py:function    your own: letters (n, L, 4), A C G T, -> (n,)
       python dna/das.py --problem data --checkpoints out/dna_pretrain      your own table, after pretrain.py
       python dna/das.py --paper --device cuda        128 steps and DRAKES' 640 groups; not run here
Read first: smc, das, tilt. Skip: the networks, checked, report, draw.
Problems: mpsa, 5' splice sites of 9 letters, log10 of measured inclusion, 4^9 sequences that can be enumerated;
    hepg2, elements of 200 letters, log odds of accessibility in HepG2 by oracle A; oracle B has other chromosomes.
Notation (here -> paper); G groups of P interacting particles: x (G, P, L) letters 0 to 3 or MASK, log_w (G, P)
    kl_weight -> alpha     reward temperature; temper -> lambda_t, from 0 (all masked) to 1 (a sequence)
    log_p -> p(x_0 | x_t)  of the letters of masked places, independent of each other within a step
    x0_hat -> x0hat_t      forecast: the letters that are set, probabilities of the others; (G, P, L, 4)
    log_twist              temper r(x0_hat) / kl_weight
Algorithm, at every step from all masked to none
    1. look: log_p, the reward of x0_hat, its gradient in the letters; only where a letter was set, the rest is known
    2. smc: weight by the twist; resample the groups whose effective sample size is low: all that is known moves along
    3. step: set each masked letter with probability 1 / (steps left), from q: log_p tilted by the tempered gradient
    4. smc: divide the old twist out, multiply by the new one and p / q. The last twist is the reward of the sequence
Ours: the tilt of a step may spread log p / q by --max-shift (no bias), and a sequence is drawn by weight. das_published
    has the paper's switches: no cap, and the heaviest particle of a group is taken.
What you should see (seed 0): mpsa, E[r] 1.49 +- 0.01 for das, exact 1.52, published 1.83 however many particles; hepg2,
    oracle B -2.0 (base), 0.4 (importance), 3.4 (guidance), 4.5 (bootstrap), 7.2 (das), 7.5 (published), and oracle A
    1.1 to 2.0 more for the last four. log_z of hepg2 is that of the luckiest of 40 groups. To try: --kl-weight 0.0625.
"""
import argparse, functools, json, math, os, pathlib, runpy, sys, time
import numpy as np
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

HERE, MASK, PROBLEMS = pathlib.Path(__file__).resolve().parent, 4, ["mpsa", "hepg2", "data"]
METHODS = {  # options of das(); the first two share their samples, of p
    "pretrained": dict(guided=False, ess=0), "importance": dict(guided=False, ess=0), "bootstrap": dict(guided=False),
    "guidance": dict(ess=0), "das": {}, "das_published": dict(max_shift=math.inf)}
POWER = dict(pretrained=0, guidance=0, das_published=1e9)  # of the weights; the last: the heaviest particle alone
COLORS = dict(importance="k", bootstrap="#E69F00", das_published="#D55E00", das="#0072B2")

def parse_args(argv=None):
    parser = common_flags(__doc__, size=(100, 100, 40, 8), quick=(16, 20, 4, 4), paper=(640, 100, 640, 16))
    add = parser.add_argument
    add("--reward", default="activity", help="or my.py:function of letters (n, L, 4), probabilities of A C G T -> (n,)")
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    add("--kl-weight", type=float, help="reward temperature; 0.5 for mpsa, else 0.25")
    add("--gamma", type=float, default=0.008, help="growth of the temper in a hundredth of the steps")
    add("--max-shift", type=float, default=2.0, help="cap of the tilt: standard deviation of log p / q of a step")
    return checked(parser, parser.parse_args(argv))

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

# ---- the problem: model, reward, exact answer ------------------------------------------------------------------------
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

def exact_values(world, kl_weight):
    """log Z, E[r] and held-out E[r] of p exp(r / kl_weight), by enumeration; nothing where there is none."""
    if world.p is None:
        return {}
    joint = world.p.log() + world.r / kl_weight
    w = joint.softmax(0)
    return dict(log_z=joint.logsumexp(0), reward=w @ world.r, held_out=w @ world.held_r)

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

def unmask(log_q, x, left):
    """Set each masked token of x (..., L) with probability 1 / left, its letter from log_q (..., L, 4) -> tokens, newly
    set (..., L). In float64: Gumbel noise in float32 is cut off, which lowers the temperature (Zheng et al. 2024)."""
    new = (x == MASK) & (torch.rand(x.shape, dtype=torch.float64) < 1 / left)
    cdf = log_q[new].double().exp().cumsum(1)
    letters = (cdf <= torch.rand(len(cdf), 1, dtype=torch.float64) * cdf[:, -1:]).sum(1).clamp(max=3)
    return x.masked_scatter(new, letters), new

def letters_log_p(log_p, x, new):
    """Log probability of the letters of x (..., L) at the places `new` under log_p (..., L, 4) -> (...), a sum."""
    return torch.where(new, log_p.gather(-1, x.clamp(max=3)[..., None])[..., 0], 0).sum(-1)

def forecast(log_p, x):
    """x0_hat (..., L, 4): the letters of x that are set, and the probabilities of the masked ones."""
    return torch.where((x == MASK)[..., None], log_p.exp(), F.one_hot(x.clamp(max=3), 4)).float()

def tilt(log_p, x, shift, left, max_shift):
    """Proposal of letters: log_p + shift (..., L, 4), normalised. The shift is scaled down where the log weight of the
    step would have a standard deviation above max_shift, to first order: a masked letter is set with probability
    1 / left and then adds the variance of its shift."""
    p = log_p.exp()
    variance = (p * shift**2).sum(-1) - (p * shift).sum(-1) ** 2
    size = (torch.where(x == MASK, variance, 0).sum(-1) / left).clamp(min=1e-30).sqrt()
    return (log_p + shift * (max_shift / size).clamp(max=1)[..., None, None]).log_softmax(-1)

def look(world, x, kl_weight, chunk, guided):
    """What is known at tokens x (n, L): x, log_p (n, L, 4), value = r(x0_hat) / kl_weight (n,) and its gradient in the
    letters of x0_hat (n, L, 4), not through the denoiser: to first order, what one letter more changes."""
    parts = []
    for part in x.split(chunk):
        with torch.no_grad():
            log_p = world.denoiser(part)
        with torch.set_grad_enabled(guided):
            x0_hat = forecast(log_p, part).requires_grad_(guided)
            value = world.reward(x0_hat).double() / kl_weight
            grad = torch.autograd.grad(value.sum(), x0_hat)[0] if value.requires_grad else torch.zeros_like(x0_hat)
        parts.append([part, log_p, value.detach(), grad.to(log_p)])
    return dict(zip(("x", "log_p", "value", "grad"), map(torch.cat, zip(*parts))))

def das(world, groups, particles, args, guided=True, ess=0.5, max_shift=None):
    """Weighted particles of p exp(r / kl_weight) -> x (G, P, L), reward, held_out and log_w (G, P).
    guided=False is the bootstrap filter, as is a reward without a gradient; ess=0 never resamples: with both, weights
    are exp(r / kl_weight) of samples of p. One particle is guidance alone."""
    steps, kl_weight, max_shift = world.steps, args.kl_weight or world.kl_weight, max_shift or args.max_shift
    temper = [min((1 + args.gamma) ** (100 * i / steps) - 1, 1) for i in range(steps)] + [1]
    def step(state, i):
        x, log_p, left = state["x"], state["log_p"], steps - i
        log_q = tilt(log_p, x, temper[i + 1] * state["grad"], left, max_shift)
        x, new = unmask(log_q, x, left)
        log_ratio = letters_log_p(log_p, x, new) - letters_log_p(log_q, x, new)
        due = new.any(2)  # where no letter was set, nothing has changed
        for name, known in look(world, x[due], kl_weight, args.chunk, guided).items() if due.any() else ():
            state[name] = state[name].index_put((due,), known)
        return state | dict(log_twist=temper[i + 1] * state["value"]), log_ratio
    start = look(world, torch.full((1, world.length), MASK), kl_weight, args.chunk, guided)
    start = {name: v.expand(groups, particles, *v.shape[1:]) for name, v in start.items()}  # all alike
    state, log_w = smc(step, start | dict(log_twist=0 * start["value"]), steps, ess)
    held_out = [world.held_out(F.one_hot(x, 4).float()) for x in state["x"].flatten(0, 1).split(args.chunk)]
    held_out = torch.cat(held_out).view_as(log_w)
    return dict(x=state["x"], reward=state["value"] * kl_weight, held_out=held_out, log_w=log_w)

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

# ---- files, figure, main ---------------------------------------------------------------------------------------------
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

def measure(world, problem, method, out, args):
    """Rows of a method's particles: means over groups of their weighted means, beside the exact values of mpsa."""
    kl_weight, w = args.kl_weight or world.kl_weight, out["log_w"].softmax(1)
    exact = exact_values(world, kl_weight if method != "pretrained" else math.inf)
    values = {key: (w * out[key]).sum(1) for key in ("reward", "held_out")}  # (G,)
    rows = [(key, v.mean(), v.std() / len(v) ** 0.5, exact.get(key)) for key, v in values.items()]
    if method in ("importance", "bootstrap", "das"):
        z = out["log_w"].exp().mean(1)
        rows.append(("log_z", z.mean().log(), z.std() / z.mean() / len(z) ** 0.5, exact.get("log_z")))
    if problem != world.name:  # of one group, of so many particles
        rows = [("error_of_reward", (values["reward"] - exact["reward"]).square().mean().sqrt(), None, 0)]
    return [(problem, method, *row) for row in rows]

def draw(args, rows):
    """Reward and held-out reward of every method on a problem; for mpsa the error by particles."""
    number, study, figure = {r[:3]: r[3:] for r in rows}, "mpsa" in args.problem, Figure((9, 3), layout="constrained")
    axes = figure.subplots(1, len(args.problem) + study, squeeze=False)[0]
    for problem, ax in zip(args.problem, axes):
        for key, fmt, color in (("reward", "o", "#0072B2"), ("held_out", "s", "#E69F00")):
            for method in args.methods:
                value, se, exact = number[problem, method, key]
                ax.errorbar(value.item(), method, xerr=2 * se.item(), fmt=fmt, color=color, capsize=3)
            ax.axvline(math.nan if exact is None else exact.item(), color=color, linestyle=":")
        ax.set_title(f"{problem}: reward (circles), held out", fontsize=9)
        ax.invert_yaxis()
    for method, color in COLORS.items() if study else ():
        sizes = [int(r[0][5:]) for r in rows if r[1:3] == (method, "error_of_reward")]
        errors = [number[f"mpsa_{n}", method, "error_of_reward"][0].cpu() for n in sizes]
        axes[-1].loglog(sizes, errors, ".-", color=color, label=method)
        axes[-1].set(ylim=(0.01, 3), xlabel="particles in a group", ylabel="mpsa: error of E[r]")
        axes[-1].legend(fontsize=8, loc="lower left")
    return figure

def main(args):
    started, found, rows, coarse = time.time(), {}, [], args.size[3] < 8
    torch.set_default_device(args.device)
    print("COARSE: numbers mean nothing" if coarse else "reward: E[r] of the weighted particles, held_out: by replicate"
          " 2 and oracle B; se: over groups; exact: of infinitely many steps, 64 cost .004 of log_z")
    for name in args.problem:
        world, (groups, particles) = Rewarded(args, name), args.size[:2] if name == "mpsa" else args.size[2:]
        jobs = [(name, m, *((4 * groups, 1) if m == "guidance" else (groups, particles))) for m in args.methods]
        sizes = () if name != "mpsa" else (10, 30) if coarse else (10, 30, 100, 300)
        jobs += [(f"mpsa_{n}", method, groups // 2, n) for method in COLORS for n in sizes]
        for problem, method, *shape in jobs:
            torch.manual_seed(args.seed + 100 * PROBLEMS.index(name))
            out = das(world, *shape, args, **METHODS[method])
            found[problem, method] = out | dict(log_w=out["log_w"] * POWER.get(method, 1))
            rows += measure(world, problem, method, found[problem, method], args)
    save_sequences(args, {names: out for names, out in found.items() if names[0] in args.problem})
    report(args, rows, started, lambda: draw(args, rows))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
