"""Scripts are tested by path: `python -m pytest tests --src DIR` grades the copy under DIR."""
import importlib.util
import json
import os
import pathlib
import sys
import types

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when a library is first imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same sums on a machine of any number of cores

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SOURCE = REPOSITORY
GRADES = {}  # exercise -> what was wrong with it, or nothing


def pytest_addoption(parser):
    parser.addoption("--src", type=pathlib.Path, default=REPOSITORY, help="folder that holds toy/, sd/, dna/")
    parser.addoption("--grades", type=pathlib.Path, help="write the points of the exercises there, for Gradescope")


def pytest_configure(config):
    global SOURCE
    SOURCE = config.getoption("--src").resolve()
    if not all((SOURCE / folder).is_dir() for folder in ("toy", "sd", "dna")):
        raise pytest.UsageError(f"{SOURCE} does not hold the folders toy, sd and dna.")
    tests = REPOSITORY / "tests"
    if SOURCE != REPOSITORY and all(pathlib.Path(arg).resolve() in (tests, REPOSITORY) for arg in config.args):
        config.args = [f"{tests / 'test_exercises.py'}::test_exercise"]  # a copy is graded, unless tests are named


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.originalname == "test_exercise" and (call.when == "call" or report.failed):
        crash = getattr(report.longrepr, "reprcrash", None)
        GRADES[item.callspec.params["number"]] = (crash.message if crash else str(report.longrepr)) * report.failed
    return report


def pytest_terminal_summary(terminalreporter, config):
    """The table of points of a copy, and the same in the file that --grades names."""
    target = config.getoption("--grades")
    if not GRADES or SOURCE == REPOSITORY and not target:
        return
    import exercise

    tests = []
    for number, reason in sorted(GRADES.items()):
        kind, where = exercise.kinds()[number]
        points = exercise.POINTS[kind]
        tests.append(dict(name=f"{number} {kind}: {where}", score=0 if reason else points, max_score=points,
                          output=" ".join(reason.split())[:300]))
    terminalreporter.section("points")
    for test in tests:
        terminalreporter.write_line(f"{test['score']}/{test['max_score']}  {test['name']}  {test['output'][:160]}".rstrip())
    score = sum(test["score"] for test in tests)
    terminalreporter.write_line(f"{score} of {sum(test['max_score'] for test in tests)} points")
    if target:
        target.write_text(json.dumps(dict(score=score, tests=tests), indent=1) + "\n")


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


def planted(script, *changes):
    """The module of a script with each text `old` replaced by `new`; `old` must stand there exactly once."""
    text = (SOURCE / script).read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{script} holds {text.count(old)} times: {old}"
        text = text.replace(old, new)
    module = types.ModuleType("planted")
    exec(compile(text, f"{script} with a planted bug", "exec"), module.__dict__)
    return module
