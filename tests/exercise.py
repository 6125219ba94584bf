"""Coursework on the central lines of the four papers: fifteen exercises, questions of a student's own, points.

    python tests/exercise.py list [--only 3]             all exercises; one, with its hint
    python tests/exercise.py handout                     one page of markdown
    python tests/exercise.py make FOLDER --student ann   scripts with emptied blocks, questions.md, answers.json
    python tests/exercise.py check FOLDER [--only 3]     the criteria of the blocks, and what else was changed
    python tests/exercise.py grade FOLDER --student ann  points; --only 2 5, --results results.json
    python tests/exercise.py make FOLDER --gradescope    an autograder: zip what the folder holds

Only the text of blocks and answers.json are taken from a copy. A block may not import, define or open anything. It is
put into the script as it is here and runs in another process, in a folder of its own, which returns numbers; what
these must fulfil is in test_exercises.py. Questions depend on --student (a name, number or address, or Gradescope's
submission_metadata.json) and on --key, a word that the instructor alone knows; answers are computed while grading.
Solutions are public, as are the criteria: a block that is right says little of who wrote it. Questions, bug hunts and
the reasons written beside them say more.
"""
import argparse
import ast
import difflib
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import types

import numpy as np

ROOT, LIMIT = pathlib.Path(__file__).resolve().parent.parent, 60  # seconds for one block
FILES = ("exercise.py", "test_exercises.py", "conftest.py")  # what a copy, and the other process, have of tests/
SLOW = r"(?m)^from (accelerate|diffusers|peft|transformers|matplotlib|tqdm)\b.*"  # of images and figures alone
POINTS = dict(fill=4, carry=5, hunt=8, derive=9, predict=6)
TABLE = """
fill, 30 minutes | weights and gathering of smc | toy/das.py | smc | ancestors = ... log_w = log_w - before
    log w - old twist + log p/q + new twist; a group of low effective size: its ancestors, with its mean weight
    weights telescope where nothing is resampled; all that is known moves along; the mean weight stays
    The old twist is that of the ancestors: read it after the gathering. | toy/das.py --score exact: log_z of das
fill, 30 minutes | the log twist of DAS | toy/das.py | log_twist | slope, curvature = ... return reward
    log E exp(r / a), x_0 ~ N(x0_hat, v), r' = g, r'' = -k: r / a + sum g^2 v / (2 a (a + k v)) - log(1 + k v / a) / 2
    exact for a quadratic reward and for a straight one; an upward curve counts as straight
    jvp of the gradient along ones gives slope and curvature at once. | toy/das.py: das, das_gamma in 32 dimensions
fill, 25 minutes | the choice of DAV's local search | toy/dav.py | search | log_v = ... return new, log_v
    one of M children in proportion to v = twist p/q; the weight of the step is the mean of v over the chosen twist
    E[w] and E[w x] are those of p exp(r), by z-scores
    In logarithms: logsumexp, and log M. | toy/dav.py: second line of figure.png
fill, 25 minutes | the M-step of DAV | toy/dav.py | m_step | learn = ... return (learn
    maximise E[w log p_new(x_next)] (ours = 0), or its mean under p_old for the part w = 1; less kl w KL(p_new, p_base)
    the loss at one network less that at another: as published, ours, with kl
    (1 - w) log p_new + KL(p_old, p_new): where w = 1, no noise is left. | toy/dav.py: E[r] by round, dotted: exact
fill, 30 minutes | the product of kernels and C_t | toy/msdda.py | merge | precision = ... return merged
    prod_i N(mean_i, v_i)^w_i = C N(mean, v): precisions add, means are averaged by precision, log C is the rest
    sum_i w_i log N_i = log C + log N at every x
    Take both sides at x = mean. | toy/msdda.py: sliced W2 of msdda .28, of msdda_ct .03
fill, 25 minutes | dual step | toy/constrained_alignment.py | dual_step | loss = ... return (
    half way to the maximum of v's - v'Av / 2, v the move from dual: over dual >= 0, with sum one on the simplex
    closed forms for diagonal A: orthant, simplex
    minimize wants the negative, in units of its size. | toy/constrained_alignment.py: multipliers, dotted: exact
fill, 25 minutes | the weights of Lemma 2 | toy/and_composition.py | pointwise_kl | x = a**0.5 ... kls +=
    KL(p, q) = 1/2 integral ds E|x0_hat - x0_hat_q|^2, s = abar / (1 - abar), at points even in log s
    KLs of Gaussians, of equal variances and of others
    ds = s dlog s, and dlog s is 1 here. | toy/and_composition.py: worst_kl of algorithm_2, exact
fill, 15 minutes | the ratio of DDPO | toy/ddpo.py | ddpo | ratio = ... gain =
    min(ratio A, clip(ratio) A), ratio = p_new / p_old of a step, over all its dimensions
    paths of known ratios: within the clip, beyond it
    Sum logarithms over dimensions, never average. | toy/ddpo.py: objective_paths of ddpo_kl, 1.49 on gmm
carry, 30 minutes | DAS's look, from points to latents | sd/das.py | das | eps = model.eps ... grad =
    x0_hat = forecast(x, eps, abar); value = gain(x0_hat) / kl_weight; grad: of value, in x
    the forecast's value; the gradient through it; the last twist
    toy/das.py has it for points. At i = steps x is the image. | sd/das.py: das beside base in figure.png
carry, 30 minutes | DAS's step, from points to letters | dna/das.py | das | log_q = tilt ... log_ratio =
    q: log_p tilted by temper grad; a mask goes with probability 1 / left; log p/q of the new letters
    frequencies of the letters; log p - log q of them
    tilt, unmask, letters_log_p are there. Temper: of the next twist. | dna/das.py: log_z of das on mpsa, exact
carry, 20 minutes | from Gaussian kernel to unmasking | dna/das.py | unmask | new = (x == MASK) ... letters =
    a mask goes with probability 1 / left; its letter by inverting the cumulative sum of q
    set letters stay; share of new ones; their frequencies
    In float64; rounding may leave the last sum below 1. | dna/das.py: reward of pretrained on mpsa, exact
hunt, 45 minutes | which bug has this DAS?
    weights telescope: log Z of every setting is the same, but for noise
    the bug's name; a reason, for a person to read
    What changes with resampling is in the gathering, what with guidance in p/q. | the table in questions.md
hunt, 35 minutes | which bug has this DAV?
    E[mean of v over the chosen twist, times that twist] is E_p[twist]
    the bug's name; a reason, for a person to read
    With one child there is no choice: what is wrong then? | the table in questions.md
derive, 60 minutes | three closed forms
    E exp(b x) of a Gaussian; KL of two Gaussians; letters set together are independent
    each number to 1%
    Check each by a sum over a grid. | your own sums
predict, 20 minutes | colder or warmer
    p exp(r / kl_weight) / Z
    the prediction to 25%, the run to 1%
    Which Gaussians of the ring win, and how far do they move? | toy/das.py: mean_reward on gmm2, exact
"""

def rows(lines):
    """{number: exercise} from the table; spans: how the first and the last line of each block begin."""
    for i in range(0, len(lines), 4):
        head, formula, criterion, last = (line.strip().split(" | ") for line in lines[i : i + 4])
        (kind, minutes, _), (script, function, *spans) = re.split(", | ", head[0]), head[2:] or ("answers.json", "")
        yield i // 4 + 1, types.SimpleNamespace(
            kind=kind, minutes=int(minutes), points=POINTS[kind], title=head[1], script=script, function=function,
            spans=[span.split(" ... ") for span in spans], formula=" | ".join(formula), criterion=criterion[0],
            hint=last[0], compare=last[1])

EXERCISES = dict(rows(TABLE.strip().splitlines()))
BLOCKS = [number for number, e in EXERCISES.items() if e.spans]

# ---- blocks ----------------------------------------------------------------------------------------------------------
def spans(text, number):
    """First and last character and indent of an exercise's blocks, by marks or else by the table."""
    marked = re.finditer(rf"^( *)# exercise {number}: .*\n((?:.*\n)*?)\1# end exercise\n", text, re.M)
    if f"# exercise {number}:" in text:
        return [(*m.span(2), m[1]) for m in marked]
    e, found, lines = EXERCISES[number], [], text.splitlines(keepends=True)
    (node,) = [n for n in ast.parse(text).body if getattr(n, "name", "") == e.function]
    for first, last in e.spans:
        (start,) = [i for i in range(node.lineno, node.end_lineno) if lines[i].lstrip().startswith(first)]
        end, *_ = [i for i in range(start, node.end_lineno) if lines[i].lstrip().startswith(last)]
        indent = lines[start][: -len(lines[start].lstrip())]
        found.append((len("".join(lines[:start])), len("".join(lines[: end + 1])), indent))
    return found

def spliced(text, number, parts):
    """A script's text with other blocks for one exercise, each without its indent."""
    for (start, end, indent), part in reversed([*zip(spans(text, number), parts)]):
        text = text[:start] + textwrap.indent(part, indent) + text[end:]
    return text

def emptied(text, script):
    """A script's text with marks, and between them what to do."""
    for number in [n for n in BLOCKS if EXERCISES[n].script == script]:
        body = f"# {EXERCISES[number].formula}\nraise NotImplementedError('exercise {number}')\n"
        if f"# exercise {number}:" not in text:
            body = f"# exercise {number}: {EXERCISES[number].title}\n{body}# end exercise\n"
        text = spliced(text, number, [body] * len(EXERCISES[number].spans))
    return text

FORBIDDEN = re.compile(
    r"\b(import|def|class|global|nonlocal|try|del|exec|eval|open|compile|getattr|setattr|delattr|vars|globals|locals|"
    r"input|breakpoint|argparse|csv|io|json|os|pathlib|runpy|sys|time|load|save|hub|utils|serialization|ops|library|"
    r"jit|package|from_?file|tofile|lib|\w+txt|memmap|savez\w*|testing|inspect|importlib|ctypes|multiprocessing|"
    r"attrgetter|\w+_(frame|globals|builtins|locals|code|back)|Path|HERE|MINI|set_default\w*)\b|\b__|\._|\btype\(")

def block_of(copy, number):
    """An exercise's blocks in a copy; ValueError says what is wrong with them."""
    text = (copy / EXERCISES[number].script).read_text()
    parts = [textwrap.dedent(text[start:end]) for start, end, _ in spans(text, number)]
    for tree in [ast.parse("def block():\n" + textwrap.indent(part, " ")) for part in parts]:
        words = [m[0] for m in FORBIDDEN.finditer("\n".join(map(ast.unparse, tree.body[0].body)))]
        words += [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
        if words or len(tree.body) > 1:
            raise ValueError(f"{words[:1]}: a block imports, defines, opens nothing and changes nothing outside itself")
    if len(parts) != len(EXERCISES[number].spans):
        raise ValueError(f"its marks are not in {EXERCISES[number].script} any more")
    return parts

def examined(copy, numbers, seed):
    """The blocks of a copy -> {number: {part: is it right?}, or what went wrong}."""
    from test_exercises import judged
    found, jobs = {}, []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for number in numbers:
            try:
                text = spliced((ROOT / EXERCISES[number].script).read_text(), number, block_of(copy, number))
                (folder / f"{number}.py").write_text(re.sub(SLOW, "", text))
                jobs.append((number, seed(number)))
            except (OSError, ValueError, SyntaxError) as error:
                found[number] = f"{type(error).__name__}: {error}"
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=lambda _, names: {*names} - {*FILES})
        for i, job in enumerate(jobs):  # all in one process, unless a block never ends or ends everything
            if not [*folder.glob(f"{job[0]}.[nt]*")]:
                (folder / "jobs.json").write_text(json.dumps([LIMIT, jobs[i:]]))
                subprocess.run([sys.executable, "tests/test_exercises.py"], cwd=folder, capture_output=True,
                               env=os.environ | dict(OMP_NUM_THREADS="1"))
            found[job[0]] = judged(folder, *job)
    return found

# ---- commands --------------------------------------------------------------------------------------------------------
def seeded(args):
    """The seed of an exercise, by student and key."""
    student = args.student
    if student.endswith(".json"):  # Gradescope's
        student = json.loads(pathlib.Path(student).read_text())["users"][0]["email"]
    return lambda n: int(hashlib.sha256(f"{args.key}/{student.strip().lower()}/{n}".encode()).hexdigest()[:12], 16)

def handout():
    """All exercises on one page of markdown."""
    lines = ["# Exercises\n", "Hints: `list --only 3`. Check yourself: `python tests/exercise.py check FOLDER`.\n",
             "| | exercise | kind | minutes | points | formula | right if | compare with |", "|" + " - |" * 8]
    for n, e in EXERCISES.items():
        cells = n, f"{e.title}: {e.script}", e.kind, e.minutes, e.points, e.formula, e.criterion, e.compare
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"

def copied(folder):
    """{path: content} of the folders of a copy or of the repository, scripts emptied."""
    paths = [p.relative_to(folder) for d in ("toy", "sd", "dna") for p in (folder / d).rglob("*") if p.is_file()]
    found = {p.as_posix(): (folder / p).read_bytes() for p in paths if not {"results", "__pycache__"} & {*p.parts}}
    for name in {EXERCISES[n].script for n in BLOCKS} & {*found}:
        try:
            found[name] = emptied(found[name].decode(), name).encode()
        except (ValueError, SyntaxError):  # neither marks nor the lines of the table
            found[name] += b"\n"
    return found

def make(args):
    """A student's copy, or Gradescope's autograder."""
    from test_exercises import QUESTIONS
    if args.gradescope:
        files = {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in ROOT.glob("*/*.py")}
        files["setup.sh"] = b"#!/usr/bin/env bash\npip3 install torch numpy scipy matplotlib pytest\n"
        files["run_autograder"] = (
            '#!/usr/bin/env bash\ncd "$(dirname "$0")"\npython3 source/tests/exercise.py grade submission --student '
            f"submission_metadata.json --key '{args.key}' --results results/results.json\n").encode()
    else:
        files = copied(ROOT) | {f"tests/{n}": (ROOT / "tests" / n).read_bytes() for n in FILES}
        asked = {n: question(np.random.default_rng(seeded(args)(n))) for n, question in QUESTIONS.items()}
        texts = [handout(), *(f"## {n}. {EXERCISES[n].title}\n\n{text()}\n" for n, (text, _) in asked.items())]
        answers = {n: dict.fromkeys([*wanted, "why"]) for n, (_, wanted) in asked.items()}
        files |= {"questions.md": "\n".join(texts).encode(), "answers.json": json.dumps(answers, indent=1).encode()}
    for name, content in files.items():
        (args.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (args.folder / name).write_bytes(content)
    print(f"{args.folder}: start with {'run_autograder' if args.gradescope else 'questions.md'}")

def changes(folder):
    """What a copy has changed, added or lost beside its blocks and answers -> list of text."""
    theirs, ours, found = copied(folder), copied(ROOT), []
    for name in sorted(n for n in {*theirs, *ours} if theirs.get(n) != ours.get(n)):
        old, new = (c.get(name, b"").decode(errors="replace").splitlines() for c in (ours, theirs))
        lines = [v for v in difflib.unified_diff(old, new, lineterm="", n=0) if v[:2] not in ("--", "++", "@@")]
        found.append(f"{name}: missing" if name not in theirs else f"{name}: added" if name not in ours else
                     f"{name}: {lines[0] if name.endswith('.py') and lines else 'changed'}")
    return found

def points(args):
    """Lines of Gradescope's table: {number, name, score, max_score, output} of each exercise of a copy."""
    from test_exercises import QUESTIONS, answered
    seed, answers, chosen = seeded(args), {}, args.only or EXERCISES
    found = examined(args.folder, [n for n in chosen if n in BLOCKS], seed)
    try:
        answers = dict(json.loads((args.folder / "answers.json").read_text()))
    except (OSError, ValueError, TypeError):
        print("answers.json is missing, or no JSON.")
    for n in [n for n in chosen if n in QUESTIONS]:
        found[n] = answered(answers.get(str(n)), QUESTIONS[n](np.random.default_rng(seed(n)))[1])
    for n in chosen:
        parts, e = found[n] if isinstance(found[n], dict) else {"": False}, EXERCISES[n]
        text = "; ".join(f"wrong: {part}" for part, right in parts.items() if not right) or "right"
        text = text if parts is found[n] else found[n]
        text += f". To be read: {answers[str(n)]['why']}" if n in QUESTIONS and parts is found[n] else ""
        yield dict(number=str(n), name=f"{e.kind}: {e.title}", output=" ".join(text.split())[:300], max_score=e.points,
                   score=round(e.points * sum(parts.values()) / len(parts), 1))

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=["list", "handout", "make", "check", "grade"])
    add("folder", type=pathlib.Path, nargs="?", help="a student's copy")
    add("--student", help="on whom the questions depend")
    add("--key", default="", help="a word of the instructor's, the same for make and grade")
    add("--only", type=int, nargs="+", choices=[*EXERCISES], help="these exercises alone")
    add("--results", type=pathlib.Path, help="write Gradescope's results.json there")
    add("--gradescope", action="store_true", help="make an autograder")
    args = parser.parse_args(argv)
    if args.command == "handout":
        print(handout(), end="")
    elif args.command == "list":
        for n, e in [(n, EXERCISES[n]) for n in args.only or EXERCISES]:
            print(f"{n:2} {e.kind:8}{e.minutes:3} min{e.points:3} points  {e.title}: {e.script}")
            print(*[f"     {v}\n" for v in (e.formula, e.criterion, e.hint, e.compare) if args.only], sep="", end="")
    elif args.folder is None or args.folder.is_dir() == (args.command == "make"):
        parser.error(f"{args.command} wants a folder that is {'not yet ' if args.command == 'make' else ''}there")
    elif args.command != "check" and not args.student and not args.gradescope:
        parser.error(f"{args.command} wants --student, on whom the questions depend")
    elif args.command == "make":
        make(args)
    else:
        if args.command == "check":
            args.student, args.only = "check", [n for n in BLOCKS if n in (args.only or BLOCKS)]
        tests = [*points(args)]
        for t in tests:
            print(f"{t['score']:4}/{t['max_score']} {t['number']:>3} {t['name']}: {t['output']}")
        if args.command == "check":
            return print(*changes(args.folder) or ["Nothing else was changed."], sep="\n")
        score = round(sum(t["score"] for t in tests), 1)
        print(f"{score} of {sum(t['max_score'] for t in tests)} points")
        if args.results:
            args.results.write_text(json.dumps(dict(score=score, tests=tests), indent=1))

if __name__ == "__main__":
    main()
