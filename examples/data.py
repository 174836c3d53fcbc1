"""The examples' real data: downloaded by pip, verified by checksum, cached, and never committed.

The data are part of distributions on the Python package index, so pip is the only tool needed:

* ``mslr``: a slice of MSLR-WEB, inside rankeval 0.8.2. Microsoft's terms (research use):
  https://www.microsoft.com/en-us/research/project/mslr/
* ``lidar``: two LiDAR scans and the transform between them, inside small_gicp 1.0.1 (MIT).
* ``movielens``: the ratings of MovieLens 100K, inside the wheel of recbole 1.2.1. GroupLens' terms (research
  use, with acknowledgement): https://files.grouplens.org/datasets/movielens/ml-100k-README.txt

No code of these distributions runs. ``pip download`` would run an sdist's build backend to learn its metadata; here a
stand-in takes that backend's place and answers from the PKG-INFO file. Even if pip ran the real backend, it would be
the one of a known file, since pip compares the sdist with a recorded SHA-256 before it opens it. Every extracted file
is compared with its own SHA-256, and so is every cached file, each time it is used.

The cache is ``$XDG_CACHE_HOME/custom_ops``, by default ``~/.cache/custom_ops``.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class DataError(RuntimeError):
    """An error for data that are missing or differ from what was recorded; the message names the remedy."""


@dataclass(frozen=True)
class Source:
    """Files of a distribution, as {member of the archive: SHA-256 of its content}.

    ``backend`` is the build backend of a source distribution, or None for a wheel.
    """

    project: str
    version: str
    sha256: str
    backend: str | None
    members: dict[str, str]


SOURCES = {
    "mslr": Source(
        "rankeval",
        "0.8.2",
        "c7d71602ab7fe0a0281976c1f0e883cb16431f72e4e946e5fd83790449bb21a9",
        "setuptools.build_meta",
        {
            "rankeval/test/data/msn1.fold1.train.5k.txt": (
                "6d1721de961a35fbaef7085dc5b41e2940f0ddb04bab5f7a8566cf7db4158fa6"
            ),
            "rankeval/test/data/msn1.fold1.test.5k.txt": (
                "13d3c638edd23e482c38f4316c2680c938c2eaedbe096970ab30a48e364463d3"
            ),
        },
    ),
    "lidar": Source(
        "small_gicp",
        "1.0.1",
        "e0b1a03a87da154b53b489cce7079b5be02ba17723f89c4161f8311b564ca0b1",
        "scikit_build_core.build",
        {
            "data/source.ply": "f94fd33a33121dcc24d47e61d8cdbe75e6ecdad8bff1df176735cc6872967b82",
            "data/target.ply": "e754d477ebaebba42a0e036e856f6bfdca964e8e092d3f823b5b45427bec3445",
            "data/T_target_source.txt": "2c053402ed7b40d6da353395e4ccb4e40ee5e7d44397ef06e4c61cd674204add",
        },
    ),
    "movielens": Source(
        "recbole",
        "1.2.1",
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        None,
        {
            "recbole/dataset_example/ml-100k/ml-100k.inter": (
                "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
            ),
        },
    ),
}

# This backend answers pip's questions about an unpacked sdist (PEP 517) without running anything of it.
_STAND_IN = """
import pathlib, sys

__legacy__ = sys.modules[__name__]  # setuptools' name for the backend of a project without pyproject.toml

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    text = pathlib.Path("PKG-INFO").read_text(encoding="utf-8")
    fields = dict(line.split(": ", 1) for line in text.splitlines() if line.startswith(("Name: ", "Version: ")))
    folder = pathlib.Path(directory, "{Name}-{Version}.dist-info".format(**fields))
    folder.mkdir()
    (folder / "METADATA").write_text(text, encoding="utf-8")
    return folder.name
"""


def cache_folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "custom_ops"
    except RuntimeError:
        raise DataError("There is no home folder to cache data in: set HOME or XDG_CACHE_HOME") from None


def fetch(name: str) -> dict[str, Path]:
    """Return {name: path} of the files of ``SOURCES[name]``, from the cache or else through pip.

    Raises `DataError` if they are neither cached nor available, or if their checksums differ.
    """
    source = SOURCES[name]
    folder = cache_folder() / f"{source.project}-{source.version}"
    files = {member: folder / Path(member).name for member in source.members}
    if any(not file.exists() or _sha256(file.read_bytes()) != source.members[m] for m, file in files.items()):
        with tempfile.TemporaryDirectory() as temporary:
            archive = _download(source, Path(temporary), folder)
            content = {member: _read_member(archive, source, member) for member in source.members}
        try:
            for member, data in content.items():
                _write_atomically(files[member], data)
        except OSError as error:
            raise DataError(f"The data can't be cached: {error}. Set XDG_CACHE_HOME to a folder with room") from None
    return {file.name: file for file in files.values()}


def _download(source: Source, temporary: Path, folder: Path) -> Path:
    """Let pip download the archive into ``temporary`` and return its path."""
    if source.backend is None:
        form = ["--only-binary", ":all:"]
    else:
        form = ["--no-binary", ":all:", "--no-build-isolation", "--use-pep517"]
        package, _, module = source.backend.rpartition(".")
        (temporary / "backend" / package).mkdir(parents=True)
        (temporary / "backend" / package / "__init__.py").touch()
        (temporary / "backend" / package / f"{module}.py").write_text(_STAND_IN)
    requirements = temporary / "requirements.txt"
    requirements.write_text(f"{source.project}=={source.version} --hash=sha256:{source.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1"]
    command += ["--no-deps", *form, "--dest", str(temporary / "archive"), "--requirement", str(requirements)]
    environment = {**os.environ, "PYTHONPATH": str(temporary / "backend"), "PIP_NO_INPUT": "1"}
    try:
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        problem = process.stderr.strip()[-1500:] if process.returncode else ""
    except subprocess.TimeoutExpired:
        problem = "pip took longer than 5 minutes"
    archives = sorted((temporary / "archive").glob("*.tar.gz" if source.backend else "*.whl"))
    if problem or len(archives) != 1:
        raise DataError(
            f"The example needs {source.project} {source.version}'s data, which aren't in {folder}, and pip could "
            "not download them. Run it once where pip reaches a package index (`pip config list` shows which); "
            f"or copy that folder from a machine that has it. pip said:\n{problem or 'nothing'}"
        )
    return archives[0]


def _read_member(archive: Path, source: Source, member: str) -> bytes:
    """Read one regular file from the archive without unpacking it, and verify its checksum."""
    path = f"{source.project}-{source.version}/{member}" if source.backend else member
    try:
        data = _read_tar(archive, path) if source.backend else _read_zip(archive, path)
    except KeyError:
        raise DataError(f"{archive.name} holds no {path}; its record in {__name__}.SOURCES is wrong") from None
    if data is None:
        raise DataError(f"{path} in {archive.name} isn't a regular file")
    if _sha256(data) != source.members[member]:
        raise DataError(
            f"{path} in {archive.name} has SHA-256 {_sha256(data)}, expected {source.members[member]}. Nothing was "
            "cached. The package index or a proxy serves another file; try another index (`pip config list`)"
        )
    return data


def _read_tar(archive: Path, path: str) -> bytes | None:
    with tarfile.open(archive) as tar:
        info = tar.getmember(path)
        file = tar.extractfile(info) if info.isreg() else None
        return file.read() if file else None


def _read_zip(archive: Path, path: str) -> bytes | None:
    with zipfile.ZipFile(archive) as wheel:
        info = wheel.getinfo(path)
        kind = info.external_attr >> 28  # the file type of a Unix mode: 8 for regular files, 0 if unknown
        return wheel.read(info) if kind in (0, 8) else None


def _write_atomically(path: Path, data: bytes) -> None:
    """Write the file so that a reader sees the whole of it or none, even if the writing is interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Ranking:
    """The documents of several queries: features [N, 136], labels 0 to 4, and query numbers from 0, sorted."""

    features: Array
    labels: NDArray[np.int64]
    queries: NDArray[np.int64]


def load_mslr(part: str) -> Ranking:
    """Load the "train" or "test" part: 5,000 documents of 43 queries each."""
    from sklearn.datasets import load_svmlight_file

    path = fetch("mslr")[f"msn1.fold1.{part}.5k.txt"]
    features, labels, queries = load_svmlight_file(str(path), n_features=136, query_id=True)
    numbered = np.unique(queries, return_inverse=True)[1]
    order = np.argsort(numbered, kind="stable")
    return Ranking(features.toarray().astype(np.float32)[order], labels.astype(np.int64)[order], numbered[order])


@dataclass(frozen=True)
class Ratings:
    """The ratings: users and items numbered from 0, ratings 1 to 5, times in seconds."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    ratings: NDArray[np.int64]
    times: NDArray[np.int64]


def load_movielens() -> Ratings:
    """Load 100,000 ratings by 943 users of 1,682 films."""
    columns = np.loadtxt(fetch("movielens")["ml-100k.inter"], dtype=np.int64, delimiter="\t", skiprows=1)
    users, items, ratings, times = columns.T
    return Ratings(users - 1, items - 1, ratings, times)


def load_lidar() -> tuple[Array, Array, Array]:
    """Load two scans, [N, 4] of x, y, z in metres and intensity, and the 4x4 transform from first to second.

    Beams without a return, stored as points at exactly (0, 0, 0), are left out.
    """
    files = fetch("lidar")
    first, second = (read_ply(files[name]) for name in ("source.ply", "target.ply"))
    transform = np.loadtxt(files["T_target_source.txt"], dtype=np.float32)
    return first[first[:, :3].any(1)], second[second[:, :3].any(1)], transform


def read_ply(path: Path) -> Array:
    """Return the vertices of a binary little-endian PLY file whose properties are all floats, [N, properties]."""
    content = path.read_bytes()
    header, end, body = content.partition(b"end_header\n")
    lines = [line.split() for line in header.decode("ascii", "replace").splitlines()]
    formats = [line[1] for line in lines if line[0] == "format"]
    elements = [line[1:] for line in lines if line[0] == "element"]
    types = [line[1] for line in lines if line[0] == "property"]
    if not end or formats != ["binary_little_endian"] or len(elements) != 1 or set(types) != {"float"}:
        raise DataError(f"{path}: expected a binary little-endian PLY file of one element with float properties")
    vertices = np.frombuffer(body, dtype="<f4", count=int(elements[0][1]) * len(types))
    return vertices.reshape(-1, len(types)).astype(np.float32)
