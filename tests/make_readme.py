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


def msdda_reference():
    """Sliced W2 at weights (1/2, 1/2) and averaged over all weights, as multiples of the floor's."""
    runs, lines = records("toy/msdda"), []
    labels = dict(target="exact samples", oracle="tuned for each weight", msdda_smc="MSDDA with C_t", msdda="MSDDA",
                  blend="blend of noise predictions", switch="switching", rgg="reward gradients (RGG)",
                  code="best of 20 by blocks (CoDe)", soup="Rewarded Soup", soup_factor="soup of LoRA factors")
    for method, label in labels.items():
        cells = [spread(runs, f"{method}.{score}.sw2_w50_50") for score in ("exact", "mlp")]
        lines.append([label, *cells, spread(runs, f"{method}.mlp.reward_1_w50_50"),
                      spread(runs, f"{method}.mlp.reward_2_w50_50"), spread(runs, f"{method}.mlp.network_evaluations")])
    lines.append(["exact", "0", "0", *(exact(runs, f"target.mlp.reward_{i}_w50_50") for i in (1, 2)), ""])
    return table(["method, weights (1/2, 1/2)", "sliced W2, exact scores", "networks", "E[r1], networks", "E[r2]",
                  "evaluations, all weights"], lines)


def dav_reference():
    runs, lines = records("toy/dav"), []
    labels = dict(pretrained="pretrained", dav="DAV, 8 rounds", posterior="DAV posterior", dav_kl="DAV-KL, 8 rounds")
    for problem in ("equal", "unequal"):
        for method, label in labels.items():
            name = f"{method}.{problem}"
            lines.append([problem, label, spread(runs, f"{name}.mean_reward"), exact(runs, f"{name}.mean_reward"),
                          spread(runs, f"{name}.mode_error"), spread(runs, f"{name}.spread"),
                          exact(runs, f"{name}.spread"), spread(runs, f"{name}.emd"),
                          spread(runs, f"{name}.emd_floor")])
    return table(["reward", "method", "E[r]", "exact", "largest error of a mode's mass", "spread", "exact", "EMD",
                  "floor"], lines)


def baselines_reference():
    lines = []
    labels = {"toy/guidance": dict(guidance_published="guidance, published form", guidance_scaled="guidance, scaled",
                                   guidance_tempered="guidance, tempered", guidance_tuned="guidance, tuned"),
              "toy/ddpo": dict(ddpo="DDPO with KL", ddpo_no_kl="DDPO", ddpo_no_kl_stopped="DDPO, early stop"),
              "toy/draft": dict(draft="DRaFT with KL", draft_truncated="DRaFT with KL, truncated",
                                draft_no_kl="DRaFT", draft_no_kl_stopped="DRaFT, early stop", draft_1="DRaFT-1")}
    for problem in ("gmm", "gmm2"):
        for script, methods in labels.items():
            runs = records(script)
            for method, label in methods.items():
                keys = ("mean_reward", "terminal_objective", "path_objective", "emd", "mode_l1")
                lines.append([problem, label, *(spread(runs, f"{method}.{problem}.{key}") for key in keys)])
        runs = records("toy/ddpo")
        lines.append([problem, "optimum, exact samples", exact(runs, f"ddpo.{problem}.mean_reward"),
                      *[exact(runs, f"ddpo.{problem}.path_objective")] * 2, spread(runs, f"target.{problem}.emd"),
                      spread(runs, f"target.{problem}.mode_l1")])
    return table(["problem", "method", "E[r]", "objective, law of x", "objective, path", "EMD", "mode L1"], lines)


def compare_reference():
    """One record: its se is the standard deviation over three seeds."""
    rows, lines = records("toy/compare")[0], []
    labels = dict(pretrained="pretrained", target="exact samples", guidance="guidance, tuned", das="DAS",
                  ddpo_no_kl="DDPO", ddpo="DDPO + KL", draft_no_kl="DRaFT", draft="DRaFT + KL", draft_1="DRaFT-1",
                  dav="DAV", dav_kl="DAV-KL", posterior="DAV posterior")

    def cell(r, digits):
        return f"{r['estimate']:.{digits}f} ± {r['se']:.{digits}f}"

    for problem in ("gmm", "gmm2", "equal", "unequal"):
        for method, label in labels.items():
            if f"{method}.{problem}.emd" in rows:
                digits = dict(mean_reward=2, emd=2, modes=1, coverage=2, spread=2)
                lines.append([problem, label, *(cell(rows[f"{method}.{problem}.{k}"], n) for k, n in digits.items()),
                              f"{rows[f'{method}.{problem}.evaluations']['estimate'] / 1e6:.1f}",
                              f"{rows[f'{method}.{problem}.seconds']['estimate']:.0f}"])
    return table(["problem", "method", "E[r]", "EMD", "modes", "coverage", "spread", "million evaluations", "seconds"],
                 lines)


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

    floor = records("toy/das")
    add("DAS Fig. 1", "toy/das", "toy/results/das.png", "toy/das.py --paper", "3", "EMD, gmm", "das.gmm.emd", 2,
        "0.54 to 0.62", "0.82", spread(floor, "target.gmm.emd", 2))
    add("Constrained Fig. 1", "toy/and_composition", "toy/results/and_composition.png", "toy/and_composition.py", "2",
        "variance of the product", "primal_dual.paper.var_x", 3, "0.27")
    add("Constrained Fig. 2", "toy/or_composition", "toy/results/or_composition.png", "toy/or_composition.py", "2",
        "variance within modes", "elbo.paper.variance", 3, "0.07 to 0.10")
    add("Constrained Fig. 3, 4", "toy/constrained_alignment", "toy/results/constrained_alignment.png",
        "toy/constrained_alignment.py", "3", "multiplier 1, competing", "constrained.competing.dual_1")
    add("MSDDA", "toy/msdda", "toy/results/msdda.png", "toy/msdda.py", "3", "E[r1] at (1/2, 1/2)",
        "msdda_smc.mlp.reward_1_w50_50", 2, "", "", exact(records("toy/msdda"), "target.mlp.reward_1_w50_50", 2))
    add("DAV, in 2D", "toy/dav", "toy/results/dav.png", "toy/dav.py", "3", "E[r], 8 rounds", "dav.equal.mean_reward")
    add("DAS Fig. 1, DAV Fig. 2", "toy/compare", "toy/results/compare.png", "toy/compare.py", "7",
        "EMD of DAS, gmm2", "das.gmm2.emd", 2, "", "", f"{records('toy/compare')[0]['target.gmm2.emd']['estimate']:.2f}")
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


TABLES = {"gallery": gallery, "das": das_reference, "das methods": das_methods, "and": and_reference, "and samplers": and_samplers,
          "or": or_reference, "alignment": alignment_reference, "msdda": msdda_reference, "dav": dav_reference,
          "baselines": baselines_reference, "compare": compare_reference, "dna base": dna_base,
          "dna das": dna_das, "dna exact": dna_exact, "dna compare": dna_compare, "sd das": sd_das,
          "sd compare": sd_compare, "sd alignment": sd_alignment, "sd and": sd_and, "sd or": sd_or, "sd msdda": sd_msdda}


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
