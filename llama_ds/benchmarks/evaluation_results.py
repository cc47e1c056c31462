"""Results of lm-eval for a model card: the files results_*.json that its --output_path receives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llama_ds.checkpoint.formats.hf_config import read_object
from llama_ds.errors import UserError

STDERR = "_stderr"


def benchmark_rows(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield for each task its name, and its metrics with their standard errors as the file has them.

    Raises:
        UserError: a file is not one of lm-eval.
    """
    for path in paths:
        content = read_object(path)
        results, shots = content.get("results"), content.get("n-shot")
        if not isinstance(results, dict) or not results or not all(isinstance(r, dict) for r in results.values()):
            raise UserError(f"{path}: contains no results of lm-eval; give a results_*.json of its --output_path")
        for task, metrics in results.items():
            texts = [_metric(name, value, metrics) for name, value in metrics.items() if _is_metric(name, value)]
            shot = shots.get(task) if isinstance(shots, dict) else None
            about = [f"{shot}-shot"] if shot is not None else []
            if version := content.get("lm_eval_version"):
                about.append(f"lm-eval {version}")
            if texts:
                yield task, ", ".join(texts) + (f" ({', '.join(about)})" if about else "")


def _is_metric(name: str, value: object) -> bool:
    return isinstance(value, int | float) and "," in name and STDERR not in name


def _metric(name: str, value: float, metrics: dict[str, object]) -> str:
    """Return a metric, whose name is followed by that of a filter: "acc,none"."""
    metric, _, kind = name.partition(",")
    error = metrics.get(f"{metric}{STDERR},{kind}")
    spread = f" ± {error:.4f}" if isinstance(error, int | float) else ""
    return f"{metric}{'' if kind == 'none' else f' ({kind})'} {value:.4f}{spread}"
