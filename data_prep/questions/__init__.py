"""Questions about scenes whose answers follow from the ground truth, written so that the words alone give nothing away.

The answer is chosen first, from a list in which every answer (and every position among the choices) stands equally
often; then a scene is drawn in which it is true. So P(answer | question, choices) is uniform by construction, and
:mod:`data_prep.text_check` measures that it is.

``choice`` and ``spatialsoundqa`` hold the types of questions, ``planning`` deals them out and makes samples,
``records`` writes samples as other benchmarks have them.
"""

from data_prep.questions.common import QuestionsConfig
from data_prep.questions.planning import (
    CHOICE_KINDS,
    FORMATS,
    KINDS,
    OPEN_KINDS,
    Ask,
    check_config,
    draft_of,
    plan,
    sample_of,
)
from data_prep.questions.records import dcase_record, mmau_record, spatialsoundqa_record

__all__ = [
    "CHOICE_KINDS",
    "FORMATS",
    "KINDS",
    "OPEN_KINDS",
    "Ask",
    "QuestionsConfig",
    "check_config",
    "dcase_record",
    "draft_of",
    "mmau_record",
    "plan",
    "sample_of",
    "spatialsoundqa_record",
]
