"""The result of an evaluation as text."""

from __future__ import annotations

from hotlap.train.evaluation.chatcore import CHANCE


def as_table(result: dict) -> str:
    """The result of evaluate_model: a line per score, then the samples."""
    lines = [f"{result['folder']} on {result['device']}, {result['dtype']}", ""]
    lines.append(f"{'':34}{'score':>8}{'95 %':>18}{'n':>8}{'centred':>9}")
    for name, score in result["scores"].items():
        if name == "bpb":
            lines.append(f"{name:34}{score['bpb']:8.4f}{'':18}{score['rows']:>8} rows of {score['context']}")
        elif name == "core":
            lines.append(line(name, score["core"], score["interval"], len(score["tasks"])) + " tasks")
            for label, part in score["tasks"].items():
                shown = line(f"  {label}", part["accuracy"], part["interval"], part["n"])
                lines.append(f"{shown}{part['centred']:9.4f}")
        elif name == "chatcore":
            lines += of_chatcore(score)
        else:
            left_out = f" ({score['left_out']} do not fit in the context)" if "left_out" in score else ""
            lines.append(line(name, score["accuracy"], score["interval"], score["n"]) + left_out)
    for text, answer in result["samples"]:
        lines += ["", f"> {text}", answer.strip() or "[no answer]"]
    return "\n".join(lines)


def of_chatcore(score: dict) -> list[str]:
    """A line for ChatCORE that says of which tasks it is the mean, and one for it with spelling."""
    tasks = len(score["tasks"])
    missing = f" of {len(CHANCE)}, without {', '.join(score['missing'])}" if score["missing"] else ""
    lines = [line("chatcore", score["chatcore"], score["interval"], tasks) + " tasks" + missing]
    if "with_spelling" in score:
        both = score["with_spelling"]
        lines.append(line("  with spelling", both["chatcore"], both["interval"], tasks + 1) + " tasks")
    return lines


def line(name: str, score: float, interval: list[float], n: int) -> str:
    return f"{name:34}{score:8.4f}{'{:.4f} to {:.4f}'.format(*interval):>18}{n:>8}"
