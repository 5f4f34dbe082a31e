"""Floor 0: text files."""

from __future__ import annotations

from pathlib import Path

from ldm.errors import InputError
from ldm.writing import why


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, whatever the locale, without the byte order mark that editors of Windows put before it.

    Raises `InputError`, in one line, where it cannot be read or is in another encoding.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read ({error.reason} at byte {error.start}); expected UTF-8") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({why(error)}); expected text in UTF-8") from None
