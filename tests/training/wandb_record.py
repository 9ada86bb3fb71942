"""Read the record of an offline run: `wandb` writes a LevelDB log of protocol buffers."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32 * 1024, struct.Struct("<IHB")
FULL, FIRST, LAST = 1, 2, 4


def messages(path: Path) -> Iterator[bytes]:
    """Yield the records of a LevelDB log: fragments in blocks of 32 KiB, each after a checksum, a length and a kind."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    offset, parts = 7, []
    while offset + HEADER.size <= len(content):
        if BLOCK - offset % BLOCK < HEADER.size:
            offset += BLOCK - offset % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(content, offset)
        offset += HEADER.size
        if kind in (FULL, FIRST):
            parts = []
        parts.append(content[offset : offset + length])
        offset += length
        if kind in (FULL, LAST):
            yield b"".join(parts)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return config, history (one dict per step) and artifacts of every record in ``folder/wandb``, oldest first."""
    return [_read(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def _read(path: Path) -> dict[str, Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    content: dict[str, Any] = {"config": {}, "history": [], "artifacts": [], "path": path}
    for message in messages(path):
        record = Record.FromString(message)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            content["run"] = record.run
            content["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            content["config"] |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            keys = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            content["history"].append(keys)
        elif kind == "artifact":
            content["artifacts"].append(record.artifact)
    return content
