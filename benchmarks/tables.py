"""Writes the tables of docs/performance.md from results/*.json, so that no figure is typed.

Run: python -m benchmarks.tables

Text between `<!-- results: NAME -->` and `<!-- end -->` is replaced by what NAME.json holds, or
says that it is not yet measured. Everything else stays. The section of GPUs takes every
gpu_*.json.
"""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, markdown_table
from benchmarks.gpu import results as gpu_results

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
NOT_MEASURED = "Not yet measured."
GPU_SECTION = "gpu"
"""Holds one result file a device, and its targets where there is none."""
_SECTION = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Results of one script with other options.
_MODULE_OF = {
    "transformers_static_float32": "transformers_static",
    "speculation_held_at_0": "speculation",
    "speculation_draft_models": "speculation",
}


def fill(page: str, results: Path) -> str:
    """The page with every section written anew."""
    return _SECTION.sub(
        lambda found: f"{found[1]}{section(found[2], results)}\n{found[3]}",
        page,
    )


def section(name: str, results: Path) -> str:
    """A result's caption and table."""
    if name == GPU_SECTION:
        return f"\n{gpu_results.markdown(results)}\n"
    file = results / f"{name}.json"
    if not file.is_file():
        return f"\n{NOT_MEASURED}\n"
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if name == "kernels_cpu":
        table = kernels_table(result["figures"])
    else:
        table = import_module(f"benchmarks.{_MODULE_OF.get(name, name)}").markdown(
            result["figures"]
        )
    return f"\n{caption(result)}\n\n{table}\n"


def caption(result: dict[str, Any]) -> str:
    """The command, and what it ran on."""
    machine = result["machine"]
    parts = [machine["processor"]]
    if "num_cores" in machine:
        parts.append(f"{machine['num_cores']} cores")
    if "memory_gib" in machine:
        parts.append(f"{machine['memory_gib']} GiB")
    parts += [f"{name} {version}" for name, version in result["versions"].items()]
    if result.get("commit"):
        parts.append(f"commit {result['commit']}")
    if result.get("date"):
        parts.append(result["date"])
    return f"`{result['command'].strip()}` on {', '.join(parts)}."


def kernels_table(figures: dict[str, dict[str, Any]]) -> str:
    """One table a group of kernels."""
    return "\n\n".join(
        f"{title}:\n\n"
        + markdown_table(
            ("shape", "ms, median", "quartiles"),
            [
                (
                    name,
                    f"{figure['median_ms']:.3f}",
                    f"{figure['q1_ms']:.3f} to {figure['q3_ms']:.3f}",
                )
                for name, figure in rows.items()
            ],
        )
        for title, rows in figures.items()
    )


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
    print(f"written: docs/{PAGE.name}")


if __name__ == "__main__":
    main()
