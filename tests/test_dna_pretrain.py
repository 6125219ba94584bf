"""dna/prepare_data.py: tables that users have, the two data sets; dna/pretrain.py: the bound, Markov chains, training, and the
exact distribution of few steps, against kernel matrices over all 5^4 masked states.
"""
import gzip
import itertools
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from conftest import SOURCE, load, planted

prepare, pretrain = load("dna/prepare_data.py"), load("dna/pretrain.py")
from test_dna_das import LENGTH, MASK, P, X, after, das  # noqa: E402

# ---- tables of users -------------------------------------------------------------------------------------------------
HEADER = "seq,hepg2,k562,sknsh,chrom"

def table(rows=300, length=40):
    """Lines of a table in the format of DRAKES, the activity in HepG2 being the number of GA."""
    rng, lines = np.random.default_rng(0), []
    for k in range(rows):
        seq = "".join(rng.choice(list("ACGT"), length))
        lines.append(f"{seq},{seq.count('GA') + rng.normal() / 9:.3f},{rng.normal():.3f},0.5,chr{[*range(1, 23), 'X'][k % 23]}")
    return lines

def read(tmp_path, lines, header=HEADER, end="\n", name="table.csv", packed=False, start=""):
    content = (start + end.join([header, *lines]) + end).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    return prepare.read_table(tmp_path / name)

def as_rna(line):
    seq, rest = line.split(",", 1)
    return f"{seq.lower().replace('t', 'u')},{rest}"

FORMS = {
    "plain": {}, "gzip, however it is named": dict(packed=True), "gz": dict(packed=True, name="dataset.csv.gz"),
    "byte order mark": dict(start="\ufeff"), "CR LF": dict(end="\r\n"), "CR": dict(end="\r"),
    "lower case and U": dict(change=as_rna),
    "index and another column": dict(header=f",{HEADER},note", change=lambda line: f'7,{line},"a, b"'),
    "quotes": dict(header='"SEQ", hepg2 ,"k562",sknsh,Chrom',
                   change=lambda line: ",".join(f'"{word}"' for word in line.split(","))),
    "numbers of chromosomes": dict(change=lambda line: line.replace("chr", "")),
    "others are left out": dict(change=lambda line: line + "\n" + line.rsplit("chr", 1)[0] + "chrM\nNNN,,,,chrUn_7"),
}

@pytest.mark.parametrize("form", FORMS)
def test_tables_that_users_have(form, tmp_path, capsys):
    plain, options = read(tmp_path, table()), dict(FORMS[form])
    capsys.readouterr()
    change = options.pop("change", str)
    found = read(tmp_path, [change(line) for line in table()], **options)
    assert all(np.array_equal(found[key], value) for key, value in plain.items())
    assert plain["codes"].shape == (300, 40) and plain["active"].sum() == 30 and plain["chrom"].max() == 23
    text = capsys.readouterr().out
    assert "300 sequences of 40 letters" in text and f"{600 if form == 'others are left out' else 0} on other" in text

def edited(k, change):
    return lambda lines: [*lines[: k - 2], change(lines[k - 2]), *lines[k - 1 :]]  # line k of the file

BAD = {
    "N": (edited(7, lambda line: "N" + line[1:]), "line 7: the sequence holds the letter N"),
    "mixed lengths": (edited(9, lambda line: line[2:]), "line 9: the sequence has 38 letters.*first one, 40"),
    "short": (lambda lines: [line[28:] for line in lines], "line 2: the sequence has 12 letters.*13 at least"),
    "missing activity": (edited(5, lambda line: line.replace(",0.5", ",")), "line 5: an activity is missing"),
    "word for a number": (edited(5, lambda line: line.replace("0.5", "high")), "line 5: an activity is missing, no number"),
    "not finite": (edited(5, lambda line: line.replace("0.5", "inf")), "line 5: an activity is missing, no number or not finite"),
    "half a row": (lambda lines: [line.rsplit(",", 3)[0] for line in lines], "0 sequences on chromosome 1"),
    "constant": (lambda lines: [",".join([line.split(",")[0], "1", *line.split(",")[2:]]) for line in lines], "nine tenths"),
    "few rows": (lambda lines: lines[:40], "2 sequences on chromosome 1.*10 at least"),
    "no validation": (lambda lines: [line for line in lines if not line.endswith("chr2")], "0 sequences on chromosome 2"),
    "twice": (lambda lines: [*lines, lines[0].replace("chr1", "chr5")], "line 302: the sequence is there twice"),
    "no rows": (lambda lines: [], "0 sequences on"),
}

@pytest.mark.parametrize("bad", BAD)
def test_bad_rows_are_one_true_sentence(bad, tmp_path):
    change, words = BAD[bad]
    with pytest.raises(prepare.Refused, match=words) as error:
        read(tmp_path, change(table()))
    assert len(str(error.value).splitlines()) == 1 and "table.csv" in str(error.value)

OTHERS = {"column": HEADER.replace("k562", "K-562") + "\nA", "tabs": HEADER.replace(",", "\t") + "\nA", "fasta": ">a\nACGT\n",
          "bed": "chr1\t10\t210\n", "parquet": b"PAR1\x15\x04\xff\xfe", "empty": "", "gzip cut short": gzip.compress(b"a" * 99)[:20]}

@pytest.mark.parametrize("other", [*OTHERS, "missing", "folder"])
def test_other_files_are_refused(other, tmp_path):
    path = tmp_path if other == "folder" else tmp_path / "table.csv"
    if other in OTHERS:
        path.write_bytes(OTHERS[other].encode() if isinstance(OTHERS[other], str) else OTHERS[other])
    with pytest.raises(prepare.Refused) as error:
        prepare.read_table(path)
    assert len(str(error.value).splitlines()) == 1 and str(path) in str(error.value)
    assert ("seq, hepg2, k562" in str(error.value)) == (other in ("column", "tabs", "fasta", "bed", "empty"))

# ---- the two data sets -----------------------------------------------------------------------------------------------
def wheel(path, tables):
    with zipfile.ZipFile(path, "w") as file:
        for member, text in tables.items():
            file.writestr(member, gzip.compress(text.encode()) if member.endswith("gz") else text)
    return path

def test_packages_are_read_and_others_refused(tmp_path):
    first = "set,tot_ct,ex_ct,y,x\ntraining,28,2,0.5,GGAGUGAUG\ntest,7,1,-1,AAAGCAAAA\n"
    second = "set,tot_ct,ex_ct,y,x\ntest,9,1,0.25,AAAGCAAAA\n"
    made = prepare.splice_sites(wheel(tmp_path / "a.whl", dict(zip(prepare.REPLICATES, (first, second)))))
    one, two = (int("".join(str("ACGT".index(c)) for c in word), 4) for word in ("AAAGCAAAA", "GGAGTGATG"))
    assert made["measured"].sum(1).tolist() == [2, 1] and made["rewards"][:, one].tolist() == [-1, 0.25]
    ratio = (made["p"] - 0.01 / 4**9)[[one, two]] / (made["p"] - 0.01 / 4**9).max()
    assert made["rewards"][0, two] == 0.5 and ratio == pytest.approx([17 / 29, 1]) and made["p"].sum() == pytest.approx(1)
    lines = ["sequence\tTAG\tother_samples_with_this_peak_not_considering_reps\tchr",
             "\t".join(["C" * 200, prepare.CELLS["k562"], "3", "chrX"]), "\t".join(["T" * 200, prepare.CELLS["hepg2"], "0", "chr1"])]
    made = prepare.elements(wheel(tmp_path / "b.whl", {prepare.ELEMENTS: "\n".join(lines)}))
    assert made["chrom"].tolist() == [23, 1] and made["active"].tolist() == [False, True] and (made["codes"][0] == 1).all()
    for name, _ in prepare.WHEELS.values():
        wheel(tmp_path / name, {"a": "b"})
    with pytest.raises(prepare.Refused, match="sha256 differs"):
        prepare.main(prepare.parse_args(["--wheels", str(tmp_path), "--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()

def test_shipped_data():
    sites, data = np.load(SOURCE / "dna/splice_sites.npz"), pretrain.read_elements(SOURCE / "dna/elements.npz")
    assert sites["measured"].sum(1).tolist() == [30483, 30697] and sites["measured"].all(0).sum() == 29593
    both = sites["measured"].all(0)
    assert np.corrcoef(sites["rewards"][:, both])[0, 1] == pytest.approx(0.795, abs=5e-4)
    assert data.codes.shape == (47872, 200) and data.targets.sum(0).tolist() == [11968.0] * 4 and data.top.sum() == 1421
    parts = {name: int(rows.sum()) for name, rows in pretrain.chromosome_parts(data.chrom).items()}
    assert parts == dict(test=4565, oracle_a=18582, oracle_b=20672)

# ---- the bound, chains, few steps ------------------------------------------------------------------------------------
def every_bound(module):
    """The mean of hidden_loss over the distribution, all numbers hidden and all places."""
    denoiser, total = pretrain.ExactDenoiser(P), 0.0
    for count in range(1, LENGTH + 1):
        for place in (places := list(itertools.combinations(range(LENGTH), count))):
            hidden = torch.zeros_like(X, dtype=torch.bool)
            hidden[:, place] = True
            total += P @ module.hidden_loss(denoiser(torch.where(hidden, MASK, X)), X, hidden) / LENGTH / len(places)
    return total

def test_bound_of_the_exact_denoiser_is_the_entropy():
    entropy = -(P * P.log()).sum()
    assert abs(every_bound(pretrain) - entropy) < 1e-10
    for wrong in ("(nll * hidden).sum(1)", "(nll * hidden).mean(1)", "x.shape[1] * (nll * hidden).sum(1) / (hidden.sum(1) + 1)"):
        bug = planted("dna/pretrain.py", ("x.shape[1] * (nll * hidden).sum(1) / hidden.sum(1)", wrong))
        assert abs(every_bound(bug) - entropy) > 0.1
    torch.manual_seed(0)
    values = pretrain.masked_bound(pretrain.ExactDenoiser(P), X[P.multinomial(4000, replacement=True)], LENGTH).mean(1)
    assert abs(values.mean() - entropy) < 5 * values.std() / 4000**0.5
    z, hidden = pretrain.hide(X[:1].expand(8000, -1), torch.rand(8000))
    assert torch.equal(z == MASK, hidden) and (hidden.double().mean(0) - 5 / 8).abs().max() < 0.03

def test_few_steps_have_the_distribution_of_the_kernel_matrices():
    jumps = pretrain.jump_distributions(P)
    for steps in (1, 2, 5, 64):
        assert (pretrain.sampler_distribution(jumps, steps) - after(steps)).abs().max() < 1e-12
    marginals = torch.stack([P.view(4**k, 4, -1).sum((0, 2))[X[:, k]] for k in range(LENGTH)]).prod(0)
    assert (pretrain.sampler_distribution(jumps, 1) - marginals).abs().max() < 1e-12
    distance = [(pretrain.sampler_distribution(jumps, n) - P).abs().sum() for n in (32, 64, 10**6)]
    assert 1.8 < distance[0] / distance[1] < 2.2 and distance[2] < 1e-5

def test_markov_chains_are_normalised_and_learn_their_order():
    torch.manual_seed(0)
    x, every = torch.randint(4, (9000, 12)), torch.cartesian_prod(*[torch.arange(4)] * 5)
    x[:, 2::3] = (x[:, 0::3] + x[:, 1::3]) % 4
    words = ["".join(map(str, row[i : i + 3])) for row in x[:5].tolist() for i in range(10)]
    assert {k: int(c) for k, c in enumerate(pretrain.kmer_counts(x[:5], 3)) if c} == {int(w, 4): words.count(w) for w in words}
    assert torch.equal(pretrain.kmer_counts(x, 3), pretrain.kmer_counts(x[:5000], 3) + pretrain.kmer_counts(x[5000:], 3))
    chains = [pretrain.MarkovChain(x, order) for order in range(4)]
    assert all(abs((-chain.bound(every)).exp().sum() - 1) < 1e-10 for chain in chains)
    bounds = [chain.bound(x).mean() for chain in chains]
    assert bounds[0] > bounds[2] + 0.5 and bounds[1] > bounds[2] + 0.5
    own, exact = chains[2].bound(chains[2].sample(4000, 5)), chains[2].bound(every)
    assert abs(own.mean() - (exact * (-exact).exp()).sum()) < 5 * own.std() / 4000**0.5

def test_auc_counts_pairs():
    score, positive = torch.tensor([0.0, 1, 1, 2, 3, 3]), torch.tensor([0, 0, 1, 1, 0, 1]).bool()
    wins = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert pretrain.auc(score, positive).item() == pytest.approx(np.mean(wins))

# ---- training --------------------------------------------------------------------------------------------------------
def fit(folder, *flags, updates=250, stop=math.inf, scale=1):
    args, calls = pretrain.parse_args(["--train", "--out", str(folder), *flags]), 0
    torch.manual_seed(0)
    net, letters = pretrain.MaskedDenoiser(4, 3, [1]), X[P.multinomial(500, replacement=True)]
    def loss(net):
        nonlocal calls
        if (calls := calls + 1) > stop:
            raise KeyboardInterrupt
        return scale * pretrain.denoiser_loss(net, letters[torch.randint(500, (16,))])
    return pretrain.fit(args, "net", net, loss, updates, 9)

def test_training_learns_and_goes_on_after_an_interruption(tmp_path):
    whole = fit(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", stop=130)
    with pytest.raises(pretrain.Refused, match="other flags"):
        fit(tmp_path / "b", "--resume", "--lr", "0.1")
    parts = fit(tmp_path / "b", "--resume")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    saved, length = das.load_network(tmp_path / "b/net.pt", das.MaskedDenoiser)
    assert length == 9 and torch.equal(saved(X), whole(X)) and not (tmp_path / "b/net.part").exists()
    x = X[P.multinomial(2000, replacement=True)]
    before, now = (pretrain.masked_bound(net, x, 4).mean() for net in (pretrain.MaskedDenoiser(4, 3, [1]), whole))
    assert now < before - 0.2
    with pytest.raises(pretrain.Refused, match="lower --lr"):
        fit(tmp_path / "c", scale=math.inf)

def test_from_a_table_to_a_world(tmp_path, monkeypatch):
    monkeypatch.setitem(pretrain.SIZES["quick"], "hepg2", (8, [1], 5, 8, 5, 10))
    lines = [f"{seq},{float(value) - 99},{rest}" for seq, value, rest in (v.split(",", 2) for v in table())]  # log ratios
    (tmp_path / "t.csv").write_text("\n".join([HEADER, *lines]))
    prepare.main(prepare.parse_args(["--data", str(tmp_path / "t.csv"), "--out", str(tmp_path)]))
    pretrain.main(pretrain.parse_args(["--problem", "data", "--train", "--quick", "--out", str(tmp_path)]))
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert {r["problem"] for r in rows} == {"data"} and all(math.isfinite(r["estimate"]) for r in rows)
    world = das.Rewarded(das.parse_args(["--checkpoints", str(tmp_path), "--out", str(tmp_path)]), "data")
    assert world.length == 40 and world.reward(torch.ones(3, 40, 4) / 4).shape == (3,)
