"""What makes the scripts one design: shared text, budgets, imports, commands that parse, pages that tell the records.

In a folder one name has one text, and SPINES says where the three short algorithms stand. The scripts of dna/ in SHARED
are longer ones, with a table of the names that each shares.
"""
import ast
import json
import re
import shlex
import sys
from importlib.metadata import packages_distributions

import conftest
import make_readme
import pytest
from conftest import REPOSITORY, load

SCRIPTS = sorted(str(p.relative_to(REPOSITORY)) for d in ("toy", "sd", "dna") for p in (REPOSITORY / d).glob("*.py"))

OWN = {"main", "parse_args", "Problem", "measure", "draw", "run"}  # names that every script defines for itself
COMPOSED = {"and_composition", "or_composition", "constrained_alignment"}
SPINES = {  # which script holds which short algorithm, the same to the letter: in all folders, then in each
    "smc": {"das", "and_composition", "msdda", "dav"}, "systematic": {"das", "and_composition", "msdda", "dav"},
    "dual_step": COMPOSED, "toy: descend": COMPOSED | {"das", "msdda", "dav", "ddpo", "draft"},
    "sd: train": {"constrained_alignment", "or_composition", "dav", "ddpo", "draft"},
}
ONLINE = {"sd/das_online.py"}  # das in a loop
BUDGETS = {"toy": 300, "sd": 400, "dna": 400, "toy/compare.py": 250, "sd/compare.py": 250, "sd/pretrain.py": 450,
           "dna/pretrain.py": 450, "dna/prepare_data.py": 200}  # lines
OVER = {"sd/das_online.py": 412, "sd/ddpo.py": 422, "sd/constrained_alignment.py": 451, "sd/msdda.py": 467,
        "sd/dav.py": 483, "sd/and_composition.py": 502}  # known to be over theirs, which stands; they must not grow

FIRST = {"main", "parse_args"}  # the first edition's names that every script defines for itself
WORLD = {"make_problem", "run_methods", "measure", "draw_panels", "draw_duals", "dual_function", "primal_dual",
         "diversity", "preset", "measures", "run_job", "job_results", "collect", "flags", "recorded"}  # and names that
# may mean another thing in each script

FILES = {"common_parser", "device", "results_folder", "positive", "fail", "progress", "write_atomically", "row",
         "write_numbers", "print_table"}
RESAMPLING = {"effective_sample_size", "log_mean_exp", "resample", "invert_cdf", "pivotal"}
SEQUENCES = {"read_arrays", "unpack", "encode", "read_elements", "read_csv", "chromosome_split", "all_sequences",
             "splice_law", "ExactDenoiser", "TableReward", "initialise", "SequenceConv", "MaskedDenoiser", "Oracle",
             "load_network", "predict", "unmask", "invert_cdf", "dna_world", "save_figure"}
JUDGES = {"hide", "hidden_loss", "masked_bound", "mean_and_se", "median_and_se", "kmer_counts", "kmer_correlation",
          "levenshtein", "diversity", "motif_scores", "motif_hits", "element_measures"}
FINE_TUNING = {"kl_of_letters", "sample_trajectories", "InPrecision", "improve_model", "objective_rows", "tuned_models",
               "baseline_elements", "baseline_splice", "draw_training", "refresh", "save_network", "log_mean_and_se",
               "dna_parser", "open_world"}
CELL_MODELS = {"maximise_dual", "project_to_simplex", "dual_update", "letters_log_p", "predict_all", "letter_counts",
               "set_letters", "splice_models", "fit_weighted", "denoiser_batches", "either_strand", "fit_network",
               "members", "cell_models", "CountRows", "save_network", "dna_parser", "open_world"}
SHARED = {  # script -> names whose text it shares with every other script that is listed with them
    "dna/and_composition.py": FILES | SEQUENCES - {"unmask"} | JUDGES | RESAMPLING | CELL_MODELS
    | {"dual_ascent", "spread", "gather", "log_mean_and_se"},
    "dna/or_composition.py": FILES | SEQUENCES - {"unmask"} | CELL_MODELS
    | {"divergences", "hide", "hidden_loss", "masked_bound", "mean_and_se"},
    "dna/dav.py": FILES | SEQUENCES | JUDGES | RESAMPLING
    | {"gather", "letters_log_p", "refresh", "sample_masked", "save_network", "log_mean_and_se", "dna_parser",
       "open_world"},
    "dna/msdda.py": FILES | SEQUENCES | JUDGES
    | {"weight_pair", "weights_tag", "resample_systematic", "effective_sample_size", "log_mean_exp", "gather",
       "log_mean_and_se", "refresh", "save_network", "either_strand", "denoiser_batches", "fit_network",
       "fit_weighted", "dna_parser", "open_world"},
    "dna/constrained_alignment.py": FILES | SEQUENCES | JUDGES
    | {"MarkovChain", "both_strands", "check_feasible", "maximise_dual", "dual_update", "relaxed_step",
       "relaxed_paths", "kl_of_letters", "sample_trajectories", "InPrecision", "refresh", "save_network",
       "dna_parser", "open_world"},
    "dna/draft.py": FILES | SEQUENCES | JUDGES | FINE_TUNING,
    "dna/ddpo.py": FILES | SEQUENCES | JUDGES | FINE_TUNING,
}


def source(script):
    return (conftest.SOURCE / script).read_text()


def definitions(text):
    """{name: text with decorators and comments} of the top-level functions and classes of a script."""
    nodes = [n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    lines = text.splitlines()
    first = {n: min([n.lineno, *(d.lineno for d in n.decorator_list)]) for n in nodes}
    return {n.name: "\n".join(lines[first[n] - 1 : n.end_lineno]) for n in nodes}


SECOND = [script for script in SCRIPTS if script not in SHARED]
FOLDERS = {folder: [s for s in SECOND if s.startswith(folder)] for folder in ("toy", "sd", "dna")}


def test_every_script_is_listed():
    assert set(SHARED) < set(SCRIPTS)


@pytest.mark.parametrize("folder", [*FOLDERS, "longer"])
def test_one_name_one_text(folder):
    scripts, own = (FOLDERS[folder], OWN) if folder in FOLDERS else (sorted(SHARED), FIRST | WORLD)
    texts = {}
    for script in scripts:
        for name, text in definitions(source(script)).items():
            if name not in own:
                texts.setdefault(name, {}).setdefault(text, []).append(script)
    assert {name: list(t.values()) for name, t in texts.items() if len(t) > 1} == {}


@pytest.mark.parametrize("name", SPINES)
def test_spines_are_there(name):
    folder, _, name_there = name.rpartition(": ")
    texts = {s: definitions(source(s)).get(name_there) for s in SECOND if s.startswith(folder) and s not in ONLINE}
    assert len({text for text in texts.values() if text}) == 1
    for each in [folder] if folder else ("toy", "sd"):
        assert {s.split("/")[1][:-3] for s, text in texts.items() if text and s.startswith(each)} == SPINES[name]


@pytest.mark.parametrize("script", [pytest.param(s, marks=pytest.mark.xfail(s in OVER, reason="over its budget",
                                                                            strict=True)) for s in SECOND])
def test_budgets(script):
    assert len(source(script).splitlines()) <= BUDGETS.get(script, BUDGETS[script.split("/")[0]])


@pytest.mark.parametrize("script", SECOND)
def test_form(script):
    text = source(script)
    assert len(text.splitlines()) <= OVER.get(script, 450) and max(map(len, text.splitlines())) <= 120
    assert text.isascii(), "a terminal of any encoding shows --help"
    assert "pyplot" not in text and len(ast.get_docstring(ast.parse(text)).splitlines()) >= 12
    assert {"main", "parse_args"} <= set(definitions(text))
    assert "# your own" in text or script.split("/")[1] in ("compare.py", "pretrain.py", "prepare_data.py")


@pytest.mark.parametrize("script", sorted(SHARED))
def test_shared_names_are_there(script):
    assert SHARED[script] - set(definitions(source(script))) == set()
    assert FIRST - set(definitions(source(script))) == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports(script):
    """Scripts stand alone: the standard library and what requirements.txt names, or what those need themselves."""
    allowed = {re.split(r"[<>=\[]", line)[0] for line in (REPOSITORY / "requirements.txt").read_text().split()}
    allowed |= {"tokenizers"}  # of transformers
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not getattr(node, "level", 0), "no relative imports"
            for name in [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]:
                top = name.split(".")[0]
                siblings = {p.split("/")[1][:-3] for p in SCRIPTS if p.split("/")[0] == script.split("/")[0]}
                if script.endswith("compare.py") and top in siblings:
                    continue
                known = packages_distributions().get(top) or [dict(PIL="pillow").get(top, top)]  # not all, on 3.10
                packages = {p.lower() for p in known}
                assert top in sys.stdlib_module_names or packages & allowed, f"{script} imports {name}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_import_runs_nothing(script):
    nodes = ast.parse(source(script)).body
    calls = [ast.unparse(n) for n in nodes if isinstance(n, ast.Expr) and not isinstance(n.value, ast.Constant)]
    assert set(calls) <= {"matplotlib.use('Agg')"}


def commands():
    """Every `python DIR/SCRIPT.py FLAGS` of the pages and of the docstrings; two blanks end a command."""
    texts = {page: (REPOSITORY / page).read_text() for page in make_readme.PAGES}
    texts |= {s: ast.get_docstring(ast.parse((REPOSITORY / s).read_text()), clean=False) for s in SCRIPTS}
    texts = {page: re.sub(r"\n +(?=--)", " ", text) for page, text in texts.items()}  # a command goes on
    found = {(m[1], m[2].split("  ")[0].strip()) for t in texts.values()
             for m in re.finditer(r"python ((?:toy|sd|dna)/\w+\.py)((?: +[^\n`|&]*)?)", t)}
    return sorted(found)


@pytest.mark.parametrize("script, flags", commands())
def test_commands_parse(script, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # scripts of toy/ make their folder at once
    load(script).parse_args(shlex.split(flags.replace("--device cuda", "--device cpu")))  # here may be no GPU


def test_readme_starts_with_the_two_commands():
    text = (REPOSITORY / "README.md").read_text()
    assert "python -m pip install -r requirements.txt && python toy/das.py" in text
    assert "python -m pip install -r requirements.txt && python -m pytest" in text


def test_the_oldest_python_reads_every_file():
    """The README names it; the tests were run there and with 3.11."""
    assert "(Python 3.10 or newer;" in (REPOSITORY / "README.md").read_text()
    for path in REPOSITORY.glob("*/*.py"):
        ast.parse(path.read_text(), feature_version=(3, 10))


@pytest.mark.parametrize("page", make_readme.PAGES)
def test_pages_tell_the_records(page):
    text = (REPOSITORY / page).read_text()
    assert make_readme.fill(text) == text, "run: python tests/make_readme.py"


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("*/results/*.json")), ids=lambda p: p.name)
def test_records_belong_to_the_scripts(path, tmp_path):
    """A record, <script>_seed<k>.json or <script>_<variant>_seed<k>.json, holds arguments that its script has still."""
    folder, name = path.parent.parent.name, path.stem.rsplit("_seed", 1)[0]
    script = max((s for s in SCRIPTS if f"{folder}/{name}_".startswith(s.removesuffix(".py") + "_")), key=len)
    record = json.loads(path.read_text())
    if script in SECOND:
        keys = [(r["problem"], r["method"], r["quantity"]) for r in record["rows"]]
        assert len(keys) == len(set(keys)) and all(re.fullmatch(r"[a-z0-9_.-]+", word) for key in keys for word in key[1:])
        defaults = vars(load(script).parse_args(["--out", str(tmp_path)]))
        defaults = json.dumps({k: v for k, v in defaults.items() if k not in ("out", "seed")}, default=str)
        assert {k: v for k, v in record["args"].items() if k in json.loads(defaults)} == json.loads(
            defaults.replace(f"{conftest.SOURCE}/", "")) or name == "pretrain"
        return
    assert set(record["args"]) == set(vars(load(script).parse_args([]))) and record["args"]["out"] == "out"
    names = [r["name"] for r in record["rows"]]
    assert len(names) == len(set(names)) and all(re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)+", n) for n in names)


def test_pictures_of_the_readme_are_there_and_small():
    for page in make_readme.PAGES:
        for path in re.findall(r"\]\(([^)]+\.png)\)", (REPOSITORY / page).read_text()):
            assert 10_000 < ((REPOSITORY / page).parent / path).stat().st_size < 300_000, path


def test_a_changed_comment_or_decorator_is_seen():
    text = "@cache\ndef f(x):\n    return x  # same\n"
    assert definitions(text)["f"] == text.rstrip()
    assert definitions(text) != definitions(text.replace("same", "other"))
    assert definitions(text) != definitions(text.replace("@cache\n", ""))
