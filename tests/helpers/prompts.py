"""Files of prompts."""

import json
from pathlib import Path


def write_prompts(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
