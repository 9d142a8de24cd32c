"""What a pull request is: what it edits, and what it adds.

What exists only upstream lies under `upstream/`, a folder for each, laid out as SGLang's
repository. What this project runs, too, is taken from where it runs, by the rules of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[3]


class PullRequest(NamedTuple):
    """One pull request; paths are relative to the root of SGLang's repository."""

    name: str
    edits: Mapping[str, Callable[[str], str]]
    """SGLang's files, and what each becomes. An edit gives its own result back as it is."""
    rules: Mapping[str, Callable[[str], str]] = {}
    """Files under `upstream/` that this project's sources complete."""
    replaces: frozenset[str] = frozenset()
    """New files that may be there already, with another text."""
    needs: PullRequest | None = None
    """The pull request that must have been committed before, whose files this one edits."""

    @property
    def folder(self) -> Path:
        """What it adds, laid out as SGLang's repository."""
        return REPOSITORY / "upstream" / self.name

    def new_files(self) -> dict[str, str]:
        """The text of each new file.

        Raises:
            RuleError: a rule does not fit this project's sources.
        """
        files = sorted(file for file in self.folder.rglob("*") if file.is_file())
        paths = [file.relative_to(self.folder).as_posix() for file in files]
        texts = [file.read_text(encoding="utf-8") for file in files]
        return {
            path: self.rules.get(path, str)(text) for path, text in zip(paths, texts, strict=True)
        }


class RuleError(Exception):
    """A rule that does not fit what it is for, in one line."""
