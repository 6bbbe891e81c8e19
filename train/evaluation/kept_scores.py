"""evaluation.json in a run's directory: the newest score of each task, for the model card and for people."""

from __future__ import annotations

import errno
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.common.files import read_object, write_object
from hotlap.common.log import log
from hotlap.model.weights import is_model, run_checkpoints

KEPT = "evaluation.json"
ABOUT = ("date", "device", "dtype")  # of a result, kept with each of its scores
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def kept_scores(run: Path) -> dict[str, dict]:
    """The scores in a run's evaluation.json, by task; none if there is no such file. DataError if it is
    damaged.
    """
    path = run / KEPT
    try:
        scores = read_object(path).get("scores")
    except FileNotFoundError:
        return {}
    except DataError as error:
        raise DataError(f"{error}; move it away") from None
    if not isinstance(scores, dict) or not all(isinstance(score, dict) for score in scores.values()):
        raise DataError(f"{path} has no scores by task; move it away")
    return scores


def keep(model: Path, result: dict) -> bool:
    """Write a result's scores to the run's evaluation.json, where they replace older ones of the same tasks.

    `model` is what was evaluated. If that is no run, but a model or one of a run's checkpoints, or if the run
    may not be written to, nothing is written, and the log says so. Returns whether it was.
    """
    if not result["scores"]:
        return False
    if is_model(model) or not run_checkpoints(model):
        log.info("%s is not a run's directory, so no scores are kept there; --out writes them", model)
        return False
    about = {name: result[name] for name in ABOUT} | {"checkpoint": Path(result["folder"]).name}
    scores = kept_scores(model) | {task: score | about for task, score in result["scores"].items()}
    try:
        write_object(model / KEPT, {"scores": scores})
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        log.warning("warning: %s cannot be written to, so no scores are kept there; use --out", model)
        return False
    return True
