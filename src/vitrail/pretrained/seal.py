"""Seals: which files, of those that are programs, this user made or said to trust.

A compiled model and an exported graph do whatever is written in them. What is under a seal is run; anything
else is refused. A seal is a keyed digest (BLAKE2b, RFC 7693) with a key in this user's cache, which no file
from elsewhere can know.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def seal(said: Mapping[str, Any], files: Sequence[Path]) -> str:
    """The seal of a description, apart from its entry `seal`, and of the files it speaks of.

    Args:
        said: What JSON can hold.
        files: Those that are absent are absent for the check, too.

    Raises:
        ValueError: The key cannot be written.
    """
    key = _key_file()
    try:
        key.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
    except FileExistsError:
        pass  # all seals of this user are made with the same key
    except OSError as error:
        raise ValueError(
            f"cannot write {key} ({error.strerror}): set VITRAIL_CACHE to another folder"
        ) from None
    return _digest(said, files)


def is_sealed(said: Mapping[str, Any], files: Sequence[Path]) -> bool:
    """Whether `said["seal"]` was made here, of these words and files, and nothing changed since."""
    own = str(said.get("seal")).encode()
    return _key_file().is_file() and hmac.compare_digest(_digest(said, files).encode(), own)


def _digest(said: Mapping[str, Any], files: Sequence[Path]) -> str:
    words = {name: value for name, value in said.items() if name != "seal"}
    digest = hashlib.blake2b(json.dumps(words, sort_keys=True).encode(), key=_key_file().read_bytes())
    for path in files:
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def _key_file() -> Path:
    return Path(os.environ.get("VITRAIL_CACHE") or Path.home() / ".cache" / "vitrail") / "seal.key"
