"""Evaluation of a model: loss, bits per byte and exact-match accuracy on questions."""

from slmkit.evaluation.loss import LossReport, validation_loss
from slmkit.evaluation.questions import QuestionReport, ask

__all__ = ["LossReport", "QuestionReport", "ask", "validation_loss"]
