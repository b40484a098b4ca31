"""Every key of a config.json that a family's code in transformers reads is read here, or refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slmkit.model.config import TRAINING_FIELDS, SLMConfig
from slmkit.model.families import FAMILIES
from slmkit.model.files.published import HARMLESS, ONLY_WITH

transformers = pytest.importorskip("transformers")

ROOT = Path(transformers.__file__).parent
READ = re.compile(r'(?:\bconfig\.|(?:get|has)attr\((?:self\.)?config, ")([a-z]\w*)')
FOLDERS = {"gemma3_text": "gemma3"}
# Of classes beside the language model: classifiers, experts (dense layers alone are supported), images.
OF_OTHERS = {
    "classifier_dropout", "num_labels", "summary_last_dropout", "num_local_experts", "get_text_config",
    "image_token_id", "mm_tokens_per_image", "text_config", "vision_config",
}  # fmt: skip
# Of the code that all families share: what is of other families, of training, or of how a model is loaded.
SHARED = ("masking_utils.py", "cache_utils.py", "modeling_rope_utils.py")
OF_SHARED_CODE = OF_OTHERS | {
    "default_theta", "json", "standardize_rope_params", "validate_rope", "kv_sharing_modes", "num_kv_shared_layers",
}  # fmt: skip


def reads(path: Path) -> set[str]:
    return set(READ.findall(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"slm"}))
def test_no_key_that_the_reference_reads_is_ignored(family: str) -> None:
    row, folder = FAMILIES[family], FOLDERS.get(family, family)
    known = SLMConfig.model_fields.keys() - TRAINING_FIELDS | set(row.spelling.values()) | row.derived.keys()
    known |= row.fixed.keys() | HARMLESS["config"] | ONLY_WITH.keys()
    found = reads(ROOT / "models" / folder / f"modeling_{folder}.py")
    assert len(found) > 8
    assert found - known == found & OF_OTHERS - known
    shared = set().union(*(reads(ROOT / name) for name in SHARED))
    assert {"is_causal", "sliding_window", "rope_parameters"} <= shared
    assert shared - known <= OF_SHARED_CODE
