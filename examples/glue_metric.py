"""The figures of the nine GLUE tasks, and of own data, as one `evaluate.Metric`: no hub needed.

`evaluate.load("path/to/glue_metric.py", "mrpc").compute(predictions=..., references=...)`
"""

# evaluate reads this file's imports line by line: `import datasets` and `import evaluate` must not share one.
import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

_DESCRIPTION = "Accuracy, F1, Matthews, Pearson or Spearman correlation: whatever a GLUE task is judged by."

_INPUTS = """
Args:
    predictions: label ids, or for `stsb` and `regression` numbers.
    references: the true ones.
Returns:
    cola: matthews_correlation. mrpc, qqp: accuracy and f1. stsb: pearson and spearmanr. The other tasks and
    `classification` (own data): accuracy. `regression` (own data): mse, pearson and spearmanr.
"""

_CITATION = """
@inproceedings{wang2019glue,
  title={{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author={Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and Bowman, Samuel R.},
  booktitle={International Conference on Learning Representations},
  year={2019}
}
"""


def accuracy(references, predictions):
    """The share of predictions that are right."""
    return {"accuracy": float(accuracy_score(references, predictions))}


def accuracy_and_f1(references, predictions):
    """Accuracy, and F1 of label 1; F1 is 0 where label 1 neither occurs nor is predicted."""
    return accuracy(references, predictions) | {"f1": float(f1_score(references, predictions, zero_division=0))}


def matthews(references, predictions):
    """Matthews correlation; 0 where only one label is predicted."""
    return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


def correlations(references, predictions):
    """Pearson's and Spearman's correlation; 0 where one side is constant, as Matthews is, so that JSON can hold it."""
    constant = len(np.unique(references)) < 2 or len(np.unique(predictions)) < 2
    return {
        "pearson": 0.0 if constant else float(pearsonr(references, predictions)[0]),
        "spearmanr": 0.0 if constant else float(spearmanr(references, predictions)[0]),
    }


def regression(references, predictions):
    """The mean squared error, and the correlations."""
    error = np.subtract(references, predictions)
    return {"mse": float(np.mean(np.square(error)))} | correlations(references, predictions)


FIGURES = {
    "cola": matthews,
    "mnli": accuracy,
    "mrpc": accuracy_and_f1,
    "qnli": accuracy,
    "qqp": accuracy_and_f1,
    "rte": accuracy,
    "sst2": accuracy,
    "stsb": correlations,
    "wnli": accuracy,
    "classification": accuracy,
    "regression": regression,
}


class GlueMetric(evaluate.Metric):
    """The figures of the task that is `evaluate.load`'s second argument."""

    def _info(self):
        if self.config_name not in FIGURES:
            raise ValueError(f"There is no GLUE task {self.config_name!r}; there are: {', '.join(FIGURES)}.")
        kind = datasets.Value("float32" if self.config_name in ("stsb", "regression") else "int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions, references):
        return FIGURES[self.config_name](references, predictions)
