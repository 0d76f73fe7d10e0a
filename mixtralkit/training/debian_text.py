"""Free text from Debian packages, in four domains: scripture, python, docs, man.

Packages are fetched with ``apt-get download`` and unpacked into a folder; nothing is installed.
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mixtralkit.training.corpus import Document

PACKAGES = {
    "scripture": ("bible-kjv", "bible-kjv-text"),
    "python": ("libpython3.11-stdlib", "libpython3.11-minimal", "idle-python3.11"),
    "docs": ("python3.11-doc",),
    "man": (
        "manpages", "manpages-dev", "bash", "binutils-common", "bzip2", "coreutils", "cpio", "diffutils", "e2fsprogs",
        "findutils", "gawk", "git-man", "grep", "gzip", "iproute2", "less", "make", "openssh-client", "openssl",
        "procps", "rsync", "sed", "systemd", "systemd-container", "tar", "util-linux", "xz-utils",
    ),
}  # fmt: skip

# Tests are not library code; these modules are generated tables, or the documentation once more.
_SKIPPED_PYTHON = re.compile(r"/(test|tests|idle_test|pydoc_data|encodings/(cp|iso|mac|koi|kz|ptcp|hp|tis)|_sysconfig)")
_TROFF_SETTINGS = b".de ad\n..\n.de hy\n..\n.na\n.nh\n"  # ragged lines, no hyphens, whatever the page asks for


def fetch_packages(folder: Path, names: Sequence[str]) -> list[str]:
    """Downloads each package that ``folder/packages`` lacks and unpacks all into ``folder/unpacked``.

    Returns the file names, which carry the versions. RuntimeError with what apt says when one cannot be had.
    """
    for tool in ("apt-get", "dpkg-deb", "groff"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} is needed to collect the text and is not installed; run this on Debian")
    packages, unpacked = folder / "packages", folder / "unpacked"
    packages.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not list(packages.glob(f"{name}_*.deb"))]
    if missing:
        got = subprocess.run(["apt-get", "download", "-q", *missing], cwd=packages, capture_output=True, text=True)
        if got.returncode:
            raise RuntimeError(f"apt-get download failed: {got.stderr.strip()}")
    files = [next(packages.glob(f"{name}_*.deb")) for name in names]
    for file in files:
        subprocess.run(["dpkg-deb", "-x", file, unpacked], check=True)
    return [file.name for file in files]


def read_domain(domain: str, unpacked: Path) -> list[Document]:
    """The documents of one of ``PACKAGES``' domains, in the order of their names."""
    readers = {"scripture": scripture, "python": python_source, "docs": python_docs, "man": man_pages}
    return list(readers[domain](unpacked))


def scripture(unpacked: Path) -> Iterator[Document]:
    """A document for each chapter: its heading, then a numbered verse a line."""
    command = [unpacked / "usr/bin/bible", "-p", f"{unpacked}/usr/lib/", "-l10000", "gen1-rev22:21"]
    printed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    for chapter in re.split(r"\n(?=[1-9A-Z])", printed.strip()):
        heading, *verses = [line.strip() for line in chapter.strip().splitlines() if line.strip()]
        yield Document(f"scripture/{heading}", (heading + "\n\n" + "\n".join(verses) + "\n").encode())


def python_source(unpacked: Path) -> Iterator[Document]:
    """Every module of the standard library."""
    root = unpacked / "usr/lib/python3.11"
    for path in sorted(root.rglob("*.py")):
        name = f"/{path.relative_to(root)}"
        text = path.read_bytes()
        if not _SKIPPED_PYTHON.search(name) and text.strip() and _is_utf8(text):
            yield Document(f"python{name}", text)


def python_docs(unpacked: Path) -> Iterator[Document]:
    """The reStructuredText pages of Python's documentation."""
    root = unpacked / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(root.rglob("*.rst.txt")):
        text = path.read_bytes()
        if text.strip() and _is_utf8(text):
            yield Document(f"docs/{path.relative_to(root)}", text)


def man_pages(unpacked: Path) -> Iterator[Document]:
    """Every page of the packages, rendered as ASCII, 78 columns; pages that only point to another are left out."""
    root = unpacked / "usr/share/man"
    paths = sorted(path for path in root.glob("man*/*.gz") if not path.is_symlink())
    with ThreadPoolExecutor() as pool:
        for path, text in zip(paths, pool.map(_render_page, paths), strict=True):
            if text:
                yield Document(f"man/{path.name.removesuffix('.gz')}", text)


def _render_page(path: Path) -> bytes:
    source = gzip.decompress(path.read_bytes())
    if source.startswith(b".so ") or len(source) < 300:
        return b""
    command = ["groff", "-k", "-t", "-mandoc", "-Tascii", "-P-cbou", "-rLL=78n"]
    rendered = subprocess.run(command, input=_TROFF_SETTINGS + source, capture_output=True, check=True).stdout
    return re.sub(rb"\n{3,}", b"\n\n", rendered).strip() + b"\n"


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
