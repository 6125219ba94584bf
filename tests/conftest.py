"""Scripts are tested by path: `python -m pytest tests --src DIR` tests the copy under DIR."""
import importlib.util
import os
import pathlib
import subprocess
import sys
import types

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when a library is first imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same sums on a machine of any number of cores

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SOURCE = REPOSITORY

def pytest_addoption(parser):
    parser.addoption("--src", type=pathlib.Path, default=REPOSITORY, help="folder that holds toy/, sd/, dna/")

def pytest_configure(config):
    global SOURCE
    SOURCE = config.getoption("--src").resolve()
    if not all((SOURCE / folder).is_dir() for folder in ("toy", "sd", "dna")):
        raise pytest.UsageError(f"{SOURCE} does not hold the folders toy, sd and dna.")

def load(script):
    """The module of a script such as "toy/das.py"."""
    name = script.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SOURCE / script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str((SOURCE / script).parent))  # compare.py imports its folder's scripts
        spec.loader.exec_module(sys.modules[name])
        sys.path.pop(0)
        for sibling in (SOURCE / script).parent.glob("*.py"):  # another folder has scripts of the same names
            sys.modules.pop(sibling.stem, None)
    return sys.modules[name]

def in_two_processes(script, *flags):
    """Runs a script by torchrun -> its standard output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SOURCE / script]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

def planted(script, *changes):
    """The module of a script with each text `old` replaced by `new`; `old` must stand there exactly once."""
    text = (SOURCE / script).read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{script} holds {text.count(old)} times: {old}"
        text = text.replace(old, new)
    module = types.ModuleType("planted")
    module.__file__ = str(SOURCE / script)
    exec(compile(text, f"{script} with a planted bug", "exec"), module.__dict__)
    return module
