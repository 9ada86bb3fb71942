"""What an offline run wrote down: the record of `wandb` is a LevelDB log of protocol buffers."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32 * 1024, struct.Struct("<IHB")
FULL, FIRST, LAST = 1, 2, 4


def messages(path: Path) -> Iterator[bytes]:
    """The records of a LevelDB log: fragments in blocks of 32 KiB, each behind a checksum, a length and a kind."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, parts = 7, []
    while place + HEADER.size <= len(content):
        if BLOCK - place % BLOCK < HEADER.size:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(content, place)
        place += HEADER.size
        if kind in (FULL, FIRST):
            parts = []
        parts.append(content[place : place + length])
        place += length
        if kind in (FULL, LAST):
            yield b"".join(parts)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Of every record in ``folder/wandb``, the oldest first: config, history (one dict per step), artifacts."""
    return [_read(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def _read(path: Path) -> dict[str, Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, Any] = {"config": {}, "history": [], "artifacts": [], "path": path}
    for message in messages(path):
        record = Record.FromString(message)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            keys = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found["history"].append(keys)
        elif kind == "artifact":
            found["artifacts"].append(record.artifact)
    return found
