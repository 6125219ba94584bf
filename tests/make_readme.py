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
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def exact(runs, name, digits=3):
    value = next(run[name]["exact"] for run in runs if name in run)
    return f"{value:.{digits}f}"


def table(header, lines):
    lines = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def das_reference():
    """Official column: the official notebooks run with four sampling seeds (mode L1: one)."""
    runs = records("toy/das")
    official = {"gmm.emd": "0.54 to 0.62", "gmm2.emd": "0.98 to 1.16", "gmm.mode_l1": "0.27", "gmm2.mode_l1": "0.27",
                "gmm.mean_reward": "-0.29 to -0.24", "gmm2.mean_reward": "-1.45 to -1.42"}
    paper = {"gmm.emd": "0.82", "gmm.mean_reward": "-0.22"}
    lines = []
    for key, label in dict(emd="EMD", mode_l1="mode L1", mean_reward="E[r]", log_z="log Z").items():
        for problem in ("gmm", "gmm2"):
            name = f"{problem}.{key}"
            if key in ("mean_reward", "log_z"):
                truth = f"{exact(runs, f'das.{name}')}; at 100 steps {spread(runs, f'reference.{name}')}"
            else:
                truth = f"{spread(runs, f'target.{name}')} (exact samples)"
            lines.append([f"{problem} {label}", spread(runs, f"das.{name}"), official.get(name, ""),
                          paper.get(name, ""), truth])
    return table(["DAS", "ours", "official code", "paper", "exact"], lines)


def das_methods():
    runs, lines = records("toy/das"), []
    for problem in ("gmm", "gmm2"):
        for method, label in dict(pretrained="pretrained", target="exact samples", guidance="guidance, 1 particle",
                                  importance="importance resampling", bootstrap="bootstrap SMC", das="DAS").items():
            keys = ("mean_reward", "emd_at_1e5", "emd_at_1e6", "emd", "mode_l1", "network_evaluations")
            lines.append([problem, label, *(spread(runs, f"{method}.{problem}.{k}") for k in keys)])
    header = ["problem", "method", "E[r]", "EMD, 1e5 evaluations", "1e6", "all", "mode L1", "evaluations"]
    return table(header, lines)


def and_reference():
    """Official column: means and sqrt of the determinant of the covariance of the notebook's stored samples."""
    runs, lines = records("toy/and_composition"), []
    official = {"primal_dual.paper.mean_x": "-0.002", "primal_dual.paper.var_x": "0.27 (both axes)"}
    for method, label in dict(equal="equal weights", dual_only="Algorithm 3, summed score", corrected="SMC and entropies",
                              primal_dual="Algorithm 2, network").items():
        for problem in ("paper", "pair"):
            keys = ("dual_1", "worst_kl", "mean_x", "var_x")
            lines.append([problem, label, *(spread(runs, f"{method}.{problem}.{key}") for key in keys)])
            if official and method == "primal_dual" and problem == "paper":
                lines.append([problem, "Algorithm 2, official notebook", "", "",
                              *(official[f"primal_dual.paper.{key}"] for key in ("mean_x", "var_x"))])
    for problem in ("paper", "pair"):
        keys = ("dual_1", "worst_kl", "mean_x", "var_x")
        lines.append([problem, "exact", *(exact(runs, f"corrected.{problem}.{key}") for key in keys)])
    return table(["problem", "method", "multiplier 1", "worst KL", "mean x", "variance x"], lines)


def and_samplers():
    runs, lines = records("toy/and_composition"), []
    for sampler, label in dict(target="exact samples", ddim="DDIM on summed scores", langevin="annealed Langevin",
                               mala="annealed MALA", smc="SMC").items():
        keys = ("mean_x", "var_x", "emd")
        lines.append([label, *(spread(runs, f"{sampler}.pair_samplers.{key}") for key in keys)])
    lines.append(["exact", *(exact(runs, f"smc.pair_samplers.{key}") for key in ("mean_x", "var_x")), ""])
    return table(["sampler of `pair`, 500 calls of each model", "mean x", "variance x", "EMD"], lines)


def or_reference():
    """Official column: the notebook's fitted mixtures; its multipliers are not stored."""
    runs, lines = records("toy/or_composition"), []
    for problem in ("paper", "overlap"):
        for objective in ("elbo", "kl"):
            keys = ("dual_1", "dual_2", "variance")
            lines.append([problem, objective, *(spread(runs, f"{objective}.{problem}.{key}") for key in keys)])
            lines.append([problem, f"{objective}, exact", *(exact(runs, f"{objective}.{problem}.{key}") for key in keys)])
    lines.insert(2, ["paper", "elbo, official notebook", "", "", "0.07 to 0.10"])
    return table(["problem", "objective", "weight 1", "weight 2", "variance within modes"], lines)


def alignment_reference():
    runs, lines = records("toy/constrained_alignment"), []
    for problem in ("linear", "competing", "inactive", "bump", "objective", "combined"):
        names = [n for n in runs[0] if n.startswith(f"constrained.{problem}.dual_")]
        for name in names:
            i = name.rsplit("_", 1)[1]
            lines.append([problem, i, spread(runs, f"threshold.{problem}.reward_{i}", 2).split(" ")[0],
                          spread(runs, f"equal.{problem}.reward_{i}"), spread(runs, f"constrained.{problem}.reward_{i}"),
                          spread(runs, f"dual_only.{problem}.dual_{i}"), spread(runs, name), exact(runs, name),
                          *([spread(runs, f"constrained.{problem}.kl_1"), exact(runs, f"constrained.{problem}.kl_1")]
                            if i == "1" else ["", ""])])
    return table(["problem", "reward", "threshold", "E[r], equal weights", "E[r], constrained", "multiplier, exact tilt",
                  "multiplier, network", "exact", "KL", "exact"], lines)


TABLES = {"das": das_reference, "das methods": das_methods, "and": and_reference, "and samplers": and_samplers,
          "or": or_reference, "alignment": alignment_reference}


def fill(text):
    """The README's text with its tables made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert len(pattern.findall(text)) == 1, f"README.md has no place for the table {name!r}"
        text = pattern.sub(lambda m: m[1] + make() + "\n" + m[2], text)
    return text


if __name__ == "__main__":
    path = REPOSITORY / "README.md"
    path.write_text(fill(path.read_text()))
