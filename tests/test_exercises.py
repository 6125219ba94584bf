"""The exercises: what is asked of every block and answer, and that it can be told apart from nothing.

`test_exercise` grades whatever --src names. The instances depend on the student's number, which answers.json holds.
"""
import importlib
import json
import math
import re
import subprocess
import sys
import types

import conftest
import exercise
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, load
from scipy.integrate import quad
from scipy.special import logsumexp

D = torch.float64


def other(module):
    """Another module of tests; imported late, so that a script that does not even load fails its own exercise only."""
    return importlib.import_module(module)


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=D)


# ---- what a block must do --------------------------------------------------------------------------------------------


def temper_schedule(rng):
    schedule = load("sd/das.py").temper_schedule
    steps, gamma = int(torch.randint(3, 60, (1,), generator=rng)), 0.002 + 0.05 * torch.rand(1, generator=rng).item()
    wanted = [min((1 + gamma) ** (100 * i / steps) - 1, 1) for i in range(steps)] + [1]
    assert (schedule(steps, gamma, "schedule") - torch.tensor(wanted)).abs().max() < 1e-5
    assert (schedule(steps, gamma, "none") == 1).all()


def log_ratio(rng):
    shift, z, mean, sigma = normal(rng, 5, 3, 4), normal(rng, 5, 3, 4), normal(rng, 5, 3, 4), 0.1 + normal(rng, 1).abs()
    x = mean + sigma * (shift + z)
    p, q = (torch.distributions.Normal(m, sigma).log_prob(x).flatten(1).sum(1) for m in (mean, mean + sigma * shift))
    found = load("sd/das.py").log_ratio(shift, z)
    assert found.shape == (5,) and (found - (p - q)).abs().max() < 1e-10


def adapt_temper(rng):
    das = load("dna/das.py")
    log_w, value, temper = normal(rng, 6, 50), 5 * normal(rng, 6, 50), torch.rand(6, generator=rng, dtype=D) * 0.05
    log_w = 0.1 * log_w
    found = das.adapt_temper(log_w, value, temper, 25)
    size = das.effective_sample_size(log_w + found[:, None] * value)
    assert ((found > temper) & (found < 1)).all() and (size - 25).abs().max() < 1e-4
    assert (das.adapt_temper(log_w, 1e-3 * value, temper, 25) == 1).all()


def project_to_simplex(rng):
    project = load("dna/or_composition.py").project_to_simplex
    for m in (2, 3, 7):
        v = 2 * normal(rng, m)
        p = project(v)
        assert (p >= 0).all() and abs(p.sum() - 1) < 1e-12
        assert ((torch.eye(m, dtype=D) - p) @ (v - p)).max() < 1e-10  # no corner lies closer to v


def resample_systematic(rng):
    log_w, count = normal(rng, 1, 40), torch.zeros(40, dtype=D)
    w = log_w.softmax(1)[0]
    for _ in range(4000):
        ancestors = load("dna/msdda.py").resample_systematic(log_w, rng)
        copies = torch.bincount(ancestors[0], minlength=40)
        assert ancestors.shape == (1, 40) and ((copies - 40 * w).abs() < 1 + 1e-9).all()
        count += copies / 4000
    assert ((count - 40 * w).abs() < 5 * (0.25 / 4000) ** 0.5).all()
    two = load("dna/msdda.py").resample_systematic(log_w.expand(200, -1), rng)
    assert len(two.unique(dim=0)) > 1, "every group has a uniform number of its own"


def merge(rng):
    means, variances, w = normal(rng, 3, 4, 2), 0.3 + normal(rng, 3, 1, 2).abs(), torch.tensor([0.5, 0.3], dtype=D)
    mean, variance, log_c = load("sd/msdda.py").merge(list(means[:2]), list(variances[:2]), w, means[2], variances[2])
    exponents = torch.tensor([0.5, 0.3, 0.2], dtype=D)
    x = normal(rng, 4, 2)
    log_p = torch.distributions.Normal(means, variances.expand_as(means).sqrt()).log_prob(x).sum(2)
    merged = torch.distributions.Normal(mean, variance.expand_as(mean).sqrt()).log_prob(x).sum(1)
    assert (merged + log_c - exponents @ log_p).abs().max() < 1e-10


def letters_log_p(rng):
    log_p, x = normal(rng, 6, 9, 4).log_softmax(2), torch.randint(5, (6, 9), generator=rng)
    new = (torch.rand(6, 9, generator=rng) < 0.5) & (x < 4)
    wanted = [sum(log_p[n, k, x[n, k]] for k in range(9) if new[n, k]) for n in range(6)]
    assert (load("dna/das.py").letters_log_p(log_p, x, new) - torch.tensor(wanted, dtype=D)).abs().max() < 1e-10


def tilt_letters(rng):
    das, step, n = load("dna/das.py"), 5, 60_000
    log_p, grad = normal(rng, 1, 6, 4).log_softmax(2), 3 * normal(rng, 1, 6, 4)
    x = torch.tensor([[4, 4, 1, 4, 2, 4]])
    log_q = das.tilt_letters(log_p, x, grad, torch.ones(1, dtype=D), step, math.inf)
    assert (log_q - (log_p + grad).log_softmax(2)).abs().max() < 1e-6
    for cap in (0.1, 0.5):
        log_q = das.tilt_letters(log_p, x, grad, torch.ones(1, dtype=D), step, cap)
        # the tilt found, up to its mean; its variance over what is set in a step, by drawing steps
        tilt = log_q - log_p
        tilt = (tilt - (log_p.exp() * tilt).sum(2, keepdim=True)).expand(n, -1, -1)
        letter = torch.multinomial(log_p[0].exp(), n, replacement=True, generator=rng).T
        new = (torch.rand(n, 6, generator=rng) < 1 / step) & (x == 4)
        total = (tilt.gather(2, letter[:, :, None])[:, :, 0] * new).sum(1)
        assert abs(total.std() / cap - 1) < 0.05


def path_loss(rng):
    dna = other("test_dna_dav")
    x, when, w = dna.small_paths(dna.SMALL_R / dna.ALPHA)
    net = dna.Table(dna.optimal_table(x, when, w))
    dna.mean_path_loss(load("dna/dav.py"), net, None, x, when, w, 0.0).backward()
    assert net.logits.grad.abs().max() < 1e-10
    shifted = dna.Table(dna.optimal_table(x, when, w) + 0.1 * normal(rng, *net.logits.shape))
    dna.mean_path_loss(load("dna/dav.py"), shifted, None, x, when, w, 0.0).backward()
    assert shifted.logits.grad.abs().max() > 1e-4


def policy_loss(rng):
    ours, exact = other("test_dna_baselines").policy_gradients(load("dna/ddpo.py"), 0.7)
    assert exact.abs().max() > 0.01 and (ours - exact).abs().max() < 1e-10
    other("test_dna_baselines").test_clipping_stops_where_it_should()


BLOCKS = {1: temper_schedule, 2: log_ratio, 3: adapt_temper, 4: project_to_simplex, 6: resample_systematic, 7: merge,
          11: letters_log_p, 12: tilt_letters, 13: path_loss, 14: policy_loss}


def carried_over(number):
    """A block that several scripts share is the same in all of them."""
    texts = [m[0] for script in exercise.places()[number]
             for m in exercise.BLOCK.finditer((conftest.SOURCE / script).read_text()) if int(m[2]) == number]
    assert len(texts) == len(exercise.places()[number]) and len(set(texts)) == 1, "carry the block over to every script"


# ---- questions -------------------------------------------------------------------------------------------------------


def graded(number, entry, truth):
    """Is this entry of answers.json right?"""
    if entry["answer"] is None:
        raise NotImplementedError(f"exercise {number}: there is no answer in answers.json")
    if isinstance(truth, list):
        assert str(entry["answer"]).strip() in truth, "this line is not wrong"
        return
    assert entry.get("prediction", 0.0) is not None, "there is no prediction"
    assert math.isclose(float(entry["answer"]), truth, rel_tol=0.01, abs_tol=1e-3), "wrong"


def numbers_in(text):
    return [float(v) for v in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text)]


def solution(number, student):
    """The answers that we would give, from the text of the question: closed forms, where exercise.py adds up or solves."""
    text, truth = exercise.question(number, student)
    if isinstance(truth, list):
        return truth[0]
    found = numbers_in(text)
    if number == 18:
        w, means, variances, (slope, kl_weight) = found[0:4:3], found[1:5:3], found[2:6:3], found[6:8]
        b = slope / kl_weight
        return logsumexp([b * m + b**2 * v / 2 for m, v in zip(means, variances)], b=w)
    if number == 19:  # KL of N(m, s) from N(0, 1) and from N(gap, var), at the precisions added up
        gap, var = found[2:4]

        def excess(w):
            s = 1 / (w + (1 - w) / var)
            m = s * (1 - w) * gap / var
            return (s + m**2 - math.log(s)) - ((s + (m - gap) ** 2) / var - math.log(s / var))

        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
        return low
    if number == 20:  # Blahut and Arimoto
        laws, weights = np.array(found[:6]).reshape(2, 3), np.ones(2) / 2
        for _ in range(20_000):
            weights = weights * np.exp((laws * np.log(laws / (weights @ laws))).sum(1))
            weights /= weights.sum()
        return weights[0]
    if number == 21:
        share, steps = found
        return 2 * share * (1 - share) / steps
    kl_weight = found[0]  # the tilt of each of nine Gaussians, axis by axis
    line, var, curvature = np.array([-4.0, 0, 4]), 0.3, np.array([0.01, 1.0])
    reward = 0
    for c in curvature:
        grow = 1 + 2 * c * var / kl_weight
        w = np.exp(-c * line**2 / (kl_weight * grow))
        reward -= c * (var / grow + (w / w.sum()) @ (line / grow) ** 2)
    return reward


# ---- grading ---------------------------------------------------------------------------------------------------------


def answers_of(source):
    """answers.json of a copy; without one the repository has our own answers, and a copy has none."""
    if (source / "answers.json").exists():
        return json.loads((source / "answers.json").read_text())
    ours = {str(n): dict(answer=solution(n, 0)) for n in exercise.QUESTIONS} if source == REPOSITORY else {}
    return dict(student=0, **ours)


@pytest.mark.parametrize("number", [*BLOCKS, *exercise.QUESTIONS])
def test_exercise(number):
    answers = answers_of(conftest.SOURCE)
    student = answers["student"]
    if number in BLOCKS:
        BLOCKS[number](torch.Generator().manual_seed(student))
        carried_over(number)
        return
    graded(number, answers.get(str(number), dict(answer=None)), exercise.question(number, student)[1])


def test_a_copy_without_answers_has_none(tmp_path):
    for number in exercise.QUESTIONS:
        with pytest.raises(NotImplementedError):
            graded(number, answers_of(tmp_path).get(str(number), dict(answer=None)), 0.0)


def test_exercises_are_those_of_the_scripts():
    """At most 15 lines, one idea; the same wherever a block stands twice."""
    assert [*exercise.places()] == [*BLOCKS] and not set(BLOCKS) & set(exercise.QUESTIONS)
    assert {kind for kind, _ in exercise.kinds().values()} == set(exercise.POINTS)
    for script in exercise.scripts():
        for m in exercise.BLOCK.finditer((REPOSITORY / script).read_text()):
            assert m[0].count("\n") <= 17, m[0]
    for number in exercise.places():
        carried_over(number)


@pytest.mark.parametrize("student", [1, 2, 3])
@pytest.mark.parametrize("number", exercise.QUESTIONS)
def test_questions_have_the_answers_we_derive(number, student):
    truth = exercise.question(number, student)[1]
    graded(number, dict(answer=solution(number, student)), truth)
    assert exercise.question(number, student + 1)[1] != truth
    wrong = "x = 0" if isinstance(truth, list) else truth * 1.1 + 0.01
    with pytest.raises(AssertionError):
        graded(number, dict(answer=wrong), truth)


def test_every_bug_can_be_planted():
    for number, (script, _) in enumerate(exercise.bugs()):
        assert exercise.with_bug(number)[1] != (REPOSITORY / script).read_text()


def grade(src, tmp_path):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests", "--src", src, "--grades", tmp_path / "grades.json"],
                          cwd=REPOSITORY, capture_output=True, text=True)
    return done, json.loads((tmp_path / "grades.json").read_text())


def test_emptied_copy_fails_each_exercise_by_itself(tmp_path):
    exercise.make(tmp_path / "copy", 7, None)
    assert exercise.changes(tmp_path / "copy") == []
    done, grades = grade(tmp_path / "copy", tmp_path)
    assert grades["score"] == 0 and len(grades["tests"]) == len(exercise.kinds()) and "0 of " in done.stdout
    for test in grades["tests"]:
        number = test["name"].split()[0]
        assert test["output"].startswith(f"NotImplementedError: exercise {number}:"), test


def test_a_solved_block_earns_its_points_and_a_change_elsewhere_is_listed(tmp_path):
    exercise.make(tmp_path / "copy", 7, None)
    for name in ("msdda.py", "ddpo.py"):
        script = tmp_path / "copy" / "dna" / name
        script.write_text((REPOSITORY / "dna" / name).read_text())
    assert exercise.changes(tmp_path / "copy") == []
    answers = json.loads((tmp_path / "copy" / "answers.json").read_text())
    answers["21"]["answer"] = solution(21, 7)
    (tmp_path / "copy" / "answers.json").write_text(json.dumps(answers))
    _, grades = grade(tmp_path / "copy", tmp_path)
    earned = {test["name"].split()[0] for test in grades["tests"] if test["score"]}
    assert earned == {"14", "21"}
    assert "carry the block over" in next(test["output"] for test in grades["tests"] if test["name"].startswith("6 "))
    script.write_text(script.read_text().replace("def kl_of_letters(", "def kl_of_letter("))
    assert any("def kl_of_letter(" in line for line in exercise.changes(tmp_path / "copy"))


def test_a_copy_with_a_bug_is_complete(tmp_path):
    exercise.make(tmp_path / "copy", 0, 4)
    script, text, lines = exercise.with_bug(4)
    assert (tmp_path / "copy" / script).read_text() == text and len(lines) == 1
    assert len([line for line in exercise.changes(tmp_path / "copy") if line[len(script) + 2] in "+-"]) == 2


@pytest.mark.parametrize("words", [["make", "{full}"], ["make", "{new}", "--bug", "999"], ["check", "{new}"]])
def test_bad_input_ends_in_one_sentence(words, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        exercise.main([word.format(full=tmp_path, new=tmp_path / "new") for word in words])
    text = capsys.readouterr().err.strip()
    assert end.value.code == 2 and len(text) > 15 and "\n" not in text
