"""The project itself: light imports, documented names, consistent metadata, links."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import typer
import yaml

import pathtune
from pathtune import cli, discovery
from pathtune.config import RunConfig
from pathtune.methods import base
from pathtune.paths import Path, PathWeight
from tests.conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HEAVY = ("torch", "ase", "e3nn", "sevenn")
VENDORS = (
    *("e3nn", "sevenn", "mace", "nequip", "chgnet"),
    *("torch_geometric", "matplotlib"),
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REGISTERED = [
    *discovery.names("backends"),
    *discovery.names("methods"),
]


def tracked():
    """Return the files that git has, relative to the root."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


MARKDOWN = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "benchmarks", "docs", "examples/*")
    for path in ROOT.glob(f"{folder}/*.md")
)


# Imports


def imported(code, modules):
    """Run code in a fresh interpreter; return which of the modules it has imported."""
    code += (
        f"\nimport json; print(json.dumps(sorted({set(modules)} & set(sys.modules))))"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return json.loads(result.stdout.splitlines()[-1])


HELP = """
sys.argv = ["pathtune", "--help"]
from pathtune.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def test_help_imports_nothing_heavy():
    assert imported(HELP, HEAVY) == []


def test_a_heavy_import_would_be_seen():
    assert imported(f"import ase\n{HELP}", HEAVY) == ["ase"]


def test_no_module_imports_a_vendor():
    everything = """
import importlib, pkgutil, pathtune
for module in pkgutil.walk_packages(pathtune.__path__, "pathtune."):
    if module.name != "pathtune.__main__":
        importlib.import_module(module.name)
"""
    assert imported(everything, VENDORS) == []


# Names


def commands(group=None, prefix="pathtune"):
    """Return the full names of all commands."""
    group = group or typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


COMMANDS = dict(commands())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_names_every_command(command):
    assert f"`{command}" in README


@pytest.mark.parametrize("name", REGISTERED, ids="name={}".format)
def test_the_docs_name_every_backend_and_method(name):
    assert f"`{name}`" in README
    docs = [ROOT / "docs" / page for page in ("extending.md", "concepts.md")]
    assert any(f"`{name}`" in page.read_text(encoding="utf-8") for page in docs)


@pytest.mark.parametrize("name", discovery.names("backends"), ids="name={}".format)
def test_every_backend_has_an_extra_and_a_marker(name):
    assert name in PYPROJECT["project"]["optional-dependencies"]
    markers = PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]
    assert any(marker.startswith(f"{name}:") for marker in markers)


def test_every_released_model_is_in_the_readme():
    for info in pathtune.models():
        assert f"`{info.name}`" in README


def blocks(page, language):
    """Return the fenced blocks of one language in a markdown page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", MARKDOWN)
def test_the_commands_in_the_docs_exist(page):
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["pathtune"]:
                continue
            n = 3 if words[1] == "delta" else 2
            name = " ".join(words[:n])
            assert name in COMMANDS, line
            known = {flag for p in COMMANDS[name].params for flag in p.opts}
            used = {word for word in words[n:] if word.startswith("-")}
            assert used <= known, line


@pytest.mark.parametrize("page", MARKDOWN)
def test_the_python_in_the_docs_exists(page):
    for block in blocks(page, "python"):
        compile(block, page, "exec")
        for name in re.findall(r"\bpathtune\.(\w+)\(", block):
            assert name in pathtune.__all__


def test_the_example_method_of_the_docs_works():
    block = next(b for b in blocks("docs/extending.md", "python") if "Change" in b)
    module = types.ModuleType("path_scale")
    sys.modules[module.__name__] = module
    try:
        exec(compile(block, "docs/extending.md", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    paths = (Path(0, 2, (1, 2), "0e", "0e"), Path(2, 6, (2, 2), "1o", "1o"))
    weights = [
        PathWeight("a", (6,), "linear", "interaction", 0, paths),
        PathWeight("b", (2,), "linear", "readout"),
    ]
    values = [torch.arange(6.0).double(), torch.tensor([7.0, 8.0]).double()]
    change = module.Change(
        module.Config(),
        [
            base.Target(w, np.arange(w.size), v)
            for w, v in zip(weights, values, strict=True)
        ],
        total_parameters=8,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )
    assert [part.tolist() for part in change()] == [[0] * 6, [0] * 2]
    optimizer = torch.optim.SGD(change.param_groups())
    torch.cat(change()).sum().backward()
    assert change.scale.grad.tolist() == [1, 14, 15]
    optimizer.step()
    changed = torch.cat(change()) / torch.cat(values)
    assert changed[1:].tolist() == pytest.approx([-0.01] + 4 * [-0.14] + 2 * [-0.15])


# Metadata


def test_the_versions_agree():
    assert PYPROJECT["project"]["version"] == pathtune.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{pathtune.__version__}]" in changelog
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == pathtune.__version__


def test_the_citation_has_what_the_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()


def test_every_public_name_can_be_imported():
    for name in pathtune.__all__:
        getattr(pathtune, name)
    for kind in ("backends", "methods"):
        for name in discovery.names(kind):
            importlib.import_module(f"pathtune.{kind}.{name}")


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("examples/*/config.yaml")), ids=lambda p: p.parent.name
)
def test_the_examples_settings_are_valid(path):
    config = RunConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    discovery.load("methods", config.method)
    assert any(info.name == config.model for info in pathtune.models())
    for data in (config.train, config.valid, config.test):
        assert (ROOT / data).parent == path.parent


# Files


@pytest.mark.parametrize("page", MARKDOWN)
def test_local_links_resolve(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.exists(), f"{page} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text("utf-8"), re.MULTILINE)
            slugs = {
                re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings
            }
            assert anchor in slugs, f"{page} links to {target}; there is {slugs}"


# Written in pieces, so that this file does not find itself.
_ROOTS = "|".join(("work", "tmp", "home", "root", "opt", "Users"))
_HOSTS = "|".join(
    re.escape(".".join(parts))
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("anaconda", "org"),
        ("anaconda", "com"),
    )
)
FORBIDDEN = re.compile(
    rf"(?<![\w.}}~*-])/(?:{_ROOTS})/|{_HOSTS}|--(?:extra-)?index-url"
)


def found_forbidden(text):
    return [match.group() for match in FORBIDDEN.finditer(text)]


def test_no_file_names_a_machine_path_or_a_registry():
    for name in tracked():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        assert not found_forbidden(text), name


def test_a_machine_path_would_be_found():
    assert found_forbidden("see " + "/".join(("", "home", "me", "train.xyz")))
    assert found_forbidden("https://" + ".".join(("pypi", "org")) + "/simple")
    assert not found_forbidden("examples/home/train.xyz and {tmp_path}/home/x")


def test_the_tables_of_the_benchmarks_are_those_of_the_results():
    command = [sys.executable, "-X", "utf8", "benchmarks/compare.py", "tables"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    written = (ROOT / "benchmarks" / "tables.md").read_text(encoding="utf-8")
    assert done.stdout.decode() == written
