"""Flags of toy/: what cannot work is said in one sentence before any work, and importing a script changes nothing."""
import os
import subprocess
import sys

import conftest
import pytest
from conftest import REPOSITORY, load

SCRIPTS = sorted(p.name for p in (REPOSITORY / "toy").glob("*.py"))
BAD = [["--seed", "-1"], ["--seed", "18446744073709551616"], ["--seed", "one"], ["--device", "meta"], ["--device", "mps"],
       ["--device", "tpu"], ["--out", "file/folder"], ["--out", "file"], ["--problem", "none"]]
NUMBERS = {"--kl-weight", "--particles", "--steps", "--gamma", "--rounds", "--updates", "--subsamples", "--paths"}

def refused(script, flags, capsys):
    with pytest.raises(SystemExit) as end:
        load(f"toy/{script}").parse_args(flags)
    text = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(text[-1]) < 300 and flags[0].strip("-") in text[-1]

@pytest.mark.parametrize("flags", BAD, ids=" ".join)
@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_input_is_one_sentence(script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    refused(script, flags, capsys)

@pytest.mark.parametrize("value", ["inf", "nan", "0", "-1"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_are_positive_and_finite(script, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flag in NUMBERS:
        if f'"{flag}"' in (conftest.SOURCE / "toy" / script).read_text():
            refused(script, [flag, value], capsys)

@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="the superuser may write everywhere")
def test_a_folder_that_cannot_be_written_is_found_first(tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused("das.py", ["--out", str(tmp_path / "locked")], capsys)

def test_help_in_a_strange_environment():
    """A notebook's backend that is not installed, and a terminal that knows ASCII alone."""
    environment = os.environ | dict(MPLBACKEND="module://no_such_backend", PYTHONIOENCODING="ascii")
    for script in SCRIPTS:
        done = subprocess.run([sys.executable, f"toy/{script}", "--help"], env=environment, cwd=REPOSITORY,
                              capture_output=True, text=True)
        assert done.returncode == 0 and "--problem" in done.stdout, done.stderr

def test_importing_changes_nothing():
    code = ("import sys; sys.path.insert(0, 'toy'); import das, torch; assert 'matplotlib.pyplot' not in sys.modules;"
            "assert torch.get_default_device().type == 'cpu' and 'MPLBACKEND' not in __import__('os').environ")
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment).returncode == 0

def test_two_runs_may_share_a_folder(tmp_path):
    """Each file is whole at every moment: it is renamed into place."""
    import json
    import threading

    das, fails = load("toy/das.py"), []
    args = das.parse_args(["--out", str(tmp_path)])
    rows = [("p", "m", f"quantity_{i}", float(i), None, float("inf")) for i in range(300)]

    class Figure:
        def savefig(self, part, **_):
            part.write_bytes(b"figure")

    def reads():
        for _ in range(300):
            if (tmp_path / "numbers.json").exists():
                try:
                    assert len(json.loads((tmp_path / "numbers.json").read_text())["rows"]) == 300
                except Exception as error:
                    fails.append(error)

    threads = [threading.Thread(target=lambda: [das.report(args, rows, 0.0, Figure) for _ in range(5)]) for _ in range(2)]
    threads.append(threading.Thread(target=reads))
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not fails and sorted(p.name for p in tmp_path.iterdir()) == [".writable", "figure.png", "numbers.json"]
