"""A hook that hatch runs before it packs a wheel or an sdist: what `lutq build --out kernels` left in kernels/ must be of the
sources beside it, and a wheel that carries it is for this platform alone.
"""

import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

REMEDY = "run `lutq build --out kernels` again (with --arch all for GPUs of every kind), or delete kernels/lutq_cuda.*"


class WheelHook(BuildHookInterface):
    """The hook. It may run where none of lutq's dependencies are installed."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Tag a wheel with its platform if there is a library; end the build if nothing would use that library.

        An editable install goes through in any case: there the library is looked at when it is used.
        """
        if version == "editable" or not any(Path(self.root, "kernels").glob("lutq_cuda.*")):
            return
        if found := fault_of_library(Path(self.root)):
            self.app.abort(f"kernels/lutq_cuda.so is {found}: {REMEDY}")
        if self.target_name == "wheel":
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"


def fault_of_library(root: Path) -> str | None:
    """What keeps the library in `root`/kernels from being used with the sources beside it; None when nothing does."""
    sys.path.insert(0, str(root))
    try:
        from lutq.build import BUNDLED, fault, read_library, source_hash  # it needs only the standard library
    finally:
        sys.path.pop(0)
    found = read_library(root / "kernels" / BUNDLED)
    return "incomplete" if found is None else fault(found, source_hash(root / "kernels"))
