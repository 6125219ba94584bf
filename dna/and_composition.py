"""Compose masked diffusion models of DNA by AND: the product of their distributions whose worst KL from them is least.
Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104, of images. figure.png: multipliers by round, KLs, properties (its Fig. 5, 6).
Run    python dna/and_composition.py                    both problems; 5 CPU minutes, --quick: 15 s
       python dna/and_composition.py --problem hepg2 --cells hepg2 k562                  two cell types
Read first: compose, run, dual_step. Skip: World, the networks, checked, report, draw.
Problems: mpsa, two tilts of a distribution of 9 letters, by measured inclusion and by G and C, hard to have at once;
    all is exact; hepg2, 200 letters, models of elements accessible in a cell type: p(x) P(cell | x) / P(cell)
Notation (here -> paper); G groups of P particles: x (G, P, L) letters 0 to 3 or MASK, log_w (G, P)
    dual -> lambda         multipliers, of sum one: the exponents of the models q_i; -log Z -> D_AND, the dual function
Algorithm: 1. compose: letters from the product of the models', place by place; its normaliser C is smc's weight
    2. run: KLs, the gradient of -log Z, are means of -log_q but for what all share. A step sets a place with the same
       probability in all models: if it sets one letter, the product of the paths is that of the sequences
    3. dual_step: the Hessian of -log Z is -cov(log_q); back to 1. The second half of the rounds is averaged
    algorithm_3 is the paper's but for the step: no C; its KLs are of letters, summed over the steps (Lemma 1).
What you should see (seed 0): mpsa, the best multipliers are (.414, .586), worst KL 1.451; equal weights have 2.05, smc
    finds (.415, .585). algorithm_3 ends at (.392, .608), and what it draws is not that product: KLs of its paths 1.58
    and 1.60, where the product has 1.70 and 1.29. hepg2, models 1.5 to 2 nats apart: multipliers (.366, .340, .295)
    lower the worst KL from .633 to .579 +- .007; 2% of the sequences are above chance in all three cell types by
    oracle B, as at equal weights.
"""
import argparse, json, math, os, pathlib, sys, time
import numpy as np
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

HERE, MASK, PROBLEMS = pathlib.Path(__file__).resolve().parent, 4, ["mpsa", "hepg2", "data"]
METHODS = dict(equal_weights="#E69F00", algorithm_3="#D55E00", smc="#0072B2")

def parse_args(argv=None):
    parser = common_flags(__doc__, (100, 100, 40, 12, 16, 16, 4, 6), quick=(8, 30, 4, 3, 3, 4, 1, 1),
                          paper=(100, 1000, 100, 50, 640, 16, 64, 50))
    parser.add_argument("--cells", nargs="+", default=["hepg2", "k562", "gm12878"], help="whose models to compose")
    args = parser.parse_args(argv)
    if not 1 < len(args.cells) == len({*args.cells}):
        parser.error("--cells: two or more, each once")
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

# ---- the problem: models, exact product ------------------------------------------------------------------------------
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

class Parts:
    """What to compose: names (m,) and denoisers of the models q_i, oracles that judge what they draw. Of mpsa, by
    enumeration, log_q (m, 4^9), tables {row: value of each sequence} and best, the rows of the best multipliers."""
    def __init__(self, args, world):
        self.names, self.log_q, self.best = args.cells, None, {}
        if world.p is None:
            files = [args.checkpoints / f"{world.name}_cell_{cell}.pt" for cell in args.cells]
            self.denoisers = [load_network(file, MaskedDenoiser)[0] for file in files]
            files = {k: args.checkpoints / f"{world.name}_oracle_{k}.pt" for k in "ab"}
            self.oracles = {k: load_network(file, Oracle)[0] for k, file in files.items()}
            return
        gc = F.one_hot(torch.cartesian_prod(*[torch.arange(4)] * 9), 4)[..., 1:3].sum((1, 2)).double()
        self.names, self.tables = ["included", "gc_rich"], dict(reward=world.r, held_out=world.held_r, gc=gc)
        self.log_q = torch.stack([(world.p.log() + v).log_softmax(0) for v in (world.r / 0.25, gc / 2)])  # your own
        self.denoisers, dual = [ExactDenoiser(q.exp()) for q in self.log_q], torch.tensor([0.5, 0.5]).double().cpu()
        for _ in range(60):
            dual = dual_step(dual, *self.product(dual)[:2], simplex=True)
        self.best = dict(zip(("dual_included", "dual_gc_rich"), dual), worst_kl=self.product(dual)[0].max())
    def judge(self, x):
        """Sequences x (n, L) -> {row: value (n,)}: log odds of each cell type, and if they are above chance in all."""
        if self.log_q is not None:
            return {key: value[(x * 4 ** torch.arange(8, -1, -1)).sum(1)] for key, value in self.tables.items()}
        letters = F.one_hot(x, 4).float()
        values = dict(gc=letters[..., 1:3].sum((1, 2)))
        for key, oracle in self.oracles.items():
            odds = {f"{key}_{cell}": oracle.score(letters, cell) for cell in self.names}
            above = torch.stack([*odds.values()]) > -math.log(len(oracle.architecture["names"]) - 1)
            values |= odds | {f"{key}_all": above.all(0).float()}
        return values
    def product(self, dual):
        """Of p = prod_i q_i^dual_i / Z, exactly: KL(p || q_i) (m,), whose mean by dual is -log Z; covariance of log_q
        (m, m); {row: exact value}, with the best multipliers and worst KL; {} where nothing is enumerated."""
        if self.log_q is None:
            return None, None, {}
        log_p = (dual.to(self.log_q) @ self.log_q).log_softmax(0)
        p, rows = log_p.exp(), {f"kl_{name}": log_p.exp() @ (log_p - q) for name, q in zip(self.names, self.log_q)}
        kls = torch.stack([*rows.values()]).cpu()
        rows |= {key: p @ value for key, value in self.tables.items()} | dict(dual_value=dual @ kls)
        return kls, self.log_q.cov(correction=0, aweights=p).cpu(), rows | self.best

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

@torch.no_grad()
def compose(world, models, dual, shape, chunk, weighted=True):
    """Samples of prod_i q_i^dual_i / Z in groups: x (G, P, L), log_w (G, P), log_q (G, P, m) of their paths by models;
    kl (G, m), nats: of the paths from each model, of the product by the weights, unweighted those that were drawn.
    prod_i p_i(letter)^dual_i = C p(letter): draws are from p, and the C of the letters set weight the step."""
    share, shape = dual.to(torch.ones(())).double(), (*shape, world.length)
    def ask(x):  # (n, L) -> (n, m, L, 4)
        return torch.cat([torch.stack([q(part) for q in models], 1) for part in x.split(chunk)])
    def step(state, i):
        x, log_p_i, left = state["x"], state["log_p_i"], world.steps - i
        joint = torch.einsum("m,gpmla->gpla", share.to(log_p_i), log_p_i)
        log_c = joint.logsumexp(3)
        log_p = joint - log_c[..., None]
        kl = torch.einsum("gpla,gpmla->gpml", log_p.exp(), log_p[:, :, None] - log_p_i)  # of a letter
        kl = torch.where((x == MASK)[:, :, None], kl, 0).sum(3) / left
        x, new = unmask(log_p, x, left)
        log_q = letters_log_p(log_p_i, x[:, :, None].expand(kl.shape + x.shape[2:]), new[:, :, None])
        due = new.any(2)  # where no letter was set, nothing has changed
        log_p_i = log_p_i.index_put((due,), ask(x[due])) if due.any() else log_p_i
        sums = dict(log_q=state["log_q"] + log_q, kl=state["kl"] + kl)
        return state | sums | dict(x=x, log_p_i=log_p_i), torch.where(new, log_c, 0).sum(2) * weighted
    x, zeros = torch.full(shape, MASK), torch.zeros(*shape[:2], len(models)).double()
    start = dict(x=x, log_p_i=ask(x[0, :1]).expand(*shape[:2], -1, -1, -1), log_q=zeros, kl=zeros)
    state, log_w = smc(step, start | dict(log_twist=zeros[..., 0]), world.steps, ess=0)  # not resampled
    log_q, kl = state["log_q"], state["kl"]
    if weighted:  # the mean of log p - log q_i over paths of p, by the weights, less what has mean zero over the draws
        gap = (log_q @ share)[..., None] - log_q
        noise = gap - log_w[..., None] - kl
        kl = log_w.softmax(1)[..., None] * gap * shape[1] - noise - log_w.exp().mean(1)[:, None, None].log()
    return dict(x=state["x"], log_q=log_q, log_w=log_w, kl=kl.mean(1))

def run(method, world, parts, args, size, seed):
    """One of METHODS, or a model alone by its name -> what compose returns, at multipliers dual (m,), and path, those
    of all rounds (rounds + 1, m)."""
    (*shape, few, rounds), alone = size, [float(name == method) for name in parts.names]
    path = [torch.tensor(alone if sum(alone) else [1 / len(alone)] * len(alone), dtype=torch.float64, device="cpu")]
    for left in reversed(range(1 + rounds * (method in ("algorithm_3", "smc")))):
        dual = path[-1] if left else torch.stack(path[len(path) // 2 :]).mean(0)
        torch.manual_seed(seed + 1000 * left)  # the last draws have the same noise in all methods
        now = (1, few * shape[1]) if left else shape  # a round has one group
        out = compose(world, parts.denoisers, dual, now, args.chunk, method in ("equal_weights", "smc"))
        if left:
            curvature = out["log_q"][0].T.cov(aweights=out["log_w"][0].softmax(0))
            path.append(dual_step(dual, out["kl"][0].cpu(), curvature.cpu(), simplex=True))
    return out | dict(path=torch.stack(path), dual=dual)

def dual_step(dual, slack, curvature, simplex):
    """Multipliers (m,) half way to the maximum of the dual function's quadratic expansion: slack (m,) is its gradient,
    -curvature (m, m) its Hessian; over dual >= 0, of sum one on the simplex. Half way halves the noise of estimates."""
    start, a, b = (v.numpy() for v in (dual, curvature, slack))
    unit = abs(a).max() + abs(b).max()  # the solver wants numbers of order one
    loss = lambda v: ((v - start) @ a @ (v - start) / 2 - (v - start) @ b) / unit
    found = minimize(loss, start, method="SLSQP", bounds=[(0, None)] * len(start), options=dict(ftol=1e-12),
                     constraints=[dict(type="eq", fun=lambda v: v.sum() - 1)] * simplex)
    return (dual + torch.from_numpy(found.x).clamp(min=0)) / 2

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

def measure(parts, out):
    """Rows of what run returns; what is saved of it."""
    w, z = out["log_w"].softmax(1), out["log_w"].exp().mean(1)
    judged, exact = [parts.judge(x) for x in out["x"]], parts.product(out["dual"])[2]
    values = {key: torch.stack([v[key] for v in judged]) for key in judged[0]}  # (G, P)
    means = {f"kl_{name}": v for name, v in zip(parts.names, out["kl"].T)}
    means |= {key: (w * v).sum(1) for key, v in values.items()}
    rows = [(f"dual_{name}", v, None) for name, v in zip(parts.names, out["dual"])]
    rows += [(key, v.mean(), v.std() / len(v) ** 0.5) for key, v in means.items()]
    rows += [("worst_kl", out["kl"].mean(0).max(), None)]
    rows += [("effective_share", 1 / w.square().sum(1).mean() / w.shape[1], None)]
    rows += [("dual_value", -z.mean().log(), z.std() / z.mean() / len(z) ** 0.5)] * bool(out["log_w"].any())
    return [(*row, exact.get(row[0])) for row in rows], dict(values, x=out["x"], log_w=out["log_w"])

def draw(rows, results):
    """Multipliers of the first model by round; KLs from all; what is drawn, by two judges. Exact: dotted."""
    figure, number = Figure((9, 2.8 * len(results)), layout="constrained"), {r[:3]: r[3:] for r in rows}
    for line, (problem, (names, paths)) in zip(figure.subplots(len(results), 3, squeeze=False), results.items()):
        shown = ["reward", "gc"] if problem == "mpsa" else [f"b_{cell}" for cell in names[:2]]
        for k, (method, path) in enumerate(paths.items()):
            style = dict(fmt="o", color=METHODS.get(method, "k"), capsize=3)
            if method in METHODS:
                line[0].plot(path[:, 0], ".-", color=METHODS[method], label=method)
            for j, name in enumerate(names * (method in METHODS)):
                value, se, _ = number[problem, method, f"kl_{name}"]
                line[1].errorbar(j + 0.1 * k, value.item(), 2 * se.item(), **style)
            (x, dx, _), (y, dy, _) = (number[problem, method, key] for key in shown)
            line[2].errorbar(x.item(), y.item(), 2 * dy.item(), 2 * dx.item(), **style)
            line[2].annotate(method * (method not in METHODS), (x.item(), y.item()), (5, 5),
                             textcoords="offset points", fontsize=9)
        for ax, key in zip(line, (f"dual_{names[0]}", "worst_kl")):
            ax.axhline(number[problem, "smc", key][2] or math.nan, color="k", linestyle=":")
        line[0].set(ylabel=problem, xlabel="round", title=f"multiplier of {names[0]}")
        line[1].set(title="KL from the models, nats", xticks=[j + 0.1 for j in range(len(names))], xticklabels=names)
        line[2].set(xlabel=shown[0], ylabel=shown[1], xmargin=0.3, ymargin=0.2)
    figure.axes[0].legend(fontsize=8)
    return figure

def main(args):
    started, found, rows, results = time.time(), {}, [], {}
    torch.set_default_device(args.device)
    print("COARSE: numbers mean nothing" if args.size[3] < 12 else "kl: nats, of paths; a_, b_: log odds by oracle A, "
          "B, all: share above chance in all; se: over groups; exact: of infinitely many steps, 64 cost .02 of D")
    for name in args.problem:
        world, size = World(args, name), args.size[:4] if name == "mpsa" else args.size[4:]
        parts, seed, paths = Parts(args, world), args.seed + 100 * PROBLEMS.index(name), {}
        for method in [*METHODS, *parts.names]:
            out = run(method, world, parts, args, size, seed)
            values, found[name, method] = measure(parts, out)
            rows += [(name, method, *row) for row in values]
            paths[method] = out["path"]
        results[name] = parts.names, paths
    save_sequences(args, found)
    report(args, rows, started, lambda: draw(rows, results))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
