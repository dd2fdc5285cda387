"""Check a judge before RL starts: does it put images in the order that is known, and at what cost?

Pairwise accuracy and correlation are means over examples, and compare rewards, since that is what RL is driven by: a
judge that scores everything alike is right in half of the pairs and counts as having no correlation, 0.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from earl import code_version, judges
from earl.files import atomic
from earl.judges import Verdict, known_order
from earl.judges.known_order import Ranked
from earl.messages.errors import EarlError
from earl.statistics import intervals, rewards
from earl.statistics.agreement import spearman

if TYPE_CHECKING:
    from earl.config.schema import Config
    from earl.config.sections import JudgeGate

Prices = tuple[float, float]
"""What a million tokens cost, in and out, in any currency."""


def run(config: "Config", gate: "JudgeGate", prices: Prices | None = None) -> dict[str, Any]:
    """Have the configured judge score images whose order is known; return what `text` prints.

    Raises:
        EarlError: the judge cannot be asked, the images cannot be read, or there is nothing to compare.
    """
    if gate.pairs is None:
        ranked = known_order.of_shapes(gate.examples, gate.seed)
    else:
        ranked = known_order.read(Path(gate.pairs), gate.examples)
    judge = judges.get(config)
    verdicts = judge.score([one.judgement for one in ranked])
    return {
        "judge": judge.name,
        "judge_model": judge.model,
        "judge_revision": judge.revision,
        "rubrics": {request["rubric"]: request["rubric_digest"] for one in verdicts for request in one.requests},
        "reward_final_reward": config.reward_final_reward,
        "pairs_from": gate.pairs or f"shapes world, seed {gate.seed}",
        **measure(ranked, verdicts, config.reward_final_reward),
        **costs(verdicts, prices),
        "code_version": code_version(),
    }


def check(report: dict[str, Any], gate: "JudgeGate", max_failed_fraction: float) -> None:
    """Compare a report with what the configuration requires.

    Raises:
        EarlError: with the figure that is not reached.
    """
    if report["failed_fraction"] > max_failed_fraction:
        raise EarlError(
            f"the judge failed on {report['failed_fraction']:.1%} of {report['images']} images, more than "
            f"max_failed_fraction = {max_failed_fraction}; mend the judge before RL starts"
        )
    accuracy = report["accuracy"]["mean"]
    if accuracy < gate.minimum_accuracy:
        raise EarlError(
            f"the judge puts {accuracy:.1%} of the pairs in their order, fewer than judge_gate.minimum_accuracy = "
            f"{gate.minimum_accuracy}; take another judge or rubric, or more judge_samples, before RL starts"
        )


def measure(ranked: Sequence[Ranked], verdicts: Sequence[Verdict], which: str) -> dict[str, Any]:
    """Return accuracy, correlation and failures of verdicts on images whose order is known.

    Pairs with a failed judgement are left out; an equal reward counts as half right.

    Raises:
        EarlError: no two images of an example could be compared.
    """
    examples: dict[str, list[tuple[float, float, str]]] = {}
    for one, verdict in zip(ranked, verdicts, strict=True):
        if verdict.status == "ok":
            reward = rewards.final_reward(vars(verdict), which)
            examples.setdefault(one.example_id, []).append((one.rank, reward, one.label))
    failed = sum(verdict.status == "failed" for verdict in verdicts)
    accuracies, correlations, by_pair, pairs = [], [], {}, 0
    for images in examples.values():
        rights = []
        for worse, better in itertools.combinations(sorted(images, key=lambda image: image[0]), 2):
            if worse[0] < better[0]:
                rights.append((1 + np.sign(better[1] - worse[1])) / 2)
                by_pair.setdefault(f"{better[2]} > {worse[2]}", []).append(float(rights[-1]))
        if rights:
            pairs += len(rights)
            accuracies.append(float(np.mean(rights)))
            correlations.append(spearman([image[0] for image in images], [image[1] for image in images]) or 0.0)
    if not accuracies:
        reasons = {verdict.failure or verdict.raw for verdict in verdicts if verdict.status == "failed"}
        raise EarlError(
            f"no two images of an example could be compared; {failed} of {len(verdicts)} judgements failed"
            + "".join(f"\n  {reason}" for reason in sorted(reasons)[:3])
        )
    return {
        "examples": len(accuracies),
        "images": len(ranked),
        "pairs": pairs,
        "accuracy": vars(intervals.bootstrap(accuracies)),
        "accuracy_by_pair": {pair: fmean(found) for pair, found in by_pair.items()},
        "spearman": fmean(correlations),
        "failed": failed,
        "failed_fraction": failed / len(verdicts),
    }


def costs(verdicts: Sequence[Verdict], prices: Prices | None) -> dict[str, Any]:
    """Return tokens, seconds and money for each judgement (one image, all rubrics); what is shared counts once."""
    unique = {
        (request["question"], request["attempt"], request["continues"]): request
        for verdict in verdicts
        for request in verdict.requests
    }
    per = {
        f"{name}_per_judgement": sum(request[name] or 0 for request in unique.values()) / len(verdicts)
        for name in ("tokens_in", "tokens_out", "seconds")
    }
    if not unique:
        return {}
    if prices is not None:
        spent = per["tokens_in_per_judgement"] * prices[0] + per["tokens_out_per_judgement"] * prices[1]
        per["cost_per_judgement"] = spent / 1e6
    return per


def text(report: dict[str, Any]) -> str:
    """Return a report for people."""
    accuracy = report["accuracy"]
    lines = [
        f"judge {report['judge']}, model {report['judge_model'] or '-'}, by {report['reward_final_reward']}; "
        f"{report['images']} images of {report['examples']} examples, {report['pairs_from']}",
        f"  pairwise accuracy  {accuracy['mean']:.3f}  [{accuracy['low']:.3f}, {accuracy['high']:.3f}]  "
        f"over {report['pairs']} pairs",
        *(f"    {pair:<32} {found:.3f}" for pair, found in report["accuracy_by_pair"].items()),
        f"  Spearman           {report['spearman']:.3f}",
        f"  failed judgements  {report['failed_fraction']:.1%}",
    ]
    for name, unit in (("tokens_in", "tokens in"), ("tokens_out", "tokens out"), ("seconds", "s"), ("cost", "cost")):
        value = report.get(f"{name}_per_judgement")
        lines += [] if value is None else [f"  {unit + ' a judgement':<24} {value:.6g}"]
    return "\n".join(lines)


def write(report: dict[str, Any], out: Path) -> None:
    """Write a report as JSON."""
    atomic.write_text(out, json.dumps(report, indent=1, allow_nan=False) + "\n")
