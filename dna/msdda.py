"""Merge masked diffusion models of DNA, tuned for one reward each, into a model for any weighting of the rewards.
Paper: Zhang, Wang and Zou, "Step-level Denoising-time Diffusion Alignment with Multiple Objectives" (MSDDA), 2026,
arXiv 2604.14379, of images and Gaussian kernels; its text was not at hand. figure.png: Pareto fronts of two rewards.
Run    python dna/msdda.py                              both problems; 4 CPU minutes, --quick: 20 s
       python dna/msdda.py --problem hepg2 --cells gm12878 hesc          other cell types
Read first: merge, msdda, letter_by_letter. Skip: World, the networks, checked, report, draw.
Problems: mpsa, 9 letters, rewards: measured inclusion, and number of G and C; all is exact; hepg2, 200 letters, models
    of the elements accessible in a cell type: p(x) exp(r) / Z with r = log P(cell | x), which oracles A and B estimate
Notation (here -> usual symbol); G groups of P interacting particles: x (G, P, L) letters or MASK, log_w (G, P)
    weights -> w_i         of the rewards; the pretrained p takes the rest, 1 - sum_i w_i
    log_p                  log probabilities of letters, one place at a time, by each model; models p exp(r_i) / Z_i
    log_c -> log C_t       log of the sum over letters of prod_i p_i(letter)^w_i
Algorithm: 1. msdda: ask all models for their letters, where one was set since they were asked
    2. merge: multiply the probabilities and normalise (blend: a plain average)
    3. msdda: set some letters. Ours (row msdda_ct): smc adds log C of these to the weights and resamples, at no call
soup averages the parameters (Rewarded Soup; tables have none); target weights p's samples by exp(sum_i w_i r_i).
The theorem: let V_i = E[r_i | x] under p. Kernels p(letter) exp(V_i) multiply to that of sum_i w_i r_i: V is linear
    in r. Models of p exp(r_i) do so only as paths: the merge drops C.
What you should see (seed 0): mpsa, exact, at (1/2, 1/2): the theorem's models merge to a distribution .307 nats from
    the target, models of p exp(r_i) to one .058 away, blended .373. Mean inclusion at (1/4, 3/4): msdda .576, with C
    .414, target .429. hepg2: the models are 2 nats apart and C changes nothing: log P by oracle B is -2.09, -1.68 for
    msdda, -2.11, -1.66 with C, -2.11, -1.68 for the soup, se .14, .11; target -1.93, -1.66. At (1, 1) the soup has
    106.5 letters G and C, msdda 96.4, the target 94.7 +- 1.6. To try: --steps 512 --problem mpsa.
"""
import argparse, copy, json, math, os, pathlib, sys, time
import numpy as np
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

HERE, MASK, PROBLEMS = pathlib.Path(__file__).resolve().parent, 4, ["mpsa", "hepg2", "data"]
METHODS = dict(target="k", soup="#CC79A7", blend="#E69F00", msdda="#D55E00", msdda_ct="#0072B2")
SWEEP = [(0.5, 0.5), (0.25, 0.75), (0.75, 0.25), (1.0, 1.0)]  # weights of the rewards

def parse_args(argv=None):
    parser = common_flags(__doc__, (100, 100, 16, 8, 4), quick=(8, 30, 2, 4, 1), paper=(100, 1000, 100, 16, 4))
    parser.add_argument("--cells", nargs=2, default=["hepg2", "k562"], help="cell types whose models to merge")
    args = parser.parse_args(argv)
    if args.cells[0] == args.cells[1]:
        parser.error("--cells: two different ones")
    return checked(parser, args)

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

# ---- the problem: models, exact answers ------------------------------------------------------------------------------
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

class Models:
    """What to merge: names of the rewards r_i, denoisers of their models, the last of the pretrained p, and oracles. Of
    mpsa, by enumeration, log_q (3, 4^9) of the models and tables {row: value of each sequence}."""
    def __init__(self, args, world):
        self.world, self.names, self.log_q = world, args.cells, None
        if world.p is None:
            files = [args.checkpoints / f"{world.name}_cell_{cell}.pt" for cell in args.cells]
            self.denoisers = [load_network(file, MaskedDenoiser)[0] for file in files] + [world.net]
            files = {k: args.checkpoints / f"{world.name}_oracle_{k}.pt" for k in "ab"}
            self.oracles = {k: load_network(file, Oracle)[0] for k, file in files.items()}
            self.shown = [f"b_{cell}" for cell in args.cells]
            return
        gc = F.one_hot(torch.cartesian_prod(*[torch.arange(4)] * 9), 4)[..., 1:3].sum((1, 2)).double()
        self.names, self.tables = ["included", "gc_rich"], dict(reward=world.r, held_out=world.held_r, gc=gc)
        self.values, self.shown = torch.stack([world.r / 0.25, gc / 2, 0 * gc]), ["reward", "gc"]  # your own
        self.log_q = (world.p.log() + self.values).log_softmax(1)
        self.denoisers = [ExactDenoiser(q.exp()) for q in self.log_q]
    def judge(self, x):
        """Sequences x (n, L) -> {row: value (n,)}: log probability of each cell type by oracle A and B."""
        if self.log_q is not None:
            return {key: value[(x * 4 ** torch.arange(8, -1, -1)).sum(1)] for key, value in self.tables.items()}
        letters = F.one_hot(x, 4).float()
        return dict(gc=letters[..., 1:3].sum((1, 2))) | {
            f"{key}_{cell}": F.logsigmoid(oracle.score(letters, cell))  # of log odds
            for key, oracle in self.oracles.items() for cell in self.names}
    def exact(self, method, weights):
        """{row: exact value} of mpsa: means of a method with infinitely many steps, its KL from the target p exp(sum_i
        w_i r_i) / Z, log Z. step_level: of the optimum; shift: what its merged models change of it, total variation."""
        if self.log_q is None:
            return {}
        shares = torch.tensor([*weights, 1 - sum(weights)]).double()
        joint = shares @ self.log_q
        target, rules = joint.softmax(0), dict(blend=blend, msdda=merge, step_level=merge)
        rows, p = dict(log_z=joint.logsumexp(0)), target
        if method in rules:
            base, models = self.log_q[2].exp(), self.denoisers
            if method == "step_level":
                models = [step_level(base, value) for value in self.values]
                optimum = letter_by_letter(step_level(base, shares @ self.values), 9)
            p = letter_by_letter(lambda x: rules[method](torch.stack([f(x) for f in models]), shares.tolist())[0], 9)
            rows |= dict(shift=(p - optimum).abs().sum() / 2) if method == "step_level" else {}
        return rows | {key: p @ value for key, value in self.tables.items()} | dict(kl=target @ (target / p).log())

def step_level(p, value):
    """Denoiser of the step-level optimum: p(letter) exp(V), normalised; V = E[value | x and this letter] under p (4^L,)
    by enumeration."""
    base, length = ExactDenoiser(p), round(math.log(len(p), 4))
    mass = (p * value).view([4] * length)
    for axis in range(length):
        mass = torch.cat([mass, mass.sum(axis, keepdim=True)], axis)
    mean = mass.flatten() / base.log_mass.exp()
    def denoiser(x):
        letter = (torch.arange(4) - x[:, :, None]) * base.place[:, None]
        return (base(x) + mean[(x * base.place).sum(1)[:, None, None] + letter]).log_softmax(2)
    return denoiser

def letter_by_letter(denoiser, length):
    """The exact distribution (4^L,) of a sampler of infinitely many steps: one letter after the other in random order.
    The probability of every masked sequence, from all masked on, is what arrives from those with one mask more."""
    states, place = torch.cartesian_prod(*[torch.arange(5)] * length), 5 ** torch.arange(length - 1, -1, -1)
    mass, masks = torch.zeros(len(states)).double(), (states == MASK).sum(1)
    mass[-1] = 1
    for k in range(length, 0, -1):
        for rows in (masks == k).nonzero()[:, 0].split(2**15):
            x = states[rows]
            p, to = denoiser(x).exp() * mass[rows, None, None] / k, (torch.arange(4) - MASK) * place[:, None]
            mass.index_add_(0, (rows[:, None, None] + to)[x == MASK].flatten(), p[x == MASK].flatten().double())
    return mass[masks == 0]

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

def merge(log_p, weights):
    """prod_i p_i(letter)^w_i = C p(letter), sum_i w_i = 1: log_p (m, ..., L, 4) -> the merged, log C (..., L)."""
    joint = torch.einsum("m,m...->...", log_p.new_tensor(weights), log_p)
    return joint.log_softmax(-1), joint.logsumexp(-1)

def blend(log_p, weights):
    """The average of the probabilities (at least 1e-9: weights may be negative), and no C."""
    mean = torch.einsum("m,m...->...", log_p.new_tensor(weights), log_p.exp()).clamp(min=1e-9).log()
    return mean.log_softmax(-1), 0 * mean[..., 0]

@torch.no_grad()
def msdda(world, models, weights, shape, chunk, rule=merge, corrected=False, ess=0.5):
    """Samples of the merged models in groups, shape (G, P) -> x (G, P, L), log_w (G, P). corrected: C in log_w."""
    def ask(x):  # (n, L) -> (n, m, L, 4)
        return torch.cat([torch.stack([model(part) for model in models], 1) for part in x.split(chunk)])
    def step(state, i):
        log_p, log_c = rule(state["log_p_i"].movedim(2, 0), weights)
        x, new = unmask(log_p, state["x"], world.steps - i)
        due = new.any(2)  # where no letter was set, nothing has changed
        log_p_i = state["log_p_i"].index_put((due,), ask(x[due])) if due.any() else state["log_p_i"]
        return dict(state, x=x, log_p_i=log_p_i), torch.where(new, log_c, 0).sum(2) * corrected
    x = torch.full((*shape, world.length), MASK)
    start = dict(x=x, log_p_i=ask(x[0, :1]).expand(*shape, -1, -1, -1), log_twist=torch.zeros(shape).double())
    state, log_w = smc(step, start, world.steps, ess)
    return dict(x=state["x"], log_w=log_w)

def soup(nets, weights):
    """Rewarded soup: one network, its parameters the average of those tuned from one."""
    net, states = copy.deepcopy(nets[0]), [net.state_dict() for net in nets]
    net.load_state_dict({name: sum(w * s[name] for w, s in zip(weights, states)) for name in states[0]})
    return net

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

def sample(method, parts, weights, args, shape, base):
    """One of METHODS, or models alone, at weights (2,) -> x (G, P, L), log_w (G, P). base: samples of p, which the
    target weights by oracle A; where it is enumerated it is drawn."""
    shares = [*weights, 1 - sum(weights)]
    asked, shares = zip(*((f, w) for f, w in zip(parts.denoisers, shares) if abs(w) > 1e-6))
    if method == "target" and parts.log_q is not None:
        p = (torch.tensor([*weights, 1 - sum(weights)]).double() @ parts.log_q).softmax(0)
        x = p.multinomial(shape[0] * shape[1], True)[:, None] // 4 ** torch.arange(8, -1, -1) % 4
        return dict(x=x.view(*shape, 9), log_w=torch.zeros(shape).double())
    if method == "target":
        found = [parts.judge(x) for x in base["x"]]
        r = torch.stack([sum(w * v[f"a_{cell}"] for w, cell in zip(weights, parts.names)) for v in found])
        return dict(x=base["x"], log_w=r.double())
    asked, shares = ([soup(asked, shares)], [1.0]) if method == "soup" else (asked, shares)
    rule = blend if method == "blend" else merge
    return msdda(parts.world, asked, shares, shape, args.chunk, rule, method == "msdda_ct")

def measure(parts, out, exact):
    """Rows of samples, means over groups, beside exact ones; what is saved."""
    judged = [parts.judge(x) for x in out["x"]]
    values, w = {key: torch.stack([v[key] for v in judged]) for key in judged[0]}, out["log_w"].softmax(1)
    means = {key: (w * v).sum(1) for key, v in values.items()}
    rows = [(key, v.mean(), v.std() / len(v) ** 0.5, exact.get(key)) for key, v in means.items()]
    if out["log_w"].any():
        z = out["log_w"].exp().mean(1)
        rows += [("log_z", z.mean().log(), z.std() / z.mean() / len(z) ** 0.5, exact.get("log_z"))]
        rows += [("effective_share", 1 / w.square().sum(1).mean() / w.shape[1], None, None)]
    return rows, out | values

def draw(rows, problems, shown):
    """Means of two judges, a line through the weights (0, 1) to (1, 0) for each method."""
    figure, number = Figure((9, 4), layout="constrained"), {r[:3]: r[3:5] for r in rows}
    for ax, name in zip(figure.subplots(1, len(problems), squeeze=False)[0], problems):
        for method, color in METHODS.items():
            path = sorted(w for w in SWEEP if sum(w) == 1 and (f"{name}_{w[0]:g}_{w[1]:g}", method, "gc") in number)
            points = [[number[f"{name}_{a:g}_{b:g}", method, key] for a, b in path] for key in shown[name]]
            (x, dx), (y, dy) = (zip(*((v.item(), 2 * se.item()) for v, se in p)) if p else ((), ()) for p in points)
            ax.errorbar(x, y, dy, dx, fmt="o-", color=color, ms=4, lw=0.8, label=method)
        for alone in dict.fromkeys(r[1] for r in rows if r[0] == name):
            x, y = (number[name, alone, key][0].item() for key in shown[name])
            ax.plot(x, y, "k*")
            ax.annotate(alone, (x, y), (5, 5), textcoords="offset points", fontsize=9)
        ax.set(title=name, xlabel=shown[name][0], ylabel=shown[name][1], xmargin=0.2, ymargin=0.1)
        ax.locator_params(nbins=6)
        ax.legend(fontsize=8)
    return figure

def main(args):
    started, found, rows, shown = time.time(), {}, [], {}
    torch.set_default_device(args.device)
    print("COARSE: numbers mean nothing" if args.size[4] < 4 else "name_w1_w2: weights of the rewards; a_, b_: log "
          "probability by oracle A, B; kl: nats from the target; se: over groups; exact: of infinitely many steps")
    for name in args.problem:
        world, shape = World(args, name), args.size[:2] if name == "mpsa" else args.size[2:4]
        parts = Models(args, world)
        jobs = [(name, w, m) for w, m in zip([(0, 0), (1, 0), (0, 1)], ["pretrained", *parts.names])]
        jobs += [(f"{name}_{w[0]:g}_{w[1]:g}", w, m) for w in SWEEP[: args.size[4]] for m in METHODS
                 if (m != "soup" or world.p is None) and (m != "blend" or sum(w) == 1)]
        for problem, weights, method in jobs:
            torch.manual_seed(args.seed + 100 * PROBLEMS.index(name))
            exact = parts.exact(method, weights)
            out = sample(method, parts, weights, args, shape, found.get((name, "pretrained")))
            values, out = measure(parts, out, exact)
            values += [("kl", exact["kl"], None, None)] if "kl" in exact and method in ("blend", "msdda") else []
            rows += [(problem, method, *row) for row in values]
            if problem == name or weights == SWEEP[0]:
                found[name, method] = out
        if world.p is not None and args.size[4] > 1:
            exact = parts.exact("step_level", SWEEP[0])
            rows += [("mpsa_0.5_0.5", "step_level", key, exact[key], None, None)
                     for key in ("reward", "gc", "kl", "shift")]
        shown[name] = parts.shown
    save_sequences(args, found)
    report(args, rows, started, lambda: draw(rows, args.problem, shown))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
