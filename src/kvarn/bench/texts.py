"""Real prose to read: a file, or the language reference that comes with every Python."""

from pathlib import Path
from pydoc_data.topics import topics

from ..errors import KvarnError


def read(path: Path | None) -> str:
    """The text of a file in UTF-8; None: Python's language reference, whose words differ a little between versions."""
    if path is None:
        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise KvarnError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KvarnError(f"{path}: not a text in UTF-8") from error
