"""Fill the README's tables, between <!-- table NAME --> and <!-- end -->, from the recorded runs: python tests/make_readme.py.

A record is the numbers.json of a run, kept as <folder>/results/<script>_seed<k>.json. Numbers of the papers and of
their official code are written here, with where they come from.
"""
import json
import pathlib
import re
import statistics

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def records(script):
    """Rows by name of each recorded seed of a script such as toy/das."""
    folder, name = script.split("/")
    paths = sorted((REPOSITORY / folder / "results").glob(f"{name}_seed*.json"))
    return [{r["name"]: r for r in json.loads(path.read_text())["rows"]} for path in paths]


def spread(runs, name, digits=3):
    """mean ± standard deviation over the recorded seeds, as text; empty where the row is missing."""
    values = [run[name]["estimate"] for run in runs if name in run]
    if not values:
        return ""
    if isinstance(values[0], int):
        return f"{values[0]:,}"
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (one seed)"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def exact(runs, name, digits=3):
    value = next(run[name]["exact"] for run in runs if name in run)
    return f"{value:.{digits}f}"


def table(header, lines):
    lines = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tidy(script):
    """{(problem, method, quantity): [row of each recorded seed]} of a script of toy/."""
    folder, name = script.split("/")
    found = {}
    for path in sorted((REPOSITORY / folder / "results").glob(f"{name}_seed*.json")):
        for r in json.loads(path.read_text())["rows"]:
            found.setdefault((r["problem"], r["method"], r["quantity"]), []).append(r)
    return found


def over_seeds(rows, digits, key="estimate"):
    """mean +- standard deviation over the seeds, as text."""
    values = [r[key] for r in rows if r[key] is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}".replace("-0.000", "0.000")


def tidy_table(script, problems, methods, quantities, digits="3", exact="", **_):
    """The table that a marker asks for: a line a problem and method, a column a quantity; exact=1: a column more."""
    rows, lines = tidy(script), []
    for problem in problems.split(","):
        for method in methods.split(","):
            cells = [rows.get((problem, method, q), []) for q in quantities.split(",")]
            if any(cells):
                texts = [over_seeds(c, int(digits)) for c in cells]
                truths = [over_seeds(c, int(digits), "exact") for c in cells] if exact else []
                both = [text for pair in zip(texts, truths) for text in pair] if exact else texts
                lines.append([problem, f"`{method}`", *both])
    head = [text for q in quantities.split(",") for text in ([q, "exact"] if exact else [q])]
    return table(["problem", "method", *head], lines)


def dna_base():
    runs, lines = records("dna/pretrain"), []
    for method, label in dict(markov0="Markov chain, order 0", markov3="order 3", markov5="order 5",
                              base="the masked diffusion model").items():
        lines.append([label, *(f"{runs[0][f'{method}.hepg2.bound_{part}']['estimate']:.4f} ± "
                               f"{runs[0][f'{method}.hepg2.bound_{part}']['se']:.4f}" for part in ("chr2", "chr1"))])
    return table(["held-out elements, nats per letter (± standard error)", "chromosome 2", "chromosome 1"], lines)


def dna_das():
    runs, lines = records("dna/das"), []
    for method, label in dict(real_hepg2="real HepG2 elements", real_other="real elements of other cells",
                              random="random letters", pretrained="base model", importance="importance resampling",
                              guidance="guidance, 1 particle", bootstrap="bootstrap SMC", das="DAS").items():
        name = f"{method}.hepg2"
        lines.append([label, *(spread(runs, f"{name}.{key}", digits) for key, digits in dict(
            activity=2, held_out=2, accessible=2, kmer3_correlation=2, diversity=1, motif_hnf4a=2,
            motif_spi1=2).items())])
    return table(["elements", "oracle A (the reward)", "oracle B", "accessible", "3-mers", "diversity", "HNF4A", "SPI1"],
                 lines)


def dna_exact():
    """The enumerated world: one number of every script beside the exact one."""
    lines = []

    def add(script, label, name, digits=3, truth=None):
        runs = records(f"dna/{script}_mpsa")
        if runs:
            lines.append([f"`{script}.py`", label, spread(runs, name, digits),
                          exact(runs, name, digits) if truth is None else truth(runs)])

    def other(name, digits=3):
        return lambda runs: f"{runs[0][name]['estimate']:.{digits}f}"

    add("das", "log Z", "das.mpsa.log_z")
    add("das", "E[r] of the tilt", "das.mpsa.mean_reward")
    add("dav", "E[r] of the model after three rounds", "dav.mpsa.mean_reward")
    add("dav", "ELBO of the third E-step", "dav_round_2.mpsa.elbo")
    add("dav", "E[r] with KL, after three rounds", "dav_kl.mpsa.mean_reward")
    add("draft", "objective E[r] / α − KL, with KL", "draft_kl.mpsa.objective")
    add("ddpo", "objective E[r] / α − KL, with KL", "ddpo_kl.mpsa.objective")
    add("and_composition", "multiplier 1, letters alone (the paper's Algorithm 3)", "constrained.mpsa.dual_1")
    add("and_composition", "multiplier 1, weighted paths", "constrained_smc.mpsa.dual_1")
    add("or_composition", "weight 1 of the mixture, KL", "kl.mpsa.dual_1", 4)
    add("or_composition", "weight 1 of the mixture, cross entropy", "elbo.mpsa.dual_1", 4)
    add("constrained_alignment", "multiplier 1, exact law", "dual_only.mpsa.dual_1")
    add("constrained_alignment", "multiplier 1, network", "constrained.mpsa.dual_1")
    add("msdda", "E[r1] at (1/2, 1/2), merged letters", "msdda.mpsa.reward_1_w50_50")
    add("msdda", "the same, with C_t as weight", "msdda_smc.mpsa.reward_1_w50_50")
    return table(["script", "quantity", "ours", "exact"], lines)


def dna_compare():
    """One record: its se is the standard deviation over three seeds."""
    rows, lines = (records("dna/compare") or [{}])[0], []
    labels = dict(real_hepg2="real HepG2 elements", random="random letters", base="base model",
                  guidance="guidance", importance="best of 8", bootstrap="SMC, bootstrap", das="DAS",
                  search="search on the base model", ddpo="DDPO", ddpo_kl="DDPO + KL", draft="DRAKES without KL",
                  draft_kl="DRAKES", dav="DAV", dav_kl="DAV-KL", dav_posterior="DAV posterior")
    keys = dict(held_out=2, over_optimisation=2, accessible=2, kmer3_correlation=2, diversity=1, log_likelihood=0,
                wanted=2, unwanted=2)
    for name, label in labels.items() if rows else ():
        cells = [(rows[f"{name}.hepg2.{key}"], digits) for key, digits in keys.items()]
        lines.append([label, *(f"{r['estimate']:.{n}f} ± {r['se']:.{n}f}" for r, n in cells)])
    return table(["elements", "oracle B", "A − B", "accessible", "3-mers", "diversity", "log p", "wanted motifs",
                  "unwanted"], lines)


def sd_das():
    runs, lines = records("sd/das"), []
    for method, label in dict(base="base", best_of_n="best of 16", importance="importance resampling",
                              guidance="guidance", das="DAS",
                              reference="target: 128 weighted base images a prompt").items():
        lines.append([label, *(spread(runs, f"{method}.all.{key}") for key in ("gain", "clip_eval", "diversity"))])
    return table(["method", "reward, base standard deviations", "CLIP score, the other model", "diversity"], lines)


def sd_compare():
    """One record: its se is the standard deviation over three seeds."""
    rows, lines = (records("sd/compare") or [{}])[0], []
    labels = dict(base="base model", guidance="guidance", best_of_n="best of 16", importance="importance resampling",
                  das="DAS", search="search of DAV on the base model", draft_1="DRaFT-1", truncated="DRaFT, last 3 steps",
                  draft="DRaFT", draft_kl="DRaFT + KL", ddpo="DDPO", ddpo_kl="DDPO + KL", dav="DAV", dav_kl="DAV-KL",
                  dav_posterior="DAV posterior")

    def cell(name, digits):
        r = rows.get(name)
        if r is None:
            return ""
        text = f"{r['estimate']:,.{digits}f}" + (f" ± {r['se']:,.{digits}f}" if r["se"] and digits else "")
        return text.replace("-0.00 ± 0.00", "0")

    for name, label in labels.items() if rows else ():
        keys = dict(gain=2, held_out=3, diversity_kept=2, kl=1, calls=0, image_calls=0, seconds=0)
        lines.append([label, *(cell(f"{name}.all.{key}", digits) for key, digits in keys.items())])
    return table(["method", "reward, base standard deviations", "held-out CLIP score, change", "diversity, share of base",
                  "KL of the paths, nats", "UNet calls, training", "UNet calls, an image", "CPU seconds, training"],
                 lines)


def sd_alignment():
    runs, lines = records("sd/constrained_alignment"), []
    for problem, rewards in dict(learned=("clip", "saturation", "contrast"),
                                 several=("clip", "saturation", "contrast")).items():
        for method, label in dict(constrained="constrained", equal="equal weights").items() if runs else ():
            name = f"{method}.{problem}"
            kept = [f"{spread(runs, f'{name}.{key}', 2)}" + (
                f" (≥ {runs[0][f'threshold.{problem}.{key}']['estimate']:g})"
                if f"threshold.{problem}.{key}" in runs[0] else "") for key in rewards]
            lines.append([problem, label, *kept, spread(runs, f"{name}.kl", 1),
                          spread(runs, f"{name}.clip_eval_change")])
    return table(["problem", "method", "CLIP", "saturation", "contrast", "KL of the paths, nats",
                  "held-out CLIP score, change"], lines)


def sd_and():
    runs, lines = records("sd/and_composition"), []
    models = ("saturation", "contrast_strong", "clip")
    labels = dict(equal="equal weights", constrained="constrained (Algorithm 3)", equal_smc="equal weights, SMC",
                  corrected="constrained, SMC")
    for method, label in labels.items() if runs else ():
        name = f"{method}.adapters"
        lines.append([label, *(spread(runs, f"{name}.percent_{m}", 0) for m in models),
                      spread(runs, f"{name}.worst_percent", 1), *(spread(runs, f"{name}.kl_{m}", 2) for m in models),
                      spread(runs, f"{name}.dual_value", 2)])
    return table(["weights", "saturation, % of its gain", "contrast, %", "CLIP, %", "worst, %", "KL of saturation, nats",
                  "of contrast", "of CLIP", "bound D(λ)"], lines)


def sd_or():
    runs, lines = records("sd/or_composition"), []
    for problem, models, digits in (("adapters", ("saturation", "contrast", "clip"), 1),
                                    ("prompts", ("cat", "butterfly", "fish"), 0)):
        for method, label in dict(base="base model", equal="equal weights", kl="constrained").items() if runs else ():
            name = f"{method}.{problem}"
            cells = [", ".join(spread(runs, f"{name}.{key}_{model}", n) for model in models)
                     if f"{name}.{key}_{models[0]}" in runs[0] else ""
                     for key, n in (("kl", digits), ("dual", 2), ("share", 2))]
            lines.append([f"{problem}: {', '.join(models)}", label, *cells, spread(runs, f"{name}.worst_kl", digits)])
    return table(["models", "weights", "KLs of the paths, nats", "multipliers", "shares of the images", "largest KL"],
                 lines)


def sd_msdda():
    runs, lines = records("sd/msdda"), []
    labels = dict(msdda_smc="MSDDA with C_t", msdda="MSDDA (here the blend of noise predictions)", soup="Rewarded Soup",
                  soup_factor="soup of LoRA factors", switch="switching", rgg="reward gradients (RGG)",
                  code="best of 5 by blocks (CoDe)")
    for method, label in labels.items() if runs else ():
        lines.append([label, *(spread(runs, f"{method}.all.{key}", n) for key, n in dict(
            weighted=2, clip_eval=3, diversity=3, calls=0).items())])
    return table(["method", "weighted reward, mean over weights", "held-out CLIP score", "diversity", "UNet calls"], lines)


def gallery():
    """A row a figure. Minutes are of a laptop with two cores; a record that is not there yet leaves its row out."""
    rows = []

    def add(figure, script, picture, command, minutes, number, name, digits=2, official="", paper="", truth=None):
        runs = records(script)
        if runs:
            link = f"[`{script}.py`]({script}.py)" + (f" ([figure]({picture}))" if picture else "")
            ours = f"{number}: " + (f"{runs[0][name]['estimate']:.{digits}f} ± {runs[0][name]['se']:.{digits}f}"
                                    if script.endswith("compare") else spread(runs, name, digits))  # se: over seeds
            truth = truth if truth is not None else exact(runs, name, digits)
            rows.append([figure, link, f"`python {command}`", minutes, ours, official, paper, truth])

    def toy(figure, script, command, minutes, number, key, digits=2, official="", paper="", floor=None):
        found = tidy(f"toy/{script}")
        if key in found:
            truth = over_seeds(found[key], digits, "exact") if floor is None else over_seeds(found[floor], digits)
            rows.append([figure, f"[`toy/{script}.py`](toy/{script}.py) ([figure](toy/results/{script}.png))",
                         f"`python {command}`", minutes, f"{number}: {over_seeds(found[key], digits)}", official, paper,
                         truth])

    for line in TOY:
        toy(*line)
    add("DAS Fig. 2", "sd/das", "sd/results/das.png", "sd/das.py", "4", "reward, base standard deviations",
        "das.all.gain", 2, "", "", spread(records("sd/das"), "reference.all.gain", 2))
    add("DAS Fig. 2, DAV Fig. 2", "sd/compare", "sd/results/compare.png", "sd/compare.py", "80",
        "reward of DAV posterior, base standard deviations", "dav_posterior.all.gain", 2, "", "", "")
    add("DAV Fig. 2 to 4", "sd/dav", "sd/results/dav.png", "sd/dav.py", "9", "reward of DAV", "dav.all.gain", 2, "", "", "")
    add("Constrained Fig. 3, 4", "sd/constrained_alignment", "sd/results/constrained_alignment.png",
        "sd/constrained_alignment.py", "16", "contrast, threshold 1", "constrained.learned.contrast", 2, "", "", "1")
    worst = spread(records("sd/and_composition"), "equal.adapters.worst_percent", 0)
    add("Constrained Fig. 5, 6", "sd/and_composition", "sd/results/and_composition.png", "sd/and_composition.py", "4",
        f"worst adapter, % of its gain (equal weights {worst})", "constrained.adapters.worst_percent", 0, "", "", "")
    base = spread(records("sd/or_composition"), "equal.adapters.worst_kl", 1)
    add("Constrained Fig. 2", "sd/or_composition", "sd/results/or_composition.png", "sd/or_composition.py", "3",
        f"largest KL of adapters (equal weights {base})", "kl.adapters.worst_kl", 1, "", "", "")
    add("MSDDA", "sd/msdda", "sd/results/msdda.png", "sd/msdda.py", "9", "weighted reward of MSDDA with C_t",
        "msdda_smc.all.weighted", 2, "", "", "")
    rest = records("dna/compare")[0]
    rest = {name: f"{rest[f'{name}.hepg2.held_out']['estimate']:.1f}" for name in ("das", "base")}
    add("DAV Fig. 5", "dna/compare", "dna/results/compare.png", "dna/compare.py", "40",
        f"oracle B of DAV posterior (DAS {rest['das']}, base {rest['base']})", "dav_posterior.hepg2.held_out", 1, "",
        "9.24, another oracle", "")
    return table(["figure", "script", "command", "minutes", "ours", "official code", "paper", "exact"], rows)


TOY = [  # figure, script, command, minutes of one core, what, its row, digits, official code, paper, row of the floor
    ("DAS Fig. 1", "das", "toy/das.py", "0.7", "EMD, gmm2", ("gmm2", "das", "emd"), 2, "0.98 to 1.16", "",
     ("gmm2", "exact", "emd")),
    ("Constrained Fig. 1", "and_composition", "toy/and_composition.py", "1.2", "variance of the product",
     ("paper", "smc", "var_x"), 3, "0.27"),
    ("Constrained Fig. 2", "or_composition", "toy/or_composition.py", "1", "weight of data set 1, elbo",
     ("paper", "elbo", "weight_1"), 3),
    ("Constrained Fig. 3, 4", "constrained_alignment", "toy/constrained_alignment.py", "1.2", "multiplier 1, competing",
     ("competing", "constrained", "multiplier_1")),
    ("MSDDA", "msdda", "toy/msdda.py", "1", "E[r2] at (1/2, 1/2), the paper's merge",
     ("ring_0.5_0.5", "msdda", "mean_reward_2")),
    ("DAV, in 2D", "dav", "toy/dav.py", "1.3", "E[r] after 8 rounds", ("equal", "dav", "mean_reward_round_8")),
    ("DAS Fig. 1, DAV Fig. 2", "compare", "toy/compare.py", "6", "EMD of DAV, 8 rounds, gmm2", ("gmm2", "dav_8", "emd"),
     2, "", "", ("gmm2", "exact_1", "emd")),
]

TABLES = {"gallery": gallery, "dna base": dna_base, "dna das": dna_das, "dna exact": dna_exact,
          "dna compare": dna_compare, "sd das": sd_das, "sd compare": sd_compare, "sd alignment": sd_alignment,
          "sd and": sd_and, "sd or": sd_or, "sd msdda": sd_msdda}
PAGES = ("README.md", "toy/README.md")


def fill(text):
    """A page with its tables made anew. A marker names a function of TABLES, or a script and what to show of it:
    <!-- table toy/das problems=gmm,gmm2 methods=das,exact quantities=emd digits=3 exact=1 -->"""
    def replaced(m):
        words = m[1].split()
        if words[0].startswith("toy/"):
            body = tidy_table(words[0], **dict(w.split("=") for w in words[1:]))
        else:
            body = TABLES[m[1]]()
        return f"<!-- table {m[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table (.*?) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        path = REPOSITORY / page
        path.write_text(fill(path.read_text()))
