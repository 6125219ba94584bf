"""What is right: criteria of blocks, questions with answers; then tests that the coursework cannot be fooled.
A criterion is a generator, alike in two processes by its seed. It yields a probe, a function of a script with a
student's block that returns tensors; sent them, in the grader's process, it yields {part: is it right?}."""
import faulthandler
import importlib
import json
import math
import pathlib
import re
import subprocess
import sys
import types

import exercise
import numpy as np
import pytest
import torch
from conftest import planted
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import one_hot

def near(a, b, tol=1e-5):
    return a.shape == torch.as_tensor(b).shape and (a - b).abs().max() < tol

def sure(x, mean):
    """Is the mean of x (N, ...) this one, by z-scores?"""
    return ((x - mean).mean(0) / (x.std(0) / len(x) ** 0.5)).abs().max() < 5

def gaussian(mean, v):
    """Mean and variance of x_0 given x_t, for data N(mean, v)."""
    return lambda x, a: ((a**0.5 * v * x + (1 - a) * mean) / (a * v + 1 - a), (1 - a) * v / (a * v + 1 - a) + 0 * x)

# ---- criteria --------------------------------------------------------------------------------------------------------
def of_smc(randn):
    twist = torch.stack([torch.zeros(6), 6 * torch.eye(6)[2]]).double()  # the second group alone is resampled
    x, (twists, ratios), ancestors = randn(2, 6, 3), randn(2, 3, 2, 6), randn(2, 6, 6).argmax(2)
    def probe(m):
        m.systematic = lambda log_w: ancestors
        state, log_w = m.smc(lambda s, i: (s, 0 * twist), dict(x=x, log_twist=twist), 1)
        plain = m.smc(lambda s, i: (dict(log_twist=twists[i]), ratios[i]), dict(log_twist=twist), 3, ess=0)[1]
        return dict(x=state["x"], twist=state["log_twist"], log_w=log_w, plain=plain)
    found = yield probe
    groups, moved = torch.tensor([[0], [1]]), torch.stack([torch.arange(6), ancestors[1]])
    yield {"weights without resampling": near(found.plain, ratios.sum(0) + twists[2]),
           "the state moves along": near(found.x, x[groups, moved]) and near(found.twist, twist[groups, moved]),
           "the mean weight stays": near(found.log_w, twist.exp().mean(1, keepdim=True).log().expand(2, 6))}

def of_twist(randn):
    (x, c, s), (v, a), k = randn(3, 4, 3), randn(2, 4, 3).abs() + 0.1, 0.7
    rewards = lambda x: -(a * (x - c) ** 2).sum(-1), lambda x: (s * x).sum(-1), lambda x: (a * x**2).sum(-1)
    found = yield lambda m: dict(twists=torch.stack([m.log_twist(reward, x, v, k) for reward in rewards]))
    grow = 1 + 2 * a * v / k
    yield {"quadratic reward": near(found.twists[0], (-a * (x - c) ** 2 / k / grow - grow.log() / 2).sum(1)),
           "straight reward": near(found.twists[1], (s * x / k + (s / k) ** 2 * v / 2).sum(1)),
           "upward curve": near(found.twists[2], (a * x**2 / k + (2 * a * x / k) ** 2 * v / 2).sum(1))}

def of_choice(randn, n=20_000, a=0.3, b=0.7):
    x, mean, s, v = *randn(2, 2), 2 * randn(2).sign(), randn(2).abs() + 0.5
    def probe(m):
        found = m.search(gaussian(mean, v), lambda x: (s * x).sum(-1), x.repeat(1, n, 1), [a, b], 1.0, 3, 0)
        return dict(x=found["x"][0], log_w=found["log_w"][0])
    found = yield probe
    mean, var = planted("toy/das.py").kernel(x, *gaussian(mean, v)(x, a), a, b)
    w = (found.log_w - (s * mean + s**2 * var / 2).sum()).exp()  # over Z
    yield {"weights": sure(w, 1.0), "choice": sure(w[:, None] * (found.x - mean - s * var), 0.0)}

def of_m_step(randn):
    (x, x_next, mean, *shifts), std, w = randn(5, 2), randn(2).abs() + 0.5, randn(1).abs()
    base, *nets = [lambda x, abar, c=c: (0.5 * x + c, 0.3 * c.exp() + 0 * x) for c in (0 * mean, *shifts)]
    found = dict(transitions=[v.view(1, 1, 1, -1) for v in (x, x_next, mean, std)] + [w.view(1, 1, 1)])
    def probe(m):
        m.descend = lambda net, loss, *rest: loss()
        losses = [[m.m_step(net, base, found, [0.25, 0.5], 1, kl, ours, batch=1) for net in nets]
                  for ours, kl in ((0, 0), (1, 0), (0, 0.7))]
        return dict(apart=torch.tensor(losses).diff(dim=1)[:, 0])
    found = yield probe
    kernels = [planted("toy/das.py").kernel(x, *net(x, 0), 0.25, 0.5) for net in (base, *nets)]
    base, *new = (Normal(mean, var.sqrt()) for mean, var in kernels)
    fit, old, pull = (torch.stack([f(p).sum() for p in new]).diff()[0] for f in (
        lambda p: p.log_prob(x_next), lambda p: kl_divergence(Normal(mean, std), p), lambda p: kl_divergence(p, base)))
    yield {"published": near(found.apart[0], -w[0] * fit, 1e-4),
           "ours": near(found.apart[1], (1 - w[0]) * fit + old, 1e-4),
           "kl": near(found.apart[2] - found.apart[0], 0.7 * w[0] * pull, 1e-4)}

def of_merge(randn):
    (mean, spread), x, w = randn(2, 3, 5, 2), randn(5, 2), randn(3).softmax(0)
    var = spread.abs() + 0.2
    found = yield lambda m: dict(zip(("mean", "var", "log_c"), m.merge(mean, var, w.tolist())))
    log_p = lambda x: torch.einsum("m,mn->n", w, Normal(mean, var.sqrt()).log_prob(x).sum(2))
    merged = lambda x: Normal(found.mean, found.var.sqrt()).log_prob(x).sum(1)
    yield {"kernel": near(log_p(x) - log_p(found.mean), merged(x) - merged(found.mean)),
           "log C": near(found.log_c, log_p(found.mean) - merged(found.mean))}

def of_dual_step(randn):
    a, small, dual = randn(3).abs() + 1, 0.03 * randn(3), torch.tensor([0.3, 0.3, 0.4]).double()
    slack, far = randn(3) / 5 + torch.tensor([0.0, -2.0, 0.5]), torch.tensor([-5.0, 0.0, 0.0]).double()
    asked = dict(orthant=(slack, a), simplex=(small, a), edge=(far, 0 * a + 1))
    found = yield lambda m: {k: m.dual_step(dual, v, c.diag(), k != "orthant") for k, (v, c) in asked.items()}
    yield {"orthant": near(found.orthant, (dual + (dual + slack / a).clamp(min=0)) / 2, 1e-4),
           "simplex": near(found.simplex, dual + (small - (small / a).sum() / (1 / a).sum()) / a / 2, 1e-4),
           "edge of the simplex": near(found.edge, torch.tensor([0.15, 0.375, 0.475]), 1e-4)}

def of_lemma(randn):
    v, x, means = torch.tensor([[0.5], [0.5], [2]]), randn(20_000, 2), randn(1, 2) + torch.tensor([[0.0], [2], [0.2]])
    p, *q = [gaussian(*pair) for pair in zip(means, v)]
    found = yield lambda m: dict(kls=m.pointwise_kl(p, q, means[0] + 0.5**0.5 * x))
    ratio = found.kls / kl_divergence(Normal(means[0], v[0] ** 0.5), Normal(means, v**0.5)).sum(1)[1:]
    yield {"equal variances": near(ratio[0], 1.0, 0.01), "others": near(ratio[1], 1.0, 0.05)}

def of_ratio(randn):
    x, advantage, log_ratio = randn(5, 40, 3), randn(4, 40), randn(4, 40).sign()
    levels = torch.tensor([[0.1, 0.3, 0.5, 0.7], [0.3, 0.5, 0.7, 0.9]])[..., None, None]
    def probe(m):
        p = m.policy(lambda x, a: (0.5 * x, 0.3 + 0 * x), x[:-1], *levels)
        batch, log_p = dict(x=x, levels=levels, advantage=advantage, anchor=p), p.log_prob(x[1:]).sum(-1)
        m.policy = lambda *args: p
        return {name: m.ddpo(None, batch | dict(log_p=log_p - size * log_ratio), 0.2, 0.0)
                for name, size in dict(inside=0.1, beyond=0.5).items()}
    found = yield probe
    beyond = torch.where(log_ratio == advantage.sign(), 1 + 0.2 * advantage.sign(), (0.5 * log_ratio).exp())
    yield {"within the clip": near(found.inside, -((0.1 * log_ratio).exp() * advantage).sum(0).mean()),
           "beyond it": near(found.beyond, -(beyond * advantage).sum(0).mean())}

def of_look(randn):
    c, model = randn(1, 2, 2), types.SimpleNamespace(eps=lambda x, i, k: 0.4 * x, abar=[0.2, 0.5, 0.8, 1.0])
    model.times, model.shape, args = range(3), c.shape, types.SimpleNamespace(gamma=0.008, kl_weight=0.5, chunk=4)
    def probe(m):
        states = []
        m.smc = lambda step, s, steps: (states.extend([step(s, 0)[0], step(s, 2)[0]]) or states[1], 0)
        m.das(model, lambda x, k: -((x - c) ** 2).flatten(1).sum(1), 0, 2, 3, args, 1.0)
        return {f"{k}{i}": state[k] for i, state in enumerate(states) for k in ("x", "grad", "log_twist")}
    found = yield probe
    slope = (1 - 0.4 * 0.5**0.5) / 0.5**0.5  # of the forecast
    value = lambda x: -((x - c) ** 2).flatten(2).sum(2) / 0.5
    yield {"forecast's value": near(found.log_twist0, (1.008 ** (100 / 3) - 1) * value(slope * found.x0), 1e-4),
           "gradient": near(found.grad0, -4 * slope * (slope * found.x0 - c), 1e-4),
           "the last twist": near(found.log_twist1, value(found.x1), 1e-4)}

START = torch.tensor([4, 1, 4, 3])  # two masks

def drawn(x, log_q, left):
    """Set letters stay and the share of new ones is 1 / left; new ones are from log_q (4, 4)."""
    new = (x != 4) & (START == 4)
    of_q = [sure(one_hot(x[new[:, k], k], 5)[:, :4].double(), log_q[k].exp()) for k in (0, 2)]
    return (x[:, 1::2] == START[1::2]).all() and sure(new[:, ::2].double(), 1 / left), all(of_q)

def of_letter_step(randn):
    log_p, slope = randn(4, 4).log_softmax(1), 2 * randn(4, 4)
    args = types.SimpleNamespace(gamma=0.008, kl_weight=2.0, chunk=40_000, max_shift=math.inf)
    world = types.SimpleNamespace(steps=4, kl_weight=1.0, length=4, denoiser=lambda x: log_p.expand(len(x), 4, 4),
                                  reward=lambda x: (x * slope).sum((1, 2)), held_out=lambda x: x.sum((1, 2)))
    def probe(m):
        def smc(step, state, steps, ess):
            new, ratio = step(dict(state, x=START.expand(state["x"].shape)), 1)
            found.update(x=new["x"][0], ratio=ratio[0])
            return dict(new, x=new["x"].clamp(max=3)), 0 * ratio
        found, m.smc = {}, smc
        m.das(world, 1, 20_000, args)
        return found
    found = yield probe
    log_q = (log_p + (1.008**50 - 1) * slope / 2).log_softmax(1)
    ratio = (log_p - log_q)[range(4), found.x.clamp(max=3)] * (found.x != START)
    yield {"letters from q": all(drawn(found.x, log_q, 3)), "log p - log q": near(found.ratio, ratio.sum(1), 1e-4)}

def of_unmask(randn):
    log_q = randn(4, 4).log_softmax(1)
    found = yield lambda m: dict(x=m.unmask(log_q.expand(20_000, 4, 4), START.expand(20_000, 4), 3)[0])
    yield dict(zip(("which are set", "their letters"), drawn(found.x, log_q, 3)))

CRITERIA = dict(zip(exercise.BLOCKS, [of_smc, of_twist, of_choice, of_m_step, of_merge, of_dual_step, of_lemma,
                                      of_ratio, of_look, of_letter_step, of_unmask]))

def begun(number, seed):
    """A criterion, and its probe."""
    g = torch.Generator().manual_seed(seed)
    criterion = CRITERIA[number](lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64))
    return criterion, next(criterion)

def worker(folder):
    """In a process of its own: the tensors of each job's probe, or what went wrong, in a file of this folder."""
    limit, jobs = json.loads((folder / "jobs.json").read_text())
    for number, seed in jobs:
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            probe = begun(number, seed)[1]
            torch.manual_seed(seed)
            found = probe(planted(f"{number}.py"))
            np.savez(folder / f"{number}.npz", **{k: v.detach().numpy() for k, v in found.items()})
        except BaseException as error:
            (folder / f"{number}.txt").write_text(f"{type(error).__name__}: {error}")
        faulthandler.cancel_dump_traceback_later()

def judged(folder, number, seed):
    """What the worker left -> {part: is it right?}, or what went wrong."""
    data, text = folder / f"{number}.npz", folder / f"{number}.txt"
    if not data.exists():
        return text.read_text() if text.exists() else "it came to no end"
    try:
        found = {k: torch.from_numpy(v) for k, v in np.load(data, allow_pickle=False).items()}
        return {k: bool(v) for k, v in begun(number, seed)[0].send(types.SimpleNamespace(**found)).items()}
    except Exception as error:  # of any form
        return f"{type(error).__name__}: what it returns has another form"

# ---- questions: a random generator -> a function that writes the text, {answer: (truth, relative tolerance)} ---------
def symptoms(script, changes, seed, groups=200):
    """log Z, E[r], each with its standard error, at four settings of a changed script; data N((0.5, -1), (0.4, 0.2)),
    r = -2 |x - 1|^2, kl_weight 3, 6 steps, groups of 8. symptoms() in test_exercises.py: without changes, or yours."""
    m, rows, reward = planted(script, *changes), [], lambda x: -2 * ((x - 1) ** 2).sum(-1)
    torch.manual_seed(seed)
    abar, denoise = m.signal_power(torch.linspace(1, 0, 7)), gaussian(*torch.tensor([[0.5, -1], [0.4, 0.2]]))
    for value, ess in ((0, 0), (0, 1.1), (3, 0), (3, 1.1)):
        options = denoise, reward, torch.randn(groups, 8, 2), abar.tolist(), 3.0
        x, log_w, *_ = (m.das(*options, guided=value > 0, ess=ess) if script == "toy/das.py" else
                        m.search(*options, max(value, 1), ess).values())
        w, r = log_w.double().exp(), reward(x)
        z, mean = w.mean(1), (w * r).mean() / w.mean()
        errors = [(v.std() / z.mean() / groups**0.5).item() for v in (z, (w * (r - mean)).mean(1))]
        rows.append([z.mean().log().item(), errors[0], mean.item(), errors[1]])
    return torch.tensor(rows)

def bugs(script):
    return importlib.import_module("test_" + script[:-3].replace("/", "_")).BUGS

def hunt(script, settings):
    def question(rng):
        name, seed = str(rng.choice([*bugs(script)])), int(rng.integers(10**6))
        def text():
            lines = [f"A copy of {script} has one of these bugs:\n"]
            for bug, changes in bugs(script).items():
                lines += [f"- {bug}", *("  `{}` became `{}`".format(*c).replace("\n", "") for c in changes)]
            lines += ["", " ".join(symptoms.__doc__.split()), "", "| | log Z | error | E[r] | error |", "|-|-|-|-|-|"]
            for setting, values in zip(settings, symptoms(script, bugs(script)[name], seed).tolist()):
                lines.append(f"| {setting} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
            return "\n".join([*lines, "\n`bug`: its name; `why`: what in the table says so."])
        return text, dict(bug=(name, 0))
    return question

def derive(rng):
    (m, n, b), (v, u, w) = rng.uniform(-2, 2, 3).round(1), rng.uniform(0.2, 0.8, 3).round(2)
    steps, column = int(rng.integers(2, 9)), lambda *values: torch.tensor(values).double()[:, None]
    mixture = planted("toy/das.py").Mixture(column(w, 1 - w)[:, 0].log(), column(m, n), column(v, u))
    truth = dict(log_z=mixture.tilt(column(b)[0], column(0)[0])[1], distance=2 * w * (1 - w) / steps,
                 log_c=planted("toy/msdda.py").merge(column(m, n), column(v, u), [w, 1 - w])[2].item())
    return lambda: f"""With p = N({m}, {v}), q = N({n}, {u}) (variances) and w = {w}:

- `log_z` of the target of DAS for the mixture w p + (1 - w) q, r(x) = {b} x, kl_weight 1
- `log_c`: p^w q^(1 - w) = C N(...): log C
- `distance`: two letters are AC with probability w, else GT; a masked diffusion with the exact denoiser sets them in
  {steps} steps, each mask with probability 1 / (steps left): the total variation distance of its samples from them
- `why`: the derivations, a line each""", {name: (value, 0.01) for name, value in truth.items()}

def predict(rng):
    kl_weight, problem = round(rng.uniform(0.3, 3), 2), planted("toy/das.py").Problem
    truth, known = (problem("gmm2", v).mean_reward.item() for v in (kl_weight, 1.0))
    return lambda: f"""With --kl-weight {kl_weight} for 1, where the exact mean_reward on gmm2 is {known:.2f}:

- `prediction`: that of toy/das.py, before any run; then `run`: as it prints it
- `why`: what led you to the prediction, and what it missed""", dict(prediction=(truth, 0.25), run=(truth, 0.01))

QUESTIONS = {12: hunt("toy/das.py", ("plain, ess 0", "plain, ess 1.1", "guided, ess 0", "guided, ess 1.1")),
             13: hunt("toy/dav.py", ("1 child, ess 0", "1 child, ess 1.1", "3, ess 0", "3, ess 1.1")),
             14: derive, 15: predict}

def answered(entry, wanted):
    """{name of an answer: is it right?}, or what is missing."""
    if not isinstance(entry, dict) or len(str(entry.get("why")).split()) < 4:
        return "answers.json has no entry, or no sentence in its why"
    def right(value, truth, tolerance):
        number = isinstance(truth, float) and isinstance(value, (int, float))
        return abs(value - truth) <= tolerance * max(abs(truth), 0.1) if number else value == truth
    return {name: right(entry.get(name), *truth) for name, truth in wanted.items()}

# ---- tests -----------------------------------------------------------------------------------------------------------
CHEATS = {  # exercise: a block that earns nothing, and the reason that is given
    1: ("import test_exercises", "import"), 2: ("return 0 * x0_hat.sum(-1)", "wrong"), 3: ("torch.randn = 0", "randn"),
    4: ("while True: pass", "no end"), 5: ("raise SystemExit", "SystemExit"), 6: ("def f(): pass", "def"),
    7: ("runpy.run_path('x')", "runpy"), 8: ("(0).__class__", "._"), 9: ("HERE.write_text('')", "HERE"),
    10: ("torch.load('answers')", "load"), 11: ("return x, (y for y in x).gi_frame", "frame")}

@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy as a student gets it."""
    folder = tmp_path_factory.mktemp("course") / "copy"
    exercise.main(["make", str(folder), "--student", "ann", "--key", "k"])
    return folder

def grade(folder, *flags, student="Ann"):
    exercise.main(["grade", str(folder), "--student", student, "--key", "k", "--results", f"{folder}.json", *flags])
    tests = json.loads(pathlib.Path(f"{folder}.json").read_text())["tests"]
    return {int(test["number"]): test["score"] for test in tests}, [test["output"] for test in tests]

def write(path, n, parts):
    path.write_text(exercise.spliced(path.read_text(), n, parts))

def test_the_table_fits_the_scripts():
    assert {e.kind for e in exercise.EXERCISES.values()} == {*exercise.POINTS}
    assert [*CRITERIA, *QUESTIONS] == [*exercise.EXERCISES] == [*range(1, 16)]
    assert all(0 < "".join(exercise.block_of(exercise.ROOT, n)).count("\n") <= 8 for n in exercise.BLOCKS)
    for words in (["check", "none"], ["make", str(exercise.ROOT), "--student", "a"], ["grade", str(exercise.ROOT)]):
        with pytest.raises(SystemExit, match="2"):
            exercise.main(words)

def test_solutions_earn_all_points_and_parts_a_share(copy):
    answers, seed = {}, exercise.seeded(types.SimpleNamespace(student="ann", key="k"))
    for n in exercise.BLOCKS:
        write(copy / exercise.EXERCISES[n].script, n, exercise.block_of(exercise.ROOT, n))
    for n, question in QUESTIONS.items():
        wanted = question(np.random.default_rng(seed(n)))[1].items()
        answers[n] = {name: truth for name, (truth, _) in wanted} | dict(why="a reason in words")
    tables = re.findall(r"^\|.*, ess [01.]+ \|(.*)\|", (copy / "questions.md").read_text(), re.M)
    for n, script in ((12, "toy/das.py"), (13, "toy/dav.py")):  # found by its table alone
        asked = torch.tensor([[float(v) for v in line.split("|")] for line in tables[4 * n - 48 : 4 * n - 44]])
        gaps = {name: ((symptoms(script, changes, 5) - asked)[:, ::2] / asked[:, 1::2]).square().mean()
                for name, changes in bugs(script).items()}
        answers[n]["bug"] = min(gaps, key=gaps.get)
    (copy / "answers.json").write_text(json.dumps(answers))
    scores, outputs = grade(copy)
    assert scores == {n: e.points for n, e in exercise.EXERCISES.items()}, outputs
    assert exercise.changes(copy) == [] and grade(copy, "--only", "14", student="bob")[0] == {14: 0}
    answers[14]["log_c"], answers[15]["why"] = "a word", None
    (copy / "answers.json").write_text(json.dumps(answers))
    write(copy / "toy/msdda.py", 5, [exercise.block_of(exercise.ROOT, 5)[0].replace("sum(-1) / 2", "sum(-1)")])
    assert grade(copy, "--only", "5", "14", "15")[0] == {5: 2, 14: 6, 15: 0}

def test_cheats_earn_nothing_and_are_seen(copy, monkeypatch):
    monkeypatch.setattr(exercise, "LIMIT", 3)
    for n, (part, _) in CHEATS.items():
        write(copy / exercise.EXERCISES[n].script, n, [part + "\n"] * len(exercise.EXERCISES[n].spans))
    (copy / "dna/new.safetensors").touch()
    (copy / "toy/draft.py").write_text("import das\n")
    (copy / "answers.json").write_text(json.dumps(dict(student="bob", score=100)))
    scores, outputs = grade(copy)
    assert not any(scores.values()) and "Traceback" not in str(outputs) and max(map(len, outputs)) < 320
    assert [n for n, (_, reason) in CHEATS.items() if reason not in outputs[n - 1]] == []
    assert [line.split()[0] for line in exercise.changes(copy)] == ["dna/new.safetensors:", "toy/draft.py:"]

def test_gradescope_and_a_copy_as_it_is_made(tmp_path):
    for name, *flags in (("source", "--gradescope"), ("submission", "--student", "a@b.c")):
        exercise.main(["make", str(tmp_path / name), "--key", "k", *flags])
    (tmp_path / "source/run_autograder").rename(tmp_path / "run_autograder")
    (tmp_path / "results").mkdir()
    (tmp_path / "submission_metadata.json").write_text(json.dumps(dict(users=[dict(email="A@b.c")])))
    folder = pathlib.Path(sys.executable).parent  # its python3
    subprocess.run(["bash", tmp_path / "run_autograder"], check=True, env=dict(PATH=f"{folder}:/usr/bin:/bin"))
    record = json.loads((tmp_path / "results/results.json").read_text())
    assert record["score"] == 0 and [test["number"] for test in record["tests"]] == [*map(str, exercise.EXERCISES)]
    assert [n for n in CRITERIA if record["tests"][n - 1]["output"] != f"NotImplementedError: exercise {n}"] == []

if __name__ == "__main__":
    worker(exercise.ROOT)
