"""Comments and docstrings open with a main clause, not with a fragment such as "Whether ..." or "Of ..."."""

import ast
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("custom_ops", "triton_kernels", "csrc", "benchmarks", "examples", "tests", "docs", ".ci")
FRAGMENT = re.compile(r"(what|of|whether|which|whose|nor|than)\b", re.IGNORECASE)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def python_notes(path: Path) -> list[str]:
    found = [ast.get_docstring(n) or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, DOCUMENTED)]
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    lines = {token.start[0] for token in tokens if token.line.lstrip().startswith("#")}
    return found + [token.string.lstrip("#: ") for token in tokens if token.start[0] - 1 not in lines]


def cpp_notes(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    notes = zip(["", *lines], (re.search(r"(?:^|\s)// ?(.*)", line) for line in lines))
    return [note[1] for above, note in notes if note and not above.lstrip().startswith("//")]


def test_comments_and_docstrings_open_with_a_main_clause() -> None:
    files = [ROOT / "setup.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    notes = [(path, note) for path in files if path.suffix == ".py" for note in python_notes(path)]
    notes += [(path, note) for path in files if path.suffix in (".cpp", ".h") for note in cpp_notes(path)]
    assert len(notes) > 3000
    fragments = [f"{path.relative_to(ROOT)}: {note}" for path, note in notes if FRAGMENT.match(note)]
    assert not fragments, "\n".join(fragments)
