# SPDX-License-Identifier: Apache-2.0
"""Execute every tutorial notebook with ``CI=1``, which each one's first cell reads to shrink its sizes.

With ``--full`` they run at full size and their outputs are written back; that is how the kept outputs are made.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

TUTORIALS = Path(__file__).resolve().parents[1] / "tutorials"
MAX_BYTES = 300 * 1024


def compact_figures(cell: nbformat.NotebookNode) -> None:
    """Store figures by a palette: a third of the size, and no difference to see in plots."""
    for output in cell.outputs:
        png = output.get("data", {}).get("image/png")
        if png:
            figure = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
            buffer = io.BytesIO()
            figure.quantize(64, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
            output.data["image/png"] = base64.b64encode(buffer.getvalue()).decode()


def check_source(path: Path, notebook: nbformat.NotebookNode) -> list[str]:
    """What a notebook in this project must be, apart from running."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    problems = []
    if 'smoke_test = "CI" in os.environ' not in code[0].source:
        problems.append('the first code cell does not set smoke_test = "CI" in os.environ')
    if "assert" not in code[-1].source:
        problems.append("the last code cell does not check the text's claim")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        problems.append("the kernel is not python3")
    if path.stat().st_size > MAX_BYTES:
        problems.append(f"{path.stat().st_size} bytes, more than {MAX_BYTES}")
    if not any(cell.outputs for cell in code):
        problems.append("no outputs are kept; run with --full")
    return [f"{path.name}: {problem}" for problem in problems]


def main() -> None:
    """Run them all; exit with 1 if any fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="full size, and write the outputs back")
    known = {path.stem: path for path in sorted(TUTORIALS.glob("*.ipynb"))}
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"notebooks to run, of {', '.join(known)}; default: all"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"expected names among {', '.join(known)}, but got {', '.join(sorted(unknown))}")
    if options.full:
        os.environ.pop("CI", None)
    else:
        os.environ["CI"] = "1"
    problems = []
    for path in (known[name] for name in options.names or known):
        notebook = nbformat.read(path, as_version=4)
        start = time.perf_counter()
        NotebookClient(
            notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": TUTORIALS}}
        ).execute()
        print(f"{path.name}: {time.perf_counter() - start:.0f} s")
        if options.full:
            for cell in notebook.cells:
                cell.metadata.pop("execution", None)
                if cell.cell_type == "code":
                    cell.execution_count = None
                    compact_figures(cell)
                    # Warnings of the machine that it ran on, with paths of that machine.
                    cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
                    for output in cell.outputs:
                        if output.output_type == "execute_result":  # which has to have the key
                            output.execution_count = None
            notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
            nbformat.write(notebook, path)
        else:
            problems += check_source(path, nbformat.read(path, as_version=4))
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
