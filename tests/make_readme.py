"""Fill the README's tables, between <!-- table NAME --> and <!-- end -->, from the recorded runs: python tests/make_readme.py.

A record is the numbers.json of a run, kept as <folder>/results/<script>_seed<k>.json. Numbers of the papers and of
their official code are written here, with where they come from.
"""
import json
import pathlib
import re
import statistics

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

def table(header, lines):
    lines = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

def tidy(script):
    """{(problem, method, quantity): [row of each recorded seed]} of a script, or of two: toy/ddpo+toy/draft."""
    found, places = {}, (word.split("/") for word in script.split("+"))
    for path in (p for folder, name in places for p in sorted((REPOSITORY / folder / "results").glob(f"{name}_seed*"))):
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

def gallery():
    """A row a figure; a record that is not there yet leaves its row out."""
    rows = []
    for figure, script, function, minutes, key, digits, floor, theirs in GALLERY:
        found = tidy(script)
        if key in found:
            truth = over_seeds(found[key], digits, "exact") if floor is None else over_seeds(found[floor], digits)
            rows.append([figure, f"[{script}.py]({script}.py): `{function}`, {minutes} min", f"`{' '.join(key)}`",
                         over_seeds(found[key], digits), "; ".join(filter(None, (truth, theirs)))])
    return table(["figure", "script: function", "printed row", "ours", "exact; theirs"], rows)

GALLERY = [  # figure, script, function, minutes of one core, its row, digits, row of the floor, theirs
    ("DAS 1", "toy/das", "das", "0.6", ("gmm2", "das", "emd"), 2, ("gmm2", "exact", "emd"), "code 0.98 to 1.16"),
    ("Constrained 1", "toy/and_composition", "compose", "1.2", ("paper", "smc", "var_x"), 3, None, "stored samples 0.27"),
    ("Constrained 2", "toy/or_composition", "fit", "1", ("paper", "elbo", "weight_1"), 3, None, ""),
    ("Constrained 3, 4", "toy/constrained_alignment", "align", "1.2", ("competing", "constrained", "multiplier_1"), 2,
     None, ""),
    ("MSDDA", "toy/msdda", "msdda", "1", ("ring_0.5_0.5", "msdda", "mean_reward_2"), 2, None, ""),
    ("DAV, in 2D", "toy/dav", "search", "1.3", ("equal", "dav", "mean_reward_round_8"), 2, None, ""),
    ("DAS 1, DAV 2", "toy/compare", "main", "6", ("gmm2", "dav_8", "emd"), 2, ("gmm2", "exact_1", "emd"), ""),
    ("DAS 2", "sd/das", "das", "3", ("all", "das", "gain"), 2, ("all", "target", "gain"), ""),
    ("DAS, online", "sd/das_online", "main", "2", ("28_queries", "ucb", "best"), 2, ("28_queries", "random", "best"),
     "the latter random"),
    ("DAV 2 to 4", "sd/dav", "search", "7", ("all", "dav", "gain"), 2, None, ""),
    ("DAS 2, DAV 2", "sd/compare", "measure", "25", ("rounds_7", "dav", "held_out_per_gain"), 3,
     ("kl_weight_0.1", "das", "held_out_per_gain"), "the latter DAS"),
    ("Constrained 3, 4", "sd/constrained_alignment", "align", "4", ("learned_1", "constrained", "gain_contrast"), 2, None,
     "threshold 1"),
    ("Constrained 5, 6", "sd/and_composition", "compose", "4", ("adapters", "algorithm_3", "worst_kl"), 1,
     ("adapters", "equal_weights", "worst_kl"), "the latter equal weights"),
    ("Constrained, Table 1", "sd/and_concepts", "compose_concepts", "4", ("triplets", "algorithm_3", "least_clip_change"),
     3, None, ""),
    ("MSDDA", "sd/msdda", "msdda", "2.5", ("weight_0.5", "msdda", "weighted_gain"), 2, None, ""),
    ("DAV 5", "dna/dav", "search", "6", ("hepg2", "dav", "held_out"), 1, ("hepg2", "base", "held_out"),
     "the latter base"),
    ("DAV 5", "dna/compare", "measure", "14", ("rounds_4", "dav", "edits"), 0, ("reference", "real_top", "edits"),
     "the latter real"),
    ("Constrained 3", "dna/constrained_alignment", "align", "5", ("mpsa", "constrained", "multiplier_gc"), 1, None, ""),
    ("Constrained 5, 6", "dna/and_composition", "compose", "5", ("mpsa", "smc", "dual_included"), 3, None, ""),
]

PAGES = ("README.md", "toy/README.md", "sd/README.md", "dna/README.md")

def fill(text):
    """A page with its tables made anew. A marker names the gallery, or a script and what to show of it:
    <!-- table toy/das problems=gmm,gmm2 methods=das,exact quantities=emd digits=3 exact=1 -->"""
    def replaced(m):
        words = m[1].split()
        if "/" in words[0]:
            body = tidy_table(words[0], **dict(w.split("=") for w in words[1:]))
        else:
            body = gallery()
        return f"<!-- table {m[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table (.*?) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)

if __name__ == "__main__":
    for page in PAGES:
        path = REPOSITORY / page
        path.write_text(fill(path.read_text()))
