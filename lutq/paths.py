"""Where the files shipped with lutq are: beside the package in a wheel, at the repository's root in an editable install; and
whether a file can be written where a user wants it.
"""

from pathlib import Path

from lutq.errors import LutqError

PACKAGE = Path(__file__).resolve().parent
ASSETS = PACKAGE / "assets"


def shipped(folder: str) -> Path:
    """Folder `kernels` or `configs`.

    Raises FileNotFoundError when neither place has it, which means a broken installation.
    """
    for place in (PACKAGE / folder, PACKAGE.parent / folder):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"lutq's folder {folder!r} is missing: reinstall lutq")


def check_folders(*files: Path | None) -> None:
    """Raise LutqError for a file to be written whose directory does not exist."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise LutqError(f"no directory {file.parent} for {file.name}: create it first")
