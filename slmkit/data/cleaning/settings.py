"""What may be asked of cleaning; nothing is done that is not asked for."""

from __future__ import annotations

from pydantic import Field

from slmkit.config import Settings


class CleaningSettings(Settings):
    """Which documents are left out. Of copies the first one stays."""

    exact_duplicates: bool = False  # leave out copies
    near_duplicates: float | None = Field(None, ge=0.5, le=0.95)  # share of 5-word runs in common: 0.8 is usual
    min_characters: int | None = Field(None, gt=0)  # leave out shorter documents
    max_characters: int | None = Field(None, gt=0)  # leave out longer documents
    min_words: int | None = Field(None, gt=0)  # leave out documents of fewer words
    max_words: int | None = Field(None, gt=0)  # leave out documents of more words
    scripts: list[str] = Field([])  # Unicode's names, such as Latin or Cyrillic
    min_script_share: float = Field(0.9, gt=0, le=1)  # of a document's letters that are of these scripts
    min_letter_share: float | None = Field(None, gt=0, le=1)  # of its characters but white space
    evaluation: list[str] = Field([])  # files of text that a model will be tested on
    evaluation_words: int = Field(13, gt=0)  # so many words in a row that stand there too

    @property
    def is_active(self) -> bool:
        asked = self.model_dump(exclude={"min_script_share", "evaluation_words"})
        return any(asked.values())
