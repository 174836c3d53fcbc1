"""The examples get their data safely and run on them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from examples import autograd_tour, contrastive_digits, data, demo, lift_splat, rank_mslr, report, spiking_digits
from examples.agreement import Agreement
from examples.data import DataError, Source

CONTENT = b"one two three"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder that is the only package index pip sees, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def publish(index: Path, monkeypatch: pytest.MonkeyPatch, backend: str, member: str = "data/words.txt") -> Source:
    """Publish an sdist on the index whose setup.py would leave a file behind if it ran."""
    files = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: some_words\nVersion: 1.0\n",
        "setup.py": f"open({str(index / 'executed')!r}, 'w').close()".encode(),
        member: CONTENT,
    }
    if backend != "setuptools.build_meta":
        files["pyproject.toml"] = f'[build-system]\nrequires = ["nowhere"]\nbuild-backend = "{backend}"\n'.encode()
    archive = index / "some_words-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"some_words-1.0/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = Source("some_words", "1.0", sha256(archive.read_bytes()), backend, {"data/words.txt": sha256(CONTENT)})
    monkeypatch.setitem(data.SOURCES, "words", source)
    return source


@pytest.mark.parametrize("backend", ["setuptools.build_meta", "some_backend.build"])
def test_fetch_goes_through_pip_once_and_runs_nothing_of_the_sdist(
    index: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    publish(index, monkeypatch, backend)
    path = data.fetch("words")["words.txt"]
    assert path.read_bytes() == CONTENT
    assert data.cache_folder() in path.parents
    assert [file.name for file in path.parent.iterdir()] == ["words.txt"]
    assert not (index / "executed").exists()

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    assert data.fetch("words") == {"words.txt": path}


def test_a_damaged_cache_is_fetched_again(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish(index, monkeypatch, "setuptools.build_meta")
    path = data.cache_folder() / "some_words-1.0" / "words.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"one two thr")
    archive = index / "some_words-1.0.tar.gz"
    monkeypatch.setattr(data, "_download", lambda s, *_: archive if s is source else pytest.fail("another source"))
    assert data.fetch("words")["words.txt"].read_bytes() == CONTENT


def test_offline_with_an_empty_cache(index: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)rankeval 0\.8\.2.*pip could not download.*copy that folder.*pip said:"):
        data.fetch("mslr")


def test_the_command_says_so_without_a_traceback(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--quick", "--only", "lists", "ranking", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().out
    assert "error: The example needs rankeval 0.8.2" in printed
    assert "No data are needed by: --only lists activations cameras" in printed


def test_another_sdist_than_the_recorded_one(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish(index, monkeypatch, "setuptools.build_meta")
    monkeypatch.setitem(data.SOURCES, "words", dataclasses.replace(source, sha256=sha256(b"another")))
    with pytest.raises(DataError, match="DO NOT MATCH THE HASHES"):
        data.fetch("words")


def test_another_content_than_the_recorded_one(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish(index, monkeypatch, "setuptools.build_meta")
    wrong = dataclasses.replace(source, members={"data/words.txt": sha256(b"another")})
    monkeypatch.setitem(data.SOURCES, "words", wrong)
    monkeypatch.setattr(data, "_download", lambda *_: index / "some_words-1.0.tar.gz")
    with pytest.raises(DataError, match=r"has SHA-256 .* expected .* Nothing was cached"):
        data.fetch("words")
    assert not (data.cache_folder() / "some_words-1.0").exists()


def test_a_member_that_is_missing_or_no_file(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish(index, monkeypatch, "setuptools.build_meta", member="data/others.txt")
    archive = index / "some_words-1.0.tar.gz"
    with pytest.raises(DataError, match=r"holds no some_words-1\.0/data/words\.txt"):
        data._read_member(archive, source, "data/words.txt")
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("some_words-1.0/data/words.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match="isn't a regular file"):
        data._read_member(archive, source, "data/words.txt")


def test_a_cache_that_cannot_be_written(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(index, monkeypatch, "setuptools.build_meta")
    monkeypatch.setattr(data, "_download", lambda *_: index / "some_words-1.0.tar.gz")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(DataError, match="can't be cached: .*Not a directory.* Set XDG_CACHE_HOME"):
        data.fetch("words")


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(data.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(DataError, match="set HOME or XDG_CACHE_HOME"):
        data.cache_folder()


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data._write_atomically(tmp_path / "file", CONTENT)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_examples_touches_neither_network_nor_cache(tmp_path: Path) -> None:
    code = """if True:
        import sys
        import torch
        events = []
        sys.addaudithook(lambda event, _: events.append(event))
        import examples.demo
        assert not {"socket.connect", "socket.getaddrinfo", "subprocess.Popen"} & set(events)
        assert "matplotlib" not in sys.modules
    """
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


def test_read_ply(tmp_path: Path) -> None:
    header = "ply\nformat {}\nelement vertex 2\nproperty float x\nproperty float y\nend_header\n"
    path = tmp_path / "points.ply"
    path.write_bytes(header.format("binary_little_endian 1.0").encode() + np.arange(4, dtype="<f4").tobytes())
    np.testing.assert_array_equal(data.read_ply(path), [[0, 1], [2, 3]])
    path.write_bytes(header.format("ascii 1.0").encode() + b"0 1\n2 3\n")
    with pytest.raises(DataError, match="expected a binary little-endian PLY"):
        data.read_ply(path)


def test_rendered_boxes_are_where_the_cameras_project_them() -> None:
    intrinsics, camera_to_ego = (t[0] for t in lift_splat.draw_cameras(1, torch.Generator().manual_seed(0)))
    x, y, length, width, height, heading = 8.0, 1.0, 4.0, 2.0, 1.5, 0.4
    boxes = torch.tensor([[x, y, 0, length, width, height, heading, 1, 0, 0]])
    front = lift_splat.render(boxes, intrinsics, camera_to_ego)[0]
    rows, columns = ((front[0] > 0.5) & (front[1] == 0)).nonzero().unbind(1)  # red is the box's only colour

    corners = torch.cartesian_prod(torch.tensor([-0.5, 0.5]), torch.tensor([-0.5, 0.5]), torch.tensor([0.0, 1.0]))
    corners = corners * torch.tensor([length, width, height])
    c, s = np.cos(heading), np.sin(heading)
    turn = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float32)
    corners = corners @ turn.T + torch.tensor([x, y, 0])
    pose = camera_to_ego[0]
    u, v, depth = ((corners - pose[:3, 3]) @ pose[:3, :3] @ intrinsics[0].T).unbind(1)
    for seen, projected in ((columns, u / depth), (rows, v / depth)):
        # A corner is the tip of the visible box and may fall between the rays.
        assert abs(seen.min() - projected.min()) < 1.5 and abs(seen.max() - projected.max()) < 1.5


def test_the_truth_of_a_scene_is_its_boxes() -> None:
    boxes = torch.zeros(1, 1, 10)
    boxes[0, 0, :7] = torch.tensor([6.0, -3.0, 0.0, 4.5, 1.5, 2.0, np.pi / 2])  # turned by 90 degrees
    x, y = lift_splat.truth(boxes)[0].nonzero().unbind(1)
    cells = lift_splat.GRID // 2 + np.array([6.0 - 0.75, 6.0 + 0.75, -3.0 - 2.25, -3.0 + 2.25]) / lift_splat.CELL
    assert [x.min(), x.max() + 1, y.min(), y.max() + 1] == cells.tolist()
    assert len(x) == 12


def test_a_check_of_nan_fails() -> None:
    assert not report.Check("gap", float("nan"), 1.0).holds
    assert not report.Check("gain", float("nan"), 0.0, at_least=True).holds


def test_the_examples_run_on_the_real_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few steps of each example run; without the data the test fails and says how to get them."""
    code = demo.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    for title in (
        "List losses: long lists", "Summing into a bird's-eye view", "Activations: one bit per element",
        "Ranking: MSLR-WEB slice", "Recommending: MovieLens 100K", "Bird's-eye view", "Lift-Splat: synthetic scenes",
    ):  # fmt: skip
        assert title in printed
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {
        "ranking.png", "recommending.png", "bev_scan2.png", "bev_training.png",
        "lift_splat_views.png", "lift_splat_training.png", "summary.png",
    }  # fmt: skip
    assert all(column in printed for column in ("what", "ours", "theirs", "ratio"))
    assert re.search(r"Set-up: .*\n(.*\n)*After set-up: \d+ s, \d+ s of processor time; every claim holds", printed)


def test_the_closing_table_is_80_columns_wide_at_most() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    gains = [
        report.Gain("what is measured " * 9, unit, 0.5, 123456.0, "a group of rows " * 9) for unit in ("ms", "MiB")
    ]
    report.show_gains(console, gains)
    printed = console.export_text()
    assert "512 KiB" in printed and "123,456 ms" in printed and "246,912x" in printed
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80


def test_a_part_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--quick", "--eager", "--only", "lists", "--seed", "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "List losses" in printed and "compiled" not in printed and "Lift-Splat" not in printed
    assert [path.name for path in tmp_path.glob("*.png")] == ["summary.png"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("terms", [1, 1000, 1_000_000])
def test_two_orders_of_a_sum_agree_within_the_bound_and_two_sums_do_not(dtype: torch.dtype, terms: int) -> None:
    x = torch.rand(terms, dtype=dtype, generator=torch.Generator().manual_seed(0)) - 0.5
    agreement = Agreement("sums")
    agreement.compare(x.cumsum(0)[-1], x.flip(0).sum(), terms, x.abs().sum())
    assert agreement.check().holds
    agreement.compare(x.sum() + 0.01 * x.abs().sum(), x.sum(), terms, x.abs().sum())
    assert not agreement.check().holds


def test_a_nan_and_a_wrong_zero_are_no_agreement() -> None:
    one, zero, nan = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(float("nan"))
    agreement = Agreement("zero")
    agreement.compare(zero, zero, 1)
    assert agreement.check().holds
    agreement.compare(torch.tensor(1e-30), zero, 1)
    assert not agreement.check().holds
    for pair in ((nan, one), (one, nan)):
        agreement = Agreement("NaN")
        agreement.compare(*pair, 1)
        agreement.compare(one, one, 1)
        assert not agreement.check().holds


def test_the_plain_lambda_loss_is_that_of_the_op_where_lists_are_padded() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    labels = torch.randint(5, (3, 7), generator=generator)
    labels[1] = 2  # all items are tied
    lengths = torch.tensor([7, 6, 3])
    ours, plain = (loss(scores, labels, lengths) for loss in (rank_mslr.our_loss, rank_mslr.plain_loss))
    torch.testing.assert_close(ours, plain)


def test_the_spiking_network_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert spiking_digits.main(["--quick", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    assert (tmp_path / "spiking.png").exists()


def test_the_contrastive_encoder_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert contrastive_digits.main(["--quick", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    assert (tmp_path / "contrastive.png").exists()


def test_the_tour_of_autograd_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert autograd_tour.main([]) == 0
    assert capsys.readouterr().out.endswith("every result is as shown\n")
