"""Code blocks of the documentation, for tests that run them."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def read_page(name: str) -> str:
    """A page by its path in the repository, such as docs/chat.md."""
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def run_console(block: str, folder: Path, entered: str | None = None) -> str:
    """Run a block's commands in bash, `steermoe` being this environment's; returns stdout, and fails if one fails."""
    script = f'steermoe() {{ "{sys.executable}" -m steermoe "$@"; }}\nset -e\n{block}'
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, input=entered, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
