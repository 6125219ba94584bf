"""Train what the scripts of this folder steer and measure with: masked diffusion models of DNA, and their judges.
Papers: Sahoo et al. (MDLM), NeurIPS 2024, arXiv 2406.07524; Wang et al. (DRAKES), ICLR 2025, arXiv 2410.13643.
figure.png: what MDLM's bound and the judges are worth, and what no paper has: the price of independent letters, exact.
Run    python dna/pretrain.py                          measures the networks that ship (--checkpoints); 70 CPU seconds
       python dna/pretrain.py --train                  trains new ones, into out/dna_pretrain; about an hour
       python dna/pretrain.py --train --quick          20 seconds; --resume: goes on after an interruption
       python dna/pretrain.py --train --problem data   your own table, which prepare_data.py --data put into --out;
           then das.py and the others with --problem data --checkpoints out/dna_pretrain
Read first: hidden_loss, jump_distributions. Skip: MarkovChain, fit, the networks, *_rows, draw. The sampler: das.py.
Problems (prepare_data.py tells more): mpsa, 9-mers at 5' splice sites, 30,483 measured of the 32,768 NNNGYNNNN, the
    rest by rule; hepg2, 47,872 human elements of 200 letters with the cell type in which they are accessible
Notation (here -> MDLM)
    x -> x, z_t            letters 0 to 3 for A C G T, or MASK; at time t a letter is masked with probability t
    log_p -> log x_theta   log probabilities of the four letters at masked places; all others keep theirs
    bound -> L_NELBO       nats, above -log p(x); here with t integrated out: that of Binomial(k; L, t) / t is 1 / k
Algorithm
    1. hide a number of letters that is uniform on 1 to L, at random places                      hide
    2. their cross entropy times L / number hidden: its mean is the bound                         hidden_loss
    3. Adam; the moving average of the weights is kept; the models of cell types go on from the base model        fit
    4. judges: oracle A (odd chromosomes) is the reward, oracle B (even ones, X) measures; chromosomes 1 and 2 are held
       out from all training; accessibility: open in HepG2 or not, among Markov sequences         judge_loss
    5. T sampling steps set every letter at a uniform one of T times; letters of one step are independent given those
       before. Sum over all ordered partitions of the places into steps: the exact distribution   jump_distributions
What you should see (shipped networks): T steps are 0.34 / T of total variation away from infinitely many, 0.011 at 32.
    mpsa: the network's bound is 10.09 +- 0.01, the entropy 10.05. hepg2, nats a letter on chromosome 1: 1.320 +- 0.001,
    Markov chains of order 0, 3, 5: 1.385, 1.334, 1.328; the models of HepG2 and K562 are 2.1 and 1.8 +- 0.2 nats of a
    sequence from each other; AUC of oracles A and B 0.937 and 0.936 (they correlate by 0.904), of accessibility 0.925.
"""
import argparse, copy, itertools, json, math, os, pathlib, sys, time, types
import numpy as np
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
from matplotlib.figure import Figure
from scipy.stats import mannwhitneyu
from torch import nn
from torch.nn import functional as F
from tqdm import trange

HERE, MASK = pathlib.Path(__file__).resolve().parent, 4
PROBLEMS, STEPS = ["mpsa", "hepg2", "data"], [1, 2, 4, 8, 16, 32, 64, 128]
MPSA = (64, [1, 1, 4], 5000, 256, 0, 20_000)
SIZES = dict(  # width and dilations of the denoiser, its updates and their batch; updates of the judges; rows measured
    quick=dict(mpsa=(16, [1, 1, 4], 40, 32, 0, 1000), hepg2=(16, [1, 1, 4], 20, 16, 20, 200)),
    size=dict(mpsa=MPSA, hepg2=(64, [1, 1, 2, 4, 8, 16, 32, 64], 16000, 64, 1200, 2000)),
    paper=dict(mpsa=MPSA, hepg2=(128, [1] * 8 + [4] * 4 + [16] * 4 + [64] * 4, 131500, 512, 6000, 2000)))
FAST_BF16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)  # half the time; else 7 times

def parse_args(argv=None):
    parser = common_flags(__doc__, **SIZES)
    add = parser.add_argument
    add("--train", action="store_true", help="train, into --out, and measure that; else those of --checkpoints")
    add("--resume", action="store_true", help="go on with an interrupted training in --out")
    add("--lr", type=float, default=3e-3)
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

# ---- the problem: data -----------------------------------------------------------------------------------------------
def read_elements(path):
    """Elements with labels, from prepare_data.py -> codes, chrom, targets, active, top, names, kind; it tells which."""
    arrays = loaded(path, lambda: dict(np.load(path)))
    words = dict(names=arrays.pop("names").tolist(), kind=str(arrays.pop("kind")))
    return types.SimpleNamespace(**words, **{name: torch.tensor(value) for name, value in arrays.items()})

def chromosome_parts(chrom):
    """chrom (N,), 1 to 24 -> rows (N,) of each part; the oracles share out what the denoiser is trained on."""
    odd = (chrom % 2 == 1) & (chrom < 23)
    return dict(test=chrom == 1, oracle_a=(chrom > 2) & odd, oracle_b=(chrom > 2) & ~odd)

def kmer_counts(x, k):
    """How often each of the 4^k words stands in x (N, L) -> (4^k,) float64; in chunks, or a large table is 20 GB."""
    total = torch.zeros(4**k, dtype=torch.float64)
    for part in x.split(4096):
        words = sum(4 ** (k - 1 - j) * part[:, j : part.shape[1] - k + 1 + j].long() for j in range(k))
        total += torch.bincount(words.flatten(), minlength=4**k)
    return total

class MarkovChain:
    """Chain of some order from both strands of x (N, L), counts plus one; the first letters have lower orders."""
    def __init__(self, x, order):
        counts = [(kmer_counts(x, k + 1) + kmer_counts(3 - x.flip(1), k + 1) + 1).view(-1, 4) for k in range(order + 1)]
        self.order, self.log_p = order, [(c / c.sum(1, keepdim=True)).log() for c in counts]  # (4^k, 4) each
    def past(self, x, place):
        """Log probabilities (N, 4) of the letter at a place of x (N, L)."""
        k = min(place, self.order)
        return self.log_p[k][(x[:, place - k : place].long() * 4 ** torch.arange(k - 1, -1, -1)).sum(1)]
    def bound(self, x):
        """-log p(x) of x (N, L), nats -> (N,)."""
        return -sum(self.past(x, k).gather(1, x[:, k : k + 1].long())[:, 0] for k in range(x.shape[1]))
    def sample(self, n, length):
        """n sequences -> (n, length) long."""
        x = torch.zeros(n, length, dtype=torch.long)
        for k in range(length):
            x[:, k] = self.past(x, k).exp().multinomial(1)[:, 0]
        return x

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

# ---- the method: bound and training ----------------------------------------------------------------------------------
def hide(x, share):
    """Mask 1 + floor(share L) random letters of each row of x (N, L), share (N,) in [0, 1) -> tokens, hidden (N, L)."""
    hidden = torch.rand(x.shape).argsort(1).argsort(1) < 1 + (share * x.shape[1]).long()[:, None]
    return torch.where(hidden, MASK, x), hidden

def hidden_loss(log_p, x, hidden):
    """L times the mean of -log p of the hidden letters (N,), nats; averaged over their number it is the bound."""
    nll = -log_p.gather(2, x[:, :, None])[:, :, 0]
    return x.shape[1] * (nll * hidden).sum(1) / hidden.sum(1)

@torch.no_grad()
def masked_bound(denoiser, x, levels, chunk=256):
    """Estimate of the bound on -log p(x), x (N, L), nats -> (N, levels): a column for each interval of the number
    hidden, 1 to L; their mean is the bound."""
    def columns(x):
        noised = (hide(x, (level + torch.rand(len(x))) / levels) for level in range(levels))
        return torch.stack([hidden_loss(denoiser(z), x, hidden) for z, hidden in noised], 1)
    return torch.cat([columns(part) for part in x.long().split(chunk)])

def judge_loss(net, codes, targets, kind, batch=128):
    """The loss of an oracle on random rows of codes (N, L). Either strand, turned by up to 8 letters, a tenth of the
    letters blank: without that it learns its rows by heart."""
    rows = torch.randint(len(codes), (batch,))
    letters = F.one_hot(either_strand(codes[rows].long()).roll(int(torch.randint(-8, 9, ())), 1), 4)
    loss = dict(classes=F.cross_entropy, activity=F.mse_loss, open=F.binary_cross_entropy_with_logits)[kind]
    return loss(net(letters.float() * (torch.rand(*letters.shape[:2], 1) > 0.1)), targets[rows])

def either_strand(x):
    """Each row of x (N, L), or its reverse complement, by the toss of a coin."""
    return torch.where(torch.rand(len(x), 1) < 0.5, 3 - x.flip(1), x)

def fit(args, name, net, loss, updates, length):
    """Adam on loss(net) -> the moving average of the weights, saved as name.pt; without --train what is saved.
    The learning rate is constant after a warm-up and falls to zero over the last quarter."""
    path, part = (args.out if args.train else args.checkpoints) / f"{name}.pt", args.out / f"{name}.part"
    if not args.train or args.resume and path.exists():
        return load_network(path, type(net))[0]
    optimizer = torch.optim.Adam(net.train().parameters(), args.lr, betas=(0.9, 0.99), fused=True)
    values = [v for v in net.state_dict().values() if v.is_floating_point()]  # weights, and statistics of BatchNorm
    average, first, flags = [v.clone() for v in values], 0, str(vars(args) | dict(resume=False))
    if args.resume and part.exists():
        saved = torch.load(part, map_location=args.device, weights_only=True)
        if saved["flags"] != flags:
            raise Refused(f"--resume: {part} is of a run with other flags")
        average, first = saved["average"], saved["step"]
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
    for step in trange(first, updates, desc=name):
        torch.manual_seed(args.seed + 10**6 * (1 + step))  # the same after --resume
        warm, cold = (step + 1) / min(200, updates / 6), (updates - step) / (0.25 * updates)
        optimizer.param_groups[0]["lr"] = args.lr * min(1, warm, cold)
        with torch.autocast(args.device, torch.bfloat16, enabled=length > 9 and (args.device == "cuda" or FAST_BF16)):
            value = loss(net)
        optimizer.zero_grad()
        value.backward()
        if not nn.utils.clip_grad_norm_(net.parameters(), 1.0).isfinite():
            raise Refused(f"{name}: the training diverged at update {step + 1}, take a lower --lr")
        optimizer.step()
        torch._foreach_lerp_(average, values, 1 - min(0.999, (step + 1) / (step + 10)))
        if step % 100 == 99:
            state = dict(net=net.state_dict(), optimizer=optimizer.state_dict(), average=average)
            torch.save(dict(flags=flags, step=step + 1) | state, part.with_suffix(".tmp"))
            part.with_suffix(".tmp").replace(part)
    [value.copy_(mean) for value, mean in zip(values, average)]
    settings = dict(length=length, steps=updates, lr=args.lr, seed=args.seed)
    torch.save(dict(architecture=net.architecture, settings=settings, weights=net.state_dict()), part)
    part.replace(path)
    return net.eval().requires_grad_(False)

# ---- the price of independent letters --------------------------------------------------------------------------------
def jump_distributions(p):
    """What the sampler's distribution is made of at any number of steps: p (4^L,) -> (L, 4^L), row k - 1 for k jumps.
    A jump sets one or more letters, independently given those before. Row k - 1 sums the products of the jumps over all
    ordered partitions of the places into k; one pass over all masks, the most masked first."""
    length, denoiser = round(math.log(len(p), 4)), ExactDenoiser(p)
    reach = torch.zeros(length + 1, *[5] * length, dtype=p.dtype)  # mass that arrives in k jumps
    reach[0].view(-1)[-1] = 1
    for masked in sorted(itertools.product((True, False), repeat=length), key=sum, reverse=True)[:-1]:
        states = torch.cartesian_prod(*[torch.arange(4, 5) if m else torch.arange(4) for m in masked]).view(-1, length)
        letters, jump = denoiser(states).exp(), torch.ones(len(states), 1, dtype=p.dtype)
        for k in (k for k in range(length) if masked[k]):  # its letters, or it stays masked
            options = torch.cat([letters[:, k], torch.ones_like(jump[:, :1])], 1)
            jump = (jump[:, :, None] * options[:, None]).flatten(1)
        jump[:, -1] = 0  # something is set
        places = sorted(range(length), key=lambda k: masked[k])  # of the axes: the set places, then the masked ones
        jump = jump.view([5 if masked[k] else 4 for k in places])
        jump = jump.permute(sorted(range(length), key=lambda k: places[k]))
        here, there = ([slice(low, high) if m else slice(4) for m in masked] for low, high in ((4, 5), (0, 5)))
        done = length - sum(masked)
        for k in range(min(done, 1), done + 1):
            reach[(k + 1, *there)] += reach[(k, *here)] * jump
    return reach[(slice(1, None), *[slice(4)] * length)].reshape(length, -1)

def sampler_distribution(jumps, steps):
    """The distribution (4^L,) of T = steps with the exact denoiser: C(T, k) choices of k jumps, among T^L."""
    ways = [math.comb(steps, k) / steps ** len(jumps) for k in range(1, len(jumps) + 1)]
    return torch.tensor(ways, dtype=jumps.dtype) @ jumps

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

def mean_row(problem, method, quantity, values, exact=None):
    """A row: the mean of independent values and its standard error."""
    se = values.std() / len(values) ** 0.5 if len(values) > 1 else None
    return problem, method, quantity, values.mean(), se, exact

def auc(score, positive):
    """Probability that a positive scores above a negative, score (N,), positive (N,) bool."""
    wins = mannwhitneyu(score[positive].cpu(), score[~positive].cpu()).statistic
    return wins / float(positive.sum() * (~positive).sum())

def splice_rows(args, name, width, dilations, updates, batch, _, count):
    """Train and measure the network of mpsa; the exact distributions of few steps -> rows, what the figure shows."""
    table = loaded(HERE / "splice_sites.npz", np.load, HERE / "splice_sites.npz")
    (p, r), x = torch.tensor(np.stack([table["p"], table["rewards"][0]])), torch.cartesian_prod(*[torch.arange(4)] * 9)
    draw = lambda n: x[torch.searchsorted(p.cumsum(0), torch.rand(n, dtype=p.dtype)).clamp(max=len(p) - 1)]
    torch.manual_seed(args.seed)
    net = MaskedDenoiser(width, 9, dilations)
    net = fit(args, "mpsa_base", net, lambda net: denoiser_loss(net, draw(batch)), updates, 9)
    entropy, rows = -(p * p.log()).sum(), []
    torch.manual_seed(args.seed)
    sample = draw(count)
    for name, denoiser in (("exact_denoiser", ExactDenoiser(p)), ("network", net)):
        rows.append(mean_row("mpsa", name, "bound", masked_bound(denoiser, sample, 9).mean(1), entropy))
    jumps = jump_distributions(p)
    log_z = lambda q: (q.log() + r / 0.5).logsumexp(0)
    for steps in STEPS:
        q = sampler_distribution(jumps, steps)
        rows += [("mpsa", f"steps_{steps}", "total_variation", (q - p).abs().sum() / 2, None, 0),
                 ("mpsa", f"steps_{steps}", "log_z", log_z(q), None, log_z(p))]
    return rows, log_z(p).item()

def denoiser_loss(net, x):
    """The bound of x (n, L), nats a letter: numbers hidden from every n-th of 1 to L."""
    z, hidden = hide(x, (torch.arange(len(x)) + torch.rand(len(x))) / len(x))
    return hidden_loss(net(z), x, hidden).mean() / x.shape[1]

def element_rows(args, name, width, dilations, updates, batch, judge_updates, count):
    """Train and measure the networks of hepg2 or of a table -> rows, what the figure shows."""
    folder = args.out if args.train else args.checkpoints
    data = read_elements(HERE / "elements.npz" if name == "hepg2" else folder / "elements.npz")
    parts, held = chromosome_parts(data.chrom), data.chrom < 3
    train, length = data.codes[~held], data.codes.shape[1]
    some = lambda x, n: x[:: max(1, len(x) // n)]  # about n rows of x, in equal steps
    jobs = {k: (data.codes[parts[k]], data.targets[parts[k]], data.kind) for k in ("oracle_a", "oracle_b")}
    torch.manual_seed(args.seed)
    if data.kind == "classes":
        closed = MarkovChain(some(train, 20 * count), 2).sample(len(train) // 4, length).byte()  # open nowhere
        labels = torch.cat([data.targets[~held], torch.zeros(len(closed), len(data.names))])
        jobs["accessibility"] = (torch.cat([train, closed]), labels, "open")
    base, judges = MaskedDenoiser(width, 9, dilations), {k: Oracle(data.names, job[2], 96) for k, job in jobs.items()}
    draw = lambda: either_strand(train[torch.randint(len(train), (batch,))].long())
    base = fit(args, f"{name}_base", base, lambda net: denoiser_loss(net, draw()), updates, length)
    for k, job in jobs.items():
        judges[k] = fit(args, f"{name}_{k}", judges[k], lambda net: judge_loss(net, *job), judge_updates, length)
    highest = data.targets >= data.targets.double().quantile(0.9, 0)
    nets, cells = dict(base=base), data.targets > 0 if data.kind == "classes" else highest
    for k, cell in enumerate(data.names):  # the base model goes on with the elements of one cell type
        own = train[cells[~held, k]]
        if not len(own):
            raise Refused(f"{name}: all elements of {cell} are on chromosomes 1 and 2, none is left to train on")
        draw = lambda: either_strand(own[torch.randint(len(own), (batch,))].long())
        net = copy.deepcopy(base).requires_grad_(True)
        loss = lambda net: denoiser_loss(net, draw())
        nets[cell] = fit(args, f"{name}_cell_{cell}", net, loss, judge_updates, length)
    torch.manual_seed(args.seed)
    chains = {order: MarkovChain(some(train, 20 * count), order) for order in (0, 3, 5)}
    x = some(data.codes[parts["test"]], count)
    bound = masked_bound(base, x, 4) / length
    rows = [mean_row(name, "base", "bound", bound.mean(1))]
    rows += [mean_row(name, f"markov_{order}", "bound", chain.bound(x) / length) for order, chain in chains.items()]
    for k, cell in enumerate(data.names):  # KL from each other model, estimated on elements of chromosome 1
        x, bound_of = some(data.codes[parts["test"] & cells[:, k]], count // 8), {}
        for other, net in nets.items():
            torch.manual_seed(args.seed)  # the same letters are hidden
            bound_of[other] = masked_bound(net, x, 4).mean(1)
        rows += [mean_row(name, f"cell_{cell}", f"nats_from_{other}", bound_of[other] - bound_of[cell])
                 for other in nets if other != cell]
    x, active = some(data.codes[held], 5 * count), some(data.active[held], 5 * count)
    score = {k: torch.cat([net.score(F.one_hot(part.long(), 4).float()) for part in x.split(256)])
             for k, net in judges.items()}
    correlation = torch.corrcoef(torch.stack([score["oracle_a"], score["oracle_b"]]))[0, 1]
    rows.append((name, "oracles", "correlation", correlation, None, None))
    rows += [(name, k, "auc", auc(v, active), None, None) for k, v in score.items()]
    return rows, bound.mean(0)

def draw(args, rows, shown):
    """mpsa: what few steps cost, exact. Elements: the bounds of denoiser and Markov chains."""
    figure, number = Figure((9, 3), layout="constrained"), {r[:3]: float(r[3]) for r in rows}
    panels = [(p, key) for p in args.problem for key in (("total_variation", "log_z") if p == "mpsa" else ("bound",))]
    for (name, key), ax in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
        if name == "mpsa":
            ax.plot(STEPS, [number[name, f"steps_{n}", key] for n in STEPS], "o-", color="#0072B2", label="exact")
            ax.set(xscale="log", xlabel="sampling steps", yscale="linear" if key == "log_z" else "log")
            limit = [shown[name] if key == "log_z" else 0.34 / n for n in STEPS]
            ax.plot(STEPS, limit, "k:", label="infinitely many" if key == "log_z" else "0.34 / steps")
        else:
            ax.plot([0.125, 0.375, 0.625, 0.875], shown[name].cpu(), "o-", color="#0072B2", label="denoiser")
            for order, style in ((0, ":"), (3, "--"), (5, "-.")):
                level = number[name, f"markov_{order}", "bound"]
                ax.axhline(level, color="k", linestyle=style, label=f"Markov, order {order}")
            ax.set(xlabel="share of letters hidden")
        ax.set_title(f"{name}: {key}{', nats a letter' * (key == 'bound')}", fontsize=9)
        ax.legend(fontsize=8)
    return figure

def main(args):
    started, rows, shown = time.time(), [], {}
    torch.set_default_device(args.device)
    print("COARSE: numbers mean nothing" if args.size is SIZES["quick"] else "bound: nats, of hepg2 a letter; se: over "
          "sequences; exact: of infinitely many steps; of a bound: the entropy")
    for name in args.problem:
        found, shown[name] = (splice_rows if name == "mpsa" else element_rows)(
            args, name, *args.size.get(name, args.size["hepg2"]))
        rows += found
    report(args, rows, started, lambda: draw(args, rows, shown))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print(e, file=sys.stderr) or 2)
