"""The command line as tests see it, in this process or in one of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import ase.io
import pytest

from pathtune.cli import main
from tests.conftest import ROOT, molecules


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of one command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line meant for the user; there is exactly one, and no traceback."""
        assert "Traceback" not in self.out + self.err, self.err
        lines = [x for x in self.err.splitlines() if x.startswith("pathtune: error:")]
        assert len(lines) == 1, self.err
        assert self.err.rstrip("\n").endswith(lines[0]), self.err
        return lines[0]


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run a command in this process: nothing has to be imported again."""

    def run(*args) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["pathtune", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Outcome(stop.value.code or 0, captured.out, captured.err)

    return run


def environment() -> dict[str, str]:
    """Return the variables of a process that runs the source of this checkout."""
    inherited = os.environ.get("PYTHONPATH")
    paths = [str(ROOT / "src"), *([inherited] if inherited else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def command(*args) -> list[str]:
    """Return the command line of a process."""
    return [sys.executable, "-m", "pathtune", *map(str, args)]


def run_process(*args, before: str = "") -> Outcome:
    """Run a command in a process of its own.

    Parameters
    ----------
    *args
        Arguments of ``pathtune``.
    before
        Python code that runs first, e.g. to break something.
    """
    line = command(*args)
    if before:
        code = f"{before}\nfrom pathtune.cli import main\nmain()"
        line = [sys.executable, "-c", code, *line[3:]]
    done = subprocess.run(
        line, env=environment(), capture_output=True, text=True, timeout=180
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def message_of(error: str) -> str:
    """Return text without the line breaks and colours a terminal adds."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", " ".join(error.split()))


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its content; empty folders too."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class Run:
    """A finished run and what it was made from."""

    folder: Path
    model: str
    train: str
    valid: str
    test: str

    @property
    def delta(self) -> Path:
        return self.folder / "delta.safetensors"

    @property
    def flags(self) -> list[str]:
        return ["--model", self.model, "--train", self.train, "--valid", self.valid]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_sevennet) -> Run:
    """Run the tiny SevenNet for 6 steps with an evaluation every 2; do not change."""
    folder = tmp_path_factory.mktemp("finished")
    files = {}
    for seed, (name, n) in enumerate({"train": 6, "valid": 2, "test": 2}.items()):
        files[name] = str(folder / f"{name}.xyz")
        ase.io.write(files[name], molecules(n, seed))
    run = Run(folder / "run", str(tiny_sevennet), **files)
    line = ["pathtune", "finetune", *run.flags, "--test", run.test, "--output"]
    line += [str(run.folder), "--max-steps", "6", "--eval-every", "2"]
    line += ["--trust-checkpoint"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATHTUNE_HOME", str(folder / "home"))
        patch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return run
