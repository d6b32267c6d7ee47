"""Evaluation on rows that the model was not trained on."""

from fettle.evaluation.answers import Answer, Question, answer, exact_share, longest_exchange, questions

__all__ = ["Answer", "Question", "answer", "exact_share", "longest_exchange", "questions"]
