"""JSON at the edge: strict in both directions, written atomically.

pydantic takes 60 ms and tempfile 10 ms to import: only who reads or writes a file waits for them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zplan.errors import ConfigError, MachineError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
_MAX_JSON_BYTES = 8 << 20
"""A configuration is kilobytes; more is a wrong file."""
_BYTE_ORDER_MARK = "\ufeff"
_READERS = "it must be UTF-8 without a byte order mark, as accelerate reads it (utils/deepspeed.py)"
_AS_UTF8 = "save it as UTF-8 without BOM"


_adapters: dict[Any, TypeAdapter[Any]] = {}
"""Building one takes milliseconds, and a search converts thousands of values."""


def _adapter(kind: type[T]) -> TypeAdapter[T]:
    if kind not in _adapters:
        from pydantic import TypeAdapter

        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def load_json(path: Path | str, *, on_duplicate: Callable[[str], None] | None = None) -> Any:
    """Parse a JSON file.

    Args:
        on_duplicate: called with each key that one object has twice; the last one counts.

    Raises:
        ConfigError: missing, unreadable, larger than 8 MiB, not UTF-8 or with a byte order mark, not JSON.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise ConfigError(
                f"{path} is {size} bytes", because="a configuration file is at most 8 MiB", fix="another file"
            )
        pairs = None if on_duplicate is None else partial(_object, on_duplicate)
        text = path.read_text(encoding="utf-8")
        if text.startswith(_BYTE_ORDER_MARK):
            raise ConfigError(f"{path} begins with a byte order mark", because=_READERS, fix=_AS_UTF8)
        return json.loads(text, object_pairs_hook=pairs)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist", fix="check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}", because=_READERS, fix=_AS_UTF8) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}", fix="another file") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}", fix=f"python -m json.tool {path}") from error


def _object(on_duplicate: Callable[[str], None], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            on_duplicate(key)
        seen[key] = value
    return seen


def load(kind: type[T], path: Path | str) -> T:
    """Load a dataclass; unknown keys and wrong types are errors, all named at once.

    Raises:
        ConfigError: as `load_json`, or the content does not describe a `kind`.
    """
    return from_data(kind, load_json(path), name=str(path))


def from_data(kind: type[T], data: Any, *, name: str) -> T:
    """Build a dataclass from parsed JSON. Raises ConfigError with every problem."""
    from pydantic import ValidationError

    unknown = _unknown_keys(kind, data)
    try:
        value = _adapter(kind).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, item['loc'])) or 'the top'}: {item['msg']}" for item in error.errors()]
        raise _not_valid(kind, name, unknown + found) from error
    if unknown:
        raise _not_valid(kind, name, unknown)
    return value


def _not_valid(kind: type[Any], name: str, problems: list[str]) -> ConfigError:
    return ConfigError(
        f"{name} is not a valid {kind.__name__}", problems=tuple(problems),
        because="every key is checked, and one too many is an error too", fix="another file, or mend the lines above",
    )  # fmt: skip


def _unknown_keys(kind: type[Any], data: Any) -> list[str]:
    """Keys of `data` that a round trip through `kind` would lose. pydantic ignores extras of plain dataclasses."""
    from pydantic import ValidationError

    try:
        value = _adapter(kind).validate_json(json.dumps(data), strict=True)
    except ValidationError:
        return []
    kept = to_data(value)
    return sorted(_missing(data, kept, ""))


def _missing(given: Any, kept: Any, at: str) -> list[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        found: list[str] = []
        for key, value in given.items():
            path = f"{at}.{key}" if at else str(key)
            found += [f"{path}: unknown key"] if key not in kept else _missing(value, kept[key], path)
        return found
    if isinstance(given, list) and isinstance(kept, list):
        return [
            line for i, (a, b) in enumerate(zip(given, kept, strict=False)) for line in _missing(a, b, f"{at}[{i}]")
        ]
    return []


def to_data(value: Any) -> Any:
    """A dataclass as plain JSON data."""
    return _adapter(type(value)).dump_python(value, mode="json")


def save(value: Any, path: Path | str) -> None:
    """Write a dataclass as JSON; readers see the old file or the new one, never half of one."""
    save_json(to_data(value), path)


def save_json(data: Any, path: Path | str) -> None:
    """Write JSON atomically: temporary file in the same folder, fsync, rename.

    Raises:
        MachineError: no space, no permission.
    """
    save_text(json.dumps(data, indent=2, allow_nan=False) + "\n", path)


def save_text(text: str, path: Path | str) -> None:
    """Write text atomically. Raises MachineError when the disk is full or the folder is not writable."""
    import tempfile

    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as stream:
            temporary = stream.name
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # NamedTemporaryFile's 0600 is for secrets
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise MachineError(
            f"{path} cannot be written: {error.strerror or error}", fix="free space, or --out elsewhere"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    """The process's file mode mask; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
