"""Coursework: copies of the scripts with emptied blocks or a planted bug, questions of a student's own, and answers.

    python tests/exercise.py make OUT --student 42    the scripts with every block emptied, and answers.json to fill in
    python tests/exercise.py make OUT --bug 7         the complete scripts with one known bug, to be hunted
    python tests/exercise.py check OUT                every change outside the blocks
    python -m pytest tests --src OUT --grades FILE    the points of a copy, and FILE in Gradescope's format

A block stands in a script between `# exercise 3: what to do` and `# end exercise`. A function that several scripts share
holds its block in each of them: write it once, carry it over. The questions have the student's number as seed, and
their truth is computed when they are graded, by quadrature or root finding.
"""
import argparse
import difflib
import importlib
import json
import pathlib
import re
import shutil
import sys

import numpy as np
from scipy.optimize import brentq

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("toy", "sd", "dna")
BLOCK = re.compile(r"^( *)# exercise (\d+): (.*)\n(?:.*\n)*?\1# end exercise\n", re.M)
POINTS = dict(fill=4, carry=4, hunt=6, derive=5, predict=3)


# ---- blocks ----------------------------------------------------------------------------------------------------------


def scripts(root=REPOSITORY):
    """The paths of all scripts under a folder, relative to it."""
    return sorted(str(p.relative_to(root)) for folder in FOLDERS for p in (root / folder).glob("*.py"))


def emptied(text):
    """A script's text whose blocks keep the instruction and raise it as NotImplementedError."""
    return BLOCK.sub(lambda m: f"{m[1]}# exercise {m[2]}: {m[3]}\n{m[1]}raise NotImplementedError("
                               f"{f'exercise {m[2]}: {m[3]}'!r})\n{m[1]}# end exercise\n", text)


def places():
    """{number: scripts that hold that block}."""
    found = {}
    for script in scripts():
        for m in BLOCK.finditer((REPOSITORY / script).read_text()):
            found.setdefault(int(m[2]), []).append(script)
    return dict(sorted(found.items()))


# ---- bugs ------------------------------------------------------------------------------------------------------------

SOURCES = [("toy/das.py", "test_toy_das", "BUGS"), ("dna/das.py", "test_dna_das", "BUGS"),
           ("dna/dav.py", "test_dna_dav", "SEARCH_BUGS")]  # each has a test that every one of its bugs fails


def bugs():
    """Every known bug: [(script, [(text, wrong text), ...]), ...]; its number is its place."""
    found = []
    for script, module, name in SOURCES:
        for changes in getattr(importlib.import_module(module), name).values():
            changes = changes[0] if isinstance(changes[0], list) else changes
            found.append((script, list(changes) if isinstance(changes, list) else [changes]))
    return found


def with_bug(number):
    """The script that a bug is in, its text with the bug, and the lines that are wrong (none where one is missing)."""
    script, changes = bugs()[number]
    right = (REPOSITORY / script).read_text()
    wrong = right
    for old, new in changes:
        if wrong.count(old) != 1:
            fail(f"Bug {number} does not fit {script}, which was changed.")
        wrong = wrong.replace(old, new)
    diff = difflib.ndiff(right.splitlines(), wrong.splitlines())
    return script, wrong, [line[2:].strip() for line in diff if line.startswith("+ ")]


# ---- questions -------------------------------------------------------------------------------------------------------


def line_and_law(mean, var):
    """A fine grid of the line, and the normal law on it."""
    x = np.linspace(-60, 60, 240_001)
    p = np.exp(-((x - mean) ** 2) / (2 * var))
    return x, p / p.sum()


def log_z_question(rng):
    w, means, variances = rng.dirichlet([3, 3]).round(2), rng.uniform(-3, 3, 2).round(1), rng.uniform(0.2, 2, 2).round(1)
    slope, kl_weight = round(rng.uniform(0.5, 2), 1), round(rng.uniform(0.5, 2), 1)
    w[1] = round(1 - w[0], 2)
    laws = [line_and_law(m, v) for m, v in zip(means, variances)]
    truth = np.log(sum(weight * p @ np.exp(slope * x / kl_weight) for weight, (x, p) in zip(w, laws)))
    return (f"log Z of DAS on the line: p = {w[0]} N({means[0]}, {variances[0]}) + {w[1]} N({means[1]}, {variances[1]}) "
            f"(variances), r(x) = {slope} x, kl_weight {kl_weight}. Derive it; check it by a sum over a grid."), truth


def product_question(rng):
    gap, var = round(rng.uniform(1, 4), 1), round(rng.uniform(0.3, 0.8), 1)
    (x, p), (_, q) = line_and_law(0, 1), line_and_law(gap, var)
    log_p, log_q = -(x**2) / 2, -((x - gap) ** 2) / (2 * var)

    def excess(weight):
        law = np.exp(weight * log_p + (1 - weight) * log_q)
        law /= law.sum()
        norm = [np.log(np.exp(v).sum()) for v in (log_p, log_q)]
        return law @ (log_q - norm[1] - log_p + norm[0])  # KL(law || p) - KL(law || q)

    return (f"AND of N(0, 1) and N({gap}, {var}) (variances): the weight of N(0, 1) in the product at which the KLs of "
            "the product from the two are equal."), brentq(excess, 1e-6, 1 - 1e-6)


def mixture_question(rng):
    laws = rng.dirichlet([2, 2, 2], 2).round(2)
    laws[:, 2] = (1 - laws[:, :2].sum(1)).round(2)
    while laws.min() < 0.02:
        laws = np.clip(laws, 0.05, None)
        laws[:, 2] = (1 - laws[:, :2].sum(1)).round(2)

    def excess(weight):
        mixture = weight * laws[0] + (1 - weight) * laws[1]
        first, second = ((law * np.log(law / mixture)).sum() for law in laws)
        return first - second

    return (f"OR of two laws of three letters, {laws[0].tolist()} and {laws[1].tolist()}: the weight of the first in the "
            "mixture at which the KLs of the two from the mixture are equal."), brentq(excess, 1e-9, 1 - 1e-9)


def unmasking_question(rng):
    share, steps = round(rng.uniform(0.1, 0.9), 2), int(rng.integers(2, 9))
    together = 1 / steps  # both letters in the same step
    law = np.array([share, 1 - share, 0, 0])
    apart = np.array([share**2, (1 - share) ** 2, share * (1 - share), share * (1 - share)])
    sampled = together * apart + (1 - together) * law
    return (f"Two letters: AC with probability {share}, else GT. A masked diffusion with the exact denoiser samples them "
            f"in {steps} steps. The total variation distance of its law from the true one."), abs(sampled - law).sum() / 2


def reward_question(rng):
    kl_weight = round(rng.uniform(0.3, 3), 2)
    conftest = importlib.import_module("conftest")
    truth, known = (float(conftest.load("toy/das.py").Problem("gmm", v).mean_reward) for v in (kl_weight, 1.0))
    return (f"Write into `prediction` what E[r] of the target of the problem gmm will be at --kl-weight {kl_weight} (at 1 "
            f"it is {known:.3f}; at infinity that of the data). Then run python toy/das.py --quick --kl-weight "
            f"{kl_weight} and write the exact value (of mean_reward on gmm) into `answer`."), truth


def hunt(rng, script):
    known = [k for k, (where, _) in enumerate(bugs())
             if where == script and set(with_bug(k)[2]) - {"pass", "if False:"}]  # the others are seen at a glance
    number = known[int(rng.integers(len(known)))]
    return (f"Make a copy with --bug {number} and find the bug in its {script}: look at log Z, E[r] and the other moments "
            "that it prints beside the exact ones, then at the code. `answer`: a wrong line, as it stands there."), \
        with_bug(number)[2]


QUESTIONS = {  # number: kind, question of a random generator -> text, truth
    15: ("hunt", lambda rng: hunt(rng, "toy/das.py")),
    16: ("hunt", lambda rng: hunt(rng, "dna/dav.py")),
    17: ("hunt", lambda rng: hunt(rng, "dna/das.py")),
    18: ("derive", log_z_question),
    19: ("derive", product_question),
    20: ("derive", mixture_question),
    21: ("derive", unmasking_question),
    22: ("predict", reward_question),
}


def question(number, student):
    """The question of a student -> text, truth: a number, or the lines of which one is asked."""
    return QUESTIONS[number][1](np.random.default_rng([student, number]))


def kinds():
    """{number: (kind, where it is)} of all exercises."""
    blocks = {n: ("fill" if len(where) == 1 else "carry", ", ".join(where)) for n, where in places().items()}
    return blocks | {n: (kind, "answers.json") for n, (kind, _) in QUESTIONS.items()}


# ---- commands --------------------------------------------------------------------------------------------------------


def fail(message):
    print(message, file=sys.stderr)
    raise SystemExit(2)


def make(out, student, bug):
    """Copy the three folders without their results, emptied or with a bug, into a new folder."""
    if out.exists() and any(out.iterdir()):
        fail(f"{out} is not empty: name a new folder.")
    if bug is not None and not 0 <= bug < len(bugs()):
        fail(f"There is no bug {bug}: they are numbered 0 to {len(bugs()) - 1}.")
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, out / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    if bug is not None:
        script, text, _ = with_bug(bug)
        (out / script).write_text(text)
        return
    for script in scripts(out):
        (out / script).write_text(emptied((out / script).read_text()))
    entries = {str(n): dict(question=question(n, student)[0], answer=None) for n in QUESTIONS}
    entries["22"]["prediction"] = None
    (out / "answers.json").write_text(json.dumps(dict(student=student, **entries), indent=1) + "\n")


def changes(out):
    """Every line that a copy has changed outside the blocks, and scripts that it lacks or adds -> list of text."""
    found = [f"{script}: missing" for script in sorted(set(scripts()) - set(scripts(out)))]
    found += [f"{script}: added" for script in sorted(set(scripts(out)) - set(scripts()))]
    for script in sorted(set(scripts()) & set(scripts(out))):
        right, theirs = (emptied((root / script).read_text()).splitlines() for root in (REPOSITORY, out))
        found += [f"{script}: {line}" for line in difflib.unified_diff(right, theirs, lineterm="", n=0)
                  if not line.startswith(("---", "+++", "@@"))]
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make", "check"])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--student", type=int, default=0, help="the number that the questions depend on")
    parser.add_argument("--bug", type=int, help="plant this bug instead of emptying the blocks")
    args = parser.parse_args(argv)
    if args.command == "make":
        make(args.out, args.student, args.bug)
        return print(f"The exercises, and questions in answers.json: {args.out}\n"
                     f"To grade them: python -m pytest tests --src {args.out}" if args.bug is None else
                     f"A copy with bug {args.bug}: {args.out}")
    if not args.out.is_dir():
        fail(f"{args.out} is no folder.")
    found = changes(args.out)
    print("\n".join(found) if found else "Nothing was changed outside the blocks.")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
