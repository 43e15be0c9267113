"""Samples as records of other people's benchmarks: MMAU, DCASE 2025 task 5, SpatialSoundQA."""

from __future__ import annotations

from typing import Any

from audio_llm.shards.schema import Sample
from data_prep.questions.planning import KINDS


def mmau_record(sample: Sample) -> dict[str, Any]:
    """A choice question as an item of MMAU's JSON."""
    meta = sample.meta
    return {
        "id": sample.id,
        "audio_id": f"./audio/{sample.id}.wav",
        "question": sample.question,
        "choices": sample.choices,
        "answer": sample.answer,
        "dataset": sample.source.dataset if sample.source else None,
        "task": "sound",
        "split": sample.source.split if sample.source else None,
        "category": meta["category"],
        "sub-category": meta["sub_category"],
        "difficulty": meta["difficulty"],
    }


def dcase_record(sample: Sample) -> dict[str, Any]:
    """A choice question as DCASE 2025 task 5 has it: choices ``A. text``, the answer one of them verbatim."""
    choices = [f"{chr(65 + index)}. {choice}" for index, choice in enumerate(sample.choices)]
    return {
        "id": sample.id,
        "audio_url": f"../audio/{sample.id}.wav",
        "question": sample.question,
        "choice": choices,
        "answer": choices[sample.choices.index(sample.answer or "")],
        "question_type": KINDS[sample.meta["question_type"]].dcase_type,
    }


def spatialsoundqa_record(sample: Sample, number: int) -> dict[str, Any]:
    """An open question as an item of SpatialSoundQA's ``{"data": […]}``; two-source items name both responses."""
    sources = sample.meta.get("sources", [])
    record: dict[str, Any] = {"audio_id": None, "reverb_id": None, "audio_id2": None, "reverb_id2": None}
    for suffix, source in zip(("", "2"), sources, strict=False):
        record |= {f"audio_id{suffix}": source["clip"], f"reverb_id{suffix}": source["response"]}
    return {
        **record,
        "question_id": number,
        "question_type": sample.meta["question_type"],
        "question": sample.question,
        "answer": sample.answer,
    }
