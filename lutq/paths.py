"""Where the files shipped with lutq are: beside the package in a wheel, at the repository's root in an editable install."""

from pathlib import Path

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
