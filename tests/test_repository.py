"""What makes the scripts one design: shared text, budgets, imports, commands that parse, pages that tell the records.

toy/ is of the second edition: one name has one text, and SPINES says where the three short algorithms stand. sd/ and dna/
are of the first, with a table of the names that each script shares.
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

OWN = {"main", "parse_args", "Problem", "measure", "draw", "run"}  # names that every script of toy/ defines for itself
SPINES = {  # which script holds which short algorithm, the same to the letter
    "smc": {"das", "and_composition", "msdda", "dav"},
    "systematic": {"das", "and_composition", "msdda", "dav"},
    "dual_step": {"and_composition", "or_composition", "constrained_alignment"},
    "descend": {"das", "and_composition", "or_composition", "constrained_alignment", "msdda", "dav", "ddpo", "draft"},
}
BUDGETS = {"toy/compare.py": 250}  # lines; 300 for the others of toy/

FIRST = {"main", "parse_args"}  # the first edition's names that every script defines for itself
WORLD = {"make_problem", "run_methods", "measure", "draw_panels", "draw_duals", "dual_function", "primal_dual",
         "diversity", "preset", "measures", "run_job", "job_results", "collect", "flags", "recorded"}  # and names that
# may mean another thing in each script

FILES = {"common_parser", "device", "results_folder", "positive", "fail", "progress", "write_atomically", "row",
         "write_numbers", "print_table"}
SAMPLER = {"per_particle", "effective_sample_size", "log_mean_exp", "resample", "invert_cdf", "pivotal", "gather",
           "temper_schedule", "adapt_temper", "look_ahead", "checked", "ddim_kernel", "guide", "log_ratio", "das"}
RESAMPLING = {"effective_sample_size", "log_mean_exp", "resample", "invert_cdf", "pivotal"}
PIPELINE = {"load_pipeline", "load_clip", "processes", "process_sum", "over_processes", "in_chunks", "tokenize",
            "encode_prompts", "noise_predictor", "image_decoder", "images_in_range", "clip_text", "clip_images",
            "path_schedule", "snr_levels", "ddim_sample", "ddim_kernel", "join_processes"}
REWARDS = {"model_flags", "Joined", "prompt_list", "weighted_name", "load_world", "load_adapter", "load_rewards",
           "jpeg_reward", "saturation_reward", "contrast_reward", "clip_reward", "aesthetic_reward"}
TRAINING = {"training_flags", "check_training_flags", "fresh_adapter", "save_adapter", "without_adapter", "prompted",
            "roll_out", "path_noise", "draw_prompts", "gains", "train_adapter", "read_checkpoint", "draw_images",
            "measure_base", "paired_row", "pair_distance", "draw_lines", "smoothed", "checked", "save_figure"}
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
COMPOSITION = {"check_adapters", "attach_adapters", "with_adapter", "project_to_simplex",
               "dual_update", "without_adapter", "prompted", "path_noise", "paired_row", "pair_distance", "draw_lines",
               "slug", "save_figure"}
SHARED = {  # script -> names whose text it shares with every other script that is listed with them
    "sd/pretrain.py": FILES | PIPELINE - {"path_schedule", "snr_levels", "join_processes"} | {"mean_and_se"},
    "sd/das.py": FILES | SAMPLER | PIPELINE | REWARDS
    | {"selection_weights", "mean_and_se", "log_mean_and_se", "tilted_mean_and_se"},
    "sd/draft.py": FILES | PIPELINE - {"ddim_sample"} | REWARDS | TRAINING
    | {"weighted_gain", "adapter_rows", "draw_adapters", "log_mean_and_se", "mean_and_se"},
    "sd/ddpo.py": FILES | PIPELINE - {"ddim_sample"} | REWARDS | TRAINING
    | {"weighted_gain", "adapter_rows", "draw_adapters", "log_mean_and_se", "mean_and_se"},
    "sd/constrained_alignment.py": FILES | PIPELINE - {"ddim_sample"} | REWARDS | TRAINING
    | {"dual_update", "maximise_dual", "check_feasible", "log_mean_exp"},
    "sd/and_composition.py": FILES | PIPELINE - {"ddim_sample"} | REWARDS | RESAMPLING | COMPOSITION
    | {"gather", "all_rewards", "checked"},
    "sd/or_composition.py": FILES | PIPELINE - {"ddim_sample"} | COMPOSITION
    | {"Joined", "prompt_list", "load_adapter", "training_flags", "check_training_flags", "fresh_adapter",
       "save_adapter", "train_adapter", "read_checkpoint", "spread", "log_snr_rule", "mode_masses"},
    "sd/msdda.py": FILES | PIPELINE - {"ddim_sample"} | REWARDS
    | {"merge", "resample_systematic", "effective_sample_size", "log_mean_exp", "gather", "blend", "switch",
       "sample_ddpm", "weights_tag", "weight_pair", "checked", "gains", "diversity", "paired_row", "log_mean_and_se",
       "mean_and_se", "draw_lines", "save_figure"},
    "dna/and_composition.py": FILES | SEQUENCES - {"unmask"} | JUDGES | RESAMPLING | CELL_MODELS
    | {"dual_ascent", "spread", "gather", "log_mean_and_se"},
    "dna/or_composition.py": FILES | SEQUENCES - {"unmask"} | CELL_MODELS
    | {"divergences", "hide", "hidden_loss", "masked_bound", "mean_and_se"},
    "sd/dav.py": FILES | PIPELINE - {"ddim_sample"} | REWARDS | TRAINING - {"draw_prompts", "smoothed"} | RESAMPLING
    | {"weighted_gain", "per_particle", "gather", "look_ahead", "guide", "log_ratio", "search", "transitions",
       "mean_per_noise", "search_samples"},
    "dna/prepare_data.py": {"fail", "write_atomically"},
    "dna/pretrain.py": FILES | SEQUENCES | JUDGES | {"MarkovChain", "both_strands", "either_strand", "refresh",
                                                     "sample_masked", "fit_network", "denoiser_batches"},
    "dna/das.py": FILES | SEQUENCES | JUDGES | RESAMPLING
    | {"per_particle", "gather", "temper_schedule", "adapt_temper", "checked", "gather_without_twist", "letters_log_p",
       "log_mean_and_se", "dna_parser", "open_world"},
    "dna/dav.py": FILES | SEQUENCES | JUDGES | RESAMPLING
    | {"gather", "letters_log_p", "refresh", "sample_masked", "save_network", "log_mean_and_se", "dna_parser",
       "open_world"},
    "dna/compare.py": set(),
    "sd/compare.py": set(),
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


TOY = [script for script in SCRIPTS if script.startswith("toy/")]


def test_every_script_is_listed():
    assert set(SHARED) == set(SCRIPTS) - set(TOY)


@pytest.mark.parametrize("scripts, own", [(TOY, OWN), (sorted(SHARED), FIRST | WORLD)], ids=["second", "first"])
def test_one_name_one_text(scripts, own):
    texts = {}
    for script in scripts:
        for name, text in definitions(source(script)).items():
            if name not in own:
                texts.setdefault(name, {}).setdefault(text, []).append(script)
    assert {name: list(t.values()) for name, t in texts.items() if len(t) > 1} == {}


@pytest.mark.parametrize("name", SPINES)
def test_spines_are_there(name):
    assert {s[4:-3] for s in TOY if name in definitions(source(s))} == SPINES[name]


@pytest.mark.parametrize("script", TOY)
def test_budgets(script):
    text = source(script)
    assert len(text.splitlines()) <= BUDGETS.get(script, 300) and max(map(len, text.splitlines())) <= 120
    assert text.isascii(), "a terminal of any encoding shows --help"
    assert "pyplot" not in text and len(ast.get_docstring(ast.parse(text)).splitlines()) >= 12
    assert {"main", "parse_args"} <= set(definitions(text)) and "# your own" in text or script == "toy/compare.py"


@pytest.mark.parametrize("script", sorted(SHARED))
def test_shared_names_are_there(script):
    assert SHARED[script] - set(definitions(source(script))) == set()
    assert FIRST - set(definitions(source(script))) == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports(script):
    """Scripts stand alone: the standard library and what requirements.txt names, or what those need themselves."""
    allowed = {re.split(r"[<>=\[]", line)[0] for line in (REPOSITORY / "requirements.txt").read_text().split()}
    allowed |= {"safetensors", "pillow", "tokenizers"}  # of transformers and matplotlib
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
    if folder == "toy":
        keys = [(r["problem"], r["method"], r["quantity"]) for r in record["rows"]]
        assert len(keys) == len(set(keys)) and all(re.fullmatch(r"[a-z0-9_.-]+", word) for key in keys for word in key)
        defaults = vars(load(script).parse_args(["--out", str(tmp_path)]))
        assert {k: v for k, v in record["args"].items() if k in defaults and k not in ("out", "seed")} == json.loads(
            json.dumps({k: v for k, v in defaults.items() if k not in ("out", "seed")}, default=str))
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
