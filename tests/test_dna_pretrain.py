"""dna/prepare_data.py and dna/pretrain.py: the data, exact denoisers of enumerated laws, the bound, the sampler, measures.

The sampler is tested on a law of 4^4 sequences, whose distribution after any number of steps follows from the kernel
matrices of the 5^4 masked states. z-scores are of means over independent samples; |z| > 5 is a bug.
"""
import csv
import gzip
import hashlib
import itertools
import json
import math
import pathlib
import zipfile

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, load, planted

pretrain, prepare = load("dna/pretrain.py"), load("dna/prepare_data.py")
MASK, LENGTH = pretrain.MASK, 4


def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_one_sentence(end, capsys):
    text = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(text) == 1 and len(text[0]) > 15, text


# ---- the data --------------------------------------------------------------------------------------------------------


def test_splice_sites_are_those_of_the_package():
    arrays = pretrain.read_arrays("mpsa.npz")
    codes, measured = pretrain.unpack(arrays["sequences"], 9), ~np.isnan(arrays["psi"])
    assert codes.shape == (31587, 9) and len(np.unique(codes, axis=0)) == 31587
    assert (codes[:, 3] == 2).all() and set(codes[:, 4]) == {1, 3}  # NNNGYNNNN
    assert measured.sum(0).tolist() == [30483, 30697] and measured.all(1).sum() == 29593
    assert ((arrays["reads"] > 0) == measured).all()
    text = {"".join("ACGT"[c] for c in row): tuple(psi) for row, psi in zip(codes, arrays["psi"].tolist())}
    assert text["GGAGTGATG"][0] == pytest.approx(0.023406441604553064)  # the first line of each table
    assert text["ACAGTTCAT"][1] == pytest.approx(-0.5691221345810374)
    assert np.corrcoef(arrays["psi"][measured.all(1)].T)[0, 1] == pytest.approx(0.795, abs=5e-4)


def test_elements_are_those_of_the_package():
    arrays, data = pretrain.read_arrays("dhs.npz"), pretrain.read_elements(None, "cpu")
    assert data.codes.shape == (47872, 200) and len(np.unique(arrays["sequences"], axis=0)) == 47872
    assert data.targets.sum(0).tolist() == [11968.0] * 4 and data.names == ["gm12878", "hepg2", "k562", "hesc"]
    first = "".join("ACGT"[c] for c in data.codes[0])
    assert first.startswith("TCTATTTGTCAGGGTTTTCTTAGCATTAGTG") and data.chrom[0] == 14
    parts = pretrain.chromosome_split(data.chrom)
    assert {k: int(v.sum()) for k, v in parts.items()} == dict(test=4565, validation=4053, training=39254,
                                                              oracle_a=18582, oracle_b=20672)
    assert not (parts["oracle_a"] & parts["oracle_b"]).any() and not (parts["training"] & (data.chrom <= 2)).any()
    content = b"".join(arrays[key].tobytes() for key in ("sequences", "cell", "others", "chrom"))
    assert hashlib.sha256(content).hexdigest() == "ebf2ad4bf2c267e3057c67636c0ba38c756944e8622bde358b6328a7f2d3b660"


def test_files_are_small():
    folder = REPOSITORY / "dna"
    assert sum(path.stat().st_size for path in folder.glob("*.npz")) < 4e6
    assert sum(path.stat().st_size for path in (folder / "checkpoints").glob("*")) < 10e6


@pytest.mark.parametrize("length", [1, 4, 9, 200])
def test_codes_round_trip(length):
    codes = np.random.default_rng(0).integers(0, 4, (50, length)).astype(np.uint8)
    text = ["".join("ACGT"[c] for c in row) for row in codes]
    assert (prepare.encode(text, length) == codes).all()
    assert (pretrain.unpack(prepare.pack(codes), length) == codes).all()


def wheel(path, tables):
    with zipfile.ZipFile(path, "w") as file:
        for member, text in tables.items():
            file.writestr(member, gzip.compress(text.encode()) if member.endswith("gz") else text)
    return path


def test_tables_are_read_and_put_side_by_side(tmp_path):
    first = "set,tot_ct,ex_ct,y,x\ntraining,28,2,0.5,GGAGUGAUG\ntest,7,1,-1,AAAGCAAAA\n"
    second = "set,tot_ct,ex_ct,y,x\ntest,9,1,0.25,AAAGCAAAA\n"
    arrays = prepare.splice_sites(wheel(tmp_path / "a.whl", dict(zip(prepare.REPLICATES, (first, second)))))
    assert pretrain.unpack(arrays["sequences"], 9).tolist() == [[0, 0, 0, 2, 1, 0, 0, 0, 0], [2, 2, 0, 2, 3, 2, 0, 3, 2]]
    assert arrays["reads"].tolist() == [[7, 9], [28, 0]]
    assert arrays["psi"][0].tolist() == [-1, 0.25] and arrays["psi"][1, 0] == 0.5 and np.isnan(arrays["psi"][1, 1])
    columns = ["sequence", "TAG", "other_samples_with_this_peak_not_considering_reps", "chr"]
    lines = ["\t".join(columns), "\t".join(["C" * 200, prepare.CELLS["K562"], "3", "chrX"])]
    arrays = prepare.accessible_elements(wheel(tmp_path / "b.whl", {prepare.ELEMENTS: "\n".join(lines)}))
    assert arrays["cell"].tolist() == [2] and arrays["chrom"].tolist() == [23] and arrays["others"].tolist() == [3]
    assert (pretrain.unpack(arrays["sequences"], 200) == 1).all()


def test_other_wheels_are_refused(tmp_path, capsys):
    for name, _ in prepare.WHEELS.values():
        wheel(tmp_path / name, {"a": "b"})
    with pytest.raises(SystemExit) as end:
        prepare.main(prepare.parse_args(["--wheels", str(tmp_path), "--out", str(tmp_path / "out")]))
    assert_one_sentence(end, capsys)
    assert not (tmp_path / "out").exists()


# ---- an enumerated law -----------------------------------------------------------------------------------------------


def small_law():
    """A law of 4^4 sequences with strong dependence between neighbours."""
    x = pretrain.all_sequences(LENGTH)
    table = 1.5 * torch.randn(LENGTH - 1, 4, 4, generator=generator(0), dtype=torch.float64)
    score = sum(table[k][x[:, k], x[:, k + 1]] for k in range(LENGTH - 1))
    return score.softmax(0)


P = small_law()
X = pretrain.all_sequences(LENGTH)
ENTROPY = -(P * P.log()).sum().item()
STATES = torch.cartesian_prod(*[torch.arange(5)] * LENGTH)  # (5^4, 4), MASK = 4


def brute_force_denoiser(z):
    """One state z (4,) -> (4, 4): sums over the sequences that agree with it."""
    agree = ((X == z) | (z == MASK)).all(1)
    return torch.stack([torch.stack([P[agree & (X[:, k] == v)].sum() for v in range(4)]) for k in range(LENGTH)]) / P[agree].sum()


def test_exact_denoiser_is_the_conditional_law():
    log_p = pretrain.ExactDenoiser(P)(STATES)
    for state, ours in zip(STATES[::7], log_p[::7]):
        hidden = state == MASK
        assert (ours[hidden].exp() - brute_force_denoiser(state)[hidden]).abs().max() < 1e-12 if hidden.any() else True


@pytest.mark.parametrize("order", list(itertools.permutations(range(LENGTH)))[::5])
def test_one_letter_a_step_reproduces_the_law(order):
    """Any order of unmasking: the product of the exact conditionals is the law."""
    denoiser, z, log_law = pretrain.ExactDenoiser(P), torch.full_like(X, MASK), torch.zeros(len(X), dtype=torch.float64)
    for k in order:
        log_law += denoiser(z)[:, k].gather(1, X[:, k : k + 1])[:, 0]
        z[:, k] = X[:, k]
    assert (log_law.exp() - P).abs().max() < 1e-12


def every_bound(module):
    """The mean of hidden_loss over the law, all counts and all places to hide: what masked_bound estimates."""
    denoiser, total = pretrain.ExactDenoiser(P), 0.0
    for count in range(1, LENGTH + 1):
        places = list(itertools.combinations(range(LENGTH), count))
        for place in places:
            hidden = torch.zeros_like(X, dtype=torch.bool)
            hidden[:, place] = True
            z = torch.where(hidden, MASK, X)
            total += (P @ module.hidden_loss(denoiser(z), X, hidden)).item() / LENGTH / len(places)
    return total


def test_bound_of_the_exact_denoiser_is_the_entropy():
    assert abs(every_bound(pretrain) - ENTROPY) < 1e-10


def test_counts_carry_the_weight_of_the_continuous_time_bound():
    """The integral over t of Binomial(k; L, t) / t is 1 / k, so L / k at uniform k is 1 / t at uniform t."""
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for k in range(1, 10):
        binomial = math.comb(9, k) * t**k * (1 - t) ** (9 - k)
        assert abs((binomial / t).mean() - 1 / k) < 1e-8


WEIGHT = "x.shape[1] * (nll * hidden).sum(1) / hidden.sum(1)"
WRONG_WEIGHTS = {
    "no weight": "(nll * hidden).sum(1)",
    "inverted weight": "(nll * hidden).sum(1) * hidden.sum(1) / x.shape[1]",
    "weight of the tokens that are left": "(nll * hidden).sum(1) * x.shape[1] / (x.shape[1] + 1 - hidden.sum(1))",
    "mean over all tokens": "(nll * hidden).mean(1)",
}


@pytest.mark.parametrize("bug", WRONG_WEIGHTS)
def test_wrong_weight_of_the_bound_is_caught(bug):
    wrong = every_bound(planted("dna/pretrain.py", (WEIGHT, WRONG_WEIGHTS[bug])))
    assert not abs(wrong - ENTROPY) < 0.1


def bound_z(module, seed=1, n=4000):
    x = X[torch.multinomial(P, n, replacement=True, generator=generator(seed))]
    values = module.masked_bound(pretrain.ExactDenoiser(P), x, LENGTH, generator(seed + 1)).mean(1)
    mean, se = pretrain.mean_and_se(values)
    return (mean - ENTROPY) / se


def test_estimate_of_the_bound_is_unbiased():
    assert abs(bound_z(pretrain)) <= 5


HIDE_BUGS = {
    "the first letters are hidden": ("torch.rand(x.shape, generator=rng, device=x.device).argsort(1).argsort(1)",
                                     "torch.arange(x.shape[1], device=x.device).expand(x.shape)"),
    "never all of them": ("count = 1 + (share * x.shape[1]).long()", "count = 1 + (share * (x.shape[1] - 1)).long()"),
}


@pytest.mark.parametrize("bug", HIDE_BUGS)
def test_wrong_hiding_is_caught(bug):
    """Hiding the first letters keeps the mean of an exact denoiser, so it is seen in what is hidden, not in the bound."""
    module, share = planted("dna/pretrain.py", HIDE_BUGS[bug]), torch.rand(8000, generator=generator(3))
    shares = []
    for m in (pretrain, module):
        z, hidden = m.hide(X[:1].expand(8000, -1), share, generator(4))
        assert ((z == MASK) == hidden).all()
        shares.append(hidden.double().mean(0))
    assert (shares[0] - (LENGTH + 1) / 2 / LENGTH).abs().max() < 0.03
    assert (shares[1] - (LENGTH + 1) / 2 / LENGTH).abs().max() > 0.1


# ---- the sampler -----------------------------------------------------------------------------------------------------


def sampler_law(steps):
    """The law (4^4,) of the reverse process with the exact denoiser, by kernel matrices over all masked states."""
    d = pretrain.ExactDenoiser(P)(STATES).exp()  # (S, 4, 4)
    masked, letter = STATES == MASK, STATES.clamp(max=3)
    weight = torch.ones(len(STATES), len(STATES), dtype=torch.float64)
    for k in range(LENGTH):
        new = d[:, k][:, letter[:, k]]  # (S, S'): probability of the letter that S' has there
        same = (STATES[:, None, k] == STATES[None, :, k]).double()
        weight *= torch.where(masked[:, None, k] & ~masked[None, :, k], new, same)
    left = masked.sum(1)[None].double()
    newly = masked.sum(1)[:, None] - left
    law = torch.zeros(len(STATES), dtype=torch.float64)
    law[-1] = 1  # all masked
    for step in range(steps, 0, -1):
        law = law @ (weight * (newly >= 0) * (1 / step) ** newly.clamp(min=0) * (1 - 1 / step) ** left)
    done = ~masked.any(1)
    assert abs(law[done].sum() - 1) < 1e-12
    return law[done]  # in the order of X


def test_few_steps_cost_a_bias_that_falls_as_one_over_steps():
    distance = [0.5 * (sampler_law(steps) - P).abs().sum().item() for steps in (1, 4, 16, 64, 256)]
    marginals = torch.stack([torch.stack([P[X[:, k] == v].sum() for v in range(4)]) for k in range(LENGTH)])
    product = torch.stack([marginals[k][X[:, k]] for k in range(LENGTH)]).prod(0)
    assert (sampler_law(1) - product).abs().max() < 1e-12
    assert distance[0] > 0.2 and distance[-1] < 0.005
    assert 3.5 < distance[2] / distance[3] < 4.5 and 3.5 < distance[3] / distance[4] < 4.5


def sampler_z(module, steps, n=20_000):
    """z-scores of means of functions of the samples under the exact law of this many steps."""
    x, _ = module.sample_masked(pretrain.ExactDenoiser(P), n, LENGTH, steps, generator(5))
    law = sampler_law(steps)
    functions = [P.log(), (P == P.max()).double(), *[(X[:, k] == v).double() for k, v in ((0, 0), (1, 3), (3, 2))],
                 ((X[:, 0] == X[:, 1]) & (X[:, 2] == X[:, 3])).double()]
    index = (x * 4 ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    if x.max() == MASK:
        return [math.inf]
    z = []
    for f in functions:
        mean = law @ f
        z.append(((f[index].mean() - mean) / ((law @ f**2 - mean**2) / n).sqrt()).item())
    return z


@pytest.mark.parametrize("steps", [1, 3, 12])
def test_samples_have_the_law_of_the_reverse_process(steps):
    assert max(map(abs, sampler_z(pretrain, steps))) <= 5


SAMPLER_BUGS = {
    "letters by argmax": ("x[new] = invert_cdf(log_p[new].double().exp(), u)[:, 0]", "x[new] = log_p[new].argmax(1)"),
    "the denoiser is not called again": ("due = (new.any(1) & (x == MASK).any(1)).nonzero()[:, 0]",
                                         "due = new.new_zeros(0)"),
    "unmasked too late": ("u < 1 / step", "u < 1 / (step + 1)"),
    "unmasked too early": ("u < 1 / step", "u < min(1, 6 / step)"),
    "logits taken for probabilities": ("log_p[new].double().exp()", "(log_p[new].double() - log_p[new].min() + 1)"),
    "rows mixed up": ("log_p.index_copy(0, due, predict", "log_p.index_copy(0, due.flip(0), predict"),
}


@pytest.mark.parametrize("bug", SAMPLER_BUGS)
def test_planted_bug_of_the_sampler_is_caught(bug):
    assert max(map(abs, sampler_z(planted("dna/pretrain.py", SAMPLER_BUGS[bug]), 12))) > 5


def test_calls_are_skipped_and_nothing_else_changes():
    always = planted("dna/pretrain.py", ("due = (new.any(1) & (x == MASK).any(1)).nonzero()[:, 0]",
                                         "due = torch.arange(len(x))"))
    (x, calls), (y, all_calls) = (m.sample_masked(pretrain.ExactDenoiser(P), 500, LENGTH, 64, generator(6))
                                  for m in (pretrain, always))
    assert (x == y).all() and all_calls == 1 + 500 * 64
    assert 1 < calls <= 1 + 500 * (LENGTH - 1)


# ---- the splice-site world -------------------------------------------------------------------------------------------


def test_splice_law():
    law = pretrain.splice_law("cpu")
    x = pretrain.all_sequences(9)
    assayed = (x[:, 3] == 2) & ((x[:, 4] == 1) | (x[:, 4] == 3))
    assert assayed.sum() == 32768 and abs(law.p.sum() - 1) < 1e-12 and law.p.min() > 0
    assert abs(law.p[assayed].sum() - (0.99 + 0.01 / 8)) < 1e-12
    assert law.measured.sum(1).tolist() == [30483, 30697] and not law.measured[:, ~assayed].any()
    for reward, measured in zip(law.rewards, law.measured):
        assert reward.isfinite().all() and (reward[~assayed] == reward[measured].min()).all()
        fitted = reward[assayed & ~measured]
        assert reward[measured].min() <= fitted.min() < fitted.max() <= reward[measured].max() and fitted.std() > 0.1


def test_table_reward_is_the_mean_over_independent_letters():
    value = torch.randn(4**3, generator=generator(0), dtype=torch.float64)
    reward, x = pretrain.TableReward(value), pretrain.all_sequences(3)
    assert (reward(x) == value).all()
    assert (reward(torch.nn.functional.one_hot(x, 4).double()) - value).abs().max() < 1e-12
    p = torch.rand(5, 3, 4, generator=generator(1), dtype=torch.float64).softmax(2).requires_grad_()
    brute = torch.stack([sum(value[n] * p[i, 0, a] * p[i, 1, b] * p[i, 2, c] for n, (a, b, c) in enumerate(x.tolist()))
                         for i in range(5)])
    assert (reward(p) - brute).abs().max() < 1e-12
    ours, theirs = (torch.autograd.grad(v.sum(), p)[0] for v in (reward(p), brute))
    assert (ours - theirs).abs().max() < 1e-12


# ---- measures --------------------------------------------------------------------------------------------------------


def edit_distance(a, b):
    line = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new = [i]
        for j, y in enumerate(b, 1):
            new.append(min(line[j - 1] + (x != y), line[j] + 1, new[-1] + 1))
        line = new
    return line[-1]


@pytest.mark.parametrize("lengths", [(1, 1), (9, 9), (20, 13), (5, 30), (40, 40)])
def test_levenshtein(lengths):
    x, y = (torch.randint(4, (70, n), generator=generator(n)) for n in lengths)
    y[:20, : min(lengths)] = x[:20, : min(lengths)]
    assert pretrain.levenshtein(x, y).tolist() == [edit_distance(a, b) for a, b in zip(x.tolist(), y.tolist())]
    pairs = [edit_distance(a, b) for a, b in itertools.combinations(x.tolist(), 2)]
    assert pretrain.diversity(x) == pytest.approx(np.mean(pairs))


def test_words_are_counted():
    x = torch.tensor([[0, 1, 2, 3, 0], [0, 1, 2, 2, 2]])
    counts = pretrain.kmer_counts(x, 3)
    words = ["".join(map(str, row[i : i + 3])) for row in x.tolist() for i in range(3)]
    assert {int(w, 4): words.count(w) for w in words} == {k: int(c) for k, c in enumerate(counts) if c}
    assert pretrain.kmer_correlation(x, x) == pytest.approx(1)


def test_markov_chains_are_normalised_and_learn_their_order():
    x = torch.randint(4, (300, 12), generator=generator(0))
    x[:, 2::3] = (x[:, 0::3] + x[:, 1::3]) % 4
    every = pretrain.all_sequences(5)
    bounds = []
    for order in range(4):
        chain = pretrain.MarkovChain(x, order)
        assert abs((-chain.bound(every)).exp().sum() - 1) < 1e-10
        bounds.append(chain.bound(x).mean().item())
    assert bounds[0] - bounds[2] > 1 > bounds[0] - bounds[1]
    chain = pretrain.MarkovChain(x, 2)
    mean, se = pretrain.mean_and_se(chain.bound(chain.sample(4000, 5, generator(1))))
    exact = chain.bound(every)
    assert abs(mean - (exact * (-exact).exp()).sum()) < 5 * se


@pytest.mark.parametrize("name", ["GATA1", "FOXA2", "HNF4A"])
def test_motif_threshold_is_a_probability_of_words(name):
    odds, threshold = pretrain.motif_scores(name)
    words = pretrain.all_sequences(odds.shape[1])
    score = sum(odds[words[:, k], k] for k in range(odds.shape[1]))
    assert (score >= threshold).double().mean() <= 2e-4 < (score >= threshold - 1).double().mean()


def test_motifs_are_found_on_both_strands():
    x = torch.randint(4, (400, 200), generator=generator(0))
    assert all(0.03 < hit.double().mean() < 0.13 for hit in pretrain.motif_hits(x).values())
    for name in pretrain.MOTIFS:
        word = pretrain.motif_scores(name)[0].argmax(0)
        for planted_word in (word, 3 - word.flip(0)):
            y = x.clone()
            y[:, 50 : 50 + len(word)] = planted_word
            assert pretrain.motif_hits(y)[name].all()


def test_auc_counts_pairs():
    score, positive = torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0, 3.0]), torch.tensor([0, 0, 1, 1, 0, 1]).bool()
    wins = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert pretrain.auc(score, positive) == pytest.approx(np.mean(wins))


def test_median_and_its_standard_error():
    medians, errors = zip(*(pretrain.median_and_se(torch.randn(400, generator=generator(k))) for k in range(300)))
    assert 0.8 < np.std(medians) / np.mean(errors) < 1.25


# ---- networks and their training -------------------------------------------------------------------------------------


def tiny(seed=0):
    return pretrain.MaskedDenoiser(8, 9, [1, 4], generator(seed))


def test_denoiser_interface():
    net, z = tiny(), torch.randint(5, (6, 30), generator=generator(1))
    log_p = net(z)
    assert log_p.shape == (6, 30, 4) and (log_p.exp().sum(2) - 1).abs().max() < 1e-5  # the mask has no output
    assert (net(torch.nn.functional.one_hot(z, 5).float()) - log_p).abs().max() < 1e-5
    assert (pretrain.predict(net, z, 4) - log_p).abs().max() < 1e-5
    oracle = pretrain.Oracle(["hepg2", "k562", "hesc"], "classes", 8, generator(2)).eval()
    x = torch.randint(4, (6, 30), generator=generator(3))
    p = torch.nn.functional.one_hot(x, 4).float().requires_grad_()
    assert (oracle(p) - oracle(x)).abs().max() < 1e-5
    share = oracle(x).softmax(1)[:, 0]
    assert (oracle.score(x, "hepg2") - (share / (1 - share)).log()).abs().max() < 1e-4
    assert torch.autograd.grad(oracle.score(p, "hepg2").sum(), p)[0].abs().max() > 0


def fit(folder, steps=250, resume=False, interrupt=None, lr=3e-3, **settings):
    """A tiny training run, interrupted before the batch `interrupt`."""
    rng, calls = generator(7), 0
    net = pretrain.MaskedDenoiser(4, 3, [1], rng)
    letters = X[torch.multinomial(P, 500, replacement=True, generator=generator(8))]

    def draw(n):
        nonlocal calls
        calls += 1
        if interrupt is not None and calls > interrupt:
            raise KeyboardInterrupt
        return letters[torch.randint(len(letters), (n,), generator=rng)]

    loss = pretrain.denoiser_batches(draw, 16, rng)
    return pretrain.fit_network(net, loss, steps, lr, False, rng, folder / "net.safetensors", settings, resume)


def trained(path):
    """Settings and weights of a network; the order of a safetensors file's header changes from file to file."""
    net, settings = pretrain.load_network(path, "cpu")
    return settings.encode() + b"".join(v.numpy().tobytes() for v in net.state_dict().values())


def test_resumed_training_gives_the_same_weights(tmp_path, capsys):
    fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", interrupt=130)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["net.part.pt"]
    fit(tmp_path / "parts", resume=True)
    files = [tmp_path / name / "net.safetensors" for name in ("whole", "parts")]
    assert trained(files[0]) == trained(files[1])
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["net.safetensors"]
    before = files[1].stat().st_mtime_ns
    fit(tmp_path / "parts", resume=True)  # finished: loaded
    assert files[1].stat().st_mtime_ns == before
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(tmp_path / "parts", resume=True, other="settings")
    assert_one_sentence(end, capsys)


def test_a_run_may_be_made_shorter(tmp_path):
    """The learning rate is constant until the last quarter, so the first 100 steps of 1000 and of 200 are the same."""
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", steps=1000, interrupt=110)
    fit(tmp_path / "cut", steps=200, resume=True)
    fit(tmp_path / "whole", steps=200)
    assert len({trained(tmp_path / name / "net.safetensors") for name in ("cut", "whole")}) == 1


def test_training_lowers_the_bound(tmp_path):
    net = fit(tmp_path, steps=600)
    x = X[torch.multinomial(P, 4000, replacement=True, generator=generator(9))]
    bounds = [pretrain.masked_bound(n, x, LENGTH, generator(10)).mean().item() for n in
              (pretrain.ExactDenoiser(P), net, pretrain.MaskedDenoiser(4, 3, [1], generator(7)))]
    assert bounds[0] - 0.1 < bounds[1] < bounds[2] - 0.3


def test_divergence_ends_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, steps=100, lr=1e30)
    text = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and "lower --lr" in text[-1] and not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("content", ["missing", "text", "other tensors", "other metadata", "cut short"])
def test_bad_network_files(content, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    if content != "missing":
        pretrain.save_network(path, tiny(), "{}")
    if content == "text":
        path.write_text("no network at all")
    elif content == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "other tensors":
        pretrain.safetensors.torch.save_file({"a": torch.zeros(2)}, path, dict(kind="Oracle", settings="",
                                             architecture=json.dumps(dict(names=["a"], kind="open", width=3))))
    elif content == "other metadata":
        pretrain.safetensors.torch.save_file({"a": torch.zeros(2)}, path, dict(kind="Transformer"))
    with pytest.raises(SystemExit) as end:
        pretrain.load_network(path, "cpu")
    assert_one_sentence(end, capsys)


# ---- the script ------------------------------------------------------------------------------------------------------


def write_table(path, length=40, rows=600, columns=("seq", "hepg2", "k562", "sknsh", "chrom")):
    """A table in the format of the DRAKES release, whose activity in HepG2 is the number of GATA."""
    rng = np.random.default_rng(0)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        for k in range(rows):
            seq = "".join(rng.choice(list("ACGT"), length))
            table.writerow(dict(seq=seq, hepg2=seq.count("GATA") + rng.normal() / 10, k562=rng.normal(), sknsh=0.5,
                                chrom=f"chr{[*range(1, 23), 'X'][k % 23]}"))
    return path


def test_table_of_the_papers_format(tmp_path, capsys):
    path = write_table(tmp_path / "dataset.csv.gz")
    out = tmp_path / "out"
    numbers = pretrain.main(pretrain.parse_args(["--data", str(path), "--quick", "--out", str(out)]))
    assert all(math.isfinite(v) for v in numbers.values())
    assert 1.3 < numbers["base.data.bound_chr2"] < 1.6 and numbers["markov0.data.bound_chr2"] == pytest.approx(1.386, abs=0.01)
    assert {p.name for p in (out / "dna_pretrain").iterdir()} == {
        "data_base.safetensors", "data_oracle_a.safetensors", "data_oracle_b.safetensors", "figure.png", "numbers.json"}
    world = pretrain.dna_world("data", path, out / "dna_pretrain", "cpu")
    assert world.length == 40 and world.reward(world.elements.codes[:5].long()).shape == (5,)
    assert world.accessible is None and world.elements.kind == "activity"
    assert world.elements.active.double().mean() == pytest.approx(0.1, abs=0.01)


def bad_table(path, content):
    write_table(path)
    lines = path.read_text().splitlines()
    if content == "letters":
        lines[5] = "N" + lines[5][1:]
    elif content == "length":
        lines[5] = lines[5][2:]
    elif content == "columns":
        lines[0] = lines[0].replace("k562", "other")
    elif content == "no rows":
        lines = lines[:1]
    elif content == "empty":
        lines = []
    elif content == "number":
        lines[5] = lines[5].replace("0.5", "high")
    elif content == "not finite":
        lines[5] = lines[5].replace("0.5", "nan")
    elif content == "chromosome":
        lines[5] = lines[5].rsplit("chr", 1)[0] + "chrQ"
    elif content == "half a row":
        lines[5] = lines[5].rsplit(",", 1)[0]
    elif content == "no validation":
        lines = [line for line in lines if not line.endswith("chr2")]
    path.write_bytes(b"\xff\xfe\x00" if content == "binary" else "\n".join(lines).encode())


@pytest.mark.parametrize("content", ["letters", "length", "columns", "no rows", "empty", "number", "not finite", "chromosome",
                                     "half a row", "no validation", "binary", "missing"])
def test_bad_tables_end_in_one_sentence(content, tmp_path, capsys):
    path = tmp_path / "dataset.csv"
    if content != "missing":
        bad_table(path, content)
    with pytest.raises(SystemExit) as end:
        pretrain.read_elements(path, "cpu")
    assert_one_sentence(end, capsys)


@pytest.mark.parametrize("flags", ["--steps 0", "--world mpas", "--layers 5", "--device cuda:99", "--quick --paper",
                                   "--lr -1", "--data x.csv --world mpsa", "--resume --checkpoints README.md"])
def test_bad_flags_end_in_one_sentence(flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        pretrain.main(pretrain.parse_args([*flags.split(), "--out", str(tmp_path / "out")]))
    assert_one_sentence(end, capsys)


def test_world_without_checkpoints(tmp_path, capsys):
    for name in ("hepg2", "mpsa"):
        with pytest.raises(SystemExit) as end:
            pretrain.dna_world(name, None, tmp_path, "cpu")
        assert_one_sentence(end, capsys)


def test_quick_run_of_the_enumerated_world(tmp_path):
    runs = [pretrain.main(pretrain.parse_args(["--world", "mpsa", "--quick", "--out", str(tmp_path / name)])) for name in "ab"]
    assert runs[0] == runs[1]
    assert (tmp_path / "a/dna_pretrain/figure.png").read_bytes() == (tmp_path / "b/dna_pretrain/figure.png").read_bytes()
    rows = {r["name"]: r for r in json.loads((tmp_path / "a/dna_pretrain/numbers.json").read_text())["rows"]}
    assert abs(rows["exact_denoiser.mpsa.bound"]["z"]) < 5 < rows["network.mpsa.bound"]["z"]
    assert abs(rows["steps_128.mpsa.cross_entropy"]["z"]) < 5 < rows["steps_1.mpsa.cross_entropy"]["z"]


RECORDS = {"hepg2": REPOSITORY / "dna/results/pretrain_seed0.json",
           "mpsa": REPOSITORY / "dna/results/pretrain_mpsa_seed0.json"}


@pytest.mark.parametrize("name", RECORDS)
def test_committed_networks_reproduce_their_recorded_numbers(name):
    rows = {r["name"]: r["estimate"] for r in json.loads(RECORDS[name].read_text())["rows"]}
    world = pretrain.dna_world(name, None, REPOSITORY / "dna/checkpoints", "cpu")
    check = pretrain.fixed_batch_measures(world)
    assert check and all(rows[f"check.{name}.{key}"] == pytest.approx(value, abs=1e-3) for key, value in check.items())


def test_recorded_numbers_reach_what_was_asked():
    rows = {r["name"]: r for r in json.loads(RECORDS["hepg2"].read_text())["rows"]}
    for chrom in ("chr1", "chr2"):
        for order in (0, 3, 5):
            gain = rows[f"markov{order}.hepg2.above_base_{chrom}"]
            assert gain["estimate"] > 5 * gain["se"]
    assert rows["base.hepg2.kmer3_training"]["estimate"] >= 0.98
    assert rows["oracles.hepg2.correlation"]["estimate"] > 0.7
    assert all(rows[f"{name}.hepg2.auc"]["estimate"] > 0.85 for name in ("oracle_a", "oracle_b", "accessibility"))
