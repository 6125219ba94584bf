"""Distil a test-time search into the model: diffusion alignment as variational expectation-maximisation.

Paper: Lee et al., "Diffusion Alignment as Variational Expectation-Maximization" (DAV), ICLR 2026, arXiv 2510.00502.
Draws what its Fig. 5 reports for DNA, on accessibility instead of measured activity (figure.png), and, in the
enumerated world of splice sites, every quantity beside its exact value.

Run    python dna/dav.py                            HepG2: DAV, DAV-KL, DAV posterior       5 minutes on one CPU core
       python dna/dav.py --world mpsa               9-mers, everything enumerated           65 CPU seconds
       python dna/dav.py --quick                    in seconds
       python dna/dav.py --search nested            the E-step with population weights (also: smc)
       python dna/dav.py --proposal base            an E-step that takes no gradient of the reward
       python dna/dav.py --data dataset.csv         the papers' data, after pretrain.py --data; --paper for its sizes
       python dna/dav.py --resume                   continue an interrupted run

Notation (here -> paper)
       kl_weight -> alpha    reward temperature of one round: its target is p_k(x) exp(r(x) / kl_weight) / Z
       gamma     -> gamma    discount of the value forecast s steps from the end: exp(gamma^s value / kl_weight)
       children  -> M        draws from which every trajectory keeps one in each step
       worth     -> r(x0hat) forecast of the reward of a half-masked sequence
       kl        -> lambda   weight of KL(p_theta || p_theta^0) in the M-step (DAV-KL, eq. 11); 0 is DAV
       elbo      -> J        E[log_w] <= log E_p[exp(r / kl_weight)] = log p(O = 1)

Algorithm
       1. E-step: sample trajectories of the tilted law, M children a step, one survivor        `search_paths`
          the children come from letters tilted by the gradient of the forecast                `letter_gradient`
          local: each trajectory by itself, as the paper; smc: one child, a population that resamples;
          nested: both, properly weighted for any number of children
       2. M-step: maximise the likelihood of every step of these trajectories, that is of the tokens set in it and
          never of a forecast, plus kl times KL(p_theta || p_0) at their states                 `path_loss`, `fit_paths`
       3. repeat: after k rounds the law is p_0 exp(k r / kl_weight)                            `tune`
       4. DAV posterior: the search once more, on the tuned model
       The steps of a trajectory are told by two arrays, the sequence and the step that set each letter. Where a child
       equals its parent no network is called.

Worlds hepg2  the reward is oracle A's log odds of HepG2 *accessibility*, a stand-in for the papers' measured activity;
              oracle B, trained on other chromosomes, only measures.
       mpsa   the exact denoiser plus a small network, zero at first: round 0 is p_0 itself. The E-step is smc, because
              the local one, which has no weights, is far from its target here (right panel).

What you should see
       hepg2 (3 seeds, +- their standard deviation): median activity by oracle B from -2.0 (base) to 1.0 +- 0.4
       (DAV-KL), 2.4 +- 0.7 (DAV), 5.1 +- 0.1 (search on the base model) and 9.6 +- 1.0 (DAV posterior); the highest
       tenth of real HepG2 elements begins at 3.9. Edits a pair 110 (base), 108, 106, 109 and 101: 88% to 95% for the
       posterior. Oracle A exceeds B by -0.1 (DAV) and 1.9 (searches): what is searched over-optimises, what is learnt
       of it does not. The correlation of 3-mers with the top real elements falls from 0.94 to 0.68 +- 0.10 (DAV) and
       0.54 +- 0.09. FOXA2 and HNF1A rise to 85% and 60%, HNF4A only in searches (55%; DAV 16%, base 14%); of the
       controls GATA1 and SPI1 none rises.
       mpsa: E[r] after 1, 2, 3 rounds 1.23 +- 0.02, 1.89 +- 0.01, 1.960 +- 0.002
       for 1.524, 1.958, 1.993: 83%, 97% and 98% of the exact rise; DAV-KL 0.84, 1.48, 1.66 for 1.11, 1.65, 1.69. The
       E-step is right (1.503 +- 0.010 for 1.524); what lags is the M-step: the measured reward is rugged, and 2 million
       exact samples with 1500 updates of 1024 still gave a network 90% of the first rise. Local search stays behind:
       1.33, 1.00 and 0.71 of 1.524 with 8 children and the exact, argmax and drawn forecasts.
To try: --kl-weight 0.2 --rounds 4 (more activity, and the diversity falls below 85% of the base model's);
--gamma 0.9; --value argmax (the official forecast); --world mpsa --search local.
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
    "quick": dict(trajectories=32, particles=8, children=2, rounds=2, updates=4, batch=16, steps=8, samples=24,
                  levels=2),
    "hepg2": dict(trajectories=128, particles=32, children=2, rounds=3, updates=100, batch=32, steps=32, samples=256,
                  levels=8),
    "mpsa": dict(trajectories=5000, particles=100, children=8, rounds=3, updates=450, batch=320, steps=64, samples=3000,
                 levels=9),
    "paper": dict(trajectories=256, particles=32, children=10, rounds=200, updates=32, batch=64, steps=128, samples=640,
                  levels=128),
}
SETTINGS = dict(hepg2=dict(search="local", kl_weight=0.25, kl=0.3, lr=3e-3),
                mpsa=dict(search="smc", kl_weight=0.5, kl=0.3, lr=5e-3))


def parse_args(argv=None):
    parser = dna_parser(__doc__)
    parser.add_argument("--search", choices=["local", "smc", "nested"], help="the E-step: local, in mpsa smc")
    parser.add_argument("--value", choices=["mean", "draws", "argmax"], default="mean", help="forecast of the reward")
    parser.add_argument("--kl-weight", type=positive(float), help="reward temperature alpha of a round")
    parser.add_argument("--kl", type=positive(float), help="lambda of DAV-KL")
    parser.add_argument("--gamma", type=positive(float), default=1.0, help="discount, at most 1")
    parser.add_argument("--proposal", choices=["guided", "base"], default="guided", help="of the children")
    parser.add_argument("--ess", type=positive(float), default=0.5, help="smc and nested resample below this share")
    parser.add_argument("--trajectories", type=positive(int), help="trajectories of an E-step")
    parser.add_argument("--particles", type=positive(int), help="trajectories in a group (local: 1)")
    parser.add_argument("--children", type=positive(int), help="draws of a trajectory in a step (smc: 1)")
    parser.add_argument("--rounds", type=positive(int), help="E-steps and M-steps")
    parser.add_argument("--updates", type=positive(int), help="gradient steps of an M-step")
    parser.add_argument("--batch", type=positive(int), help="states in a gradient step")
    parser.add_argument("--lr", type=positive(float), help="learning rate, falling to 0 in every M-step")
    parser.add_argument("--steps", type=positive(int), help="steps of the reverse process")
    parser.add_argument("--samples", type=positive(int), help="sequences drawn to measure each model")
    parser.add_argument("--levels", type=positive(int), help="noise levels behind the bound of each sequence")
    parser.add_argument("--bf16", action="store_true", help="run the denoiser in bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on with the rounds that are in the results folder")
    args = parser.parse_args(argv)
    world = "mpsa" if args.world == "mpsa" else "hepg2"
    for name, value in (PRESETS["quick" if args.quick else "paper" if args.paper else world] | SETTINGS[world]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.search != "nested":
        setattr(args, *(("particles", 1) if args.search == "local" else ("children", 1)))
    if args.gamma > 1 or args.samples < 2:
        parser.error("--gamma can be at most 1, and --samples not below 2")
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


# ---- exact answers of the enumerated world ---------------------------------------------------------------------------


def tilt_law(log_p, value):
    """log p (S,) and value (S,) -> log of p exp(value) / Z (S,), log Z (float)."""
    joint = log_p + value
    return joint - joint.logsumexp(0), joint.logsumexp(0).item()


def kl_projection(log_target, log_base, kl):
    """The law q that minimises -sum target log q + kl KL(q || base) -> log q (..., S). kl may be (..., 1).

    Stationary where kl q log(q / base) + c q = target, with c = 1 - kl KL(q || base) from sum q = 1. For u = target /
    (kl q) that is log u + u = log(target / (kl base)) + c / kl (Lambert's W). sum q is convex in c: Newton's method
    climbs from below, starting where q = target would put it, 1 - kl KL(target || base).
    """
    kl = torch.as_tensor(kl, dtype=log_target.dtype, device=log_target.device)
    ratio = log_target - log_base
    c = 1 - kl * (log_target.exp() * ratio).sum(-1, keepdim=True)
    a = ratio - kl.log() + c / kl
    s = torch.where(a > 1, a.clamp(min=1).log(), a)  # log u
    for _ in range(50):
        for _ in range(3):  # from where the last c left it
            u = s.exp()
            s = s - (u + s - a) / (u + 1)
        q = (log_target - s).exp() / kl
        excess = q.sum(-1, keepdim=True) - 1
        if excess.abs().max() < 1e-14:
            break
        step = excess * kl / (q / (1 + s.exp())).sum(-1, keepdim=True)
        c, a = c + step, a + step / kl
    return (log_target - s - kl.log()).log_softmax(-1)


def exact_rounds(denoiser, reward, kl_weight, kl, rounds):
    """Exact E- and M-steps, one letter at a time in any order -> [(log p_k, log Z_k, log of the tilted law)], k = 0 on.

    Without kl, p_k = p exp(k r / kl_weight) / Z. With it, the M-step is one for each masked place of each of the 5^L
    states: with k of them left, its letters' loss has the weight of this place under the E-step, eta, its KL 1 / k.
    (The states are those of the E-step, so that this is no projection of laws.) Z_k = E_p_k[exp(r / kl_weight)].
    """
    length = len(denoiser.place)
    place, count, out = denoiser.place, 5**length, []
    states = torch.arange(count, device=place.device)
    hidden = sum((states // unit % 5 == MASK).long() for unit in place)
    end = hidden == 0  # in the order of all_sequences
    if not kl:
        log_p = denoiser.log_mass[end]
        for k in range(rounds + 1):
            tilted, log_z = tilt_law(log_p, reward / kl_weight)
            out.append((log_p, log_z, tilted))
            log_p = tilted
        return out
    levels = []  # by the number of masked places: the moves that set one, source (n, 1), goal (n, 4)
    for left in range(1, length + 1):
        rows = states[hidden == left]
        source, where = ((rows[:, None] // place % 5) == MASK).nonzero(as_tuple=True)
        goal = rows[source, None] + (torch.arange(4, device=place.device) - MASK) * place[where, None]
        levels.append((rows[source], goal))
    base = [denoiser.log_mass[goal] - denoiser.log_mass[source][:, None] for source, goal in levels]
    log_q = base
    for k in range(rounds + 1):
        value = torch.zeros_like(denoiser.log_mass)  # E[exp(r / kl_weight)] from a state on, relative to the highest
        top = (reward / kl_weight).max()
        value[end] = (reward / kl_weight - top).exp()
        for left, ((source, goal), q) in enumerate(zip(levels, log_q), 1):
            value.index_add_(0, source, (q.exp() * value[goal]).sum(1) / left)
        law = torch.zeros_like(value)
        law[-1] = 1
        for left, ((source, goal), q) in reversed([*enumerate(zip(levels, log_q), 1)]):
            law.index_add_(0, goal.flatten(), (law[source][:, None] * q.exp() / left).flatten())
        log_p = law[end].log()
        out.append((log_p, (value[-1].log() + top).item(), tilt_law(log_p, reward / kl_weight)[0]))
        if k < rounds:
            for n, ((source, goal), q) in enumerate(zip(levels, log_q)):
                target = q + value[goal].log()
                mass = target.logsumexp(1, keepdim=True)  # of this place: (n + 1) times its probability, times value
                target = target - mass
                weight = kl * (value[source].log()[:, None] - mass).exp()
                parts = zip(target.split(4096), base[n].split(4096), weight.split(4096))  # small enough for the cache
                log_q = [*log_q[:n], torch.cat([kl_projection(*part) for part in parts]), *log_q[n + 1 :]]
    return out


def selection_law(denoiser, log_twist, length):
    """The law (4^L,) of local search with infinitely many children, one letter at a time, in any order, enumerated.

    log_twist (5^L,) of all masked states x, at sum_l x_l 5^(L - 1 - l). From x, place l and letter v are chosen with
    probability proportional to p(v at l | x) twist(x with v at l). Equal to the tilted law iff the twist is exact.
    """
    place = 5 ** torch.arange(length - 1, -1, -1)
    states = torch.arange(5**length)
    hidden = sum((states // 5**k % 5 == MASK).long() for k in range(length))  # how many
    mass = torch.zeros(5**length, dtype=torch.float64)
    mass[-1] = 1
    for count in range(length, 0, -1):
        for state in (hidden == count).nonzero()[:, 0].split(50_000):
            x = state[:, None] // place % 5
            child = (state[:, None, None] + (torch.arange(4) - MASK) * place[:, None]).clamp(min=0)  # (n, L, 4)
            log_w = torch.where((x == MASK)[:, :, None], denoiser(x) + log_twist[child], -math.inf).flatten(1)
            mass.index_add_(0, child.flatten(), (mass[state][:, None] * log_w.softmax(1)).flatten())
    return mass[hidden == 0]  # in the order of all_sequences


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


def sample_masked(denoiser, n, length, steps, rng):
    """n sequences by the reverse process in `steps` steps -> tokens (n, length), calls of the denoiser (rows)."""
    x = torch.full((n, length), MASK, device=rng.device)
    log_p, calls = predict(denoiser, x[:1]).expand(n, -1, -1), 1
    for step in range(steps, 0, -1):
        x, new = unmask(log_p, x, step, rng)
        log_p, rows = refresh(denoiser, log_p, x, new)
        calls += rows
        progress("sampling", steps - step + 1, steps)
    return x, calls


def invert_cdf(w, u):
    """Smallest n with w_1 + ... + w_n > u sum(w), for w (G, P) and u (G, M) in [0, 1) -> (G, M)."""
    cdf = w.cumsum(1)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=w.shape[1] - 1)


def letters_log_p(log_p, x, new):
    """Log probability of the letters of x (N, L) at the places `new` (N, L) under log_p (N, L, 4) -> (N,), a sum."""
    # exercise 11: x may hold masks, which no log probability belongs to: keep them away from gather
    letter = log_p.gather(2, x.clamp(max=3)[:, :, None])[:, :, 0]
    return torch.where(new, letter, 0).sum(1)
    # end exercise


# ---- shared: weights -------------------------------------------------------------------------------------------------


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


# ---- the method: E-step ----------------------------------------------------------------------------------------------


class Correction(torch.nn.Module):
    """A dense network of zero output that is added to the exact denoiser: x (n, L) -> log_p (n, L, 4).

    Before its first round the model is then p_0 itself, and what the rounds miss is theirs.
    """

    def __init__(self, denoiser, length, width, rng):
        super().__init__()
        self.architecture, self.denoiser = dict(length=length, width=width), denoiser
        sizes = [5 * length, width, width, width, 4 * length]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        initialise(self.to(rng.device), rng)
        torch.nn.init.zeros_(self.layers[-1].weight)
        torch.nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x):
        h = self.layers[0](one_hot(x, 5).to(self.layers[0].weight).flatten(1))
        for layer in self.layers[1:]:
            h = layer(silu(h))
        return (self.denoiser(x) + h.unflatten(1, (-1, 4))).to(h).log_softmax(2)


class CountRows:
    """A function of sequences that counts the rows it is asked for, in bfloat16 if that is wanted."""

    def __init__(self, function, bf16=False):
        self.function, self.bf16, self.rows = function, bf16, 0

    def __call__(self, x):
        self.rows += len(x)
        if not self.bf16:
            return self.function(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.function(x).float()


def letter_probabilities(log_p, x):
    """Probabilities (N, L, 4) of the letters of x (N, L): one-hot where they are known, those of log_p elsewhere."""
    known = one_hot(x.clamp(max=3), 4).to(log_p)
    return torch.where((x == MASK)[:, :, None], log_p.exp(), known)


def forecaster(reward, kind, rng, chunk=256, draws=2):
    """The forecast of the reward of half-masked x (n, L) from the letters' log_p, as a function (log_p, x) -> (n,).

    argmax: of the most likely letters, the paper's estimate; mean: of the letters' probabilities; draws: the mean over
    some completions by independent letters. All are the reward itself where nothing is masked.
    """

    def forecast(log_p, x):
        if kind == "mean":
            return score(letter_probabilities(log_p, x))
        if kind == "argmax":
            return score(torch.where(x == MASK, log_p.argmax(2), x))
        u = torch.rand(*x.shape, draws, generator=rng, device=x.device, dtype=torch.float64)
        letters = invert_cdf(log_p.double().exp().flatten(0, 1), u.flatten(0, 1)).view_as(u)
        return sum(score(torch.where(x == MASK, letter, x)) for letter in letters.unbind(2)) / draws

    def score(x):
        with torch.no_grad():
            value = torch.cat([reward(part) for part in x.split(chunk)]).double() if len(x) else x.new_zeros(0).double()
        if not value.isfinite().all():
            fail("The reward must be one finite number per sequence.")
        return value

    return forecast


def letter_gradient(reward, log_p, x):
    """Gradient of the reward at the mean letters of x (n, L), relative to its mean over them -> (n, L, 4)."""
    parts = []
    for soft in letter_probabilities(log_p, x).split(256):
        with torch.enable_grad():
            soft = soft.detach().requires_grad_()
            value = reward(soft)
            if not value.requires_grad:
                fail("The reward has no gradient: search with --proposal base.")
            grad = torch.autograd.grad(value.sum(), soft)[0]
        parts.append(grad - (soft.detach() * grad).sum(2, keepdim=True))
    return torch.cat(parts)


def search_paths(denoiser, forecast, n, length, steps, rng, kl_weight, children=1, particles=1, gamma=1.0,
                 ess=0.5, reward=None, cap=2.0):
    """Trajectories for p(x) exp(r(x) / kl_weight), p being the reverse process: nested SMC over unmasking.

    Every particle draws `children`, each worth w = p / q * twist, twist = exp(gamma^s forecast / kl_weight) with s
    steps to go, and keeps one of them in proportion to w. Its log weight grows by log mean w - log twist of the parent,
    which makes it proper for any number of children (DAV leaves that out: local search is particles=1, where a group is
    a single trajectory). Groups of `particles` resample where their effective size is low, and at the end. With a
    `reward` the proposal q is guided. denoiser (n, L) -> (n, L, 4); forecast (log_p, x) -> (n,).
    Returns x (n, L), when (n, L), the step that set each letter, reward (n,), log_z (groups,) with E[exp(log_z)] = Z,
    how often a group resampled, and the weights log_w (groups, particles) before the last resampling.
    """
    groups = n // particles
    x = torch.full((n, length), MASK, device=rng.device)
    log_p = predict(denoiser, x[:1])
    zero = torch.zeros(n, dtype=torch.float64, device=rng.device)
    state = dict(x=x, when=torch.zeros_like(x), log_p=log_p.expand(n, -1, -1), twist=zero, log_w=zero,
                 worth=forecast(log_p, x[:1]).expand(n), grad=log_p.expand(n, -1, -1), changed=zero == 0)
    first_slot = torch.arange(groups, device=rng.device)[:, None] * particles
    log_z, resampled = zero[:groups], 0.0
    for step in range(steps, -1, -1):
        log_w = state["log_w"].view(groups, particles)
        due = effective_sample_size(log_w) < (ess if step else 2) * particles
        if due.any() and particles > 1:
            ancestors = resample(log_w, "systematic", rng)
            ancestors = torch.where(due[:, None], ancestors, torch.arange(particles, device=rng.device))
            state = gather(state, (first_slot + ancestors).flatten())
            state["log_w"] = torch.where(due[:, None], 0, log_w).flatten()
            log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)
            resampled += due.double().mean().item()
        if step == 0:
            break

        log_q = state["log_p"]
        if reward:  # letters tilted to first order; cut off at `cap` nats, and the weights know what was done
            due = (state["changed"] & (state["x"] == MASK).any(1)).nonzero()[:, 0]
            if len(due):
                grad = letter_gradient(reward, log_q[due], state["x"][due])
                state["grad"] = state["grad"].index_copy(0, due, grad)
            shift = gamma ** (step - 1) / kl_weight * state["grad"]
            log_q = (log_q + shift.clamp(-cap, cap)).log_softmax(2)
        family = torch.arange(n, device=rng.device).repeat_interleave(children)
        child = gather(state, family)
        x, new = unmask(log_q[family], child["x"], step, rng)
        log_ratio = letters_log_p(child["log_p"] - log_q[family], x, new).double() if reward else 0
        child["x"], child["when"] = x, torch.where(new, step, child["when"])
        child["log_p"] = refresh(denoiser, child["log_p"], x, new)[0]
        due = new.any(1).nonzero()[:, 0]
        child["worth"] = child["worth"].index_copy(0, due, forecast(child["log_p"][due], x[due]))
        child["twist"] = gamma ** (step - 1) * child["worth"] / kl_weight
        w = (log_ratio + child["twist"]).view(n, children)
        u = torch.rand(n, 1, generator=rng, device=rng.device, dtype=torch.float64)
        pick = torch.arange(n, device=rng.device) * children + invert_cdf(w.softmax(1), u)[:, 0]
        log_w = state["log_w"] + log_mean_exp(w) - state["twist"]
        state = dict(gather(child, pick), log_w=log_w, changed=new.any(1)[pick])
        progress("search", steps - step + 1, steps)
    if particles == 1:
        log_z = log_w[:, 0]
    return dict(x=state["x"], when=state["when"], reward=state["worth"], log_z=log_z, log_w=log_w, resampled=resampled)


# ---- the method: M-step ----------------------------------------------------------------------------------------------


def path_loss(net, base, x, when, place, kl):
    """An unbiased estimate of the M-step's loss for trajectories x, when (n, L) -> (n,), nats.

    The loss of a trajectory is the sum over its steps of -log p_theta of the letters set there, plus kl times the KL of
    p_theta(. | x_t) from the base model's. The step is that in which the letter at `place` (n, 1), a uniform one, was
    set: taken with probability (letters set in it) / L, it counts L times their mean. The chance of being set is free
    of theta, so that the KL is one of letters, and L times its mean over the masked places has the same expectation as
    the sum over steps, as long as each masked place is equally likely to be set.
    """
    # exercise 13: step (n, 1); z, the state before it; log_p there; loss (n,) by hidden_loss, of the letters it set
    step = when.gather(1, place)
    z = torch.where(when > step, x, MASK)
    log_p = net(z)
    loss = hidden_loss(log_p, x, when == step)
    # end exercise
    if kl:
        masked = z == MASK
        gap = (log_p.exp() * (log_p - predict(base, z))).sum(2)
        loss = loss + kl * x.shape[1] * (gap * masked).sum(1) / masked.sum(1)
    return loss


def fit_paths(net, base, x, when, kl, updates, batch, lr, rng, bf16=False):
    """The M-step: `updates` steps of Adam on random states of the trajectories -> mean loss, nats a letter."""
    optimizer, total = torch.optim.Adam(net.parameters(), lr, betas=(0.9, 0.99)), 0.0
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = lr * (1 - update / updates)
        rows = torch.randint(len(x), (batch,), generator=rng, device=x.device)
        place = torch.randint(x.shape[1], (batch, 1), generator=rng, device=x.device)
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            loss = path_loss(net, base, x[rows], when[rows], place, kl).mean() / x.shape[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        total += loss.item() / updates
        progress("M-step", update + 1, updates)
    if not math.isfinite(total):
        fail("The M-step diverged: take a lower --lr.")
    return total


def tune(world, args, kl, folder):
    """Rounds of E- and M-steps from the base model -> tuned network, [numbers of each round], calls.

    Keeps network, generator and numbers of the rounds made in a file of `folder`, from which --resume goes on. The
    numbers of round k are those of its E-step on the model after k rounds, and of samples of that model.
    """
    label, base = "dav_kl" if kl else "dav", world.network
    net, part = copy.deepcopy(base).requires_grad_(True), folder / f"{label}.part.pt"
    rng = torch.Generator(args.device).manual_seed(2 * args.seed + (kl > 0))
    settings = {name: str(v) for name, v in vars(args).items() if name not in ("resume", "out", "checkpoints")}
    settings = json.dumps(settings, sort_keys=True)
    history, calls = [], dict(denoiser=0, oracle=0)
    if args.resume and part.exists():
        try:
            state = torch.load(part, map_location=args.device, weights_only=True)
            found, history, calls = state["settings"], state["history"], state["calls"]
            net.load_state_dict(state["net"])
            rng.set_state(state["rng"].cpu())
        except (KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            fail(f"{part} is no state of this script ({type(error).__name__}): delete it to start again.")
        if found != settings:
            fail(f"{part} was made with other settings: {found}.")
    for k in range(len(history), args.rounds):
        start = time.perf_counter()
        paths, spent = search_model(world, net, args, rng)
        x, _ = sample_masked(CountRows(net, args.bf16), args.trajectories, world.length, args.steps, rng)
        loss = fit_paths(net, base, paths["x"], paths["when"], kl, args.updates, args.batch, args.lr, rng, args.bf16)
        with torch.no_grad():
            scores = {name: torch.cat([f(part_) for part_ in y.split(256)]) for name, f, y in (
                ("reward", world.reward, x), ("held_out", world.held_out, x),
                ("search_reward", world.reward, paths["x"]), ("search_held_out", world.held_out, paths["x"]))}
        groups = {name: args.particles if "search" in name else 1 for name in scores}  # independent of each other
        numbers = {name: mean_and_se(value.double().view(-1, groups[name]).mean(1)) for name, value in scores.items()}
        numbers |= dict(elbo=mean_and_se(paths["log_z"]), loss=(loss, None))
        history.append({name: list(value) for name, value in numbers.items()})
        calls = {name: calls[name] + spent[name] for name in calls}
        state = dict(settings=settings, net=net.state_dict(), rng=rng.get_state(), history=history, calls=calls)
        write_atomically(part, lambda temporary: torch.save(state, temporary))
        print(f"{label} round {k + 1}/{args.rounds}: reward of model {numbers['reward'][0]:.2f}, of search "
              f"{numbers['search_reward'][0]:.2f}, held out {numbers['search_held_out'][0]:.2f}, elbo "
              f"{numbers['elbo'][0]:.2f}, loss {loss:.4f}, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    net.requires_grad_(False)
    save_network(folder / f"{label}.safetensors", net, settings)
    return net, history, calls


def search_model(world, net, args, rng, n=None):
    """The search that the flags name, with a network -> its trajectories, rows of denoiser and oracle it took."""
    denoiser, reward = CountRows(net, args.bf16), CountRows(world.reward)
    n = (n or args.trajectories) // args.particles * args.particles
    out = search_paths(denoiser, forecaster(reward, args.value, rng), n, world.length, args.steps, rng, args.kl_weight,
                       args.children, args.particles, args.gamma, args.ess,
                       reward if args.proposal == "guided" else None)
    return out, dict(denoiser=denoiser.rows, oracle=reward.rows)


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


def run_elements(world, args, folder, rng):
    """Tune, sample and measure on real elements -> rows, calls of denoiser and oracle."""
    name, data, rows, tuned = world.name, world.elements, [], {}
    calls = dict(denoiser=0, oracle=0)
    for label, kl in (("dav", 0.0), ("dav_kl", args.kl)):
        tuned[label], history, spent = tune(world, args, kl, folder)
        calls = {key: calls[key] + spent[key] for key in calls}
        for k, numbers in enumerate(history):
            rows += [row(f"{label}_round_{k}.{name}.{key}", *v) for key, v in numbers.items()]
    held = data.codes[(data.chrom <= 2) & data.active]
    some = torch.randperm(len(held), generator=rng, device=held.device)[: args.samples]
    sets = dict(real_hepg2=held[some].long(), random=torch.randint(4, (args.samples, world.length), generator=rng,
                                                                   device=rng.device))
    for label, net in dict(base=world.network, **tuned).items():
        sets[label], spent = sample_masked(CountRows(net, args.bf16), args.samples, world.length, args.steps, rng)
        calls["denoiser"] += spent
    for label, net in (("search", world.network), ("dav_posterior", tuned["dav"])):
        paths, spent = search_model(world, net, args, rng, args.samples)
        sets[label], calls = paths["x"], {key: calls[key] + spent[key] for key in calls}
    for label, x in sets.items():
        measures = element_measures(world, x, args.levels, rng)
        rows += [row(f"{label}.{name}.{key}", *value) for key, value in measures.items()]
        with torch.no_grad():
            excess = torch.cat([world.reward(part) - world.held_out(part) for part in x.split(256)])
        rows.append(row(f"{label}.{name}.over_optimisation", *mean_and_se(excess)))
    with torch.no_grad():
        real = torch.cat([world.held_out(part.long()) for part in held.split(256)])
    rows.append(row(f"real_hepg2.{name}.held_out_p90", real.quantile(0.9).item()))
    return rows, calls


def run_splice(world, args, folder, rng):
    """The enumerated world: rounds with the network, then the E-steps on the exact denoiser -> rows, calls."""
    log_p, (reward, held_out) = world.law.p.log(), world.law.rewards
    world.network = Correction(world.denoiser, 9, 256, rng).requires_grad_(False)
    value, rows, calls = reward / args.kl_weight, [], dict(denoiser=0, oracle=0)
    functions = dict(mean_reward=reward, held_out=held_out, log_likelihood=log_p)

    def add(label, log_law, x, particles=1):  # groups are independent
        for key, f in functions.items():
            means = TableReward(f)(x).view(-1, particles).mean(1)
            rows.append(row(f"{label}.mpsa.{key}", *mean_and_se(means), (log_law.exp() @ f).item()))

    for label, kl in (("dav", 0.0), ("dav_kl", args.kl)):
        net, history, spent = tune(world, args, kl, folder)
        exact = exact_rounds(world.denoiser, reward, args.kl_weight, kl, args.rounds)
        for k, (numbers, (law, log_z, tilted)) in enumerate(zip(history, exact)):
            model, tilted = law.exp(), tilted.exp()
            wanted = dict(elbo=log_z, reward=(model @ reward).item(), held_out=(model @ held_out).item(),
                          search_reward=(tilted @ reward).item(), search_held_out=(tilted @ held_out).item())
            rows += [row(f"{label}_round_{k}.mpsa.{key}", *v, wanted.get(key)) for key, v in numbers.items()]
        x, rows_ = sample_masked(CountRows(net), args.samples, 9, args.steps, rng)
        paths, more = search_model(world, net, args, rng, args.samples)
        add(label, exact[-1][0], x)
        add(f"{label}_posterior", exact[-1][2], paths["x"], args.particles)
        calls = {key: calls[key] + spent[key] + more[key] + rows_ * (key == "denoiser") for key in calls}
    add("base", log_p, sample_masked(CountRows(world.network), args.samples, 9, args.steps, rng)[0])

    law, log_z = tilt_law(log_p, value)
    exact_twist = ExactDenoiser(law.exp()).log_mass + log_z - world.denoiser.log_mass
    states = torch.arange(5**9, device=args.device)[:, None] // world.denoiser.place % 5
    likely = torch.cat([torch.where(z == MASK, world.denoiser(z).argmax(2), z) for z in states.split(100_000)])
    for label, twist in (("selection_exact", exact_twist), ("selection_argmax", world.reward(likely) / args.kl_weight)):
        selected = selection_law(world.denoiser, twist, 9)
        for key, f in functions.items():
            rows.append(row(f"{label}.mpsa.{key}", (selected @ f).item(), exact=(law.exp() @ f).item()))
        rows.append(row(f"{label}.mpsa.total_variation", (selected - law.exp()).abs().sum().item() / 2, exact=0.0))

    def exact_forecast(_, x):
        return args.kl_weight * exact_twist[(x * world.denoiser.place).sum(1)]

    draws, sizes = forecaster(world.reward, "draws", rng), PRESETS["quick" if args.quick else "mpsa"]
    group, family = sizes["particles"], sizes["children"]
    for label, forecast, children, particles in (
            ("local_exact", exact_forecast, family, 1), ("local_draws", draws, family, 1),
            ("local_argmax", forecaster(world.reward, "argmax", rng), family, 1),
            ("smc_draws", draws, 1, group), ("nested_draws", draws, family, group)):
        n = args.samples // particles * particles
        out = search_paths(world.denoiser, forecast, n, 9, args.steps, rng, args.kl_weight, children, particles)
        add(label, law, out["x"], particles)
        if particles > 1:
            rows.append(row(f"{label}.mpsa.log_z", *log_mean_and_se(out["log_z"]), log_z))
    return rows, calls


# ---- the figures -----------------------------------------------------------------------------------------------------

COLORS = {"dav": "#0072B2", "dav_kl": "#D55E00"}
TITLES = {"real_hepg2": "real HepG2", "random": "random", "base": "base", "search": "search on base", "dav": "DAV",
          "dav_kl": "DAV-KL", "dav_posterior": "DAV posterior"}


def draw_curves(axes, name, rows, last):
    """Reward and ELBO by round, of models and of their E-steps; dotted where an exact value is known."""
    table = {r["name"]: r for r in rows}
    for label, color in COLORS.items():
        lines = [f"{label}_round_{k}.{name}" for k in range(len(rows)) if f"{label}_round_{k}.{name}.elbo" in table]
        curves = {"model": ([f"{line}.reward" for line in lines] + [f"{label}.{name}.{last}"], "o-"),
                  "E-step": ([f"{line}.search_reward" for line in lines], "^:"),
                  "ELBO": ([f"{line}.elbo" for line in lines], "o-")}
        for ax, key in zip((axes[0], axes[0], axes[1]), curves):
            values = [table[entry] for entry in curves[key][0]]
            ax.plot(range(len(values)), [r["estimate"] for r in values], curves[key][1], color=color, markersize=4,
                    linewidth=1, label=f"{TITLES[label]}, {key}")
            if values[0]["exact"] is not None and key != "E-step":
                ax.plot(range(len(values)), [r["exact"] for r in values], "_", color="black", markersize=14,
                        label="exact" if label == "dav" else None)
    for ax, text in zip(axes, ("reward, oracle A" if name != "mpsa" else "reward E[r]", "ELBO, nats")):
        ax.set(xlabel="rounds", ylabel=text)
        ax.legend(fontsize=7)


def draw_activity(path, world, rows):
    """By round: reward and ELBO; then activity by the held-out oracle against diversity (DAV Fig. 5), and motifs."""
    value = {r["name"]: r["estimate"] for r in rows}
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), width_ratios=[1, 1, 1, 1.4])
    draw_curves(axes[:2], world.name, rows, "activity")
    for label, title in TITLES.items():
        x, y = (value[f"{label}.{world.name}.{key}"] for key in ("diversity", "held_out"))
        axes[2].scatter(x, y, color=COLORS.get(label, "#555555"), s=20)
        axes[2].annotate(title, (x, y), (4, 3), textcoords="offset points", fontsize=7)
    axes[2].axhline(value[f"real_hepg2.{world.name}.held_out_p90"], color="black", linestyle=":", linewidth=1)
    axes[2].axvline(0.85 * value[f"base.{world.name}.diversity"], color="black", linestyle="--", linewidth=1)
    axes[2].set(xlabel="mean edit distance; dashed: 85% of base", ylabel="oracle B, median; dotted: top 10% of real")
    axes[2].margins(0.25)
    shown = ["real_hepg2", "base", "dav", "dav_kl", "dav_posterior"]
    for k, label in enumerate(shown):
        rates = [value[f"{label}.{world.name}.motif_{motif.lower()}"] for motif in MOTIFS]
        axes[3].bar(np.arange(len(rates)) + (k - 2) * 0.16, rates, 0.16, label=TITLES[label])
    axes[3].set_xticks(range(len(MOTIFS)), MOTIFS, fontsize=8)
    axes[3].set(ylabel="share with the motif (last two: controls)")
    axes[3].legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def draw_law_rounds(path, rows):
    """By round: reward and ELBO against enumeration; then the E-steps of one round on the exact denoiser."""
    table = {r["name"]: r for r in rows}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=[1, 1, 1.2])
    draw_curves(axes[:2], "mpsa", rows, "mean_reward")
    labels = ["selection_exact", "selection_argmax", "local_exact", "local_draws", "local_argmax", "smc_draws",
              "nested_draws"]
    lines = [table[f"{label}.mpsa.mean_reward"] for label in labels]
    axes[2].errorbar(range(len(lines)), [r["estimate"] for r in lines], [2 * (r["se"] or 0) for r in lines], fmt="o",
                     color="#0072B2", capsize=3)
    axes[2].axhline(lines[0]["exact"], color="black", linestyle=":", label="exact tilted law")
    axes[2].set_xticks(range(len(lines)), [label.replace("_", "\n") for label in labels], fontsize=8)
    axes[2].set(ylabel="E[r] of one E-step; bars: 2 se")
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


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
    """Tune, measure, draw and write -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "dna_dav")
    world = open_world(args)
    rng = torch.Generator(args.device).manual_seed(args.seed)
    rows, calls = (run_splice if world.law else run_elements)(world, args, out, rng)
    if world.law:
        draw_law_rounds(out / "figure.png", rows)
    else:
        draw_activity(out / "figure.png", world, rows)
    seconds = time.perf_counter() - start
    write_numbers(out / "numbers.json", args, rows, calls["denoiser"], seconds)
    print_table(rows, world.name, ["mean_reward", "held_out", "log_likelihood", "log_z", "total_variation"])
    print_table(rows, world.name, ["reward", "search_reward", "search_held_out", "elbo", "loss"])
    print_table(rows, world.name, ["activity", "held_out", "held_out_p90", "over_optimisation", "accessible",
                                   "kmer3_correlation", "diversity", "log_likelihood"])
    print_table(rows, world.name, [f"motif_{motif.lower()}" for motif in MOTIFS])
    print(f"{calls['denoiser']:,} calls of the denoiser, {calls['oracle']:,} of the oracle, {seconds:.0f} s")
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
