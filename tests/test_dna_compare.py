"""dna/compare.py: measures on sequences whose answer is known, counts of calls, and a run that is not repeated."""
import json
import types

import pytest
import torch
from conftest import load

compare = load("dna/compare.py")
das = compare.das

def consensus(name):
    """The most frequent letter of each place of a motif -> list of tokens."""
    return torch.tensor(compare.MOTIFS[name]).argmax(0).tolist()

@pytest.mark.parametrize("name", compare.MOTIFS)
def test_a_motif_is_found_on_both_strands_and_rarely_by_chance(name):
    torch.manual_seed(0)
    x = torch.randint(4, (4000, 200))
    rate = compare.motif_rate(x, compare.MOTIFS[name])
    width = len(consensus(name))
    at_most = 2 * (201 - width) * 2e-4  # words on two strands
    assert 0.2 * at_most < rate < at_most + 4 * (at_most / 4000) ** 0.5
    planted = torch.tensor(consensus(name))
    for word in (planted, 3 - planted.flip(0)):
        x[:, 50 : 50 + width] = word
        assert compare.motif_rate(x, compare.MOTIFS[name]) == 1

def test_measures_of_known_sequences():
    nets = {k: types.SimpleNamespace(score=lambda letters, k=k: k * letters[..., 1].sum(1)) for k in (1, 2, 3)}
    nets = dict(zip(("oracle_a", "oracle_b", "accessibility"), nets.values()))
    nets["base"] = lambda x: torch.full((*x.shape, 4), 0.25).log()
    x = torch.zeros(5, 40, dtype=torch.long)
    for k in range(5):
        x[k, : 2 * k] = 1  # C
    rows = {key: value for key, (value, _) in compare.measure(x, nets, torch.rand(64).double()).items()}
    assert rows["activity"] == 4 and rows["held_out"] == 8 and rows["a_minus_b"] == -4
    assert rows["accessible"] == 0.8 and rows["gc"] == pytest.approx(0.1) and rows["nats"] == pytest.approx(1.3863, abs=1e-4)
    assert rows["edits"] == pytest.approx(sum(2 * abs(j - k) for j in range(5) for k in range(5)) / 20)
    other = {k: v for k, (v, _) in compare.measure(x, nets, compare.kmer_counts(x, 3)).items()}
    assert other["kmer3"] == pytest.approx(1)

def test_watch_counts_rows_and_a_backward_pass_as_two():
    module = types.SimpleNamespace(MaskedDenoiser=das.MaskedDenoiser, Oracle=das.Oracle)
    net, counts, x = das.MaskedDenoiser(4, 3, [1]), [], torch.zeros(6, 9, dtype=torch.long)
    module.sample_paths = lambda: net.requires_grad_(False)(x)
    module.sampled = lambda: module.sample_paths()
    module.train = lambda: (net.requires_grad_(True)(x), module.sample_paths(), module.sampled())
    forward = das.MaskedDenoiser.forward
    stop = compare.watch(module, counts)
    module.train()
    net(x)  # for no method
    module.sample_paths()
    stop()
    assert das.MaskedDenoiser.forward is forward
    assert [c[:2] for c in counts] == [["train", 24], ["sampled", 6], ["sample_paths", 6]]

def test_a_run_that_stands_there_is_not_repeated(tmp_path):
    calls = []
    def main(args):
        calls.append(args)
        args.out.mkdir(exist_ok=True)
    module = types.SimpleNamespace(__name__="das", MaskedDenoiser=das.MaskedDenoiser, Oracle=das.Oracle, main=main,
                                   parse_args=lambda flags: types.SimpleNamespace(out=tmp_path / "das_kl-weight_1"))
    args = types.SimpleNamespace(out=tmp_path, seed=0, quick=False)
    for seed, runs in ((0, 1), (0, 1), (1, 2)):
        args.seed = seed
        out, counts = compare.point(args, module, "--kl-weight 1")
        assert len(calls) == runs and counts == [] and json.loads((out / "counts.json").read_text())["flags"][-1] == str(seed)
