"""Fine-tune a masked diffusion model of DNA by policy gradients on the rewards of its sequences, with and without KL.
Paper: Black, Janner, Du, Kostrikov and Levine, "Training Diffusion Models with Reinforcement Learning" (DDPO), ICLR
2024, arXiv 2305.13301; its KL is that of DPOK, arXiv 2305.16381. figure.png: the baseline of Fig. 5 of DAV, 2510.00502.
Run    python dna/ddpo.py                      both problems, see dna/das.py; 5 CPU minutes, --quick: 20 s
       python dna/ddpo.py --reward my.py:function     your own: letters (n, L, 4), A C G T, -> (n,); no gradient needed
       python dna/ddpo.py --paper --device cuda --steps 128                                a GPU's sizes; not run here
Read first: states_of, policy_loss, ddpo_update. Skip: World, the networks, checked, report, draw.
Notation (here -> paper); a step of the sampler is an action, tokens its state, the reward comes at the end
    ratio                  of the probabilities of the letters that a step set, now and when it was drawn
    advantage -> A-hat     reward less kl_weight KL of a path (nats), above the mean of the round
Algorithm
    1. draw paths with the model as it is, their KL and rewards                                         `sample_paths`
    2. take states of every path: those before the steps that set the letters of random places             `states_of`
    3. on each part of the states, ascend min(ratio A, clipped ratio A) - kl_weight KL                   `policy_loss`
    4. Adam on a copy of the base model; new paths                                              `ddpo_update`, `train`
The KL acts twice: a step's own is differentiated, exact at its state; that of the path is part of the advantage.
Published: no KL, of images. For mpsa the model starts at p itself (`tuned`), and log Z is exact.
What you should see (seed 0): hepg2, oracle A / B from -2.2 / -2.0 to 3.4 / 2.2 for ddpo, 35 nats, and 2.4 / 1.5 for
    ddpo_kl, 26 nats: of their letters .89 and .85 are G or C, where dna/draft.py ends with none. mpsa: the objective
    from -.35 to .64 for ddpo_kl (log Z 1.12); without KL 23 of 2,000 sequences differ. To try: --clip-ratio 10.
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
METHODS = ["pretrained", "ddpo", "ddpo_kl"]

def parse_args(argv=None):
    # rounds, paths of each, and sequences that measure, for mpsa; then for the others
    parser = common_flags(__doc__, size=(40, 256, 2000, 16, 48, 128), quick=(2, 16, 64, 2, 4, 8),
                          paper=(200, 256, 4000, 200, 256, 640))
    add = parser.add_argument
    add("--reward", default="activity", help="or my.py:function of letters (n, L, 4), probabilities of A C G T -> (n,)")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--kl-weight", type=float, help="of ddpo_kl and the objective; 0.5 for mpsa, else 0.05")
    add("--clip-ratio", type=float, default=0.2, help="a ratio moves no further than this from 1")
    add("--states", type=int, default=8, help="of every path that are learned from")
    add("--parts", type=int, default=4, help="updates on the states of a round, each on a part of them")
    add("--lr", type=float, help="3e-3 for mpsa, else 1e-3")
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

def letters_log_p(log_p, x, new):
    """Log probability of the letters of x (..., L) at the places `new` under log_p (..., L, 4) -> (...), a sum."""
    return torch.where(new, log_p.gather(-1, x.clamp(max=3)[..., None])[..., 0], 0).sum(-1)

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

def states_of(path, count):
    """`count` states of every path (T + 1, n, L) -> tokens x, next tokens (n count, L), number of the path (n count,).
    A state is that before a step which set the letter of a random place: each step as often as it set letters."""
    place = torch.rand(path.shape[1:]).argsort(1)[:, :count]
    when = (path == MASK).sum(0).gather(1, place)  # (n, count): number of states in which the place is masked
    number = torch.arange(len(place))[:, None].expand_as(place)
    return path[when - 1, number].flatten(0, 1), path[when, number].flatten(0, 1), number.flatten()

def policy_loss(log_p, base, old, x, after, advantage, clip_ratio, weight):
    """PPO's loss and weight KL at states x (n, L) that states_of drew -> (n,), ratio (n,): of what the step set, now by
    log_p (n, L, 4), and as it was drawn, old (n,). The mean of the loss is that of a path, summed over its steps."""
    new, masked = x != after, x == MASK
    ratio = (letters_log_p(log_p, after, new) - old).exp()
    near = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    gain = torch.minimum(ratio * advantage, near * advantage) / new.sum(1)  # as the state is drawn once per letter set
    apart = torch.where(masked, (log_p.exp() * (log_p - base)).sum(2), 0).sum(1) / masked.sum(1)
    return x.shape[1] * (weight * apart - gain), ratio

def ddpo_update(args, world, net, step, batch, weight):
    """Draw `batch` paths of net; on each part of their states, descend PPO's loss and weight KL -> mean reward, mean KL
    of the paths, share of clipped ratios."""
    policy, clipped = tuned(world, net), []
    path, kl = sample_paths(world, policy, batch, args.chunk)
    x, after, number = states_of(path, args.states)
    with torch.no_grad():
        r = torch.cat([world.reward(F.one_hot(part, 4).float()) for part in path[-1].split(args.chunk)]).double()
        parts = zip(x.split(args.chunk), after.split(args.chunk))
        old = torch.cat([letters_log_p(policy(a), b, a != b) for a, b in parts])
    worth = r - weight * kl
    advantage = (worth - worth.mean())[number].to(old)
    for part in torch.randperm(len(x)).chunk(args.parts):
        for k in part.split(args.chunk):
            with torch.no_grad():
                base = world.denoiser(x[k])
            loss, ratio = policy_loss(policy(x[k]), base, old[k], x[k], after[k], advantage[k], args.clip_ratio, weight)
            (loss.sum() / len(part)).backward()
            clipped.append(((ratio - 1).abs() > args.clip_ratio).double().mean().item())
        step()
    return r.mean().item(), kl.mean().item(), sum(clipped) / len(clipped)

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
    """Fresh paths -> what save_sequences wants; more rows: means over sequences, beside the exact ones of mpsa."""
    torch.manual_seed(args.seed + 100 * PROBLEMS.index(world.name))
    path, kl = sample_paths(world, denoiser, n, args.chunk)
    letters, target = F.one_hot(path[-1], 4).float().split(args.chunk), exact_values(world, kl_weight)
    r, held_out = (torch.cat([f(part) for part in letters]).double() for f in (world.reward, world.held_out))
    exact = target if method.endswith("_kl") else exact_values(world, math.inf) if method == "pretrained" else {}
    exact = exact | dict(objective=target.get("log_z"))
    values = dict(reward=r, held_out=held_out, kl=kl, objective=r / kl_weight - kl)
    rows += [(world.name, method, key, v.mean(), v.std() / n**0.5, exact.get(key)) for key, v in values.items()]
    return {k: v[:, None] for k, v in dict(x=path[-1], reward=r, held_out=held_out, kl=kl, log_w=0 * kl).items()}

def draw(args, worlds, traces, rows):
    """Reward of every update's paths; reward and held-out reward of each model against the KL of its paths."""
    number, figure = {r[:3]: r[3] for r in rows}, Figure(figsize=(9, 2.7 * len(worlds)), layout="constrained")
    for world, (left, right) in zip(worlds, figure.subplots(len(worlds), 2, squeeze=False)):
        for k, method in enumerate(args.methods):
            left.plot([row[0] for row in traces.get((world.name, method), [])], f"C{k}")
            for key, mark, label in (("reward", "o", method), ("held_out", "s", None)):
                point = [number[world.name, method, name].cpu() for name in ("kl", key)]
                right.plot(*point, f"C{k}{mark}", label=label)
        if world.p is not None:
            best = [(k, exact_values(world, k)) for k in torch.logspace(1, -1.5, 50)]
            kl, r = zip(*[((f["reward"] / k - f["log_z"]).cpu(), f["reward"].cpu()) for k, f in best])
            right.plot(kl, r, ":k", label="best possible")
        left.set_title(f"{world.name}: reward by update", fontsize=9)
        right.set_title("reward (circles) and held out, against the KL of the paths, nats", fontsize=9)
        right.legend(fontsize=8)
    return figure

def main(args):
    started, found, traces, rows, worlds = time.time(), {}, {}, [], []
    torch.set_flush_denormal(True)  # numbers that small slow a backward pass on a CPU down by five
    torch.set_default_device(args.device)
    print("COARSE: numbers mean nothing" if args.size[0] < 9 else "se: over sequences; kl: of paths, nats; objective: "
          "reward / kl_weight - kl; exact: of p exp(r / kl_weight), for pretrained of p, for objective log Z")
    for name in args.problem:
        worlds.append(world := Rewarded(args, name))
        kl_weight, lr, (rounds, batch, n) = (
            (0.5, 3e-3, args.size[:3]) if name == "mpsa" else (0.05, 1e-3, args.size[3:]))
        kl_weight, job = args.kl_weight or kl_weight, argparse.Namespace(**vars(args) | dict(lr=args.lr or lr))
        for method in args.methods:
            net, weight = copy.deepcopy(world.net), kl_weight if method == "ddpo_kl" else 0
            if method != "pretrained":
                trace = traces[name, method] = train(job, net, f"{name}_{method}", rounds, lambda step, _: ddpo_update(
                    args, world, net, step, batch, weight))
                rows.append((name, method, "clipped", sum(row[2] for row in trace) / rounds, None, None))
            found[name, method] = measure(world, method, tuned(world, net), n, kl_weight, args, rows)
    save_sequences(args, found)
    report(args, rows, started, lambda: draw(args, worlds, traces, rows))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
