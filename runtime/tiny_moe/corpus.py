"""The text that the tiny MoE is trained on: eight domains from sources that any Debian machine can get.

============  ================================================================================================
domain        source
============  ================================================================================================
code          the running Python's standard library (``*.py``, without its tests)
english       the King James Bible, printed by Debian's ``bible-kjv`` from ``bible-kjv-text`` (public domain)
german        ``fortunes-de``
spanish       ``fortunes-es``
russian       ``fortunes-ru``
chinese       ``fortunes-zh`` (among it 300 Tang and 100 Song poems)
proofs        Metamath's ``set.mm`` from ``metamath-databases`` (CC0)
arithmetic    sums, differences, products, remainders and comparisons, generated here from a seed
============  ================================================================================================

The packages are downloaded with ``apt-get download`` and unpacked in a cache folder: nothing is installed and
no root rights are needed. Every domain is cut into blocks of 16 KiB, and every 20th block is held out.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.errors import FormatError

__all__ = ["DOMAINS", "PACKAGES", "Corpus", "arithmetic_text", "build_corpora"]

#: The domains, in the order in which traces and reports list them.
DOMAINS = ("code", "english", "german", "spanish", "russian", "chinese", "proofs", "arithmetic")

#: Debian packages and the versions (Debian 12) that the shipped weights were trained on.
PACKAGES = {
    "bible-kjv": "4.38",
    "bible-kjv-text": "4.38",
    "fortunes-de": "0.35-1",
    "fortunes-es": "1.36",
    "fortunes-ru": "1.52-3.1",
    "fortunes-zh": "2.98",
    "metamath-databases": "0.0.0~20210101.git55fe226-2",
}

BLOCK = 16 * 1024
HELD_OUT_EVERY = 20
#: Longer sources are thinned to this many bytes by taking evenly spaced blocks.
LARGEST = 12 * 1024 * 1024


@dataclass(frozen=True)
class Corpus:
    """One domain's text.

    Parameters
    ----------
    domain : str
        Its name.
    train, held_out : uint8 arrays
        The text's bytes; the two share no block.
    sha256 : str
        Of the whole text before the split.
    source : str
        Where it came from, with version.
    """

    domain: str
    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]
    sha256: str
    source: str

    def card(self) -> dict[str, Any]:
        """Describe the corpus for the training record."""
        sizes = {"train_bytes": int(self.train.size), "held_out_bytes": int(self.held_out.size)}
        return {"source": self.source, "sha256": self.sha256, **sizes}


def _fetch(package: str, cache: Path) -> tuple[Path, str]:
    """Unpack a Debian package below `cache`; return the folder, and name, version and hash of the package."""
    folder = cache / package
    archives = sorted(cache.glob(f"{package}_*.deb"))
    if not archives:
        wanted = f"{package}={PACKAGES[package]}"
        for request in (wanted, package):  # the recorded version, else the one that this Debian has
            done = subprocess.run(["apt-get", "download", request], cwd=cache, capture_output=True, text=True)
            archives = sorted(cache.glob(f"{package}_*.deb"))
            if done.returncode == 0 and archives:
                break
        else:
            raise FormatError(
                f"package {package}",
                f"'apt-get download' failed: {done.stderr.strip() or 'no message'}; "
                "run 'apt-get update' on a Debian machine first",
            )
    if not folder.is_dir():
        subprocess.run(["dpkg-deb", "-x", str(archives[0]), str(folder)], check=True)
    digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    return folder, f"{archives[0].name} sha256:{digest}"


def _code(cache: Path) -> tuple[bytes, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    # Neighbouring files are alike: shuffle, so that the held-out blocks are of every kind.
    order = np.random.default_rng(0).permutation(len(files))
    text = b"\n\n".join(files[i].read_bytes() for i in order)
    return text, f"CPython {platform.python_version()} standard library, {len(files)} files"


def _english(cache: Path) -> tuple[bytes, str]:
    program, program_source = _fetch("bible-kjv", cache)
    text, text_source = _fetch("bible-kjv-text", cache)
    done = subprocess.run(
        [str((program / "usr/bin/bible").resolve()), "gen1:1-rev22:21"],
        cwd=text / "usr/lib",
        capture_output=True,
        env={**os.environ, "LC_ALL": "C"},
        check=True,
    )
    return done.stdout, f"{program_source}; {text_source}"


def _fortunes(package: str, pattern: str, cache: Path) -> tuple[bytes, str]:
    folder, source = _fetch(package, cache)
    root = folder / "usr/share/games/fortunes"
    names = sorted(p for p in root.glob(pattern) if p.is_file() and not p.is_symlink())
    texts = [p.read_bytes() for p in names if p.suffix not in (".dat", ".u8")]
    # Cookies of one file are alike (and of one topic): shuffle all of them, without terminal colours.
    cookies = [c.strip() for t in texts for c in re.sub(rb"\x1b\[[0-9;]*m", b"", t).split(b"\n%")]
    cookies = [c for c in cookies if c and _is_utf8(c)]
    order = np.random.default_rng(0).permutation(len(cookies))
    return b"\n\n".join(cookies[i] for i in order), source


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _proofs(cache: Path) -> tuple[bytes, str]:
    folder, source = _fetch("metamath-databases", cache)
    return (folder / "usr/share/metamath/databases/set.mm").read_bytes(), source


def arithmetic_text(size: int, seed: int = 0) -> bytes:
    """Generate lines of right arithmetic.

    Parameters
    ----------
    size : int
        Bytes wanted (the text is cut there).
    seed : int
        Same seed, same text.

    Returns
    -------
    bytes
        Lines such as ``417 + 38 = 455``, ``91 mod 8 = 3`` and ``12 < 40``.
    """
    rng = np.random.default_rng(seed)
    lines: list[str] = []
    length = 0
    while length < size:
        kind = int(rng.integers(6))
        digits = rng.integers(1, 4, size=2)
        a, b = (int(rng.integers(10 ** int(d))) for d in digits)
        if kind == 0:
            line = f"{a} + {b} = {a + b}"
        elif kind == 1:
            line = f"{a} - {b} = {a - b}"
        elif kind == 2:
            line = f"{a} * {b % 100} = {a * (b % 100)}"
        elif kind == 3:
            line = f"{a} mod {b % 20 + 1} = {a % (b % 20 + 1)}"
        elif kind == 4:
            line = f"{a} {'<' if a < b else '>' if a > b else '='} {b}"
        else:
            start, step = a % 50, b % 9 + 1
            line = ", ".join(str(start + step * i) for i in range(8))
        lines.append(line)
        length += len(line) + 1
    return "\n".join(lines).encode()[:size]


def _thin(text: bytes) -> bytes:
    """Take evenly spaced blocks of a text that is too long."""
    if len(text) <= LARGEST:
        return text
    blocks = len(text) // BLOCK
    keep = np.linspace(0, blocks - 1, LARGEST // BLOCK).astype(int)
    return b"".join(text[i * BLOCK : (i + 1) * BLOCK] for i in keep)


def _split(domain: str, text: bytes, source: str) -> Corpus:
    data = np.frombuffer(_thin(text), dtype=np.uint8)
    block_of = np.arange(data.size) // BLOCK
    held = block_of % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    return Corpus(domain, data[~held], data[held], hashlib.sha256(text).hexdigest(), source)


def build_corpora(cache: Path) -> dict[str, Corpus]:
    """Fetch and cut all domains.

    Parameters
    ----------
    cache : Path
        Folder for the downloaded packages; made when missing.

    Returns
    -------
    dict of str to Corpus
        In the order of `DOMAINS`.

    Raises
    ------
    FormatError
        A package cannot be had.
    """
    cache.mkdir(parents=True, exist_ok=True)
    cache = cache.resolve()
    texts: dict[str, tuple[bytes, str]] = {
        "code": _code(cache),
        "english": _english(cache),
        "german": _fortunes("fortunes-de", "de/*", cache),
        "spanish": _fortunes("fortunes-es", "es/*", cache),
        "russian": _fortunes("fortunes-ru", "ru/*", cache),
        "chinese": _fortunes("fortunes-zh", "*", cache),
        "proofs": _proofs(cache),
        "arithmetic": (arithmetic_text(4 * 1024 * 1024), "generated, seed 0"),
    }
    return {d: _split(d, *texts[d]) for d in DOMAINS}
