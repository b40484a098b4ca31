"""What a real corpus needs before it is tokenized: copies, near-copies, odd texts and evaluation text left out."""

from slmkit.data.cleaning.cleaner import Cleaner, CleaningReport
from slmkit.data.cleaning.settings import CleaningSettings

__all__ = ["Cleaner", "CleaningReport", "CleaningSettings"]
