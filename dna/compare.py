"""Every method as a front: what it gains by oracle A, and what oracle B, edits, words and motifs say about it.
Papers: the table of Wang et al. (DRAKES), arXiv 2410.13643, and Fig. 5 of Lee et al. (DAV), arXiv 2510.00502, on HepG2
*accessibility* instead of measured activity. The reward is oracle A; all the rest here only measures.
Run    python dna/compare.py                    runs das, draft, ddpo and dav; 14 CPU minutes
       python dna/compare.py --quick            coarse, 90 seconds
A run that stands in --out with the same flags is read and not repeated: an interrupted comparison goes on.
Read first: RUNS, measure. Skip: watch, draw.
Fronts: importance, guidance and DAS over kl_weight; DRAKES and DDPO over the weight of their KL; DAV and its posterior
    (the search on the tuned model) over rounds. All at the same number of steps, and with our guidance: that of DAV's
    released DNA code hardly tilts (standard deviation .002 nats).
Table, of one sequence a group, drawn by weight
    activity     median of oracle A, the reward; held_out: of oracle B, trained on other chromosomes
    a_minus_b    activity less held_out, and per unit of activity above the base model's: over-optimisation
    accessible   share that a classifier of open and closed takes for open in HepG2; gc: share of letters G and C
    edits        mean edit distance of two sequences; kmer3: correlation of 3-letter words with the top real elements
    nats         bound on -log p of the base model, a letter; motif_*: share with a hit; GATA1, SPI1: other cell types
    *_calls      sequences that denoiser and oracle see, a backward pass counted as two: for one sequence (a group of
                 particles), and in thousands for the training; *_seconds, of one core
What you should see (three seeds, +- their standard deviation): das at an activity of 9.0 has A - B 2.0 +- .2, 108 edits
    and words .90 (real elements 110, .99); dav_kl at 9.6 -.3 +- .3, 102 and .60: what is searched over-optimises oracle
    A, what is learned of it pays in composition (32% G and C for 45%). draft_kl and ddpo_kl lose diversity first: 68
    +- 8 edits at 6.7, 82 +- 5 at 2.5. Training pays after 150 sequences, of .03 CPU seconds for .5 by das.
"""
import argparse, json, os, pathlib, sys, time
import numpy as np
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
import das
import dav
import ddpo
import draft
from matplotlib.figure import Figure
from pretrain import kmer_counts, masked_bound, read_elements
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from torch.nn import functional as F

RUNS = [  # script, flags of its runs, a point of the front each (of dav: rounds, which one run tells), flags of all
    (das, ["--kl-weight 1", "--kl-weight 0.25", "--kl-weight 0.0625"], "--methods pretrained importance guidance das"),
    (draft, ["--kl-weight 0.2", "--kl-weight 0.05", "--kl-weight 0.0125"], "--methods draft_kl"),
    (ddpo, ["--kl-weight 0.2", "--kl-weight 0.05", "--kl-weight 0.0125"], "--methods ddpo_kl"),
    (dav, ["--rounds 4"], "--methods dav dav_kl")]
COLORS = dict(importance="k", guidance="#999999", das="#0072B2", draft_kl="#CC79A7", ddpo_kl="#E69F00", dav="#009E73",
              dav_kl="#56B4E9", posterior="#D55E00")
MOTIFS = json.loads((das.HERE / "motifs.json").read_text())  # letters per thousand sites: rows A, C, G, T (DATA.md)

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="coarse, one point of each front")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default="out/dna_compare", help="folder of the runs and results")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 1e9:
        parser.error(f"--seed: {args.seed} is not between 0 and 1e9")
    das.loaded("--out", args.out.mkdir, parents=True, exist_ok=True)
    return args

# ---- the runs --------------------------------------------------------------------------------------------------------
def watch(module, counts):
    """Count rows that networks of `module` see, a backward pass as two, and CPU seconds -> how to stop it. counts: a
    list of [function, rows, seconds], one for each call of a function that works for a method, in their order."""
    inside, restore = [], [(kind, "forward", kind.forward) for kind in (module.MaskedDenoiser, module.Oracle)]
    for kind, _, forward in list(restore):
        def counted(self, x, forward=forward):
            out = forward(self, x)
            if inside:
                inside[-1][1] += len(x) * (3 if out.requires_grad else 1)
            return out
        kind.forward = counted
    for name in {"das", "search", "train", "sample_paths", "sampled"} & set(vars(module)):
        def named(*args, name=name, function=getattr(module, name), **options):
            if inside and name != "sampled":  # what a training draws to be measured is not its cost
                return function(*args, **options)
            inside.append([name, 0, -time.process_time()])
            counts.append(inside[-1])
            out = function(*args, **options)
            spent = inside.pop()
            spent[2] += time.process_time()
            if inside:
                inside[-1][2] -= spent[2]
            return out
        restore.append((module, name, getattr(module, name)))
        setattr(module, name, named)
    return lambda: [setattr(*old) for old in restore]

def point(args, module, flags):
    """The folder of a run, made unless it stands there with the same flags; its counts."""
    flags = ["--problem", "hepg2", *flags.split(), "--seed", str(args.seed), *["--quick"] * args.quick]
    out, counts = args.out / "_".join([module.__name__, *flags[2:4]]).replace("--", ""), []
    done = out / "counts.json"
    if not done.exists() or json.loads(done.read_text())["flags"] != flags:
        print(module.__name__, *flags, flush=True)
        restore = watch(module, counts)
        try:
            module.main(module.parse_args([*flags, "--out", str(out)]))
        finally:
            restore()
        done.write_text(json.dumps(dict(flags=flags, counts=counts)))
    return out, json.loads(done.read_text())["counts"]

# ---- the measures ----------------------------------------------------------------------------------------------------
def motif_rate(x, counts):
    """Share of x (N, L) with a word on either strand that scores as few words do: one random sequence of 200 in 13.
    The score is the log odds against uniform letters, its distribution over words the convolution of the columns'."""
    odds = torch.tensor(counts).double() + 2.5
    odds = (odds / odds.sum(0) * 4).log().mul(100).round().long()  # (4, width), hundredths of a nat
    share = np.ones(1)  # of words by score, the lowest first
    for column in (odds - odds.amin(0)).T:
        share = np.convolve(share, np.bincount(column) / 4)
    least = int((share[::-1].cumsum() > 2e-4).sum()) + odds.amin(0).sum()
    both = torch.stack([odds, odds.flip(0, 1)]).float()
    return (F.conv1d(F.one_hot(x, 4).float().mT, both).amax((1, 2)) >= least).double().mean()

@torch.no_grad()
def measure(x, nets, top_words):
    """Sequences x (N, L) -> {quantity: (estimate, standard error or None)}."""
    letters, rows = F.one_hot(x, 4).float(), {}
    score = {name: torch.cat([net.score(part) for part in letters.split(256)]) for name, net in nets.items()
             if name != "base"}
    def median(values):  # its standard error from order statistics
        ranked, n = values.sort().values, len(values)
        low, high = (min(max(round(n / 2 + sign * n**0.5 / 2), 0), n - 1) for sign in (-1, 1))
        return values.median(), (ranked[high] - ranked[low]) / 2
    rows["activity"], rows["held_out"] = median(score["oracle_a"]), median(score["oracle_b"])
    rows["a_minus_b"] = rows["activity"][0] - rows["held_out"][0], None
    rows["accessible"] = (score["accessibility"] > 0).double().mean(), None
    rows["gc"] = letters[..., 1:3].sum(2).mean(), None
    words = [row.tobytes() for row in x.byte().numpy()]
    rows["edits"] = cdist(words, words, scorer=Levenshtein.distance).sum() / (len(x) * (len(x) - 1)), None
    rows["kmer3"] = torch.corrcoef(torch.stack([kmer_counts(x, 3), top_words]))[0, 1], None
    torch.manual_seed(0)
    bound = masked_bound(nets["base"], x, 4).mean(1) / x.shape[1]
    rows["nats"] = bound.mean(), bound.std() / len(x) ** 0.5
    rows |= {f"motif_{name.lower()}": (motif_rate(x, counts), None) for name, counts in MOTIFS.items()}
    return rows

def rows_of(args, module, flags, options, nets, top_words, base):
    """The tidy rows of a run: its methods at their points of the fronts."""
    (out, counts), rows = point(args, module, f"{flags} {options}"), []
    arrays, (word, value) = np.load(out / "sequences.npz"), flags.strip("-").replace("-", "_").split()
    methods = [*dict.fromkeys(name.split("/")[1] for name in arrays)]
    kinds = ("das", "train", "search", "sample_paths", "sampled")
    spent = {name: [c[1:] for c in counts if c[0] == name] for name in kinds}
    trained = dict(zip([m for m in options.split() if m in COLORS], spent["train"]))
    for method in methods:
        name, _, k = method.partition("_round_")
        if name not in COLORS:
            continue
        x, log_w = (torch.tensor(arrays[f"hepg2/{method}/{key}"]) for key in ("x", "log_w"))
        torch.manual_seed(args.seed)
        found = measure(x[torch.arange(len(x)), log_w.softmax(1).multinomial(1)[:, 0]].long(), nets, top_words)
        found["a_minus_b_per_gain"] = (found["a_minus_b"][0] / (found["activity"][0] - base), None)
        once = spent["das"][methods.index(name)] if module is das else spent["search"][-1] if name == "posterior" else [
            v / 2 for v in (spent["sampled"] or spent["sample_paths"])[-1]]  # the base model is asked too, for the KL
        found |= dict(sequence_calls=(once[0] / len(x), None), sequence_seconds=(once[1] / len(x), None))
        calls, seconds = trained.get(dict(posterior="dav").get(name, name), (None, None))
        if calls:
            share = int(k or value) / int(value) if module is dav else 1  # of the rounds
            found |= dict(training_calls=(calls * share / 1000, None), training_seconds=(seconds * share, None))
        rows += [(f"{word}_{k or value}", name, quantity, *pair, None) for quantity, pair in found.items()]
    return rows

# ---- figure, main ----------------------------------------------------------------------------------------------------
def draw(rows):
    """Against activity: oracle B, the mean edit distance, the words' correlation, and what n sequences cost."""
    value = {r[:3]: float(r[3]) for r in rows if r[3] is not None}
    figure = Figure(figsize=(9, 6), layout="constrained")
    titles = dict(held_out="oracle B, median", edits="mean edit distance of two sequences", kmer3="3-letter words:"
                  " correlation with the top real elements", seconds="CPU seconds for n sequences")
    axes = dict(zip(titles, figure.subplots(2, 2).flat))
    for method, color in COLORS.items():
        points = [p for p, m, q in value if m == method and q == "activity"]
        order = sorted(points, key=lambda p: value[p, method, "activity"])
        for quantity in ("held_out", "edits", "kmer3"):
            x, y = ([value[p, method, key] for p in order] for key in ("activity", quantity))
            axes[quantity].plot(x, y, ".-", color=color, label=method)
        if points:
            best, n = order[-1], torch.logspace(0, 5, 50)
            total = value.get((best, method, "training_seconds"), 0) + value[best, method, "sequence_seconds"] * n
            axes["seconds"].loglog(n, total, color=color)
    for name, style in (("real_hepg2", ":"), ("real_top", "--")):
        for quantity in ("held_out", "edits"):
            axes[quantity].axhline(value["reference", name, quantity], color="k", linestyle=style, label=name)
    for quantity, ax in axes.items():
        ax.set_title(titles[quantity], fontsize=9)
        ax.set_xlabel("n" if quantity == "seconds" else "oracle A, median, nats", fontsize=9)
    low, high = axes["held_out"].get_xlim()
    axes["held_out"].plot([low, high], [low, high], color="k", linewidth=0.5)
    figure.legend(*axes["held_out"].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return figure

def main(args):
    started, folder = time.time(), das.HERE / "checkpoints"
    torch.set_flush_denormal(True)  # numbers that small slow a backward pass on a CPU down by five
    nets = {k: das.load_network(folder / f"hepg2_{k}.pt", das.Oracle)[0]
            for k in ("oracle_a", "oracle_b", "accessibility")}
    nets["base"] = das.load_network(folder / "hepg2_base.pt", das.MaskedDenoiser)[0]
    data = read_elements(das.HERE / "elements.npz")
    folder, _ = point(args, das, f"{RUNS[0][1][-1]} {RUNS[0][2]}")
    base, test = torch.tensor(np.load(folder / "sequences.npz")["hepg2/pretrained/x"][:, 0]), data.chrom == 1
    top_words, rows = kmer_counts(data.codes[data.top], 3), []
    for name, x in dict(real_top=data.codes[data.top & test][:200], real_hepg2=data.codes[data.active & test][:200],
                        pretrained=base).items():
        found = measure(x.long(), nets, top_words)
        rows += [("reference", name, quantity, *pair, None) for quantity, pair in found.items()]
    base = found["activity"][0]
    for module, points, options in RUNS:
        for flags in points[-1:] if args.quick else points:
            rows += rows_of(args, module, flags, options, nets, top_words, base)
    print("COARSE: numbers mean nothing" if args.quick else "activity, held_out: medians; se: over sequences")
    das.report(args, rows, started, lambda: draw(rows))

if __name__ == "__main__":
    try:
        main(parse_args())
    except das.Refused as error:
        sys.exit(print(error, file=sys.stderr) or 2)
