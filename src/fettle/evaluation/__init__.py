"""Evaluation: what a model answers on rows it has not been trained on."""

from fettle.evaluation.answers import Answer, Question, answer, exact_share, longest_exchange, questions

__all__ = ["Answer", "Question", "answer", "exact_share", "longest_exchange", "questions"]
