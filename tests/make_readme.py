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
    """{(problem, method, quantity): [row of each recorded seed]} of a script of toy/ or sd/."""
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
    """The table that a marker asks for: a line a problem (* is all) and method, a column a quantity, with exact=1
    two."""
    rows, lines = tidy(script), []
    for problem in problems.split(",") if problems != "*" else dict.fromkeys(key[0] for key in rows):
        for method in methods.split(","):
            cells = [rows.get((problem, method, q), []) for q in quantities.split(",")]
            if any(cells):
                texts = [over_seeds(c, int(digits)) for c in cells]
                truths = [over_seeds(c, int(digits), "exact") for c in cells] if exact else []
                both = [text for pair in zip(texts, truths) for text in pair] if exact else texts
                lines.append([problem, f"`{method}`", *both])
    head = [text for q in quantities.split(",") for text in ([q, "exact"] if exact else [q])]
    return table(["problem", "method", *head], lines)


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


def gallery():
    """A row a figure. Minutes are of a laptop with two cores; a record that is not there yet leaves its row out."""
    rows = []

    def tidied(figure, script, command, minutes, number, key, digits=2, official="", paper="", floor=None):
        found = tidy(script)
        if key in found:
            truth = over_seeds(found[key], digits, "exact") if floor is None else over_seeds(found[floor], digits)
            picture = "/results/".join(script.split("/")) + ".png"
            rows.append([figure, f"[`{script}.py`]({script}.py) ([figure]({picture}))",
                         f"`python {command}`", minutes, f"{number}: {over_seeds(found[key], digits)}", official, paper,
                         truth])

    for line in GALLERY:
        tidied(*line)
    return table(["figure", "script", "command", "minutes", "ours", "official code", "paper", "exact"], rows)


GALLERY = [  # figure, script, command, minutes of one core, what, its row, digits, official code, paper, row of the floor
    ("DAS Fig. 1", "toy/das", "toy/das.py", "0.6", "EMD, gmm2", ("gmm2", "das", "emd"), 2, "0.98 to 1.16", "",
     ("gmm2", "exact", "emd")),
    ("Constrained Fig. 1", "toy/and_composition", "toy/and_composition.py", "1.2", "variance of the product",
     ("paper", "smc", "var_x"), 3, "0.27"),
    ("Constrained Fig. 2", "toy/or_composition", "toy/or_composition.py", "1", "weight of data set 1, elbo",
     ("paper", "elbo", "weight_1"), 3),
    ("Constrained Fig. 3, 4", "toy/constrained_alignment", "toy/constrained_alignment.py", "1.2", "multiplier 1, competing",
     ("competing", "constrained", "multiplier_1")),
    ("MSDDA", "toy/msdda", "toy/msdda.py", "1", "E[r2] at (1/2, 1/2), the paper's merge",
     ("ring_0.5_0.5", "msdda", "mean_reward_2")),
    ("DAV, in 2D", "toy/dav", "toy/dav.py", "1.3", "E[r] after 8 rounds", ("equal", "dav", "mean_reward_round_8")),
    ("DAS Fig. 1, DAV Fig. 2", "toy/compare", "toy/compare.py", "6", "EMD of DAV, 8 rounds, gmm2", ("gmm2", "dav_8", "emd"),
     2, "", "", ("gmm2", "exact_1", "emd")),
    ("DAS Fig. 2", "sd/das", "sd/das.py", "5", "gain of DAS (target last)", ("all", "das", "gain"), 2, "", "",
     ("all", "target", "gain")),
    ("DAV Fig. 2 to 4", "sd/dav", "sd/dav.py", "9", "gain of DAV", ("all", "dav", "gain"), 2),
]

TABLES = {"gallery": gallery, "dna exact": dna_exact}
PAGES = ("README.md", "toy/README.md", "sd/README.md")


def fill(text):
    """A page with its tables made anew. A marker names a function of TABLES, or a script and what to show of it:
    <!-- table toy/das problems=gmm,gmm2 methods=das,exact quantities=emd digits=3 exact=1 -->"""
    def replaced(m):
        words = m[1].split()
        if "/" in words[0]:
            body = tidy_table(words[0], **dict(w.split("=") for w in words[1:]))
        else:
            body = TABLES[m[1]]()
        return f"<!-- table {m[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table (.*?) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        path = REPOSITORY / page
        path.write_text(fill(path.read_text()))
