"""Compare settings on text that no calibration saw: calibrate on the first 85% of the embedded books, measure on the rest.

python scripts/heldout.py --method feedback --bits 2 --group 64 --scale-bits 8

The arguments are those of `lutq quantize`; without any, the embedded model is measured as it is. Protocol `raw` of
`lutq eval-ppl`. Settings are to be chosen by these figures, not by the WikiText-2 test, which is for what the README reports.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from lutq.calib import calibration_text

PART = 0.85  # of the characters


def main() -> None:
    flags = sys.argv[1:]
    if {"-h", "--help"} & set(flags):
        sys.exit(__doc__)
    text, _ = calibration_text("books")
    with tempfile.TemporaryDirectory() as folder:
        seen, rest, out = (Path(folder) / name for name in ("seen.txt", "rest.txt", "out"))
        cut = int(PART * len(text))
        seen.write_text(text[:cut], encoding="utf-8")
        rest.write_text(text[cut:], encoding="utf-8")
        lutq = [sys.executable, "-m", "lutq"]
        if flags:
            subprocess.run([*lutq, "quantize", "--calib", str(seen), "--out", str(out), *flags], check=True)
        model = str(out) if flags else "opt-tiny"
        subprocess.run([*lutq, "eval-ppl", str(rest), "--protocol", "raw", "--model", model], check=True)


if __name__ == "__main__":
    main()
