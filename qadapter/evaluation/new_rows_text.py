"""What `new_rows.py` found, for people: without torch, for flows that find everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qadapter.files.artifacts import read_json, read_json_lines

NEW_ROWS = "new_rows.jsonl"
_SHOWN = 3
_PROMPT = 60  # characters


def new_rows_sentence(folder: Path) -> str:
    """What `measure_new_rows` found, for people."""
    metrics = read_json(folder / "metrics.json")
    if not metrics["new_rows/n"]:
        return (
            f"none of {int(metrics['new_rows/left_out'])} new pairs can be scored, so the candidate learnt nothing "
            "from them: both replies begin alike for all of training.max_length, or the base's chat template refuses "
            "the prompts"
        )
    count, of_candidate = int(metrics["new_rows/n"]), metrics["new_rows/candidate_accuracy"]
    text = f"of {count} new pairs the candidate prefers the chosen reply in {of_candidate:.3f}"
    if "new_rows/champion_accuracy" not in metrics:
        return text
    text += f", the champion in {metrics['new_rows/champion_accuracy']:.3f}"
    suspected = [row for row in read_json_lines(folder / NEW_ROWS) if row["suspected"]]
    if not suspected:
        return text
    shown = ", ".join(repr(_last_turn(row)) for row in suspected[:_SHOWN])
    labels = "1 label" if len(suspected) == 1 else f"{len(suspected)} labels"
    return (
        f"{text}; {labels} may be flipped, because the champion is sure of the opposite, for example of {shown} (all "
        f"of them: {NEW_ROWS} among the files of the candidate's MLflow run)"
    )


def reversed_sentence(folder: Path) -> str:
    """What makes a whole delivery look reversed, with its numbers; empty where it does not."""
    metrics = read_json(folder / "metrics.json")
    if not metrics.get("new_rows/look_reversed"):
        return ""
    views = [
        f"the {who} prefers the chosen reply in {metrics[f'new_rows/{who}_accuracy']:.3f} of the {of} pairs after "
        f"{metrics[f'new_rows/earlier/{who}_accuracy']:.3f} of earlier ones"
        for who, of in (("base", f"{int(metrics['new_rows/n'])} new"), ("champion", "new"))
    ]
    return (
        f"the labels of the delivery look reversed: {views[0]}, {views[1]}. Check them; if they are meant so, set "
        "gate.flipped_labels to report"
    )


def _last_turn(row: dict[str, Any]) -> str:
    text = " ".join(str(row["prompt"][-1]["content"]).split())
    return text if len(text) <= _PROMPT else text[:_PROMPT] + " …"
