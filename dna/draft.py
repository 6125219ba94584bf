"""Fine-tune a masked diffusion model of DNA by back-propagation through its sampler, with and without KL.
Paper: Wang et al., "Fine-Tuning Discrete Diffusion Models via Reward Optimization with Applications to DNA and Protein
Design" (DRAKES), ICLR 2025, arXiv 2410.13643. figure.png: the baseline of Fig. 5 of DAV (arXiv 2510.00502).
Run    python dna/draft.py               both problems, see dna/das.py; 5 CPU minutes, --quick: 15 s; --paper: not run
Read first: draft_paths, straight_through, gap. Skip: World, the networks, checked, report, draw.
Notation (here -> paper): kl_weight -> alpha, of the KL of paths, nats; temperature -> tau, of the Gumbel softmax;
    x (n, L, 5): one-hot tokens, four letters and the mask; back: share of the steps with a gradient
Algorithm, at every update
    1. sample paths; in the last steps a letter is one-hot forward, a softmax backward             `straight_through`
    2. add the KL of the steps up, exact at each state; of those without a gradient, each path has one  `draft_paths`
    3. descend kl_weight KL - reward; Adam on a copy of the base model                         `draft_update`, `train`
For mpsa the base is the trained network, as the exact denoiser has no gradient in the states: its log Z is .98 +- .03.
drakes_published: states are mixtures of tokens, temperature 1, 50 / 128 of the steps, weight .001 for 128 steps, and
    DRAKES' KL, which is zero at one-hot states (`published_gap`). Steps, updates and learning rate are ours.
What you should see (seed 0): hepg2, oracle A / B from -2.2 / -2.0 to 8.0 / 3.9 for draft, 177 nats, and 8.1 / 3.8 for
    drakes_published, 197: TATATA..., no G or C in 128 sequences; draft_kl 1.3 / 1.0 for 22 nats. mpsa: the objective
    from -.36 to .39 for draft_kl; without KL 63 of 2,000 sequences differ. To try: --kl-weight 0.25, as in das.py.
"""
import argparse, copy, functools, json, math, os, pathlib, runpy, sys, time
import numpy as np
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from tqdm import trange

HERE, MASK, PROBLEMS = pathlib.Path(__file__).resolve().parent, 4, ["mpsa", "hepg2", "data"]
METHODS = dict(pretrained=None, draft=dict(), draft_kl=dict(kl=True), drakes_published=dict(
    kl=True, published=True, weight=0.128, back=50 / 128, temperature=1.0))  # its alpha of .001, times its 128 steps

def parse_args(argv=None):
    # updates, paths of each, and sequences that measure, for mpsa; then for the others
    parser = common_flags(__doc__, size=(60, 64, 2000, 50, 8, 128), quick=(2, 16, 64, 2, 4, 8),
                          paper=(1000, 128, 4000, 1000, 128, 640))
    add = parser.add_argument
    add("--reward", default="activity", help="or my.py:function of letters (n, L, 4), probabilities of A C G T -> (n,)")
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    add("--kl-weight", type=float, help="of draft_kl and the objective; 0.5 for mpsa, else 0.05")
    add("--back", type=float, help="share of the steps with a gradient, the last; all for mpsa, else 50 / 128")
    add("--temperature", type=float, default=0.5, help="of the Gumbel softmax; drakes_published has 1")
    add("--lr", type=float, help="3e-3 for mpsa, else 7e-4")
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
def unmask(log_q, x, left):
    """Set each masked token of x (..., L) with probability 1 / left, its letter from log_q (..., L, 4) -> tokens, newly
    set (..., L). In float64: Gumbel noise in float32 is cut off, which lowers the temperature (Zheng et al. 2024)."""
    new = (x == MASK) & (torch.rand(x.shape, dtype=torch.float64) < 1 / left)
    cdf = log_q[new].double().exp().cumsum(1)
    letters = (cdf <= torch.rand(len(cdf), 1, dtype=torch.float64) * cdf[:, -1:]).sum(1).clamp(max=3)
    return x.masked_scatter(new, letters), new

def straight_through(log_p, x, left, temperature):
    """`unmask` of one-hot tokens x (n, L, 5), with a gradient -> the next x, newly set (n, L). Forward the letter that
    is largest by log_p (n, L, 4) plus Gumbel noise, one-hot; backward the softmax of this sum at a temperature."""
    new = (x[:, :, MASK] == 1) & (torch.rand(x.shape[:2], dtype=torch.float64) < 1 / left)
    noisy = log_p - torch.empty(log_p.shape, dtype=torch.float64).exponential_().log()
    soft = (noisy / temperature).softmax(2)
    letter = F.one_hot(noisy.argmax(2), 4) + (soft - soft.detach())
    return torch.where(new[:, :, None], F.pad(letter.to(x), (0, 1)), x), new

def gap(log_p, base, x):
    """KL of the letters from the base model's at the masked places of x (n, L, 5) -> (n,), nats; a step's: / left."""
    return (x[:, :, MASK] * (log_p.exp() * (log_p - base)).sum(2)).sum(1)

def published_step(log_p, x, left, temperature):
    """DRAKES' step, mixtures of tokens x (n, L, 5) -> mixtures, all new: the softmax of letters and staying masked
    takes the share of the mask. A place that is mainly a letter predicts this letter."""
    token = x.argmax(2, keepdim=True)
    log_p = torch.where(token == MASK, log_p, F.one_hot(token[:, :, 0], 5)[:, :, :MASK].to(log_p).log())
    stay = torch.full_like(log_p[:, :, :1], math.log(left - 1) if left > 1 else -math.inf)
    noisy = torch.cat([log_p, stay], 2) - torch.empty(x.shape, dtype=torch.float64).exponential_().log()
    masked = x[:, :, MASK:]
    return (1 - masked) * x + masked * (noisy / temperature).softmax(2).to(x), token[:, :, 0] >= 0

def published_gap(log_p, base, x):
    """DRAKES' `gap`: weighted by the letters that a masked place holds already, so zero at one-hot x."""
    apart = (x[:, :, :MASK] * (log_p.exp() * (log_p - base - 1) + base.exp())).sum(2)
    return torch.where(x.argmax(2) == MASK, (1 - x[:, :, MASK]) * apart, 0).sum(1)

def draft_paths(world, net, n, back, temperature, kl=False, published=False):
    """n paths of net -> letters (n, L, 4), one-hot, and the KL of the paths from the base model's (n,), nats. The
    gradient runs through the last steps, a share `back` of all; of those before, each path adds the KL of one."""
    before = world.steps - (last := min(max(1, round(back * world.steps)), world.steps))
    chosen = last + 1 + ((torch.arange(n) + torch.rand(n)) / n * before).long()  # evenly spread over the paths
    x = early = F.one_hot(torch.full((n, world.length), MASK), 5).float()
    log_p, apart, total, due = torch.zeros(n, world.length, 4), torch.zeros(n), torch.zeros(n), torch.ones(n) > 0
    for left in range(world.steps, 0, -1):
        early = torch.where((left == chosen)[:, None, None], x, early)
        due = due | (left == last)  # where no letter was set, nothing has changed, but for the gradient
        with torch.set_grad_enabled(left <= last):
            if due.any():
                log_p = log_p.index_put((due,), net(x[due]))
                if kl and left <= last:
                    of_step = (published_gap if published else gap)(log_p[due], world.net(x[due]), x[due])
                    apart = apart.index_put((due,), of_step)
            total = total + apart / left
            step = published_step if published and left <= last else straight_through
            x, new = step(log_p, x, left, temperature)
            due = new.any(1)
    if kl and before and not published:
        total = total + gap(net(early), world.net(early), early) * before / chosen
    return F.one_hot(x[:, :, :MASK].argmax(2), 4) + (x - x.detach())[:, :, :MASK], total

def draft_update(world, net, step, batch, weight, **options):
    """A step down the gradient of weight KL - E[r], of `batch` paths of net -> mean reward, mean KL of these."""
    letters, kl = draft_paths(world, net, batch, **options)
    r = world.reward(letters)
    if not r.requires_grad:
        raise Refused("--reward: no gradient, which DRAKES needs; dna/ddpo.py and dna/das.py do without")
    (weight * kl - r).mean().backward()
    step()
    return r.mean().item(), kl.mean().item()

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

@torch.no_grad()
def measure(world, method, denoiser, n, kl_weight, args, rows):
    """Fresh paths -> what save_sequences wants; more rows: means over sequences."""
    torch.manual_seed(args.seed + 100 * PROBLEMS.index(world.name))
    path, kl = sample_paths(world, denoiser, n, args.chunk)
    letters, exact = F.one_hot(path[-1], 4).float(), dict(objective=exact_values(world, kl_weight).get("log_z"))
    r, held_out = (f(letters).double() for f in (world.reward, world.held_out))
    values = dict(reward=r, held_out=held_out, kl=kl, objective=r / kl_weight - kl)
    rows += [(world.name, method, key, v.mean(), v.std() / n**0.5, exact.get(key)) for key, v in values.items()]
    return {k: v[:, None] for k, v in dict(x=path[-1], reward=r, held_out=held_out, kl=kl, log_w=0 * kl).items()}

def draw(args, worlds, traces, rows):
    """Reward of every update's paths; reward and held-out reward of each model against the KL of its paths."""
    number, figure = {r[:3]: r[3] for r in rows}, Figure(figsize=(9, 2.7 * len(worlds)), layout="constrained")
    for world, (left, right) in zip(worlds, figure.subplots(len(worlds), 2, squeeze=False)):
        for k, name in enumerate((world.name, method) for method in args.methods):
            left.plot([row[0] for row in traces.get(name, [])], f"C{k}")
            for key, mark, label in (("reward", "o", name[1]), ("held_out", "s", None)):
                right.plot(number[(*name, "kl")].cpu(), number[(*name, key)].cpu(), f"C{k}{mark}", label=label)
        left.set_title(f"{world.name}: reward by update", fontsize=9)
        right.set_title("reward (circles) and held out, against the KL of the paths, nats", fontsize=9)
        right.legend(fontsize=8)
    return figure

def main(args):
    started, found, traces, rows, worlds = time.time(), {}, {}, [], []
    torch.set_flush_denormal(True)  # numbers that small slow a backward pass on a CPU down by five
    torch.set_default_device(args.device)
    print("COARSE: numbers mean nothing" if args.size[0] < 9 else "se: over sequences; kl: of paths, nats")
    for name in args.problem:
        worlds.append(world := Rewarded(args, name))
        world.denoiser = world.net  # as the exact one of mpsa has no gradient in the states
        kl_weight, back, lr, (updates, batch, n) = (
            (0.5, 1.0, 3e-3, args.size[:3]) if name == "mpsa" else (0.05, 50 / 128, 7e-4, args.size[3:]))
        kl_weight, job = args.kl_weight or kl_weight, argparse.Namespace(**vars(args) | dict(lr=args.lr or lr))
        for method in args.methods:
            net = copy.deepcopy(world.net)
            if method != "pretrained":
                options = dict(weight=kl_weight, back=args.back or back, temperature=args.temperature) | METHODS[method]
                traces[name, method] = train(job, net, f"{name}_{method}", updates, lambda step, _: draft_update(
                    world, net, step, batch, **options))
            found[name, method] = measure(world, method, net, n, kl_weight, args, rows)
    save_sequences(args, found)
    report(args, rows, started, lambda: draw(args, worlds, traces, rows))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
