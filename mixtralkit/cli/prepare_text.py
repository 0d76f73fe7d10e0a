"""``mixtralkit prepare-text``: the text that the shipped model is trained on, and chat made from it."""

from __future__ import annotations

import json
from pathlib import Path

from mixtralkit.cli.run import command
from mixtralkit.config.options import Count, NotNegative
from mixtralkit.training import debian_text
from mixtralkit.training.chat_pairs import dialogues
from mixtralkit.training.corpus import SPLITS, Document, split, write_documents
from mixtralkit.training.run import prepare_tokens


@command
def prepare_text(output: Path, heldout_percent: NotNegative = 4.0, vocab_size: Count = 4096) -> None:
    """Writes OUTPUT/train/DOMAIN.jsonl, OUTPUT/heldout/DOMAIN.jsonl, OUTPUT/sources.json and OUTPUT/tokens.npz.

    Needs Debian with its package sources reachable, and groff. Documents are chapters, modules and pages; which ones
    are held out depends on their names alone.

    Args:
        output: folder for the text; packages are kept in OUTPUT/packages and used again.
        heldout_percent: share of the documents that is held out.
        vocab_size: pieces of the tokenizer that is trained on the text for tokens.npz.
    """
    sources: dict[str, list[str]] = {}
    all_parts: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for domain, packages in debian_text.PACKAGES.items():
        sources[domain] = debian_text.fetch_packages(output, packages)
        documents = debian_text.read_domain(domain, output / "unpacked")
        for name, part in split(documents, heldout_percent).items():
            _write(output, name, domain, part)
            all_parts[name] += part
    for name, part in all_parts.items():
        _write(output, name, "chat", dialogues(part))
    (output / "sources.json").write_text(json.dumps(sources, indent=1) + "\n", encoding="utf-8")
    prepare_tokens([output], output / "tokens.npz", vocab_size)


def _write(folder: Path, part: str, domain: str, documents: list[Document]) -> None:
    write_documents(folder / part / f"{domain}.jsonl", documents)
    size = sum(document.num_bytes for document in documents)
    print(f"{part:8} {domain:10} {len(documents):6} documents {size / 1e6:7.2f} MB", flush=True)
