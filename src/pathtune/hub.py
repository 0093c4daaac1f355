"""Sharing a delta: pushing it to a folder or a hub repository, and pulling it."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pathtune import files, modelcard
from pathtune.deltafile import DeltaFile
from pathtune.errors import PathtuneError, UsageError
from pathtune.loading import load, models

DELTA, SUMS = "delta.safetensors", "SHA256SUMS"
#: What is shared of a run, where it is there. Settings name files of one's own machine.
SHARED = (DELTA, modelcard.CARD, "metrics.json")
_SCHEME = "hf://"
_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def repository(address: str) -> str | None:
    """Return ``owner/name`` of a hub repository, or None for a local path.

    Parameters
    ----------
    address
        ``hf://owner/name``, or ``owner/name`` where that is no existing path.

    Raises
    ------
    UsageError
        If what follows ``hf://`` is no ``owner/name``.
    """
    if address.startswith(_SCHEME):
        name = address.removeprefix(_SCHEME)
        if not _REPOSITORY.fullmatch(name):
            raise UsageError(f"{address!r}: write {_SCHEME}owner/name")
        return name
    if Path(address).exists() or not _REPOSITORY.fullmatch(address):
        return None
    return address


def push(
    source: Path, target: str, *, overwrite: bool = False, private: bool = False
) -> dict[str, Any]:
    """Share a delta with its model card, results and checksums.

    Parameters
    ----------
    source
        Run folder or delta file.
    target
        Folder, ``hf://owner/name`` or ``owner/name``; see `repository`.
    overwrite
        Replace a delta that is there. A hub keeps the old one in its history.
    private
        Make a new repository private.

    Returns
    -------
    dict
        ``target`` and the ``files`` that were written.

    Raises
    ------
    UsageError
        If there is a delta already, or the hub's client is not installed.
    PathtuneError
        If the source has no sound delta, or the hub refuses.
    """
    repo = repository(target)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = _gather(Path(source), folder, title=Path(target).name)
        if repo is None:
            there = Path(target)
            if (there / DELTA).exists() and not overwrite:
                raise UsageError(
                    f"{there / DELTA} exists; add --overwrite to replace it"
                )
            for part in written:
                files.write_bytes(there / part, (folder / part).read_bytes())
        else:
            _upload(folder, repo, overwrite=overwrite, private=private)
    return {"target": target, "files": written}


def _gather(source: Path, folder: Path, *, title: str) -> list[str]:
    """Put everything that is shared into a folder; return the names."""
    path = source / DELTA if source.is_dir() else source
    delta = DeltaFile.load(path)
    (folder / DELTA).write_bytes(path.read_bytes())
    if source.is_dir():
        for name in SHARED:
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
    if not (folder / modelcard.CARD).exists():
        card = modelcard.render(delta, name=title)
        (folder / modelcard.CARD).write_text(card, encoding="utf-8")
    names = [name for name in SHARED if (folder / name).exists()]
    sums = "".join(f"{files.sha256(folder / name)}  {name}\n" for name in names)
    (folder / SUMS).write_text(sums, encoding="utf-8")
    return [*names, SUMS]


def _upload(folder: Path, repo: str, *, overwrite: bool, private: bool) -> None:
    with _client(repo) as hub:
        api = hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        if not overwrite and api.file_exists(repo, DELTA):
            raise UsageError(
                f"{repo} has a {DELTA}; add --overwrite to put a new version there"
            )
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload with pathtune"
        )


def pull(
    source: str,
    output: Path | None = None,
    *,
    model: str | None = None,
    overwrite: bool = False,
    trust_checkpoint: bool = False,
) -> dict[str, Any]:
    """Fetch a delta, check that it is whole and that it fits the base.

    Parameters
    ----------
    source
        Folder or repository that `push` wrote; see `repository`.
    output
        Folder to write; the source's name by default.
    model
        The base to check against; by default the released model that the delta names,
        where that is available here.
    overwrite
        Write into a folder that is not empty.
    trust_checkpoint
        Open a pickled base of unknown hash.

    Returns
    -------
    dict
        ``delta`` (path), ``model`` (the base it was made for), ``files``, ``output``,
        and ``base_checked``: whether the base's fingerprint was compared.

    Raises
    ------
    UsageError
        If the output is not empty, or the hub's client is not installed.
    PathtuneError
        If there is no delta, it is damaged, or it was made for another base.
    """
    repo = repository(source)
    there = Path(source)
    output = Path(output or Path(source).name)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not overwrite:
            raise UsageError(
                f"{output} exists and is not empty; choose another --output"
            )
        if repo is None and output.resolve() == there.resolve():
            raise UsageError(f"{output} is the source itself; choose another --output")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if repo is not None:
            _download(repo, folder)
        elif there.is_dir():
            for part in (*SHARED, SUMS):
                if (there / part).is_file():
                    (folder / part).write_bytes((there / part).read_bytes())
        else:
            raise PathtuneError(f"{source}: no such folder")
        _require_sums(folder, source)
        delta = DeltaFile.load(folder / DELTA)
        checked = _require_base(delta, model, trust_checkpoint=trust_checkpoint)
        written = [part for part in (*SHARED, SUMS) if (folder / part).exists()]
        for part in written:
            files.write_bytes(output / part, (folder / part).read_bytes())
    return {
        "delta": str(output / DELTA),
        "model": delta.metadata.get("model"),
        "output": str(output),
        "files": written,
        "base_checked": checked,
    }


def _download(repo: str, folder: Path) -> None:
    with _client(repo) as hub:
        api = hub.HfApi()
        for part in (*SHARED, SUMS):
            if api.file_exists(repo, part):
                fetched = hub.hf_hub_download(repo, part, endpoint=api.endpoint)
                (folder / part).write_bytes(Path(fetched).read_bytes())


def _require_sums(folder: Path, source: str) -> None:
    """Compare the files with their checksums."""
    if not (folder / DELTA).exists():
        raise PathtuneError(f"{source} has no {DELTA}")
    if not (folder / SUMS).exists():
        raise PathtuneError(
            f"{source} has no {SUMS}, so nothing says whether {DELTA} is whole; share "
            "deltas with pathtune push"
        )
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if name not in SHARED or not (folder / name).is_file():
            raise PathtuneError(f"{source}: {SUMS} lists {name!r}, which is not there")
        # A card may be edited where it is shared; a delta may not.
        if name == DELTA and files.sha256(folder / name) != digest:
            raise PathtuneError(
                f"{source}: {DELTA} differs from its checksum; it is damaged or was "
                "changed after it was pushed"
            )


def _require_base(
    delta: DeltaFile, model: str | None, *, trust_checkpoint: bool
) -> bool:
    """Compare a delta's base with the user's; return whether there was one."""
    name = model or delta.metadata.get("model")
    if model is None and name not in {i.name for i in models() if i.available}:
        return False
    backend = load(
        str(name),
        device="cpu",
        head=delta.metadata.get("head"),
        trust_checkpoint=trust_checkpoint,
    )
    delta.require_base(backend.stored_weights())
    return True


@contextlib.contextmanager
def _client(repo: str) -> Iterator[Any]:
    """Yield the hub's client; turn what it raises into one sentence."""
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise UsageError(
            f"{repo} is on the Hugging Face hub, which needs its client: pip install "
            "'pathtune[hub]'. A local folder needs none; write ./ before its name"
        ) from error
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield hub
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no repository: {_first(error)}") from error
    except (HTTPError, OSError) as error:
        raise PathtuneError(
            f"the hub does not give or take {repo}: {_first(error)}. A private or new "
            "repository needs a login (hf auth login)"
        ) from error


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
