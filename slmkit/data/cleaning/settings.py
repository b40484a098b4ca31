"""Settings of cleaning; by default nothing is left out."""

from __future__ import annotations

from pydantic import Field

from slmkit.config import Settings


class CleaningSettings(Settings):
    """Which documents are left out. The first of several copies is kept."""

    exact_duplicates: bool = False  # leave out copies
    # leave out near copies: this share of 5-word sequences in common; 0.8 is usual
    near_duplicates: float | None = Field(None, ge=0.5, le=0.95)
    min_characters: int | None = Field(None, gt=0)  # leave out shorter documents
    max_characters: int | None = Field(None, gt=0)  # leave out longer documents
    min_words: int | None = Field(None, gt=0)  # leave out documents of fewer words
    max_words: int | None = Field(None, gt=0)  # leave out documents of more words
    scripts: list[str] = Field([])  # scripts that documents may use, by Unicode name, such as Latin or Cyrillic
    min_script_share: float = Field(0.9, gt=0, le=1)  # the smallest share of letters of these scripts
    # the smallest share of letters among characters that are not white space
    min_letter_share: float | None = Field(None, gt=0, le=1)
    evaluation: list[str] = Field([])  # files of text that a model will be tested on
    evaluation_words: int = Field(13, gt=0)  # leave out documents with this many consecutive words from `evaluation`

    @property
    def is_active(self) -> bool:
        asked = self.model_dump(exclude={"min_script_share", "evaluation_words"})
        return any(asked.values())
