"""Draw detection.png and print the table of the detector over tau, from the runs of run.sh.

python docs/results/detection.py RUNS   (a folder with the runs *-detection and *-k6-greedy)
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from patchproof.evaluation.store import read_result
from patchproof.evaluation.summary import trade_off_table
from patchproof.report.plots import trade_off_figure

TAUS = [0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]

if __name__ == "__main__":
    runs = Path(sys.argv[1])
    curves, points = [], []
    for data, name in (("mnist", "MNIST"), ("cifar10", "CIFAR-10")):
        detection = read_result(runs / f"{data}-5x5-k6-detection")
        recovery = read_result(runs / f"{data}-5x5-k6-greedy").summary
        curve = trade_off_table(detection.examples)
        curves.append(curve.assign(curve=f"{name}, Minority Reports"))
        for run, kind, summary, certified in (
            ("PatchCleanser", "recovery", recovery, "certified_accuracy"),
            ("tau 0.8", "detection", detection.summary, "certified_detection_accuracy"),
        ):
            points.append(
                {
                    "run": f"{name}, {run}",
                    "kind": kind,
                    "clean": summary.clean_accuracy.value,
                    "certified": getattr(summary, certified).value,
                }
            )
        print(name)
        print((100 * trade_off_table(detection.examples, TAUS)).round(1).to_string(index=False))
    figure = trade_off_figure(pd.concat(curves), pd.DataFrame(points))
    figure.savefig(Path(__file__).with_name("detection.png"), dpi=120)
