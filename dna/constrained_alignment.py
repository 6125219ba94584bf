"""Align a DNA model under constraints: the least KL from the base model that is active enough and natural enough.

Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104: the counterpart of its Fig. 3 on DNA, and toy/constrained_alignment.py on letters.
figure.png shows rewards, KL and multipliers in training, with thresholds, and exact values where they are known.

Run    python dna/constrained_alignment.py                      200 bp elements            2 CPU minutes
       python dna/constrained_alignment.py --quick              the same, coarse           15 seconds
       python dna/constrained_alignment.py --world mpsa         9-mers, all enumerated     45 CPU seconds
       python dna/constrained_alignment.py --threshold 1 -1.32  less active, more natural
       python dna/constrained_alignment.py --resume             go on with an interrupted run
       python dna/constrained_alignment.py --data dataset.csv   the papers' data, after pretrain.py --data
       python dna/constrained_alignment.py --paper --device cuda

Worlds mpsa   human 5' splice sites: the measured inclusion as activity.
       hepg2  the log odds of HepG2 *accessibility* by oracle A, a stand-in for measured activity; oracle B only
              measures.
       Naturalness, in both: the mean log-likelihood of a letter under the Markov chain of order 2 (words of three
       letters) of the training elements.

Notation (here -> paper)
       reward, threshold -> r_i, b_i  the constraints E_p[r_i] >= b_i on activity and naturalness
       dual              -> lambda    multipliers >= 0
       log_q             log of the base law q: enumerated for mpsa; hepg2 has the training elements, of equal mass
       aligned_law       -> q_rw      q exp(sum_i dual_i r_i) / Z(dual), the minimiser at given multipliers
       D(dual)           dual' b - log Z(dual): concave, its gradient is b - E_aligned[r]
       The same law is the most active one whose KL is at most that found and which is natural enough: a constraint on
       the KL is met by lowering the threshold on activity, and 1 / dual_1 is the activity that one more nat would buy.

Algorithm (`primal_dual`)
       1. primal step on the network, for KL - sum_i dual_i (reward_i - threshold_i), one of       `--primal`
          likelihood: `updates` steps of maximum likelihood on draws of the aligned law, its minimiser in closed form
          gradient:   one step through the last `truncate` steps of the sampler, with straight-through Gumbel softmax
                      and the KL of the paths, as in dna/draft.py                        `relaxed_paths`
       2. sample; raise dual_i while reward_i is below its threshold, lower it above     `dual_update`
       3. repeat; return the averages, over the last quarter, of network and multipliers
       The paper takes the gradient. For letters it is biased: in mpsa, with the multipliers of `equal`, it ends at an
       activity of 0.30 and a KL of 0.74, where the optimum has 0.96 and 1.19, and with duals it circles at a KL of 3.5.
       Likelihood has the aligned law as its only optimum, and is the default there. On 200 letters it learns too slowly
       (250 steps towards a mean activity of 3.7 moved the base model from -2.3 to -1.4): there the gradient is.

`dual_only` puts the aligned law itself in place of the network: what is left is the error of the dual ascent. `equal`
fixes the same weight, in standard deviations, for both rewards, as a penalty does: a threshold is missed.

What you should see (mpsa; ± is the standard deviation over 3 seeds): without a network the multipliers are the exact
ones, 1.622 and 3.615, to 1e-8, with no duality gap. The network meets both thresholds (1.214 ± 0.016 for 1.2, -1.399 ±
0.003 for -1.4) and pays for its errors: multipliers of 2.10 ± 0.03 and 4.07 ± 0.12, a KL of 1.94 ± 0.07 where the least
is 1.43. Equal weights would give 0.963 and -1.374 exactly, with a network 0.585 ± 0.041 and -1.382 ± 0.002.
hepg2 (3 seeds): activity from -2.24 to 2.00 ± 0.22 for 2.0 and naturalness -1.344 ± 0.002 for -1.34, at a KL of 15 ± 1
nats; oracle B agrees (median 2.10 ± 0.36, real HepG2 elements 1.05), 95% are called open, pairs differ by 101 edits
(base model 110), HNF1A stands in 51% (base 8%). But words of three letters correlate with those of the top real
elements by 0.57 only: likely words are not the right mix of words. Equal weights stay at an activity of -1.93, at a
naturalness of -1.302.
To try: --world mpsa --threshold 2.4 -1.4: no sequence is included that often. --weight 2; --dual-lr 0.5.
"""
import argparse
import copy
import csv
import gzip
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pathlib
import pickle
import resource
import sys
import time
import types

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from scipy.optimize import linprog, minimize
from torch.nn.functional import conv1d, one_hot, silu

MASK = 4  # the token after A, C, G, T
MOTIFS = {  # JASPAR 2026 (CC BY 4.0), letters per thousand sites: rows A, C, G, T; DATA.md gives the identifiers
    "HNF4A": ("32 932 865 930 15 20 60 29 788", "891 27 29 12 20 15 813 910 60",
              "27 23 78 41 936 47 39 14 63", "51 19 28 17 29 918 88 46 89"),
    "FOXA2": ("358 72 14 930 851 947 9 941", "47 11 8 36 86 13 751 12",
              "147 901 7 10 25 11 14 11", "448 16 971 24 39 30 226 36"),
    "HNF1A": ("459 23 147 982 934 80 236 934 45 3 815 878 86",
              "27 64 110 0 42 27 265 1 1 16 14 43 822",
              "472 55 28 17 1 0 321 22 54 0 77 68 38",
              "42 858 715 1 24 893 178 43 900 981 94 11 53"),
    "CEBPA": ("688 11 13 117 15 790 77 910 952 57", "92 10 4 12 951 45 779 72 13 205",
              "162 9 30 733 9 85 20 4 17 93", "58 969 954 138 26 80 124 14 18 645"),
    "GATA1": ("55 18 692 940 31 36 103", "869 8 10 18 17 918 42",
              "38 9 12 14 9 20 11", "38 964 286 28 943 26 844"),
    "SPI1": ("632 782 774 82 855 39 19 970 946 72 162 95 220",
             "65 55 22 116 25 5 8 10 9 67 35 58 110",
             "217 101 97 760 92 945 964 10 17 847 49 793 548",
             "86 62 106 42 29 12 9 10 27 13 754 55 121"),
}
PRESETS = {  # what the size flags default to
    "quick": dict(rounds=10, updates=2, batch=16, probe=8, steps=8, truncate=3, samples=24, levels=2),
    "hepg2": dict(rounds=70, updates=5, batch=16, probe=24, steps=16, truncate=8, samples=256, levels=4),
    "mpsa": dict(rounds=60, updates=10, batch=128, probe=128, steps=32, truncate=8, samples=4000, levels=9),
    "paper": dict(rounds=1000, updates=20, batch=128, probe=128, steps=128, truncate=50, samples=640, levels=128),
}
SETTINGS = dict(
    hepg2=dict(threshold=[2.0, -1.34], weight=10.0, dual_lr=1.0, lr=2e-3, primal="gradient"),
    mpsa=dict(threshold=[1.2, -1.4], weight=0.8, dual_lr=0.1, lr=3e-3, primal="likelihood"))
NAMES = ("activity", "naturalness")


def parse_args(argv=None):
    parser = dna_parser(__doc__)
    parser.add_argument("--threshold", nargs=2, type=float, help="of activity, and of naturalness in nats a letter")
    parser.add_argument("--primal", choices=["likelihood", "gradient"], help="step of the network")
    parser.add_argument("--dual-lr", type=positive(float), help="step of the multipliers, for rewards of variance 1")
    parser.add_argument("--weight", type=positive(float), help="of both rewards in `equal`, per standard deviation")
    parser.add_argument("--rounds", type=positive(int), help="dual steps, at least 10")
    parser.add_argument("--updates", type=positive(int), help="training steps in a round, of likelihood")
    parser.add_argument("--batch", type=positive(int), help="sequences in a training step")
    parser.add_argument("--probe", type=positive(int), help="sequences of a dual step, of likelihood")
    parser.add_argument("--lr", type=positive(float), help="learning rate of the network")
    parser.add_argument("--steps", type=positive(int), help="steps of the reverse process")
    parser.add_argument("--truncate", type=positive(int), help="last steps with gradient, at most --steps")
    parser.add_argument("--temperature", type=positive(float), default=0.5, help="of the Gumbel softmax")
    parser.add_argument("--soft", action="store_true", help="relaxed states in the forward pass too, but for the last")
    parser.add_argument("--samples", type=positive(int), help="sequences drawn to measure each model")
    parser.add_argument("--levels", type=positive(int), help="noise levels behind the bound of each sequence")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="train in bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on with what is in the results folder")
    args = parser.parse_args(argv)
    world = "mpsa" if args.world == "mpsa" else "hepg2"
    for name, value in (PRESETS["quick" if args.quick else "paper" if args.paper else world] | SETTINGS[world]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.rounds < 10 or args.truncate > args.steps or args.samples < 2:
        parser.error("--rounds must be at least 10, --truncate at most --steps, and --samples not below 2")
    if not all(map(math.isfinite, args.threshold)):
        parser.error("--threshold must be finite")
    return args


# ---- the worlds: real elements ---------------------------------------------------------------------------------------


def read_arrays(name):
    """The arrays of a file that prepare_data.py writes beside this script -> dict."""
    path = pathlib.Path(__file__).parent / name
    if not path.exists():
        fail(f"{path} is missing: make it with python dna/prepare_data.py.")
    with np.load(path) as arrays:
        return dict(arrays)


def unpack(packed, length):
    """Two bits a letter, packed (N, ceil(length / 4)) uint8 -> codes (N, length) uint8, 0 to 3 for A C G T."""
    return (packed[:, :, None] >> np.array([6, 4, 2, 0], np.uint8) & 3).reshape(len(packed), -1)[:, :length]


def encode(sequences, length):
    """Strings of ACGT (or U) -> codes (N, length) uint8, 0 to 3; ends at a sequence that is anything else."""
    codes = np.full(256, 4, np.uint8)
    codes[np.frombuffer(b"ACGTU", np.uint8)] = [0, 1, 2, 3, 3]
    for sequence in sequences:
        if len(sequence) != length or set(sequence) - set("ACGTU"):
            fail(f"Expected {length} letters of ACGT, got {sequence[:60]!r}.")
    return codes[np.frombuffer("".join(sequences).encode(), np.uint8)].reshape(-1, length)


def read_elements(path, device):
    """Elements with their labels: dhs.npz (path None), or a table (csv, csv.gz) in the format of the DRAKES release.

    -> a namespace of codes (N, L) uint8, targets (N, C) float32, names (C), chrom (N,) uint8, and of kind: "classes",
    targets one-hot over the cell types, or "activity", targets measured. active (N,) are the HepG2 elements, the
    highest tenth by activity; top (N,) those open in the fewest other samples, the highest thousandth by activity;
    digest tells one data set from another.
    """
    if path is None:
        arrays = read_arrays("dhs.npz")
        names, codes = [str(cell).lower() for cell in arrays["cells"]], unpack(arrays["sequences"], 200)
        targets, chrom, kind = np.eye(len(names), dtype=np.float32)[arrays["cell"]], arrays["chrom"], "classes"
        active = targets[:, names.index("hepg2")] == 1
        top = active & (arrays["others"] <= np.quantile(arrays["others"][active], 0.1))
    else:
        names, kind = ["hepg2", "k562", "sknsh"], "activity"
        table = read_csv(path, ["seq", *names, "chrom"])
        numbers = {str(c): n + 1 for n, c in enumerate([*range(1, 23), "X", "Y"])}
        try:
            chrom = np.array([numbers[line["chrom"].removeprefix("chr")] for line in table], np.uint8)
            targets = np.array([[float(line[name]) for name in names] for line in table], np.float32)
        except (KeyError, ValueError) as error:
            fail(f"{path} holds a chromosome or an activity that is none: {error}.")
        if not np.isfinite(targets).all():
            fail(f"{path} holds an activity that is not finite.")
        codes = encode([line["seq"] for line in table], len(table[0]["seq"]))
        active, top = (targets[:, 0] >= np.quantile(targets[:, 0], q) for q in (0.9, 0.999))
    arrays = dict(codes=codes, targets=targets, chrom=chrom, active=active, top=top)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(v).tobytes() for v in arrays.values())).hexdigest()[:12]
    arrays = {name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in arrays.items()}
    data = types.SimpleNamespace(names=names, kind=kind, digest=digest, **arrays)
    for part, rows in chromosome_split(data.chrom).items():
        if not rows.any():
            fail(f"{path} has no sequence for {part.replace('_', ' ')}: chromosome 1 is for testing, 2 for validation, "
                 "other odd ones are for the reward, other even ones and X for its evaluation.")
    return data


def read_csv(path, columns):
    """The rows of a table with a header that names these columns -> list of dicts."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="") as file:
            reader = csv.DictReader(file)
            missing = set(columns) - set(reader.fieldnames or [])
            table = list(reader) if not missing else []
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        fail(f"{path} cannot be read: {error}.")
    if missing:
        fail(f"{path} lacks the columns {', '.join(sorted(missing))}.")
    if not table or any(line[column] is None for line in table for column in columns):
        fail(f"{path} has no rows, or a row without all of {', '.join(columns)}.")
    return table


def chromosome_split(chrom):
    """chrom (N,), 1 to 24 -> rows (N,) of each part. Chromosomes 1 and 2 are held out from all that is trained."""
    train, odd = chrom > 2, (chrom % 2 == 1) & (chrom < 23)
    return dict(test=chrom == 1, validation=chrom == 2, training=train, oracle_a=train & odd, oracle_b=train & ~odd)


# ---- the worlds: all 9-mers ------------------------------------------------------------------------------------------


def all_sequences(length):
    """Every sequence, in the order of its number in base 4 -> (4^length, length) long."""
    return torch.cartesian_prod(*[torch.arange(4)] * length)


def splice_law(device):
    """The mpsa world: law p (4^9,) and rewards (2, 4^9) of all 9-mers, float64; measured (2, 4^9) bool.

    The law is that of the assayed library: 99% in proportion to its sequencing reads in both replicates plus one, on
    the 32,768 sequences NNNGYNNNN, and 1% uniform on all 4^9, so that every state has a denoiser. The reward is the
    measured log10 percent spliced in; an unmeasured NNNGYNNNN gets the additive least-squares fit to the measured
    ones, kept within their range; every other sequence, which lacks the G or the pyrimidine at the junction and was not
    assayed, the smallest measured value. Replicate 1 is the reward, replicate 2 the held-out one.
    """
    arrays, x = read_arrays("mpsa.npz"), all_sequences(9)
    index = (torch.from_numpy(unpack(arrays["sequences"], 9)).long() * 4 ** torch.arange(8, -1, -1)).sum(1)
    assayed = (x[:, 3] == 2) & (x[:, 4] % 2 == 1)  # G, then C or T
    reads = torch.zeros(len(x), dtype=torch.float64)
    reads[index] = torch.from_numpy(arrays["reads"].astype(np.float64)).sum(1)
    p = (reads + 1) * assayed
    p = 0.99 * p / p.sum() + 0.01 / len(p)
    features = one_hot(x, 4).flatten(1).double()
    rewards, measured = torch.empty(2, len(x), dtype=torch.float64), torch.zeros(2, len(x), dtype=torch.bool)
    for k in range(2):
        psi = torch.from_numpy(arrays["psi"][:, k].astype(np.float64))
        there, values = index[~psi.isnan()], psi[~psi.isnan()]
        fit = features @ torch.linalg.lstsq(features[there], values[:, None], driver="gelsd").solution[:, 0]
        rewards[k] = torch.where(assayed, fit.clamp(values.min(), values.max()), values.min())
        rewards[k, there], measured[k, there] = values, True
    return types.SimpleNamespace(p=p.to(device), rewards=rewards.to(device), measured=measured.to(device))


class ExactDenoiser:
    """The denoiser of a law p (4^L,) by enumeration: x (n, L) tokens -> log p(x_0 at l = v | x) (n, L, 4), float64.

    One table holds, for all 5^L masked states, the probability of the sequences that agree with them.
    """

    def __init__(self, p):
        length = round(math.log(len(p), 4))
        mass = p.view([4] * length)
        for axis in range(length):
            mass = torch.cat([mass, mass.sum(axis, keepdim=True)], axis)
        self.log_mass, self.place = mass.log().flatten(), 5 ** torch.arange(length - 1, -1, -1, device=p.device)

    def __call__(self, x):
        state = (x * self.place).sum(1)
        letter = (torch.arange(4, device=x.device) - x[:, :, None]) * self.place[:, None]  # (n, L, 4)
        return self.log_mass[state[:, None, None] + letter] - self.log_mass[state][:, None, None]


class TableReward:
    """A table over all sequences, value (4^L,), as a function of tokens x (n, L) or of letter probabilities (n, L, 4).

    With probabilities it is the mean over independent letters: linear in each, exact at one-hot, differentiable.
    """

    def __init__(self, value):
        self.value, self.length = value, round(math.log(len(value), 4))

    def __call__(self, x):
        if not x.is_floating_point():
            return self.value[(x * 4 ** torch.arange(self.length - 1, -1, -1, device=x.device)).sum(1)]
        halves = []
        for letters in x.tensor_split([self.length // 2], 1):
            joint = torch.ones(len(x), 1).to(x)
            for k in range(letters.shape[1]):
                joint = (joint[:, :, None] * letters[:, k, None]).flatten(1)
            halves.append(joint)  # (n, 4^(L / 2))
        return (halves[0] @ self.value.to(x).view(halves[0].shape[1], -1) * halves[1]).sum(1)


# ---- the problem: rewards, thresholds, exact multipliers -------------------------------------------------------------


class MarkovChain:
    """Chain of some order, with counts of x (N, L) plus one; the first letters have the chains of lower orders."""

    def __init__(self, x, order):
        counts = [kmer_counts(x, k + 1).view(-1, 4) + 1 for k in range(order + 1)]
        self.order, self.log_p = order, [(c / c.sum(1, keepdim=True)).log() for c in counts]  # (4^k, 4) each

    def bound(self, x):
        """-log p(x) of x (N, L), nats -> (N,)."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for place in range(x.shape[1]):
            k = min(place, self.order)
            past = (x[:, place - k : place].long() * 4 ** torch.arange(k - 1, -1, -1, device=x.device)).sum(1)
            total -= self.log_p[k][past, x[:, place].long()]
        return total

    def sample(self, n, length, rng):
        """n sequences -> (n, length) long."""
        x = torch.empty(n, 0, dtype=torch.long, device=rng.device)
        for place in range(length):
            k = min(place, self.order)
            past = (x[:, place - k :] * 4 ** torch.arange(k - 1, -1, -1, device=x.device)).sum(1)
            u = torch.rand(n, 1, generator=rng, dtype=torch.float64, device=x.device)
            x = torch.cat([x, invert_cdf(self.log_p[k][past].exp(), u)], 1)
        return x


def both_strands(x):
    """x (N, L) and its reverse complements -> (2 N, L)."""
    return torch.cat([x, 3 - x.flip(1)])


def naturalness(chain, x):
    """Mean log-probability of a letter of x under a MarkovChain of order 2, in nats: tokens (n, L) -> (n,).

    For letter probabilities (n, L, 4) the mean over independent letters: linear in each, exact at one-hot ones,
    differentiable.
    """
    p = x if x.is_floating_point() else one_hot(x.long(), 4).double()
    first, second, third = (table.to(p) for table in chain.log_p)
    pairs = (p[:, :-1, :, None] * p[:, 1:, None]).flatten(2)  # (n, L - 1, 16)
    total = p[:, 0] @ first[0] + pairs[:, 0] @ second.flatten() + (pairs[:, :-1] @ third * p[:, 2:]).sum((1, 2))
    return total / x.shape[1]


def make_problem(world, args):
    """The base law and the rewards as tables over sequences, thresholds, exact multipliers: a namespace.

    codes (M, L): all 9-mers, or training elements (for the gradient one in eight, as they only give mean and scale);
    log_q (M,) their log masses; rewards: functions of tokens (n, L) or letter probabilities -> (n,); r (2, M); mean and
    scale (2,), the standard deviations under q. Where laws over these sequences are what is asked for also dual (2,),
    at the maximum of D; ends with one sentence where none meets the thresholds.
    """
    elements = world.elements or read_elements(None, args.device)
    codes = elements.codes[chromosome_split(elements.chrom)["training"]]
    chain = MarkovChain(both_strands(codes), 2)
    exact = world.law is not None or args.primal == "likelihood"
    codes = all_sequences(9).to(args.device) if world.law else codes if exact else codes[::8]
    log_q = world.law.p.log() if world.law else torch.zeros(len(codes), device=args.device).double().log_softmax(0)
    problem = types.SimpleNamespace(codes=codes, log_q=log_q, b=torch.tensor(args.threshold, dtype=torch.float64))
    problem.rewards, problem.dual = [world.reward, lambda x: naturalness(chain, x)], None
    problem.r = mean_rewards(problem, codes)
    problem.mean = problem.r @ log_q.exp()
    problem.scale = ((problem.r - problem.mean[:, None]) ** 2 @ log_q.exp()).sqrt()
    if exact:
        check_feasible(undominated(problem.r), problem.b)
        problem.dual = newton(problem, maximise_dual(lambda v: dual_function(problem, v), 2, 0))
    return problem


def undominated(r):
    """Of the points r (2, M) those that no other one exceeds in both coordinates: only they bound what is feasible."""
    r = r[:, r[0].argsort(descending=True)]
    best = r[1].cummax(0).values
    return r[:, torch.cat([best[:1] >= best[:1], best[1:] > best[:-1]])]


def check_feasible(r, b):
    """End with one sentence where no distribution over the points has E[r_i] >= b_i: r (k, M), b (k,).

    max over p of min_i (E_p[r_i] - b_i) is a linear program. Where it is negative, its multipliers w >= 0 show a ray
    on which D(t w) grows without bound: those dual variables would diverge.
    """
    k, count = r.shape
    cost = np.zeros(count + 1)
    cost[-1] = -1  # the last variable is the worst slack
    rows = np.hstack([-r.cpu().numpy(), np.ones((k, 1))])
    total = np.hstack([np.ones((1, count)), [[0]]])
    found = linprog(cost, rows, -b.numpy(), total, [1], [(0, None)] * count + [(None, None)])
    slack, share = -found.fun, -found.ineqlin.marginals
    if slack < 0:
        names = " and ".join(f"E[r_{i + 1}] >= {b[i]:g}" for i in range(k) if share[i] > 1e-6)
        fail(f"No model meets {names}: the best is short by {-slack:.3g}, and the multiplier would grow for ever;"
             " lower the threshold.")


def aligned_law(problem, dual):
    """q exp(sum_i dual_i r_i) / Z -> its masses (4^9,), log Z."""
    log_p = problem.log_q + dual.to(problem.r) @ problem.r
    return log_p.softmax(0), log_p.logsumexp(0).item()


def dual_function(problem, dual):
    """D(dual) = dual' b - log Z, and its gradient b - E[r] (2,)."""
    p, log_z = aligned_law(problem, dual)
    return (dual @ problem.b).item() - log_z, problem.b - (problem.r @ p).cpu()


def newton(problem, dual, steps=20):
    """Multipliers near the maximum of D -> the maximum to rounding error; those at zero stay there."""
    active = dual > 1e-9
    for _ in range(steps):
        p, _ = aligned_law(problem, dual)
        offset = (problem.r - (problem.r @ p)[:, None])[active]
        gap = (problem.b - (problem.r @ p).cpu())[active]
        dual = dual.clone()
        dual[active] += torch.linalg.solve(((offset * p) @ offset.T).cpu(), gap)
    return dual


def maximise_dual(dual, count, on_simplex):
    """Maximum of a concave dual function over `count` multipliers >= 0, the first `on_simplex` of which sum to one.

    dual(v) -> value, gradient (count,). By sequential quadratic programming (scipy's SLSQP), to about 1e-7.
    """
    start = torch.ones(count, dtype=torch.float64)
    start[:on_simplex] /= max(on_simplex, 1)

    def negative(v):
        value, gradient = dual(torch.as_tensor(v))
        return -float(value), -gradient.cpu().numpy()

    rows = [dict(type="eq", fun=lambda v: v[:on_simplex].sum() - 1)] if on_simplex else []
    found = minimize(negative, start.numpy(), jac=True, method="SLSQP", bounds=[(0, None)] * count, constraints=rows,
                     options=dict(ftol=1e-15, maxiter=500))
    return torch.as_tensor(found.x)


def dual_update(dual, gap, memory, ki, kp=0.0, nu=0.0):
    """One step of nuPI (Sohrabi et al. 2024) on the multipliers (m,), before projection -> dual, memory.

    dual + ki gap + kp (change of the moving average nu memory + (1 - nu) gap); kp = 0 is dual ascent.
    """
    average = nu * memory + (1 - nu) * gap
    return dual + ki * gap + kp * (average - memory), average


def raise_duals(problem, dual, reward, memory, args):
    """Multipliers (2,) after one step along what the mean rewards (2,) miss, in units of their variance.

    Damped for the gradient, which lags behind the multipliers: undamped, both circle, with a period of 15 rounds.
    """
    damping = dict(kp=4 * args.dual_lr, nu=0.5) if args.primal == "gradient" else {}
    dual, memory = dual_update(dual, (problem.b - reward) / problem.scale.cpu() ** 2, memory, args.dual_lr, **damping)
    return dual.clamp(min=0), memory


def exact_ascent(problem, args):
    """Dual ascent with the exact aligned law in place of the network -> path of multipliers (301, 2)."""
    path, memory = [torch.zeros(2, dtype=torch.float64)], torch.zeros(2, dtype=torch.float64)
    for _ in range(300):
        p, _ = aligned_law(problem, path[-1])
        dual, memory = raise_duals(problem, path[-1], (problem.r @ p).cpu(), memory, args)
        path.append(dual)
    return torch.stack(path)


# ---- the method ------------------------------------------------------------------------------------------------------


def relaxed_step(log_p, x, step, temperature, soft, rng):
    """`unmask` for x (n, L, 5) with a gradient, from the letters' log_p (n, L, 4) -> the next x (n, L, 5).

    A masked place takes a letter with probability 1 / step, else stays masked: the largest of five log probabilities
    plus Gumbel noise. Forward that one-hot, backward the softmax at `temperature`; with `soft`, the softmax in both.
    What is set is kept; a place that is set to a degree, in soft states, sets the rest.
    """
    stay = torch.full_like(log_p[:, :, :1], math.log(1 - 1 / step) if step > 1 else -math.inf)
    u = torch.rand(x.shape, generator=rng, device=x.device, dtype=torch.float64)
    noisy = torch.cat([log_p - math.log(step), stay], 2) - (-u.log()).log().to(log_p)
    y = (noisy / temperature).softmax(2)
    if not soft:
        y = one_hot(noisy.argmax(2), 5).to(y) + y - y.detach()
    masked = x[:, :, MASK:]
    return torch.cat([x[:, :, :MASK], torch.zeros_like(masked)], 2) + masked * y


def relaxed_paths(net, base, n, length, args, kl_weight, rng):
    """n sequences as letters x (n, L, 4), one-hot with gradient, and the KL of their paths (n,), and rows of calls."""
    tokens, kl, rows = torch.full((n, length), MASK, device=rng.device), 0.0, 1
    hard = args.steps - args.truncate
    chosen = args.steps - int(torch.randint(hard, (1,), generator=rng, device=rng.device)) if hard else 0
    log_p = predict(net, tokens[:1]).expand(n, -1, -1)
    for step in range(args.steps, args.truncate, -1):
        if step == chosen and kl_weight:  # one of the steps without gradient through the states stands for all
            gap = kl_of_letters(net(tokens), predict(base, tokens))
            kl, rows = kl + hard * (gap * (tokens == MASK)).sum(1) / step, rows + n
        tokens, new = unmask(log_p, tokens, step, rng)
        log_p, due = refresh(net, log_p, tokens, new)
        rows += due
    x = one_hot(tokens, 5).to(log_p)
    for step in range(args.truncate, 0, -1):
        log_p = net(x)
        if kl_weight:
            kl = kl + (kl_of_letters(log_p, base(x)) * x[:, :, MASK]).sum(1) / step
        x, rows = relaxed_step(log_p, x, step, args.temperature, args.soft and step > 1, rng), rows + n
    return x[:, :, :MASK], kl, rows


def primal_dual(problem, world, args, folder, label):
    """Algorithm 1 from the base model -> network, multipliers (2,), trace (rounds, 5) of rewards, KL and multipliers,
    calls of the denoiser.

    label is "constrained", or "equal", which keeps the multipliers where the other starts if the exact ones are not
    known, and has half the rounds: the penalty method. Returned are averages over the last quarter, of network and
    multipliers: they converge where the iterates circle. Every ten rounds all that is needed to go on is written to a
    file of `folder`, for --resume.
    """
    fixed = label == "equal"
    rounds = args.rounds // 2 if fixed else args.rounds
    start, part = rounds * 3 // 4, folder / f"{label}.part.pt"
    net = copy.deepcopy(world.network).requires_grad_(True)
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, betas=(0.9, 0.99))
    rng = torch.Generator(args.device).manual_seed(2 * args.seed + fixed)
    dual = (args.weight / problem.scale).cpu() if problem.dual is None or fixed else problem.dual
    memory, trace, calls = torch.zeros_like(dual), [], 0
    settings = {name: str(v) for name, v in vars(args).items() if name not in ("resume", "out", "checkpoints")}
    settings = json.dumps(settings, sort_keys=True)
    if args.resume and part.exists():
        try:
            state = torch.load(part, map_location=args.device, weights_only=True)
            found, trace, calls = state["settings"], state["trace"], state["calls"]
            if found == settings:
                net.load_state_dict(state["net"])
                average.load_state_dict(state["average"])
                optimizer.load_state_dict(state["optimizer"])
                rng.set_state(state["rng"].cpu())
                dual, memory = state["dual"].cpu(), state["memory"].cpu()
        except (KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            fail(f"{part} is no state of this script ({type(error).__name__}): delete it to start again.")
        if found != settings:
            fail(f"{part} was made with other settings: {found}.")

    run, base = (InPrecision(f, args.bf16) for f in (net, world.network))

    def draw(n):
        rows = torch.multinomial(aligned_law(problem, dual)[0], n, replacement=True, generator=rng)
        x = problem.codes[rows].long()
        return x if world.law else either_strand(x, rng)

    batch_loss = denoiser_batches(draw, args.batch, rng)
    for k in range(len(trace), rounds):
        optimizer.param_groups[0]["lr"] = args.lr * (1 - 0.9 * k / rounds)
        for _ in range(args.updates if args.primal == "likelihood" else 1):
            if args.primal == "likelihood":
                loss = batch_loss(run)
            else:
                x, kl, rows = relaxed_paths(run, base, args.batch, world.length, args, 1.0, rng)
                reward = torch.stack([f(x).mean() for f in problem.rewards])
                loss = kl.mean() - dual.to(reward) @ reward
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        if args.primal == "likelihood":
            paths = sample_trajectories(net, world.network, args.probe, world.length, args.steps, rng)
            reward, kl, rows = mean_rewards(problem, paths["x"]).mean(1), paths["kl"], paths["rows"]
        reward, calls = reward.detach().double().cpu(), calls + rows
        trace.append([*reward.tolist(), kl.mean().item(), *dual.tolist()])
        if not all(map(math.isfinite, [loss.item(), *trace[-1]])):
            fail(f"{label} diverged in round {k + 1}: take a lower --lr.")
        if not fixed:
            dual, memory = raise_duals(problem, dual, reward, memory, args)
        if k >= start:
            for mean, value in zip(average.parameters(), net.parameters()):
                mean.lerp_(value.detach(), 1 / (k - start + 1))
        if (k + 1) % 10 == 0 or k + 1 == rounds:
            state = dict(settings=settings, net=net.state_dict(), average=average.state_dict(), dual=dual,
                         memory=memory, optimizer=optimizer.state_dict(), rng=rng.get_state(), trace=trace, calls=calls)
            write_atomically(part, lambda temporary: torch.save(state, temporary))
        progress(f"{label}, activity {reward[0]:.2f}, KL {trace[-1][2]:.2f}", k + 1, rounds)
    trace = torch.tensor(trace, dtype=torch.float64)
    save_network(folder / f"{label}.safetensors", average, settings)
    return average, trace[start:, 3:].mean(0), trace, calls


# ---- shared: networks ------------------------------------------------------------------------------------------------


def initialise(net, rng):
    """PyTorch's own initialisation of convolutions and linear layers, from our generator; -> net."""
    for layer in net.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            bound = layer.weight[0].numel() ** -0.5
            for value in layer.parameters():
                torch.nn.init.uniform_(value, -bound, bound, generator=rng)
    return net


class SequenceConv(torch.nn.Conv2d):
    """Convolution along the sequence, x (n, L, C) -> (n, L, C').

    In two dimensions with the channels last: on a CPU up to four times as fast as Conv1d where it is dilated.
    """

    def __init__(self, inputs, outputs, kernel, dilation=1):
        super().__init__(inputs, outputs, (1, kernel), padding=(0, kernel // 2 * dilation), dilation=(1, dilation))

    def forward(self, x):
        return super().forward(x[:, None].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, 0]


class MaskedDenoiser(torch.nn.Module):
    """Dilated residual convolutions: tokens x (n, L), 0 to 4, or a soft one-hot of them (n, L, 5) -> log_p (n, L, 4).

    SUBS parameterisation: the mask has no output, and what stands at unmasked positions is to be ignored. Without the
    time: for absorbing noise the exact denoiser does not depend on it.
    """

    def __init__(self, width, kernel, dilations, rng):
        super().__init__()
        self.architecture = dict(width=width, kernel=kernel, dilations=dilations)
        self.embed = SequenceConv(5, width, 9)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in [*dilations, 1])
        self.layers = torch.nn.ModuleList(SequenceConv(width, width, kernel, d) for d in dilations)
        self.head = torch.nn.Linear(width, 4)
        initialise(self.to(rng.device), rng)

    def forward(self, x):
        h = self.embed(x if x.is_floating_point() else one_hot(x, 5).to(self.head.weight))
        for norm, layer in zip(self.norms, self.layers):
            h = h + silu(layer(norm(h)))
        return self.head(self.norms[-1](h)).log_softmax(2)


class Oracle(torch.nn.Module):
    """Convolutions and pooling: tokens x (n, L), 0 to 3, or letter probabilities (n, L, 4) -> outputs (n, C).

    kind says what the outputs of `names` are: "classes", logits of cell types that exclude each other; "activity",
    regressed values; "open", logits that each stand alone.
    """

    def __init__(self, names, kind, width, rng):
        super().__init__()
        self.architecture = dict(names=names, kind=kind, width=width)
        self.layers = torch.nn.ModuleList(
            [SequenceConv(4, width, 15), SequenceConv(width, width, 7), SequenceConv(width, width, 5)])
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm1d(width) for _ in self.layers)
        self.head = torch.nn.Linear(2 * width, len(names))
        initialise(self.to(rng.device), rng)

    def forward(self, x):
        h = (x if x.is_floating_point() else one_hot(x, 4)).to(self.head.weight)
        for layer, norm, window in zip(self.layers, self.norms, (4, 2, 1)):
            h = silu(norm(layer(h).flatten(0, 1)).unflatten(0, (len(x), -1)))
            h = h[:, : h.shape[1] // window * window].unflatten(1, (-1, window)).amax(2)
        return self.head(torch.cat([h.mean(1), h.amax(1)], 1))

    def score(self, x, name):
        """One output as a reward (n,): log odds against the other classes, activity, or log odds of being open."""
        out, k = self(x), self.architecture["names"].index(name)
        if self.architecture["kind"] != "classes":
            return out[:, k]
        return out[:, k] - torch.cat([out[:, :k], out[:, k + 1 :]], 1).logsumexp(1)


def save_network(path, net, settings):
    """Weights, architecture and the settings of the training (text) in one safetensors file."""
    metadata = dict(kind=type(net).__name__, architecture=json.dumps(net.architecture), settings=settings)
    write_atomically(path, lambda part: safetensors.torch.save_file(net.state_dict(), part, metadata))


def load_network(path, device):
    """A MaskedDenoiser or Oracle that `save_network` wrote -> (network without gradients, its settings)."""
    try:
        with safetensors.safe_open(path, "pt", device=str(device)) as file:
            metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        kind = dict(MaskedDenoiser=MaskedDenoiser, Oracle=Oracle)[metadata["kind"]]
        net = kind(**json.loads(metadata["architecture"]), rng=torch.Generator()).to(device)
        net.load_state_dict(state)
    except FileNotFoundError:
        fail(f"{path} is missing: make it with python dna/pretrain.py, or name its folder with --checkpoints.")
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        fail(f"{path} is no network of this folder ({type(error).__name__}).")
    return net.eval().requires_grad_(False), metadata["settings"]


def either_strand(x, rng):
    """Each row of x (N, L), or its reverse complement, by the toss of a coin."""
    toss = torch.rand(len(x), 1, generator=rng, device=x.device) < 0.5
    return torch.where(toss, 3 - x.flip(1), x)


def denoiser_batches(draw, batch, rng):
    """The bound, in nats a letter, on batches of draw(n) -> tokens (n, L), as a function of the network."""

    def batch_loss(net):
        x = draw(batch)
        share = (torch.arange(batch, device=x.device) + torch.rand(batch, generator=rng, device=x.device)) / batch
        z, hidden = hide(x, share, rng)
        return hidden_loss(net(z), x, hidden).mean() / x.shape[1]

    return batch_loss


# ---- shared: masked diffusion ----------------------------------------------------------------------------------------


def predict(denoiser, x, chunk=256):
    """log_p (N, L, 4) at x (N, L), in chunks and without gradient."""
    with torch.no_grad():
        return torch.cat([denoiser(part) for part in x.split(chunk)])


def hide(x, share, rng):
    """Mask 1 + floor(share L) random tokens of each row of x (N, L), share (N,) in [0, 1) -> tokens, hidden (N, L)."""
    count = 1 + (share * x.shape[1]).long()
    rank = torch.rand(x.shape, generator=rng, device=x.device).argsort(1).argsort(1)
    hidden = rank < count[:, None]
    return torch.where(hidden, MASK, x), hidden


def hidden_loss(log_p, x, hidden):
    """L times the mean of -log p at the hidden tokens (N,), nats; its mean over uniform counts is the bound.

    MDLM's loss is the integral over t of 1/t times the cross entropy of tokens hidden with probability t. The counts k
    are then Binomial(L, t), and the integral of Binomial(k; L, t) / t is 1 / k for every k from 1 to L.
    """
    nll = -log_p.gather(2, x[:, :, None])[:, :, 0]
    return x.shape[1] * (nll * hidden).sum(1) / hidden.sum(1)


def masked_bound(denoiser, x, levels, rng):
    """Estimate of the bound on -log p(x) of x (N, L), nats -> (N, levels), one noise level a column: average them.

    The number of hidden tokens is drawn from one interval a level, so that all levels together cover 1 to L evenly.
    """
    columns = []
    for level in range(levels):
        share = (level + torch.rand(len(x), generator=rng, device=x.device, dtype=torch.float64)) / levels
        z, hidden = hide(x, share, rng)
        columns.append(hidden_loss(predict(denoiser, z), x, hidden))
    return torch.stack(columns, 1)


def unmask(log_p, x, step, rng):
    """From time step / steps to (step - 1) / steps: each masked token of x (N, L) is set with probability 1 / step.

    log_p (N, L, 4) gives the letters. -> tokens (N, L), newly set (N, L) bool. In float64 through the inverse
    distribution function: Gumbel noise in float32 is cut off, which lowers the temperature (Zheng et al. 2024).
    """
    u = torch.rand(x.shape, generator=rng, device=x.device, dtype=torch.float64)
    new = (x == MASK) & (u < 1 / step)
    u = torch.rand(int(new.sum()), 1, generator=rng, device=x.device, dtype=torch.float64)
    x = x.clone()
    x[new] = invert_cdf(log_p[new].double().exp(), u)[:, 0]
    return x, new


def refresh(denoiser, log_p, x, new):
    """log_p (N, L, 4) after `new` tokens were set in x (N, L) -> log_p, rows that needed a call of the denoiser.

    The denoiser does not know the time, so a row changes only where something was set and something is left to set.
    """
    due = (new.any(1) & (x == MASK).any(1)).nonzero()[:, 0]
    if len(due):
        log_p = log_p.index_copy(0, due, predict(denoiser, x[due]))
    return log_p, len(due)


def invert_cdf(w, u):
    """Smallest n with w_1 + ... + w_n > u sum(w), for w (G, P) and u (G, M) in [0, 1) -> (G, M)."""
    cdf = w.cumsum(1)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=w.shape[1] - 1)


def kl_of_letters(log_p, base_log_p):
    """KL(p || base) of the letters at every place, log_p and base_log_p (n, L, 4) -> (n, L), nats."""
    return (log_p.exp() * (log_p - base_log_p)).sum(2)


def sample_trajectories(net, base, n, length, steps, rng):
    """n sequences by the reverse process of `net`, with all that their trajectories tell.

    -> x (n, L); when (n, L), the step that set each letter; log_p (n, L), its log probability then; kl (n,), the KL of
    the kernels from those of `base` at the states that were met, summed over steps, nats: its mean is the KL of the two
    processes, which is at least that of the laws of x, and the mean of log_ratio (n,), log p of the path less that by
    `base`. A masked place is set with probability 1 / step in both. And rows, the calls of `net`.
    """
    x, kl, rows = torch.full((n, length), MASK, device=rng.device), torch.zeros(n, device=rng.device), 1
    when, chosen, log_ratio = torch.zeros_like(x), torch.zeros(n, length, device=rng.device), torch.zeros_like(kl)
    log_p, base_log_p = (predict(f, x[:1]).expand(n, -1, -1) for f in (net, base))
    for step in range(steps, 0, -1):
        kl = kl + (kl_of_letters(log_p, base_log_p) * (x == MASK)).sum(1) / step
        x, new = unmask(log_p, x, step, rng)
        letter, by_base = (f.gather(2, x.clamp(max=3)[:, :, None])[:, :, 0] for f in (log_p, base_log_p))
        when, chosen = torch.where(new, step, when), torch.where(new, letter, chosen)
        log_ratio = log_ratio + ((letter - by_base) * new).sum(1)
        log_p, due = refresh(net, log_p, x, new)
        base_log_p = log_p if base is net else refresh(base, base_log_p, x, new)[0]
        rows += due
    return dict(x=x, when=when, log_p=chosen, kl=kl, log_ratio=log_ratio, rows=rows)


class InPrecision:
    """A function of sequences, in bfloat16 if that is wanted; results are at least float32."""

    def __init__(self, function, bf16):
        self.function, self.bf16 = function, bf16

    def __call__(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.function(x)
        return out.float() if out.dtype == torch.bfloat16 else out


# ---- measuring -------------------------------------------------------------------------------------------------------


def mean_and_se(values):
    """Independent values (G,) -> their mean and its standard error (None for a single one)."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None


def median_and_se(values):
    """Independent values (N,) -> their median and half the distance of the order statistics sqrt(N) / 2 around it."""
    ranked, n = values.sort().values, len(values)
    low, high = (min(max(round(n / 2 + sign * n**0.5 / 2), 0), n - 1) for sign in (-1, 1))
    return values.median().item(), (ranked[high] - ranked[low]).item() / 2


def kmer_counts(x, k):
    """How often each of the 4^k words stands in x (N, L) -> (4^k,) float64."""
    words = (x.unfold(1, k, 1).long() * 4 ** torch.arange(k - 1, -1, -1, device=x.device)).sum(2)
    return torch.bincount(words.flatten(), minlength=4**k).double()


def kmer_correlation(x, y, k=3):
    """Pearson correlation of the counts of all words of k letters in x (N, L) and y (M, L): DRAKES' naturalness."""
    return torch.corrcoef(torch.stack([kmer_counts(x, k), kmer_counts(y, k)]))[0, 1].item()


def levenshtein(x, y):
    """Edit distances of x (N, A) and y (N, B), row by row -> (N,) int array.

    Bit-sliced: 64 rows a machine word. Neighbours in the table of distances differ by -1, 0 or 1 (Hyyro 2003), so that
    a cell takes eight logical operations; the cells of an anti-diagonal are independent of each other.
    """
    n, a, b = len(x), x.shape[1], y.shape[1]
    letters = [np.pad(codes.cpu().numpy().astype(np.uint8), ((0, -n % 64), (0, 0))).T for codes in (x, y)]
    planes = [np.ascontiguousarray(np.packbits(codes >> bit & 1, axis=1)).view(np.uint64)
              for codes in letters for bit in (0, 1)]
    up, down = np.full_like(planes[0], 2**64 - 1), np.zeros_like(planes[0])  # along columns: row i minus row i - 1
    more, less = np.full_like(planes[2], 2**64 - 1), np.zeros_like(planes[2])  # along rows: column j minus column j - 1
    for diagonal in range(a + b - 1):
        first, last = max(0, diagonal - b + 1), min(a, diagonal + 1)
        i, j = slice(first, last), np.arange(diagonal - first, diagonal - last, -1)
        equal = ~((planes[0][i] ^ planes[2][j]) | (planes[1][i] ^ planes[3][j]))
        u, d, m, e = up[i], down[i], more[j], less[j]
        zero = equal | d | e  # no dearer than the cell up and left
        up[i], down[i], more[j], less[j] = e | ~(zero | m), zero & m, d | ~(zero | u), zero & u
    bits = [np.unpackbits(v.view(np.uint8), axis=1)[:, :n].sum(0, dtype=np.int64) for v in (more, less)]
    return a + bits[0] - bits[1]


def diversity(x):
    """Mean edit distance over all pairs of x (N, L), a unit each for insertion, deletion and substitution."""
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return float(levenshtein(x[i], x[j]).mean())


def motif_scores(name):
    """Log odds of a motif of MOTIFS against uniform letters, and the score of a hit -> (4, width) long, int; centinats.

    The score that a word of uniform letters reaches with probability 2e-4 at most: one random 200 bp element in 13 has
    a hit. The distribution of scores is the convolution of those of the columns.
    """
    odds = torch.tensor([[float(v) for v in line.split()] for line in MOTIFS[name]], dtype=torch.float64) + 2.5
    odds = ((odds / odds.sum(0) * 4).log() * 100).round().long()
    share = torch.ones(1, dtype=torch.float64)  # of words by score, the lowest possible first
    for column in (odds - odds.amin(0)).T.tolist():
        spread = torch.zeros(len(share) + max(column), dtype=torch.float64)
        for value in column:
            spread[value : value + len(share)] += share / 4
        share = spread
    above = share.flip(0).cumsum(0).flip(0)  # probability of this score or a higher one
    return odds, int((above > 2e-4).sum() + odds.amin(0).sum())


def motif_hits(x):
    """Which of MOTIFS stand in x (N, L), on either strand -> {name: (N,) bool}."""
    hits, letters = {}, one_hot(x.long(), 4).float().transpose(1, 2)
    for name in MOTIFS:
        odds, threshold = motif_scores(name)
        both = torch.stack([odds, odds.flip(0, 1)]).float().to(x.device)
        hits[name] = conv1d(letters, both).amax((1, 2)) >= threshold
    return hits


def dna_world(name, data, checkpoints, device):
    """What the methods work with, from the networks in a folder -> a namespace of length and functions of sequences.

    name is "mpsa", "hepg2" or "data" (then `data` is its table). denoiser: tokens x (n, L) -> log_p (n, L, 4), exact
    for mpsa; network: the same as a MaskedDenoiser. reward and held_out: x (n, L), or letter probabilities (n, L, 4)
    -> (n,); accessible: x -> probability of being open in HepG2 (n,), or None. elements or law: the data behind them.
    oracle_a, oracle_b and classifier are the networks behind the rewards, with a score for every cell type, or None.
    """
    network = load_network(checkpoints / f"{name}_base.safetensors", device)[0]
    if name == "mpsa":
        law = splice_law(device)
        reward, held_out = (TableReward(value) for value in law.rewards)
        return types.SimpleNamespace(name=name, length=9, denoiser=ExactDenoiser(law.p), network=network, reward=reward,
                                     held_out=held_out, accessible=None, elements=None, law=law, oracle_a=None,
                                     oracle_b=None, classifier=None)
    elements = read_elements(data, device)
    a, b = (load_network(checkpoints / f"{name}_oracle_{k}.safetensors", device)[0] for k in "ab")
    classifier = accessible = None
    if elements.codes.shape[1] == 200:  # the classifier comes from this folder's elements, whatever the data
        folder = checkpoints if name == "hepg2" else pathlib.Path(__file__).parent / "checkpoints"
        classifier = load_network(folder / "hepg2_accessibility.safetensors", device)[0]
        accessible = lambda x: classifier.score(x, "hepg2").sigmoid()
    return types.SimpleNamespace(name=name, length=elements.codes.shape[1], denoiser=network, network=network,
                                 reward=lambda x: a.score(x, "hepg2"), held_out=lambda x: b.score(x, "hepg2"),
                                 accessible=accessible, elements=elements, law=None, oracle_a=a, oracle_b=b,
                                 classifier=classifier)


def element_measures(world, x, levels, rng):
    """What the tables say about a set of elements x (N, L) -> {key: (estimate, standard error or None)}.

    activity and held_out: median reward by oracles A and B; accessible: share open in HepG2; kmer3_correlation with the
    top real HepG2 elements; diversity: mean edit distance of pairs, letters; log_likelihood: minus the bound under the
    base model, nats; motif_*: share with a hit.
    """
    x = x.long()
    with torch.no_grad():
        scores = dict(activity=world.reward, held_out=world.held_out)
        values = {key: median_and_se(torch.cat([f(part) for part in x.split(256)])) for key, f in scores.items()}
        if world.accessible:
            values["accessible"] = mean_and_se(torch.cat([world.accessible(p) > 0.5 for p in x.split(256)]).double())
    values["kmer3_correlation"] = kmer_correlation(x, world.elements.codes[world.elements.top]), None
    values["diversity"] = diversity(x), None
    values["log_likelihood"] = mean_and_se(-masked_bound(world.denoiser, x, levels, rng).mean(1))
    return values | {f"motif_{name.lower()}": mean_and_se(hit.double()) for name, hit in motif_hits(x).items()}


def mean_rewards(problem, x):
    """Both rewards of tokens x (N, L) -> (2, N), float64."""
    with torch.no_grad():
        return torch.stack([torch.cat([f(part.long()) for part in x.split(256)]).double() for f in problem.rewards])


def run_methods(problem, world, args, folder, rng):
    """The base model, the penalty and the constrained one -> {method: namespace of x, kl (N,), dual, trace}, calls."""
    results, calls = {}, 0
    for method in ("base", "equal", "constrained"):
        net, dual, trace, spent = world.network, torch.zeros(2), None, 0
        if method != "base":
            net, dual, trace, spent = primal_dual(problem, world, args, folder, method)
        paths = sample_trajectories(net, world.network, args.samples, world.length, args.steps, rng)
        results[method] = types.SimpleNamespace(x=paths["x"], kl=paths["kl"], dual=dual, trace=trace)
        calls += spent + paths["rows"]
    return results, calls


def measure(problem, world, results, args, rng):
    """Rows of all that is known: thresholds, rewards, KLs, multipliers; exact values where there are any.

    missed_i is the distance to the threshold in standard deviations under the base law, negative where it is met.
    """
    name, rows, truth = world.name, [], {}
    rows += [row(f"threshold.{name}.reward_{i + 1}", b) for i, b in enumerate(problem.b.tolist())]
    if problem.dual is not None:
        path = exact_ascent(problem, args)
        duals = dict(base=torch.zeros(2), equal=results["equal"].dual, constrained=problem.dual)
        for method, dual in duals.items():
            p, log_z = aligned_law(problem, dual)
            r = (problem.r @ p).cpu()
            truth[method] = dict(reward_1=r[0].item(), reward_2=r[1].item(), kl=(dual.to(r) @ r).item() - log_z,
                                 dual_1=dual[0].item(), dual_2=dual[1].item())
            label = "exact" if method == "constrained" else f"exact_{method}"
            rows += [row(f"{label}.{name}.{key}", value) for key, value in truth[method].items()]
            rows.append(row(f"{label}.{name}.effective_share", 1 / (len(p) * (p**2).sum().item())))
        best = truth["constrained"]
        rows.append(row(f"exact.{name}.dual_value", dual_function(problem, problem.dual)[0], exact=best["kl"]))
        for i in range(2):
            slack = best[f"reward_{i + 1}"] - problem.b[i].item()
            rows.append(row(f"exact.{name}.slackness_{i + 1}", problem.dual[i].item() * slack, exact=0.0))
            rows.append(row(f"dual_only.{name}.dual_{i + 1}", path[-1, i].item(), exact=problem.dual[i].item()))
    for method, out in results.items():
        exact, r = truth.get(method, {}), mean_rewards(problem, out.x)
        for key, values in dict(reward_1=r[0], reward_2=r[1], kl=out.kl.double()).items():
            rows.append(row(f"{method}.{name}.{key}", *mean_and_se(values), exact.get(key)))
        for i in range(2):
            rows.append(row(f"{method}.{name}.dual_{i + 1}", out.dual[i].item(), exact=exact.get(f"dual_{i + 1}")))
            missed = (problem.b[i].item() - r[i]) / problem.scale[i]
            rows.append(row(f"{method}.{name}.missed_{i + 1}", *mean_and_se(missed)))
        if out.trace is not None:
            for k in range(0, len(out.trace), max(1, args.rounds // 20)):
                rows += [row(f"{method}_round_{k}.{name}.{key}", v) for key, v in
                         zip(("reward_1", "reward_2", "kl", "dual_1", "dual_2"), out.trace[k].tolist())]
    if not world.law:
        held = world.elements.codes[(world.elements.chrom <= 2) & world.elements.active]
        some = torch.randperm(len(held), generator=rng, device=held.device)[: args.samples]
        for method, x in dict(real_hepg2=held[some].long(), **{m: out.x for m, out in results.items()}).items():
            measures = element_measures(world, x, args.levels, rng)
            with torch.no_grad():
                excess = torch.cat([world.reward(part) - world.held_out(part) for part in x.split(256)])
            measures["over_optimisation"] = mean_and_se(excess)
            if method == "real_hepg2":
                measures |= {f"reward_{i + 1}": mean_and_se(v) for i, v in enumerate(mean_rewards(problem, x))}
            rows += [row(f"{method}.{name}.{key}", *value) for key, value in measures.items()]
    return rows


# ---- the figure ------------------------------------------------------------------------------------------------------


def draw_duals(file, problem, world, results, rows, args):
    """Rewards with thresholds, KL and multipliers by round; dotted: thresholds and the exact values of the laws."""
    value, path = {r["name"]: r["estimate"] for r in rows}, problem.dual is not None and exact_ascent(problem, args)
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8))
    for method, color in dict(equal="#E69F00", constrained="#0072B2").items():
        trace = results[method].trace.numpy()
        for k, key in enumerate(("reward_1", "reward_2", "kl")):
            axes[k].plot(np.arange(2, len(trace) - 2), np.convolve(trace[:, k], np.ones(5) / 5, "valid"), color=color,
                         linewidth=1, label=method)
            label, name = f"{method}, exact", "exact" if method == "constrained" else "exact_equal"
            if f"{name}.{world.name}.{key}" in value and (name != "exact" or k == 2):
                axes[k].axhline(value[f"{name}.{world.name}.{key}"], color=color, linestyle=":", label=label)
    for i, (name, color) in enumerate(zip(NAMES, ("#0072B2", "#D55E00"))):
        axes[i].axhline(problem.b[i].item(), color="black", linestyle=":", label="threshold")
        axes[i].axhline(problem.mean[i].item(), color="#999999", linestyle=":", label="base law")
        axes[i].set(title=f"mean {name}, of five rounds")
        scale = problem.scale[i].item()
        axes[3].plot(results["constrained"].trace[:, 3 + i] * scale, color=color, label=name)
        if problem.dual is not None:
            axes[3].plot(path[:, i] * scale, "--", color=color, linewidth=0.8,
                         label="without a network")
            axes[3].axhline(problem.dual[i].item() * scale, color=color, linestyle=":")
    axes[2].set(title="KL of the paths from the base model, nats", ylim=(0, None))
    axes[3].set(title="multipliers, per standard deviation", xlim=(0, args.rounds))
    for ax in axes:
        ax.set(xlabel="round")
        ax.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, file)


# ---- shared: command line and files ----------------------------------------------------------------------------------


def common_parser(doc):
    """The flags that every script has, in the same order; a bad flag ends in one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{parser.prog}: {message}")
    parser.add_argument("--seed", type=int, default=0)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="coarse, in seconds")
    size.add_argument("--paper", action="store_true", help="the paper's sizes")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder of results and caches")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    return parser


def dna_parser(doc):
    """common_parser with the flags of this folder's worlds."""
    parser = common_parser(doc)
    parser.add_argument("--world", choices=["hepg2", "mpsa"], default="hepg2")
    parser.add_argument("--data", type=pathlib.Path, help="table with columns seq, hepg2, k562, sknsh, chrom")
    parser.add_argument("--checkpoints", type=pathlib.Path, help="folder of the networks that pretrain.py made")
    return parser


def open_world(args):
    """The world that the flags name -> `dna_world`; its networks are this folder's own, those of --data under --out."""
    if args.data and args.world != "hepg2":
        fail("--data is a world of its own: leave --world out.")
    default = args.out / "dna_pretrain" if args.data else pathlib.Path(__file__).parent / "checkpoints"
    return dna_world("data" if args.data else args.world, args.data, args.checkpoints or default, args.device)


def device(text):
    """An argparse type: a device of PyTorch that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine") from error
    return text


def results_folder(args, script):
    """The folder of a script's results, `out`/<folder>_<script>; made now, so that a bad path costs no work."""
    path = args.out / script
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{path} cannot be made: {error.strerror}")
    return path


def positive(kind):
    """An argparse type: a number of this kind (int or float) above zero."""

    def parse(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above zero, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def fail(message):
    """End with one sentence on stderr and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def progress(label, done, total):
    """A line on stderr that counts up."""
    if done == total or done % max(1, total // 20) == 0:
        print(f"\r{label} {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def write_atomically(path, write):
    """Call write(path of a temporary file), then rename: an interrupted run leaves no half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{path.name}")  # the suffix stays, matplotlib reads the format from it
    write(part)
    os.replace(part, path)


def save_figure(figure, path, dpi=100):
    """Write a figure as a PNG with a palette of 128 colours, which is a third of the size, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB").quantize(128)
    write_atomically(path, lambda part: picture.save(part, optimize=True))


def row(name, estimate, se=None, exact=None, reference=None):
    """A line of numbers.json. z is against `reference` (value, standard error) where there is one, else `exact`."""
    value, value_se = reference or (exact, 0.0)
    z = (estimate - value) / math.hypot(se, value_se) if se and value is not None else None
    return dict(name=name, estimate=estimate, se=se, exact=exact, reference=reference and reference[0], z=z)


def write_numbers(path, args, rows, evaluations, seconds):
    """numbers.json: the arguments, the rows and what the run cost."""
    args = {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in vars(args).items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy", "matplotlib")}
    record = dict(args=args, rows=rows, network_evaluations=evaluations, seconds=round(seconds, 1),
                  peak_memory_mb=round(peak), versions=dict(python=sys.version.split()[0], **versions))
    write_atomically(path, lambda part: part.write_text(json.dumps(record, indent=1) + "\n"))
    print(f"results: {path.parent}", file=sys.stderr)


def print_table(rows, problem, keys):
    """The rows named method.problem.key: a line a method, a column a key; estimate±se, and z in brackets."""
    table = {r["name"]: r for r in rows}
    methods = list(dict.fromkeys(name.split(".")[0] for name in table if name.split(".")[1] == problem))

    def cell(r):
        if r is None:
            return ""
        text = f"{r['estimate']:,}" if isinstance(r["estimate"], int) else f"{r['estimate']:.3f}"
        return text + (f"±{r['se']:.3f}" if r["se"] else "") + (f" ({r['z']:+.1f})" if r["z"] is not None else "")

    lines = [[m, *(cell(table.get(f"{m}.{problem}.{key}")) for key in keys)] for m in methods]
    lines = [[problem, *keys]] + [line for line in lines if any(line[1:])]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines if len(lines) > 1 else []:
        print(line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:])), sep="  ")
    print()


# ---- main ------------------------------------------------------------------------------------------------------------


def main(args):
    """Solve, train, measure, draw and write -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "dna_constrained_alignment")
    world, rng = open_world(args), torch.Generator(args.device).manual_seed(args.seed)
    problem = make_problem(world, args)
    results, calls = run_methods(problem, world, args, out, rng)
    rows = measure(problem, world, results, args, rng)
    draw_duals(out / "figure.png", problem, world, results, rows, args)
    write_numbers(out / "numbers.json", args, rows, calls, time.perf_counter() - start)
    print_table([r for r in rows if "_round_" not in r["name"]], world.name,
                ["reward_1", "reward_2", "kl", "dual_1", "dual_2", "missed_1", "missed_2", "effective_share"])
    print_table(rows, world.name, ["activity", "held_out", "over_optimisation", "accessible", "kmer3_correlation",
                                   "diversity", "log_likelihood"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
