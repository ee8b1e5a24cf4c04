"""How well predicted labels agree with the true ones, from their confusion matrix alone. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LabelScores:
    """Of one label: tp / predicted, tp / support, and their harmonic mean 2 tp / (predicted + support).

    Where a denominator is 0 the value is 0.
    """

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class ClassificationReport:
    """`confusion[i][j]` counts texts of label i that were given label j; `loss` is -log p(label), nats a text."""

    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    loss: float | None = None

    @property
    def total(self) -> int:
        return sum(map(sum, self.confusion))

    @property
    def accuracy(self) -> float:
        return _ratio(sum(self.confusion[index][index] for index in range(len(self.labels))), self.total)

    @property
    def majority(self) -> float:
        """The accuracy of always giving the most frequent label."""
        return _ratio(max(map(sum, self.confusion)), self.total)

    @property
    def scores(self) -> dict[str, LabelScores]:
        result = {}
        for index, label in enumerate(self.labels):
            hits, support = self.confusion[index][index], sum(self.confusion[index])
            predicted = sum(row[index] for row in self.confusion)
            result[label] = LabelScores(
                _ratio(hits, predicted), _ratio(hits, support), _ratio(2 * hits, predicted + support), support
            )
        return result

    @property
    def macro(self) -> LabelScores:
        """The plain means over the labels."""
        scores, count = self.scores.values(), len(self.labels)
        return LabelScores(
            sum(each.precision for each in scores) / count, sum(each.recall for each in scores) / count,
            sum(each.f1 for each in scores) / count, self.total,
        )  # fmt: skip

    def describe(self) -> dict[str, object]:
        """As plain values for JSON."""
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "macro": _describe(self.macro),
            "majority_accuracy": self.majority,
            "per_label": {label: _describe(scores) for label, scores in self.scores.items()},
            "labels": list(self.labels),
            "confusion": [list(row) for row in self.confusion],
            "texts": self.total,
        }

    def lines(self) -> list[str]:
        """Two tables: scores by label, and the confusion matrix with true labels as rows."""
        width = max(12, *(len(label) for label in self.labels))
        lines = [f"{'':{width}} {'precision':>9} {'recall':>9} {'F1':>9} {'texts':>7}"]
        for label, each in {**self.scores, "macro": self.macro}.items():
            lines.append(f"{label:{width}} {each.precision:9.4f} {each.recall:9.4f} {each.f1:9.4f} {each.support:7,}")
        lines += [f"accuracy {self.accuracy:.4f} (always the most frequent label: {self.majority:.4f})", ""]
        cell = max(7, *(len(label) for label in self.labels))
        corner = "true \\ given"
        lines.append(f"{corner:{width}} " + " ".join(f"{label:>{cell}}" for label in self.labels))
        for label, row in zip(self.labels, self.confusion, strict=True):
            lines.append(f"{label:{width}} " + " ".join(f"{count:{cell},}" for count in row))
        return lines


def make_report(
    labels: Sequence[str], true: Sequence[int], given: Sequence[int], loss: float | None = None
) -> ClassificationReport:
    """From the true and the given label of each text, as indices into `labels`."""
    counts = [[0] * len(labels) for _ in labels]
    for row, column in zip(true, given, strict=True):
        counts[row][column] += 1
    return ClassificationReport(tuple(labels), tuple(map(tuple, counts)), loss)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _describe(scores: LabelScores) -> dict[str, object]:
    return {"precision": scores.precision, "recall": scores.recall, "f1": scores.f1, "support": scores.support}
