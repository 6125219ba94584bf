"""Every script of sd/ in two processes of `accelerate launch` and in one: the same numbers, written and told once.

This file is also what the two processes run: `accelerate launch ... tests/test_sd_processes.py FOLDER`. They differ
from one process in the last digits of float32 sums alone; training and weights of paths make that some 1e-4 of a value.
"""
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from conftest import SOURCE, load, planted

F = torch.float64
TOLERANCE = 1e-3  # of a value or of 0.1, whichever is more
FLAGS = {  # sizes that two processes cannot share out evenly, and one script with calls in several slices
    "draft": "--prompts cat --steps 2 --images 3 --methods full_kl --back 1 --updates 2 --batch 3 --chunk 2",
    "ddpo": "--prompts cat --steps 2 --images 3 --methods ddpo_kl --updates 2 --batch 3 --per-prompt 3",
    "constrained_alignment": "--prompts cat --steps 2 --images 5 --problem learned --threshold 0.1 0.1 --updates 2 "
                             "--batch 3",
    "das": "--prompts cat --steps 3 --groups 3 --particles 3 --reference 9",
    "dav": "--prompts cat --steps 2 --images 3 --methods dav_kl --updates 1 --batch 3 --epochs 1",
    "and_composition": "--prompts cat --steps 2 --images 6 --particles 3 --batch 3 --dual-steps 4 --problem adapters",
    "or_composition": "--prompts cat --steps 2 --images 4 --methods elbo kl --updates 2 --batch 3 --primal-steps 1 "
                      "--data 3 --levels 2 --concepts cat sun --problem prompts",
    "msdda": "--prompts cat --steps 5 --images 6 --particles 3",
}
FIGURES = {"draw_adapters", "draw_problems", "draw_rounds", "draw_product", "draw_mixture", "draw_panels"}
BUGS = {  # each must show in the float64 gradients of two processes
    "the gradient of the weights is not summed": ("        dist.all_reduce(x)\n", ""),
    "no gradient comes from the other rows": ("                tensor.register_hook(process_sum)\n",
                                              "                pass\n"),
    "no row has a gradient": ("        parts[number] = own  # the same numbers, with a gradient\n", ""),
    "a row stands twice": ("return torch.cat(parts)[:n]", "return torch.cat(parts)[-n:]"),
}


def run(script, out):
    """Its main at the sizes above, without figures, which take more time than all the rest -> {row name: estimate}."""
    module = load(f"sd/{script}.py")
    with pytest.MonkeyPatch.context() as patch:
        for name in FIGURES & set(vars(module)):
            patch.setattr(module, name, lambda *_: None)
        return module.main(module.parse_args(["--quick", *FLAGS[script].split(), "--out", str(out)]))


def gradients(module, shared):
    """Of a network on 5 rows, at once and then in slices of 3: values and all gradients, float64."""
    rng = torch.Generator().manual_seed(0)
    x, t, weight = (torch.randn(size, generator=rng, dtype=F) for size in ((5, 3), (5,), (3, 3)))
    x.requires_grad_(), weight.requires_grad_()

    def network(x, t):
        return (x @ weight).tanh() * t[:, None]

    function = module.over_processes(network) if shared else network
    y = x + function(x, t)
    y = y * module.in_chunks(function, 3, y, t).flip(1)
    (y.pow(2).sum(1) * torch.arange(5)).sum().backward()
    zero = torch.zeros_like(weight)  # where the gradient got lost
    return [y.detach(), x.grad, module.process_sum(zero if weight.grad is None else weight.grad) if shared
            else weight.grad]


def work(folder):
    """What each of the two processes does; what process k finds goes to <k>.json in the folder."""
    module = load("sd/draft.py")
    module.join_processes()
    found, wanted = dict(gaps={}, numbers={}, processes=module.processes()), gradients(module, False)
    for name, bug in {"none": None, **BUGS}.items():
        values = gradients(planted("sd/draft.py", bug) if bug else module, True)
        found["gaps"][name] = max((v - w).abs().max().item() for v, w in zip(values, wanted))
    for script in FLAGS:
        load(f"sd/{script}.py").join_processes()
        found["numbers"][script] = run(script, folder)
    (folder / f"{module.processes()[1]}.json").write_text(json.dumps(found))


def launch(*words):
    """accelerate launch with two processes. On the CPU: its own flag --cpu starts one, or asks for MPI."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.Popen([*command, *words], cwd=SOURCE, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found, what one did, and the folder that the first of the two wrote."""
    folder, alone = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(SOURCE)
        process = launch(str(pathlib.Path(__file__).resolve()), str(folder))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in each of the two: another order of sums is another run
        one = {script: run(script, alone) for script in FLAGS}  # meanwhile
        torch.set_num_threads(threads)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-3000:]
    return *(json.loads((folder / f"{number}.json").read_text()) for number in (0, 1)), one, folder


def untimed(numbers):
    return {name: value for name, value in numbers.items() if not name.endswith(".seconds")}


def test_gradients_of_shared_networks(found):
    for number, process in enumerate(found[:2]):
        gaps = dict(process["gaps"])
        assert process["processes"] == [2, number] and gaps.pop("none") < 1e-10
        assert set(gaps) == set(BUGS) and min(gaps.values()) > 1e-3, gaps


@pytest.mark.parametrize("script", FLAGS)
def test_two_processes_get_the_numbers_of_one(script, found):
    first, second, one = (untimed(numbers[script]) for numbers in (found[0]["numbers"], found[1]["numbers"], found[2]))
    assert first == second  # to the bit, or their multipliers and ancestors would part
    rows = json.loads((found[3] / f"sd_{script}/numbers.json").read_text())["rows"]
    assert untimed({r["name"]: r["estimate"] for r in rows}) == first
    gaps = {name: abs(value - first[name]) / max(abs(value), 0.1) for name, value in one.items()}
    assert set(one) == set(first) and max(gaps.values()) < TOLERANCE, max(gaps, key=gaps.get)


def test_a_script_speaks_once(tmp_path):
    """The script itself, as a user starts it; then with sizes that two processes cannot share."""
    flags = "--quick --prompts cat --steps 2 --groups 2 --particles 2 --reference 4 --out".split()
    process = launch("sd/das.py", *flags, str(tmp_path))
    text, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-3000:]
    assert text.count("clip_eval") == 1 and errors.count("base 1/1") == 1
    assert errors.count("results: ") == 1
    assert {p.name for p in tmp_path.rglob("*.*")} == {"numbers.json", "figure.png"}
    process = launch("sd/draft.py", "--quick", "--batch", "1", "--out", str(tmp_path))
    _, errors = process.communicate(timeout=900)
    assert process.returncode and errors.count("--batch 1 cannot be shared out to 2 processes") == 1


def test_more_processes_than_gpus(monkeypatch, capsys):
    das = load("sd/das.py")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as end:
        das.join_processes()
    assert end.value.code == 2 and "2 processes need as many GPUs, and here are 1" in capsys.readouterr().err


def test_chunk_counts_all_processes(monkeypatch, capsys):
    das = load("sd/das.py")
    monkeypatch.setattr(das, "processes", lambda: (4, 0))
    with pytest.raises(SystemExit) as end:
        das.in_chunks(lambda x: x, 3, torch.zeros(8, 1))
    assert end.value.code == 2 and "--chunk 3 is less than the 4 processes" in capsys.readouterr().err


if __name__ == "__main__":
    work(pathlib.Path(sys.argv[1]))
