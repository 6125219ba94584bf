"""One masked diffusion model of DNA for several (OR): it covers all of them, weighted for the one covered worst.
Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104, appendix E, which has it in 2D alone (toy/or_composition.py): DNA is ours. figure.png:
KL of each model from the one network, the mixture beside; weights by round.
Run    python dna/or_composition.py             both problems; 5 CPU minutes, --quick: 20 s
       python dna/or_composition.py --problem hepg2 --cells hepg2 k562 gm12878 hesc
       python dna/or_composition.py --paper --device cuda      longer; not run here
Read first: cover, step_kl, draw_paths, dual_step. Skip: World, the networks, report, draw.
Problems: mpsa, two tilts of the distribution of splice sites, TILTS, which can be enumerated; hepg2 and data, the
    models of cell types that pretrain.py made, for elements open in each.
Notation (here -> paper); min over p of max_i ...
    q_i, dual -> q^i, lambda   models; multipliers, which are also the shares of the mixture
    kl -> (UF-C), elbo -> (70)  KL(q_i || p), the problem as written; E_{q_i}[-log p], the problem that is solved
    mixture -> q_mix           sum_i dual_i q_i, the best model at these multipliers: picks a q_i and keeps it
Algorithm 1. draw_paths: paths of every q_i, and the letters that it predicts there
          2. cover: descend on the KLs of the paths from the network's, each times its multiplier
          3. dual_step: raise the multipliers of the models covered worse, on the simplex; repeat
kl and elbo differ by the entropy of q_i, not the same for all i: elbo gives weight to models of much entropy.
What you should see (seed 0): mpsa, kl: KLs .63 and .62 (mixture: .44 each) at a weight of .61 for `included` (exact
    .49); equal weights .77 and .45. elbo: weight .13 (.09), KLs 1.61 and .09 (1.56, .05). hepg2, in the order of
    --cells, kl .71, .73, .70, equal weights .74, .64, .62, base .82, .65, .68, mixture .43, se .01 to .02: not better.
"""
import argparse, copy, json, math, os, pathlib, sys, time
import numpy as np
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F
from tqdm import trange

HERE, MASK, PROBLEMS = pathlib.Path(__file__).resolve().parent, 4, ["mpsa", "hepg2", "data"]
METHODS = dict(equal_weights="#E69F00", kl="#009E73", elbo="#0072B2")  # the last two move their weights
TILTS = dict(included=(2.0, 0.0), gc_rich=(0.0, 1.0))  # your own: of mpsa, per log10 of inclusion, per letter G or C

def parse_args(argv=None):
    # rounds, batch of each model, paths of each to train on and to measure with, of mpsa; then of the others
    parser = common_flags(__doc__, size=(150, 32, 1000, 2000, 24, 8, 128, 64), quick=(3, 8, 50, 100, 2, 2, 3, 3),
                          paper=(600, 128, 10_000, 10_000, 600, 64, 1000, 1000))
    add = parser.add_argument
    add("--cells", nargs="+", default=["hepg2", "k562", "gm12878"], help="models to cover, of cell types; not for mpsa")
    add("--objective", nargs="+", choices=["kl", "elbo"], default=["kl", "elbo"])
    add("--every", type=int, default=10, help="updates in a round, after which the weights move")
    add("--lr", type=float, default=4e-4)
    args = checked(parser, parser.parse_args(argv))
    if len(set(args.cells)) < max(2, len(args.cells)):
        parser.error("--cells: a mixture is of two or more, all different")
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

# ---- the problem: models, their paths, the exact mixture -------------------------------------------------------------
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

def models(args, world):
    """{name: denoiser} of the models q_i, and of mpsa log q_i (m, 4^9)."""
    if world.p is None:
        file = lambda cell: args.checkpoints / f"{world.name}_cell_{cell}.pt"
        return {cell: load_network(file(cell), MaskedDenoiser)[0] for cell in args.cells}, None
    x = torch.cartesian_prod(*[torch.arange(4)] * world.length)
    gc = ((x == 1) | (x == 2)).sum(1)
    log_q = torch.stack([(world.p.log() + a * world.r + b * gc).log_softmax(0) for a, b in TILTS.values()])
    return {name: ExactDenoiser(q.exp()) for name, q in zip(TILTS, log_q)}, log_q.cpu()

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
def draw_paths(world, nets, lead, n, chunk):
    """n paths of nets[lead] -> tokens x (T + 1, n, L), its log_p (T, n, L, 4), and log_q (n, m): log probability of the
    letters of the whole path under each of the m models."""
    x, log_q, path, found = torch.full((n, world.length), MASK), torch.zeros(n, len(nets)).double(), [], []
    known = [net(x[:1]).repeat(n, 1, 1) for net in nets]
    for left in range(world.steps, 0, -1):
        path.append(x)
        found.append(known[lead].float())
        x, new = unmask(known[lead], x, left)
        log_q += torch.stack([letters_log_p(log_p, x, new).double() for log_p in known], 1)
        due = new.any(1) & (left > 1)  # where no letter was set, nothing has changed
        known = [log_p.index_put((due,), torch.cat([net(part) for part in x[due].split(chunk)])) if due.any() else log_p
                 for net, log_p in zip(nets, known)]
    return torch.stack([*path, x]), torch.stack(found), log_q.cpu()

def slacks(log_q, dual, entropy=0):
    """KL(q_i || mixture) (m,), or with their entropies the cross entropies: the dual function's gradient. log_q: a list
    of log probabilities (m, N_i) of points under all models, with the weights (N_i,) for which they stand for q_i."""
    log_mix = [(v + dual.log()[:, None]).logsumexp(0) for v, _ in log_q]
    return torch.stack([w @ (v[i] - log_mix[i]) for i, (v, w) in enumerate(log_q)]) + entropy

def optimum(log_q, entropy=0, rounds=100):
    """The multipliers (m,) of the best mixture: dual steps on the slacks of the mixture itself."""
    dual = torch.full((len(log_q),), 1 / len(log_q)).double().cpu()
    for _ in range(rounds):
        dual = dual_step(dual, slacks(log_q, dual, entropy), curvature(dual), simplex=True)
    return dual

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

def step_kl(world, log_p, log_q, x, t):
    """T times the KL of step t (n,) at x (n, L) with letters log_q (n, L, 4) from that with log_p -> (n,), nats: over t
    its mean is the KL of the paths. Every masked letter is set with probability 1 / (T - t), whatever the model."""
    kl = torch.where(x == MASK, (log_q.exp() * (log_q - log_p)).sum(2), 0).sum(1)
    return kl * (world.steps / (world.steps - t)).to(kl)

def cover(args, world, denoiser, data, dual, entropy, move, batch, step):
    """A round: args.every descents of sum_i dual_i KL_i on batches, then, if they may move, a step of the multipliers.
    data: x (m, T + 1, n, L), log_p (m, T, n, L, 4) of paths of all q_i -> multipliers, slacks (m,)."""
    (x, log_q), m, slack = data, len(data[0]), torch.zeros(len(data[0]))
    for _ in range(args.every):
        k, t, n = (torch.arange(batch * m) % m, torch.randint(world.steps, (batch * m,)),
                   torch.randint(x.shape[2], (batch * m,)))
        kl = step_kl(world, denoiser(x[k, t, n]), log_q[k, t, n], x[k, t, n], t)
        (dual.to(kl)[k] @ kl / batch).backward()
        step()
        slack = slack + kl.detach().view(-1, m).mean(0) / args.every
    slack = slack.double().cpu() + entropy
    dual = dual_step(dual, slack, curvature(dual), simplex=True) if move else dual
    return dual, slack

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

def load_network(path, kind):
    """A MaskedDenoiser or Oracle that pretrain.py saved -> network, frozen; length of its sequences."""
    saved = loaded(path, torch.load, path, torch.get_default_device(), weights_only=True)
    net = kind(**saved["architecture"])
    net.load_state_dict(saved["weights"])
    return net.eval().requires_grad_(False), saved["settings"].get("length", 200)

# ---- measures, figure, main ------------------------------------------------------------------------------------------
@torch.no_grad()
def measure(args, world, names, method, denoiser, fresh, dual, exact):
    """KL of every model's paths from the denoiser's, the weights -> rows; sequences of the denoiser.
    exact: weights and KLs of the mixture."""
    rows, n = [], fresh[0][0].shape[1]
    for k, (x, log_q, _) in enumerate(fresh):
        t = torch.arange(world.steps).repeat_interleave(n)
        parts = zip(*(v.flatten(0, 1).split(args.chunk) for v in (x[:-1], log_q)), t.split(args.chunk))
        kl = torch.cat([step_kl(world, denoiser(x), log_q, x, t) for x, log_q, t in parts]).view(world.steps, n).mean(0)
        rows += [(f"kl_{names[k]}", kl.mean(), kl.std() / n**0.5, exact[1][k]),
                 (f"weight_{names[k]}", dual[k], None, exact[0][k])]
    x = draw_paths(world, [denoiser], 0, n, args.chunk)[0][-1]
    return [(world.name, method, *row) for row in rows], dict(x=x[:, None], log_w=torch.zeros(n, 1))

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

def draw(args, rows, paths):
    """Of every problem: KL of all models from all methods, the largest decides; the path of the weights."""
    figure, number = Figure((9, 2.6 * len(args.problem)), layout="constrained"), {r[:3]: r[3:] for r in rows}
    for axes, problem in zip(figure.subplots(len(args.problem), 2, squeeze=False), args.problem):
        names = [r[2][3:] for r in rows if r[:2] == (problem, "base") and r[2][:3] == "kl_"]
        for j, method in enumerate(methods := dict(base="#999999", **METHODS)):
            bars = [number.get((problem, method, f"kl_{name}")) for name in names]
            for k, (value, se, exact) in enumerate(bars if None not in bars else ()):
                axes[0].bar(k + j / 5, float(value), 0.18, yerr=2 * float(se), color=methods[method],
                            label=method if k == 0 else None)
                axes[0].plot([k + j / 5 - 0.09, k + j / 5 + 0.09], [float(exact)] * 2, "k:")
        axes[0].set_xticks([k + 0.3 for k in range(len(names))], names)
        axes[0].set_title(f"{problem}: KL of each model's paths, nats; dotted: the mixture", fontsize=9)
        for method in args.objective:
            axes[1].plot(torch.stack(paths[problem, method])[:, 0], color=METHODS[method], label=method)
            axes[1].axhline(float(number[problem, method, f"weight_{names[0]}"][2]), color=METHODS[method], ls=":")
        axes[1].set(ylim=(0, 1))
        axes[1].set_title(f"weight of {names[0]} by round; dotted: the mixture's", fontsize=9)
        axes[0].set_ylim(0, 1.3 * max(bar.get_height() for bar in axes[0].patches))
        axes[0].legend(fontsize=8, ncols=2, loc="upper right")
        axes[1].legend(fontsize=8)
    return figure

def main(args):
    started, rows, found, paths = time.time(), [], {}, {}
    torch.set_default_device(args.device)
    torch.set_flush_denormal(True)  # or a backward pass takes up to five times as long on a CPU
    print("COARSE: numbers mean nothing" if args.size[0] < 9 else "kl_*: of a model's paths from the method's, nats; "
          "se: over paths; exact: of the mixture, of mpsa by enumeration, else from the same paths")
    for name in args.problem:
        world, sizes = World(args, name), args.size[:4] if name == "mpsa" else args.size[4:]
        rounds, batch, trained, measured = sizes
        nets, log_q = models(args, world)
        names, m = [*nets], len(nets)
        torch.manual_seed(args.seed + 100 * PROBLEMS.index(name))
        fresh = [draw_paths(world, [*nets.values()], k, measured, args.chunk) for k in range(m)]
        data = [draw_paths(world, [net], 0, trained, args.chunk)[:2] for net in nets.values()]
        data = [torch.stack(v) for v in zip(*data)]
        # all paths stand for each of the models, weighted by importance: a third of the error of its own
        pool = torch.cat([v for *_, v in fresh]).T if log_q is None else log_q
        share = (pool - (pool.logsumexp(0) if log_q is None else 0)).softmax(1)
        tables = [(pool, w) for w in share]
        entropy = torch.stack([-w @ v[i] for i, (v, w) in enumerate(tables)])
        equal = torch.full((m,), 1 / m).double().cpu()
        known = dict(equal_weights=equal, kl=optimum(tables), elbo=optimum(tables, entropy))
        known = {method: (dual, slacks(tables, dual)) for method, dual in known.items()}
        for method in ["base", "equal_weights", *args.objective]:
            net, dual, best = copy.deepcopy(world.net), equal, known.get(method, known["equal_weights"])
            if method != "base":
                def update(step, trace):
                    dual = trace[-1][0] if trace else equal
                    # a network that has just begun is further from some models than from others for no other reason
                    move = method != "equal_weights" and len(trace) + 1 > rounds / 6
                    more = entropy if method == "elbo" else 0
                    return cover(args, world, tuned(world, net), data, dual, more, move, batch, step)
                paths[name, method] = [v for v, _ in train(args, net, f"{name}_{method}", rounds, update)]
                dual = torch.stack(paths[name, method][-1 - rounds // 4 :]).mean(0)
            new, found[name, method] = measure(args, world, names, method, tuned(world, net), fresh, dual, best)
            rows += new
    save_sequences(args, found)
    report(args, rows, started, lambda: draw(args, rows, paths))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
