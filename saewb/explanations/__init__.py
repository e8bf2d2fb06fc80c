"""Explain latents in words with a language model, and score explanations, however they were written.

    judge = saewb.Chat("http://localhost:8000/v1", model="...", key_env="OPENAI_API_KEY")
    explained = saewb.explain(index, judge, file="explanations.jsonl")
    scored = saewb.score(index, explained, judge, by=("detection", "fuzz"))
    index = index.with_labels(scored)

- Judges: `judge` (an endpoint, a model on this machine, a function), with what they are asked in `instructions`.
- Text: `windows` chooses contexts that explain and others that score.
- `explaining` and `scoring` are the two runs; `figures` has the arithmetic of scores.
- Records and their file are `saewb.features.labels`, since an index shows them.
"""

from saewb.explanations.explaining import explain
from saewb.explanations.judge import Answer, AnswerToken, Chat, Cost, Judge, LocalChat, Request, Scripted
from saewb.explanations.scoring import SCORES, score
from saewb.explanations.windows import index_sha

__all__ = [
    "SCORES",
    "Answer",
    "AnswerToken",
    "Chat",
    "Cost",
    "Judge",
    "LocalChat",
    "Request",
    "Scripted",
    "explain",
    "index_sha",
    "score",
]
