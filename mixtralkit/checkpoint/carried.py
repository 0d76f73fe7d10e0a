"""What of a folder's side files goes along when its checkpoint is converted, and what the target cannot hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtralkit.checkpoint.discover import GGUF, OURS_JSON, Found
from mixtralkit.checkpoint.gguf_vocabulary import side_files
from mixtralkit.checkpoint.quantised import STATED_IN
from mixtralkit.checkpoint.statements import SIDE_FILES, Statements, with_end_ids
from mixtralkit.json_file import read_bytes, read_object
from mixtralkit.model_parameters import HUGGING_FACE_KEYS

_DTYPE_KEYS = ("dtype", "torch_dtype")
# Keys of a config.json that say nothing beyond what every Mixtral is, or that stand elsewhere in the other formats.
_IMPLIED = {
    *HUGGING_FACE_KEYS, *_DTYPE_KEYS, *STATED_IN, "architectures", "model_type", "hidden_act", "tie_word_embeddings",
    "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "num_experts", "eos_token_id",
    "transformers_version", "_name_or_path",
}  # fmt: skip


def carried_files(found: Found, written: Mapping[str, str], dtype: str) -> tuple[dict[str, bytes], list[str]]:
    """Side files of a conversion by name, those that a GGUF file holds in its keys too, and sentences on what is lost.

    The parameters' file keeps its bytes where source and target have the same one and the same dtype, but for our own,
    which says how the files are cut and rounded; all others keep them always. End tokens that only ``config.json`` says
    go to ``generation_config.json`` where there is none.

    Args:
        found: the source.
        written: the target's own JSON files as they would be written without a source.
        dtype: of the target, by name.
    """
    files = {name: text.encode() for name, text in written.items()}
    held = [name for name in SIDE_FILES if (found.folder / name).is_file() and not found.alone]
    notes = []
    if found.kind == GGUF and not {"tokenizer.model", "tokenizer.json"}.intersection(held):
        try:
            files |= side_files(found.parameters)
        except ValueError as error:
            notes.append(f"no tokenizer is written: {error}")
    files |= {name: read_bytes(found.folder / name) for name in held}
    source = found.parameters.name
    stated = read_object(found.parameters) if source.endswith(".json") and source != OURS_JSON else {}
    if source in written and source != OURS_JSON and _is_same_kind(stated, json.loads(written[source])):
        files[source] = _with_dtype(found.parameters, stated, dtype)
        return files, notes
    files, lost = _across(found, files, stated)
    return files, [*notes, *lost]


def _is_same_kind(source: Mapping[str, Any], target: Mapping[str, Any]) -> bool:
    """Whether both speak in Hugging Face's words or both in Mistral's; ``params.json`` may do either."""
    return ("hidden_size" in source) == ("hidden_size" in target)


def _with_dtype(path: Path, stated: Mapping[str, Any], dtype: str) -> bytes:
    said = [key for key in _DTYPE_KEYS if stated.get(key) is not None]
    kept = {key: value for key, value in stated.items() if key not in STATED_IN}  # what is written is not quantised
    if "hidden_size" not in stated or (len(kept) == len(stated) and all(stated[key] == dtype for key in said)):
        return read_bytes(path)
    return (json.dumps({**kept, **dict.fromkeys(said, dtype)}, indent=2) + "\n").encode()


def _across(found: Found, files: dict[str, bytes], stated: Mapping[str, Any]) -> tuple[dict[str, bytes], list[str]]:
    """From one kind of parameters to another."""
    if "hidden_size" not in stated:
        return files, []
    lost = sorted(key for key, value in stated.items() if key not in _IMPLIED and value is not None)
    lost = [key for key in lost if key not in found.config.extra]
    target = next((name for name in ("params.json", OURS_JSON) if name in files), None)
    if target is None:
        return files, []
    ids = Statements.read(found.folder).end_ids
    said = files.get("generation_config.json")
    if ids is not None and (said is None or json.loads(said).get("eos_token_id") is None):
        files["generation_config.json"] = with_end_ids(said and said.decode("utf-8-sig"), ids).encode()
    notes = [f"{target} cannot hold, of {found.parameters.name}: {', '.join(lost)}"] if lost else []
    return files, notes
