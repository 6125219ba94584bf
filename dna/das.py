"""Sample from p(x) exp(r(x) / kl_weight) over DNA at test time: tempered sequential Monte Carlo (SMC) over unmasking.

Paper: Kim, Kim and Park, "Test-time Alignment of Diffusion Models without Reward Over-optimization" (DAS), ICLR 2025,
arXiv 2501.05803, carried over to masked diffusion, where Pani, Ou and Li, arXiv 2505.22524, have its closest relative.
Same sampler as toy/das.py: where that shifts a Gaussian, this one tilts the letters that are set.

Run    python dna/das.py                              200 bp elements of HepG2            2 to 3 minutes on one CPU core
       python dna/das.py --quick                      the same, coarse                    10 seconds
       python dna/das.py --world mpsa                 9-mers, everything enumerable       1 minute
       python dna/das.py --reward motifs              a reward without gradient           2 minutes
       python dna/das.py --paper --device cuda        128 steps, more particles
       python dna/das.py --data dataset.csv           the papers' data, after python dna/pretrain.py --data dataset.csv

Worlds mpsa   human 5' splice sites, measured inclusion as reward: the law of the sampler with any number of steps, its
              tilts and soft values by enumeration.
       hepg2  the log odds of HepG2 *accessibility* by oracle A as reward, a stand-in for the papers' measured activity;
              oracle B, the classifier, words and motifs only measure.

Notation (here -> paper)
       kl_weight -> alpha    reward temperature: the target is p(x) exp(r(x) / kl_weight) / Z
       log_p     -> log x_theta(x_t)   log-probabilities of the four letters at every masked place
       x0_hat    -> x0hat_t  forecast of the sequence: the letters that are set, and for the masked ones `--forecast`
       temper    -> lambda_t from 0 (all masked) to 1 (sample); the twist is exp(temper r(x0_hat) / kl_weight)
       grad      -> gradient of r(x0_hat) / kl_weight in the letters of x0_hat, a relaxed one-hot
       log_w, log_z          log weights of the particles; log of the estimate of Z = E_p[exp(r / kl_weight)]

Algorithm (`masked_das`; the particles of a group interact, groups are independent)
       1. start from all masked and look ahead: log_p, x0_hat, its reward, the gradient of that    `forecast`
       2. where the effective sample size is low, resample: gather all per-particle state    `resample`, `gather`
       3. set each masked letter with probability 1 / step, from log_p tilted by temper grad  `unmask`, `tilt_letters`
       4. look ahead again, but only where a letter was set: nothing else has changed                `look_again`
       5. raise the temper, by schedule or as far as the weights allow        `temper_schedule`, `adapt_temper`
       6. weight: log_w += new twist - old twist + log p - log q of the letters that were set    `letters_log_p`
       The last twist is the reward of the sequence itself: exact in the limit of many particles, for the base model
       at this number of steps. `jump_laws` says what that number costs: many letters in one step are independent.

What you should see (labels are accessibility): with 8 particles in a group, the median reward by oracle B, which no
method sees, rises from -2 (base model) over 0 (importance), 2.5 (guidance, 1 particle) and 4.2 (bootstrap) to 7 to 8
(das); real HepG2 elements have 1.1, their highest tenth 3.6 to 4.1. Diversity stays: 108 edits a pair, base 110. The
price is over-optimisation: oracle A says 1.8 to 2.0 more than B, for real elements 0.1 less. HNF4A stands in 65 to 78%
of the results, in a third of real HepG2 elements. log Z is not determined at 8 particles: its estimates by
importance, bootstrap and das differ by far more than their standard errors. mpsa: log Z of all of them agrees with the
enumeration, 1.116 at 32 steps and 1.124 in the limit; E[r] of das too (1.513 for 1.519), while importance and bootstrap
are up to 0.08 low at 100 particles. The error of E[r] falls as N^(-1/2) from there on (measured power -0.46 with a
standard deviation of 0.11), and stays at 0.45 and more where the twist is left behind.
To try: --forecast argmax; --temper none; --max-shift inf; --kl-weight 0.5; --world mpsa --steps 4.
"""
import argparse
import csv
import functools
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import pathlib
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
    ("hepg2", "quick"): dict(groups=8, particles=4, steps=16, kl_weight=0.25, gamma=0.008, levels=2),
    ("hepg2", "default"): dict(groups=40, particles=8, steps=64, kl_weight=0.25, gamma=0.008, levels=8),
    ("hepg2", "paper"): dict(groups=640, particles=16, steps=128, kl_weight=0.25, gamma=0.008, levels=128),
    ("mpsa", "quick"): dict(groups=20, particles=50, steps=16, kl_weight=0.5, gamma=0.008, levels=1),
    ("mpsa", "default"): dict(groups=100, particles=100, steps=32, kl_weight=0.5, gamma=0.008, levels=1),
    ("mpsa", "paper"): dict(groups=640, particles=100, steps=128, kl_weight=0.5, gamma=0.008, levels=1),
}
STEPS = (1, 2, 4, 8, 16, 32, 64, 128)  # of which the enumerated world draws the cost
HIGH = 1.5  # log10 percent spliced in: nearly always included
UNWANTED = ("GATA1", "SPI1")  # motifs of other cell types; the others of MOTIFS are those of HepG2
SCHEMES = ("systematic", "stratified", "multinomial", "residual", "ssp")


def parse_args(argv=None):
    parser = dna_parser(__doc__)
    parser.add_argument("--reward", choices=["activity", "motifs"], default="activity",
                        help="motifs: wanted minus unwanted ones, without gradient")
    parser.add_argument("--forecast", choices=["mean", "argmax", "draws"],
                        help="of the masked letters; default: mean, for motifs draws")
    parser.add_argument("--groups", type=positive(int), help="independent groups of particles")
    parser.add_argument("--particles", type=positive(int), help="particles in a group")
    parser.add_argument("--steps", type=positive(int), help="sampling steps")
    parser.add_argument("--kl-weight", type=positive(float), help="reward temperature alpha")
    parser.add_argument("--temper", choices=["schedule", "adaptive", "none"], default="schedule")
    parser.add_argument("--gamma", type=positive(float), help="growth of the temper in 1/100 of the run")
    parser.add_argument("--max-shift", type=positive(float), default=1.0, help="cap on the tilt of a step, or inf")
    parser.add_argument("--ess", type=positive(float), default=0.5, help="resample below this fraction of particles")
    parser.add_argument("--resampling", choices=SCHEMES, default="systematic")
    parser.add_argument("--chunk", type=positive(int), default=256, help="sequences in one network call")
    parser.add_argument("--bf16", action="store_true", help="networks in bfloat16")
    parser.add_argument("--levels", type=positive(int), help="noise levels behind the likelihood of each sequence")
    args = parser.parse_args(argv)
    size = "quick" if args.quick else "paper" if args.paper else "default"
    for name, value in PRESETS[args.world, size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.forecast = args.forecast or ("mean" if args.reward == "activity" else "draws")
    if args.reward == "motifs" and (args.world == "mpsa" or args.forecast == "mean"):
        parser.error("--reward motifs needs letters to look at: 200 of them, and --forecast argmax or draws")
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


# ---- the worlds: all 9-mers, and what a number of steps makes of them ------------------------------------------------


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


def jump_laws(p):
    """What the sampler's law is made of at any number of steps: p (4^L,) -> (L, 4^L), row k - 1 for k jumps.

    In T steps every letter is set at a step that is uniform on 1 to T, independently of all else. Letters of the same
    step are independent given those before: a jump. Row k - 1 sums, over all ordered partitions of the places into k
    blocks, the product over the blocks of the probabilities of their letters; one pass from the most masked states on.
    """
    length, denoiser = round(math.log(len(p), 4)), ExactDenoiser(p)
    reach = torch.zeros(length + 1, *[5] * length, dtype=p.dtype, device=p.device)  # mass that arrives in k jumps
    reach[0].view(-1)[-1] = 1
    for masked in sorted(itertools.product((True, False), repeat=length), key=sum, reverse=True)[:-1]:
        values = [torch.arange(4, 5) if m else torch.arange(4) for m in masked]
        here = [slice(4, 5) if m else slice(0, 4) for m in masked]
        there = [slice(0, 5) if m else slice(0, 4) for m in masked]
        states = torch.cartesian_prod(*values).to(p.device).view(-1, length)
        letters, jump = denoiser(states).exp(), torch.ones(len(states), 1).to(p)
        for k in range(length):
            if masked[k]:  # its letters, or it stays masked
                options = torch.cat([letters[:, k], torch.ones_like(jump[:, :1])], 1)
                jump = (jump[:, :, None] * options[:, None]).flatten(1)
        jump[:, -1] = 0  # something is set
        places = sorted(range(length), key=lambda k: masked[k])  # jump: the set places, then the masked ones
        order = sorted(range(length), key=lambda k: places[k])
        jump = jump.view([5 if masked[k] else 4 for k in places]).permute(order)
        done = length - sum(masked)
        for k in range(min(done, 1), done + 1):
            reach[(k + 1, *there)] += reach[(k, *here)] * jump
    return reach[(slice(1, None), *[slice(0, 4)] * length)].reshape(length, -1)


def sampler_law(jumps, steps):
    """The law (4^L,) of the sampler with the exact denoiser in so many steps: C(T, k) choices of k steps among T^L."""
    length = len(jumps)
    return sum(math.comb(steps, k) / steps**length * jumps[k - 1] for k in range(1, length + 1))


def exact_forecast(p, value):
    """A look-ahead with the soft values of a law p (4^L,) and value = r / kl_weight (4^L,) -> look(x) for `masked_das`.

    Its value: log E_p[exp(value) | x]; its tilt makes the base denoiser that of the tilted law. Exact at infinitely
    many steps, where all weights are then equal.
    """
    top = value.max()
    base, tilted = ExactDenoiser(p), ExactDenoiser(p * (value - top).exp())

    def look(x):
        log_p, state = base(x), (x * base.place).sum(1)
        return dict(log_p=log_p, value=tilted.log_mass[state] - base.log_mass[state] + top, grad=tilted(x) - log_p)

    return look


# ---- shared: the sampler ---------------------------------------------------------------------------------------------


def per_particle(v, x):
    """v (N,) -> (N, 1, ..., 1), to multiply x (N, ...)."""
    return v.view(-1, *[1] * (x.dim() - 1))


def effective_sample_size(log_w):
    """log_w (G, P) -> (sum w)^2 / sum w^2 (G,), between 1 and P."""
    return (2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)).exp()


def log_mean_exp(log_w):
    """log_w (G, P) -> log of the mean weight (G,)."""
    return log_w.logsumexp(1) - math.log(log_w.shape[1])


def resample(log_w, scheme, rng):
    """Ancestors of P new particles in each group, log_w (G, P) -> indices (G, P); E[copies of n] = P w_n.

    multinomial: P independent uniforms through the inverse distribution function; stratified: one uniform in each
    interval of length 1/P; systematic: the same uniform in all of them; residual: floor(P w_n) copies for certain,
    multinomial for the rest; ssp (Gerber, Chopin and Whiteley 2019): floor or floor + 1 copies by the pivotal method.
    """
    groups, count = log_w.shape
    w = log_w.double().softmax(1)
    u = torch.rand(groups, 1 if scheme == "systematic" else count, generator=rng, dtype=w.dtype, device=w.device)
    if scheme in ("systematic", "stratified"):
        u = (u + torch.arange(count, device=w.device)) / count
    if scheme in ("residual", "ssp"):
        copies = (count * w).floor()  # (G, P), and the rest is shared out by the fractional parts
        part = count * w - copies
        if scheme == "ssp":
            copies += pivotal(part, u)
        else:
            left = count - copies.sum(1, keepdim=True)
            drawn = invert_cdf(part, u)  # the first `left` of these count
            use = (torch.arange(count, device=w.device) < left).to(w)
            copies.scatter_add_(1, drawn, use)
        slots = torch.arange(count, device=w.device).repeat(groups)
        return slots.repeat_interleave(copies.round().long().flatten()).view(groups, count)
    return invert_cdf(w, u)


def invert_cdf(w, u):
    """Smallest n with w_1 + ... + w_n > u sum(w), for w (G, P) and u (G, M) in [0, 1) -> (G, M)."""
    cdf = w.cumsum(1)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=w.shape[1] - 1)


def pivotal(part, u):
    """Round probabilities part (G, P), whose sums are integers, to 0 or 1 with those means, keeping the sums.

    Two undecided entries play at a time: while they sum to less than 1, one takes all; else one becomes 1 and the
    other keeps the excess. Deville and Tille (1998); u (G, P) are uniforms.
    """
    taken = torch.zeros_like(part)
    last = torch.zeros(len(part), 1, dtype=torch.long, device=part.device)  # the entry still undecided, and its value
    a = part[:, :1]
    for n in range(1, part.shape[1]):
        b = part[:, n : n + 1]
        both = a + b
        merge = both < 1
        wins = u[:, n : n + 1] < torch.where(merge, a / both.clamp(min=1e-300), (1 - b) / (2 - both).clamp(min=1e-300))
        new = torch.full_like(last, n)
        winner, loser = torch.where(wins, last, new), torch.where(wins, new, last)
        taken.scatter_add_(1, winner, (~merge).to(part))
        last, a = torch.where(merge, winner, loser), torch.where(merge, both, both - 1)
    return taken.scatter_add_(1, last, a.round())


def gather(state, index):
    """All per-particle state after resampling: every tensor of the dict, leading dimension N, at index (N,)."""
    return {name: value[index] for name, value in state.items()}


def temper_schedule(steps, gamma, kind):
    """temper before each step and after the last -> (steps + 1,). DAS: min((1 + gamma)^i - 1, 1), i in 1/100 runs.

    Counting i in hundredths of the run makes one gamma serve any number of steps: the paper's 0.008 for 100 steps is
    then about its 0.1 for 8.
    """
    if kind == "none":
        return torch.ones(steps + 1)
    # exercise 1: the schedule of the docstring, which is 0 at first and 1 at the end, for any gamma
    temper = ((1 + gamma) ** (torch.arange(steps + 1) * 100 / steps) - 1).clamp(max=1)
    temper[-1] = 1
    return temper
    # end exercise


def adapt_temper(log_w, value, temper, enough):
    """The largest temper, from the present one (G,) up to 1, that leaves an effective sample size of `enough`.

    log_w (G, P) are the weights without a twist, value (G, P) the rewards over kl_weight. By bisection; the result
    lies just beyond the root, so that resampling follows.
    """
    low, high = temper, torch.ones_like(temper)
    all_the_way = effective_sample_size(log_w + value) >= enough
    # exercise 3: halve the interval 30 times; the effective sample size of log_w + temper value falls with the temper
    for _ in range(30):
        middle = (low + high) / 2
        fine = effective_sample_size(log_w + middle[:, None] * value) >= enough
        low, high = torch.where(fine, middle, low), torch.where(fine, high, middle)
    # end exercise
    return torch.where(all_the_way, 1.0, high)


def checked(value, shape):
    """value, a reward or its gradient, if it has this shape and is finite."""
    if value.shape != shape or not value.isfinite().all():
        fail(f"The reward must be one finite number per sample, with a finite gradient: expected shape {tuple(shape)}, "
             f"got {tuple(value.shape)}, {int((~value.isfinite()).sum())} of them not finite.")
    return value


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


# ---- the method ------------------------------------------------------------------------------------------------------


def letters_log_p(log_p, x, new):
    """Log probability of the letters of x (N, L) at the places `new` (N, L) under log_p (N, L, 4) -> (N,), a sum."""
    # exercise 11: x may hold masks, which no log probability belongs to: keep them away from gather
    letter = log_p.gather(2, x.clamp(max=3)[:, :, None])[:, :, 0]
    return torch.where(new, letter, 0).sum(1)
    # end exercise


def forecast(denoiser, reward, kl_weight, kind, guided, rng, chunk, x):
    """What the sampler knows at tokens x (N, L): log_p (N, L, 4), value = r(x0_hat) / kl_weight (N,), grad (N, L, 4).

    x0_hat has the letters of x and, at masked places, by kind: "mean", their probabilities, a relaxed one-hot;
    "argmax", the most probable ones; "draws", those of 4 independent draws, whose rewards are averaged. grad is the
    derivative of value in the letters of x0_hat, not through the denoiser: to first order, what one letter more
    changes. Without guidance it is zero; unless the kind is "mean", the reward then gets tokens and need not be
    differentiable.
    """
    parts = []
    for part in x.split(chunk):
        with torch.no_grad():
            log_p = denoiser(part)
            p, set_ = log_p.exp().float(), one_hot(part.clamp(max=3), 4).float()
            if kind == "draws":
                u = torch.rand(part.numel(), 4, generator=rng, device=x.device, dtype=torch.float64)
                guess = one_hot(invert_cdf(p.double().flatten(0, 1), u).T, 4).view(4, *p.shape).float()
            else:
                guess = p[None] if kind == "mean" else one_hot(p.argmax(2), 4).float()[None]
            x0_hat = torch.where((part == MASK)[:, :, None], guess, set_)  # (K, n, L, 4)
        with torch.set_grad_enabled(guided):
            x0_hat.requires_grad_(guided)
            flat = x0_hat.flatten(0, 1)
            r = checked(reward(flat if guided or kind == "mean" else flat.argmax(2)), flat.shape[:1])
            value = r.view(len(guess), -1).double().mean(0) / kl_weight
            if guided and not value.requires_grad:
                fail("The reward has no gradient: sample without guidance.")
            grad = torch.autograd.grad(value.sum(), x0_hat)[0].sum(0).to(log_p) if guided else torch.zeros_like(log_p)
        parts.append([log_p, value.detach(), checked(grad, log_p.shape)])
    return dict(zip(("log_p", "value", "grad"), map(torch.cat, zip(*parts))))


def look_again(look, value, state, x, new):
    """The state after `new` (N, L) letters were set, now x (N, L).

    Rows where nothing was set keep what is known of them; complete ones need no denoiser, value(x) is their reward.
    """
    changed, open_ = new.any(1), (x == MASK).any(1)
    due, complete = (changed & open_).nonzero()[:, 0], (changed & ~open_).nonzero()[:, 0]
    state = dict(state, x=x)
    if len(due):
        for name, known in look(x[due]).items():
            state[name] = state[name].index_copy(0, due, known)
    if len(complete):
        state["value"] = state["value"].index_copy(0, complete, checked(value(x[complete]), complete.shape).double())
    return state


def tilt_letters(log_p, x, grad, temper, step, max_shift):
    """Proposal of the letters to set, log_p + temper grad, normalised: (N, L, 4); temper (N,).

    The tilt is scaled down where the standard deviation of the log weight of a step exceeds max_shift, to first order:
    each masked letter is set with probability 1 / step and then adds the variance of its tilt. The cap keeps the
    weights from degenerating and costs no exactness, because the weight knows the tilt that was made.
    """
    shift, p = per_particle(temper, grad).to(grad) * grad, log_p.exp()
    # exercise 12: size (N,), the standard deviation that the docstring speaks of; at least 1e-15, as it is divided by
    variance = (p * shift**2).sum(2) - (p * shift).sum(2) ** 2  # (N, L)
    size = (torch.where(x == MASK, variance, 0).sum(1) / step).clamp(min=1e-30).sqrt()
    # end exercise
    return (log_p + shift * per_particle((max_shift / size).clamp(max=1), shift)).log_softmax(2)


def masked_das(look, value, n, length, steps, rng, particles, temper="schedule", gamma=0.008, guided=True,
               max_shift=math.inf, ess=0.5, scheme="systematic", regroup=gather, label=None):
    """Weighted particles for p(x) exp(value(x)): tempered SMC over unmasking, with tilted proposals.

    look(x) -> dict of log_p (n, L, 4), value (n,), grad (n, L, 4) at tokens x (n, L), such as `forecast`; value(x) ->
    (n,), the reward over kl_weight of complete sequences; n = groups x particles, a group being contiguous.
    guided=False is the bootstrap filter, ess=0 never resamples: then the weights are plain importance weights.
    Returns x (N, L), value (N,), log_w (G, P), log_z (G,), and of each step the mean ess and temper, and the share of
    groups that resampled. E[exp(log_z)] is the Z of the sampler with this number of steps, for any number of particles.
    """
    groups, device = n // particles, rng.device
    schedule = temper_schedule(steps, gamma, temper).to(device).double()
    first_slot = torch.arange(groups, device=device)[:, None] * particles
    lam, log_z, history = schedule[0].expand(groups), torch.zeros(groups, device=device).double(), []
    x = torch.full((1, length), MASK, device=device)
    state = {name: known.repeat_interleave(n, 0) for name, known in dict(look(x), x=x).items()}  # all alike
    state["twist"] = lam.repeat_interleave(particles) * state["value"]
    state["log_w"] = state["twist"].clone()
    for i in range(steps):
        log_w = state["log_w"].view(groups, particles)
        size = effective_sample_size(log_w)
        due = size < ess * particles  # (G,)
        if due.any():
            ancestors = torch.where(due[:, None], resample(log_w, scheme, rng), torch.arange(particles, device=device))
            state = regroup(state, (first_slot + ancestors).flatten())
            state["log_w"] = torch.where(due[:, None], 0, log_w).flatten()
            log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)
        history.append((size.mean().item(), lam.mean().item(), due.double().mean().item()))

        log_p, step = state["log_p"], steps - i
        ahead = lam if temper == "adaptive" else schedule[i + 1].expand(groups)
        log_q = log_p
        if guided:
            log_q = tilt_letters(log_p, state["x"], state["grad"], ahead.repeat_interleave(particles), step, max_shift)
        x, new = unmask(log_q, state["x"], step, rng)
        log_w = state["log_w"] - state["twist"] + letters_log_p(log_p, x, new) - letters_log_p(log_q, x, new)

        state = look_again(look, value, state, x, new)
        if temper == "adaptive" and i + 1 < steps:
            lam = adapt_temper(log_w.view(groups, -1), state["value"].view(groups, -1), lam, ess * particles)
        else:
            lam = schedule[i + 1].expand(groups)
        state["twist"] = lam.repeat_interleave(particles) * state["value"]
        state["log_w"] = log_w + state["twist"]
        if label:
            progress(label, i + 1, steps)
    log_w = state["log_w"].view(groups, particles)
    return dict(x=state["x"], value=state["value"], log_w=log_w, log_z=log_z + log_mean_exp(log_w), history=history)


class CountedRows:
    """A function of tokens or letters (n, ...) that counts the rows it is asked for."""

    def __init__(self, function):
        self.function, self.rows = function, 0

    def __call__(self, x):
        self.rows += len(x)
        return self.function(x)


def motif_balance(x):
    """A reward without gradient, x (n, L) -> (n,): how many of the wanted MOTIFS stand in x minus the unwanted ones."""
    hits = motif_hits(x)
    return sum(hit.double() * (-1 if name in UNWANTED else 1) for name, hit in hits.items())


def sample_world(world, args, rng, n, particles, steps=None, exact=None, **options):
    """Run `masked_das` on n particles of a world; adds reward (N,), rows asked of denoiser and oracle, and seconds.

    exact, a law and value (see `exact_forecast`), takes the place of the forecast.
    """
    start, steps = time.perf_counter(), steps or args.steps
    denoiser = CountedRows(world.denoiser)
    reward = CountedRows(motif_balance if args.reward == "motifs" else world.reward)

    def in_precision(x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            return denoiser(x)

    def value(x):
        with torch.no_grad():
            return torch.cat([reward(part) for part in x.split(args.chunk)]) / args.kl_weight

    guided = options.get("guided", True)
    look = exact_forecast(*exact) if exact else functools.partial(
        forecast, in_precision, reward, args.kl_weight, args.forecast, guided, rng, args.chunk)
    options = dict(dict(temper=args.temper, gamma=args.gamma, max_shift=args.max_shift, ess=args.ess), **options)
    out = masked_das(look, value, n, world.length, steps, rng, particles, scheme=args.resampling, **options)
    return dict(out, reward=out["value"] * args.kl_weight, denoiser_calls=denoiser.rows, oracle_calls=reward.rows,
                seconds=time.perf_counter() - start)


def run_methods(world, args, rng):
    """Every sampler on a world -> {method: out}; draws (G, L) are one sequence of each group by weight.

    Without tilt and resampling the weights are those of importance sampling from the pretrained model; drawing from
    them in each group is the soft form of best-of-N.
    """
    n, particles = args.groups * args.particles, args.particles
    options = {
        "importance": dict(n=n, particles=particles, guided=False, ess=0),
        "guidance": dict(n=n if world.law else args.groups, particles=1, ess=0),
        "bootstrap": dict(n=n, particles=particles, guided=False),
        "das": dict(n=n, particles=particles),
    }
    if args.reward == "motifs":
        options = {method: option for method, option in options.items() if not option.get("guided", True)}
    if world.law:
        options["exact_values"] = dict(n=n, particles=particles, temper="none", max_shift=math.inf,
                                       exact=(world.law.p, world.law.rewards[0] / args.kl_weight))
    results = {method: sample_world(world, args, rng, label=f"{world.name}, {method}", **option)
               for method, option in options.items()}
    unweighted = torch.zeros_like(results["importance"]["log_w"])
    results = dict(pretrained=dict(results["importance"], log_w=unweighted), **results)
    for out in results.values():
        groups, count = out["log_w"].shape
        drawn = torch.multinomial(out["log_w"].softmax(1), 1, generator=rng)[:, 0]
        out["draws"] = out["x"][torch.arange(groups, device=drawn.device) * count + drawn]
    return results


# ---- measuring -------------------------------------------------------------------------------------------------------


def mean_and_se(values):
    """Independent values (G,) -> their mean and its standard error (None for a single one)."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None


def log_mean_and_se(log_values):
    """Independent unbiased estimates of Z, as logarithms (G,) -> log of their mean, its standard error."""
    top = log_values.max().item()
    mean, se = mean_and_se((log_values.double() - top).exp())
    return top + math.log(mean), se and se / mean


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


def predict(denoiser, x, chunk=256):
    """log_p (N, L, 4) at x (N, L), in chunks and without gradient."""
    with torch.no_grad():
        return torch.cat([denoiser(part) for part in x.split(chunk)])


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


def weighted_mean(out):
    """E[r] of a sampler's result: the mean over its groups of the weighted mean, and its standard error."""
    return mean_and_se((out["log_w"].softmax(1) * out["reward"].view_as(out["log_w"])).sum(1))


def measure_costs(world, results):
    """Rows of what each sampler asked for and took."""
    rows = []
    for method, out in results.items():
        if method != "pretrained":
            steps = len(out["history"])
            costs = dict(sequences_per_second=len(out["x"]) / out["seconds"], denoiser_calls=out["denoiser_calls"],
                         oracle_calls=out["oracle_calls"], resamplings=sum(step[2] for step in out["history"]),
                         calls_skipped=1 - out["denoiser_calls"] / len(out["x"]) / steps)
            rows += [row(f"{method}.{world.name}.{key}", value) for key, value in costs.items()]
    return rows


def measure_sets(world, results, args, rng):
    """Rows of real, random and drawn elements, by oracles A and B, classifier, words and motifs."""
    data, name = world.elements, world.name
    held, n = data.chrom <= 2, min(640, 4 * args.groups)
    real = {"real_hepg2": data.codes[held & data.active], "real_other": data.codes[held & ~data.active]}
    sets = {key: codes[torch.randperm(len(codes), generator=rng, device=codes.device)[:n]].long()
            for key, codes in real.items()}
    sets["random"] = torch.randint(4, (n, world.length), generator=rng, device=rng.device)
    sets |= {method: out["draws"] for method, out in results.items()}
    rows, scores = [], {}
    for key, x in sets.items():
        rows += [row(f"{key}.{name}.{measure}", *value) for measure, value in
                 element_measures(world, x, args.levels, rng).items()]
        with torch.no_grad():
            scores[key] = [torch.cat([f(part) for part in x.split(256)]).cpu() for f in (world.reward, world.held_out)]
        rows.append(row(f"{key}.{name}.a_minus_b", *mean_and_se(scores[key][0] - scores[key][1])))
        rows.append(row(f"{key}.{name}.held_out_p90", scores[key][1].quantile(0.9).item()))
    for method, out in results.items():
        rows.append(row(f"{method}.{name}.mean_reward", *weighted_mean(out)))
        if method not in ("pretrained", "guidance"):
            rows.append(row(f"{method}.{name}.log_z", *log_mean_and_se(out["log_z"])))
    return rows, scores


def exact_numbers(p, reward, kl_weight):
    """log Z, E[r] and share of high rewards of the law p (4^L,) tilted by exp(reward / kl_weight)."""
    log_w = p.log() + reward / kl_weight
    tilted = log_w.softmax(0)
    return dict(log_z=log_w.logsumexp(0).item(), mean_reward=(tilted @ reward).item(),
                share_high=tilted[reward > HIGH].sum().item())


def measure_law(world, results, args, jumps):
    """Rows of the samplers in the enumerated world; z is against the law of this number of steps, exact its limit."""
    name, reward = world.name, world.law.rewards[0]
    own = exact_numbers(sampler_law(jumps, args.steps), reward, args.kl_weight)
    limit = exact_numbers(world.law.p, reward, args.kl_weight)
    rows = [row(f"exact.{name}.{key}", value) for key, value in limit.items()]
    rows += [row(f"own.{name}.{key}", value, exact=limit[key]) for key, value in own.items()]
    for method, out in results.items():
        w = out["log_w"].softmax(1)
        base = dict(mean_reward=(world.law.p @ reward).item())
        values = dict(mean_reward=weighted_mean(out),
                      share_high=mean_and_se((w * (out["reward"].view_as(w) > HIGH)).sum(1)))
        for key, value in values.items():
            there = method != "pretrained" and ((own[key], 0.0),) or ()
            rows.append(row(f"{method}.{name}.{key}", *value, limit[key] if there else base.get(key), *there))
        if method not in ("pretrained", "guidance"):
            estimate = log_mean_and_se(out["log_z"])
            rows.append(row(f"{method}.{name}.log_z", *estimate, limit["log_z"], (own["log_z"], 0.0)))
            held_out = world.held_out(out["x"]).view_as(w)
            rows.append(row(f"{method}.{name}.held_out", *mean_and_se((w * held_out).sum(1))))
    return rows


def gather_without_twist(state, index):
    """The defect of the published samplers, for the figure: twist and gradient stay in their slots at resampling."""
    return {name: value if name in ("twist", "grad") else value[index] for name, value in state.items()}


def measure_steps(world, args, jumps, rng):
    """Rows, for each number of steps, of the law of the sampler by enumeration, and of log Z by `masked_das`."""
    rows, p, reward = [], world.law.p, world.law.rewards[0]
    limit, tilted = exact_numbers(p, reward, args.kl_weight), (p.log() + reward / args.kl_weight).softmax(0)
    for steps in STEPS:
        law = sampler_law(jumps, steps)
        own = exact_numbers(law, reward, args.kl_weight)
        tilt = (law.log() + reward / args.kl_weight).softmax(0)
        exact = dict(tv=0.5 * (law - p).abs().sum().item(), tv_tilted=0.5 * (tilt - tilted).abs().sum().item())
        rows += [row(f"steps_{steps}.{world.name}.{key}", value, exact=0.0) for key, value in exact.items()]
        rows += [row(f"steps_{steps}.{world.name}.own_{key}", value, exact=limit[key]) for key, value in own.items()]
        out = sample_world(world, args, rng, args.groups // 2 * args.particles, args.particles, steps)
        rows.append(row(f"steps_{steps}.{world.name}.log_z", *log_mean_and_se(out["log_z"]), limit["log_z"],
                        (own["log_z"], 0.0)))
        rows.append(row(f"steps_{steps}.{world.name}.denoiser_calls", out["denoiser_calls"] / len(out["x"])))
    return rows


def measure_particles(world, args, jumps, rng):
    """Rows of the error of E[r] and log Z at args.steps against the particles in a group, and of its power of N.

    The power leaves the smallest number of particles out, at which the bias of order 1 / N still counts.
    """
    own = exact_numbers(sampler_law(jumps, args.steps), world.law.rewards[0], args.kl_weight)
    sizes, groups = ([10, 40, 160], 8) if args.quick else ([32, 100, 316, 1000], 32)
    options = dict(importance=dict(guided=False, ess=0), bootstrap=dict(guided=False), das={},
                   stale_twist=dict(regroup=gather_without_twist),
                   exact_values=dict(temper="none", max_shift=math.inf,
                                     exact=(world.law.p, world.law.rewards[0] / args.kl_weight)))
    rows, name = [], "convergence"
    for done, (method, option) in enumerate(options.items()):
        points = []
        for size in sizes:
            out = sample_world(world, args, rng, groups * size, size, **option)
            r = (out["log_w"].softmax(1) * out["reward"].view(-1, size)).sum(1)
            square, se = mean_and_se((r - own["mean_reward"]) ** 2)
            points.append((math.log(size), 0.5 * math.log(square), 0.5 * se / square))
            rows.append(row(f"{method}_{size}.{name}.rmse", square**0.5, 0.5 * se / square**0.5, 0.0))
            rows.append(row(f"{method}_{size}.{name}.mean_reward", *mean_and_se(r), own["mean_reward"]))
            rows.append(row(f"{method}_{size}.{name}.log_z", *log_mean_and_se(out["log_z"]), own["log_z"]))
        rows.append(row(f"{method}.{name}.slope", *slope(points[1:]), -0.5))
        progress("convergence", done + 1, len(options))
    return rows


def slope(points):
    """Weighted least squares of y on x for points (x, y, standard error of y) -> slope, its standard error."""
    x, y, se = np.array(points).T
    w = se**-2 / (se**-2).sum()
    spread = (w * (x - w @ x) ** 2).sum()
    return (w * (x - w @ x) * y).sum() / spread, ((se**-2).sum() * spread) ** -0.5


# ---- the figures -----------------------------------------------------------------------------------------------------

COLORS = {"pretrained": "#999999", "importance": "#E69F00", "guidance": "#CC79A7", "bootstrap": "#56B4E9",
          "das": "#0072B2", "exact_values": "#009E73", "stale_twist": "#D55E00"}


def draw_law(path, world, results, rows, args, jumps):
    """Enumerated: what few steps cost, log Z by steps, the error by particles, and the law of the reward."""
    table = {r["name"]: r for r in rows}
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8))

    def line(name):
        return [table[f"steps_{steps}.{world.name}.{name}"] for steps in STEPS]

    for key, color, label in (("tv", "#999999", "base model"), ("tv_tilted", "#0072B2", "times exp(r / kl_weight)")):
        axes[0].loglog(STEPS, [r["estimate"] for r in line(key)], "o-", color=color, markersize=4, label=label)
    first = table[f"steps_{STEPS[-1]}.{world.name}.tv"]["estimate"] * STEPS[-1]
    axes[0].loglog(STEPS[3:], [first / steps for steps in STEPS[3:]], ":", color="black", label="1 / steps")
    axes[0].set(xlabel="sampling steps", ylabel="total variation to infinitely many steps")
    axes[1].plot(STEPS, [r["estimate"] for r in line("own_log_z")], color="black", label="exact, so many steps")
    limit = table[f"exact.{world.name}.log_z"]["estimate"]
    axes[1].axhline(limit, color="black", linestyle=":", label="exact, infinitely many")
    axes[1].errorbar(STEPS, [r["estimate"] for r in line("log_z")], [2 * r["se"] for r in line("log_z")], fmt="o",
                     color=COLORS["das"], markersize=4, capsize=2, label="das, 2 standard errors")
    axes[1].set(xscale="log", xlabel="sampling steps", ylabel="log Z")
    sizes = [int(name.split(".")[0][4:]) for name in table if name.startswith("das_") and name.endswith("rmse")]
    for method in ("importance", "bootstrap", "das", "stale_twist", "exact_values"):
        points = [table[f"{method}_{size}.convergence.rmse"] for size in sizes]
        axes[2].errorbar(sizes, [r["estimate"] for r in points], [2 * r["se"] for r in points], fmt="o-", markersize=4,
                         color=COLORS[method], capsize=2, label=method.replace("_", " "))
    start = table[f"das_{sizes[1]}.convergence.rmse"]["estimate"]
    axes[2].plot(sizes, [start * (size / sizes[1]) ** -0.5 for size in sizes], ":", color="black", label="N$^{-1/2}$")
    axes[2].set(xscale="log", yscale="log", xlabel="particles in a group", ylabel="error of E[r], root mean square")
    reward, law = world.law.rewards[0], sampler_law(jumps, args.steps)
    bins = np.linspace(reward.min().item(), reward.max().item(), 31)
    exact = (law.log() + reward / args.kl_weight).softmax(0)
    for p, label, style in ((law, "base model", ":"), (exact, "exact target", "-")):
        axes[3].hist(reward.cpu(), bins, weights=p.cpu(), histtype="step", color="black", linestyle=style, label=label)
    for method in ("importance", "das"):
        out = results[method]
        axes[3].hist(out["reward"].cpu(), bins, weights=(out["log_w"].softmax(1) / len(out["log_w"])).flatten().cpu(),
                     histtype="step", color=COLORS[method], label=method)
    axes[3].set(xlabel="reward: log10 percent spliced in", ylabel="share", yscale="log", ylim=(1e-4, 1))
    for ax in axes:
        ax.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def draw_sets(path, world, results, rows, scores):
    """Oracle B of every set, what oracle A says beyond it, motifs, and the effective sample size along the run."""
    value = {r["name"]: r["estimate"] for r in rows}
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), width_ratios=[1.3, 1, 1.3, 0.9])
    names = list(scores)
    box = axes[0].boxplot([scores[key][1].numpy() for key in names], widths=0.6, showfliers=False, patch_artist=True,
                          medianprops=dict(color="black"))
    for patch, key in zip(box["boxes"], names):
        patch.set_facecolor(COLORS.get(key, "#EEEEEE"))
    axes[0].axhline(value[f"real_hepg2.{world.name}.held_out_p90"], color="black", linestyle=":",
                    label="highest tenth of real HepG2 elements")
    axes[0].set_xticks(range(1, len(names) + 1), [key.replace("_", " ") for key in names], rotation=30, fontsize=8)
    axes[0].set(ylabel="oracle B, which no method sees")
    axes[0].legend(fontsize=7)
    for key in ("real_hepg2", "pretrained", "das" if "das" in scores else "bootstrap"):
        axes[1].scatter(*scores[key], s=6, linewidths=0, color=COLORS.get(key, "black"), alpha=0.6,
                        label=f"{key.replace('_', ' ')}: A - B = {value[f'{key}.{world.name}.a_minus_b']:+.2f}")
    axes[1].axline((0, 0), slope=1, color="black", linewidth=0.6)
    axes[1].set(xlabel="oracle A, the reward", ylabel="oracle B")
    axes[1].legend(fontsize=7)
    shown = [key for key in ("real_hepg2", "pretrained", "bootstrap", "das") if key in scores]
    for shift, key in enumerate(shown):
        rates = [value[f"{key}.{world.name}.motif_{motif.lower()}"] for motif in MOTIFS]
        axes[2].bar(np.arange(len(rates)) + 0.2 * shift - 0.3, rates, 0.2, color=COLORS.get(key, "#333333"),
                    label=key.replace("_", " "))
    labels = [f"{m}\n{'unwanted' if m in UNWANTED else 'wanted'}" for m in MOTIFS]
    axes[2].set_xticks(range(len(MOTIFS)), labels, fontsize=7)
    axes[2].set(ylabel="share of elements with the motif")
    axes[2].legend(fontsize=7)
    for method in ("importance", "bootstrap", "das"):
        if method in results:
            size = [step[0] / results[method]["log_w"].shape[1] for step in results[method]["history"]]
            axes[3].plot(np.arange(len(size)) / len(size), size, color=COLORS[method], label=method)
    axes[3].set(xlabel="share of the run", ylabel="effective share of particles", ylim=(0, 1.05))
    axes[3].legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


# ---- shared: the world and its networks ------------------------------------------------------------------------------


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


# ---- shared: command line and files ----------------------------------------------------------------------------------


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
    """Run every sampler on the world, measure, write the figure and numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "dna_das")
    world, rng = open_world(args), torch.Generator(args.device).manual_seed(args.seed)
    results = run_methods(world, args, rng)
    rows, name = measure_costs(world, results), world.name
    if world.law:
        jumps = jump_laws(world.law.p)
        rows += measure_law(world, results, args, jumps) + measure_steps(world, args, jumps, rng)
        rows += measure_particles(world, args, jumps, rng)
        draw_law(out / "figure.png", world, results, rows, args, jumps)
    else:
        more, scores = measure_sets(world, results, args, rng)
        rows += more
        draw_sets(out / "figure.png", world, results, rows, scores)
    calls = sum(out["denoiser_calls"] for method, out in results.items() if method != "pretrained")
    write_numbers(out / "numbers.json", args, rows, calls, time.perf_counter() - start)
    print_table(rows, name, ["mean_reward", "log_z", *(["share_high", "held_out"] if world.law else [])])
    print_table(rows, name, ["tv", "tv_tilted", "own_log_z", "own_mean_reward"])
    print_table(rows, "convergence", ["rmse", "mean_reward", "log_z", "slope"])
    if not world.law:
        print_table(rows, name, ["activity", "held_out", "a_minus_b", "accessible", "kmer3_correlation", "diversity",
                                 "log_likelihood"])
        print_table(rows, name, [f"motif_{motif.lower()}" for motif in MOTIFS])
    print_table(rows, name, ["sequences_per_second", "denoiser_calls", "oracle_calls", "calls_skipped", "resamplings"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
