"""The judge that asks a model: the same questions, the same reading of answers, however the model is reached.

A verdict is made of one question for each rubric. An answer that gives no scores is asked for again with another seed,
a bounded number of times; a judgement that is still without one then is failed, and no number is put in its place.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pvariance
from typing import TYPE_CHECKING, Any

from earl import seeds
from earl.config import paths
from earl.errors import EarlError
from earl.files import images, manifest
from earl.judges import Judgement, Verdict, answers, chat, readout, rubric
from earl.judges.answers import Unusable
from earl.judges.cache import Cache
from earl.judges.chat import ChatModel, Pass, Question, Reply
from earl.judges.rubric import Rubric

if TYPE_CHECKING:
    import numpy as np

    from earl.config.schema import Config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How a model is asked; a field of the configuration each, all part of what identifies an answer."""

    model: str
    revision: str | None
    samples: int = 1
    expected: bool = False
    temperature: float = 1.0
    max_tokens: int = 512
    reasoning_length: int = 300
    image_size: int | None = None
    structured: bool = True
    random_seed: int = 0


@dataclass
class _Case:
    """One question to the model, which any number of judgements may share."""

    key: str
    rubric: Rubric
    messages: chat.Messages
    requests: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None
    hopeless: bool = False

    @property
    def passes(self) -> list[dict[str, Any]]:
        """The answers that give scores."""
        return [one for request in self.requests for one in request["passes"] if one["scores"]]


@dataclass
class _Open:
    """An answer whose expected scores need to know what follows a "1"."""

    case: _Case
    answer: Pass
    record: dict[str, Any]
    unclear: list[readout.Unclear]


class ModelJudge:
    """Asks a chat model about edits, by rubrics."""

    def __init__(
        self,
        name: str,
        chat_model: ChatModel,
        rubrics: Sequence[Rubric],
        settings: Settings,
        retries: int = 3,
        cache: Cache | None = None,
    ) -> None:
        self.name, self.model, self.revision = name, settings.model, settings.revision
        self.rubrics, self.rubrics_digest = list(rubrics), rubric.digest_all(rubrics)
        self._chat_model, self._settings, self._retries, self._cache = chat_model, settings, retries, cache

    def score(self, judgements: Sequence[Judgement]) -> list[Verdict]:
        """See `earl.judges.Judge`. What is identical is asked once."""
        pngs: dict[str, bytes] = {}
        cases: dict[str, _Case] = {}
        rows = [[self._case(judgement, one, pngs, cases) for one in self.rubrics] for judgement in judgements]
        try:
            self._answer(list(cases.values()))
        finally:
            if self._cache is not None:
                self._cache.flush()
        verdicts = [_verdict(row, self._settings.samples) for row in rows]
        reasons = Counter(verdict.failure for verdict in verdicts if verdict.status == "failed")
        for reason, count in reasons.most_common(5):
            log.warning("judge: %d of %d judgements failed: %s", count, len(verdicts), reason)
        return verdicts

    def _case(
        self, judgement: Judgement, asked: Rubric, pngs: dict[str, bytes], cases: dict[str, _Case]
    ) -> "_Case | str":
        """Return the question that a rubric makes of a judgement, or why there is none."""
        digests = {}
        for name in asked.images:
            pixels = getattr(judgement, name)
            if pixels is None:
                return f"the rubric {asked.name!r} shows the {name} image, and there is none"
            digests[name] = _encode(pixels, self._settings.image_size, pngs)
        key = self._key(asked, judgement.instruction, digests)
        if key not in cases:
            shown = {name: pngs[digest] for name, digest in digests.items()}
            cases[key] = _Case(key, asked, chat.messages(asked, judgement.instruction, shown))
        return cases[key]

    def _key(self, asked: Rubric, instruction: str, digests: dict[str, str]) -> str:
        """Digest of everything that an answer depends on."""
        content = {
            "rubric": asked.digest,
            "instruction": instruction if "{instruction}" in asked.prompt else None,
            "images": digests,
            "settings": vars(self._settings),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _answer(self, cases: list[_Case]) -> None:
        for case in cases:
            if self._cache is not None and (kept := self._cache.get(case.key)) is not None:
                case.requests = kept
        log.info("judge: %d questions, %d of them answered before", len(cases), sum(self._is_done(c) for c in cases))
        for attempt in range(1 + self._retries):
            pending = [case for case in cases if not self._is_done(case) and not case.hopeless]
            if not pending:
                break
            self._ask(pending, attempt)

    def _is_done(self, case: _Case) -> bool:
        return len(case.passes) == self._settings.samples

    def _ask(self, pending: list[_Case], attempt: int) -> None:
        """Ask for the passes that are missing, once."""
        opened: list[_Open] = []
        questions = [self._question(case, attempt) for case in pending]

        def take(index: int, reply: Reply) -> None:
            case = pending[index]
            passes = _record(case, attempt, questions[index].seed, reply)
            for answer, record in zip(reply.passes, passes, strict=True):
                self._read(_Open(case, answer, record, []), opened)
            self._keep(case)

        self._all(questions, take)
        self._continue(opened, attempt)

    def _all(self, questions: list[Question], take: Callable[[int, Reply], None]) -> None:
        if not questions:
            return
        missing = set(range(len(questions)))

        def count(index: int, reply: Reply) -> None:
            missing.remove(index)
            take(index, reply)

        self._chat_model.ask(questions, count)
        if missing:
            raise EarlError(f"judge {self.name!r} gave no reply to {len(missing)} of {len(questions)} questions")

    def _question(self, case: _Case, attempt: int) -> Question:
        settings = self._settings
        return Question(
            messages=case.messages,
            seed=_seed(case, attempt),
            passes=settings.samples - len(case.passes),
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            schema=answers.schema(case.rubric, settings.reasoning_length) if settings.structured else None,
            logprobs=settings.expected,
        )

    def _read(self, item: _Open, opened: list[_Open], continued: "dict[int, chat.Token] | None" = None) -> None:
        """Write an answer's scores into its record, or why it has none, or put it with those that are open."""
        case, answer, record = item.case, item.answer, item.record
        try:
            scores: dict[str, float] = answers.parse(answer.text, answer.finish_reason, case.rubric)
            if self._settings.expected:
                scores, item.unclear = readout.expected(answer, case.rubric, continued)
                if item.unclear:
                    opened.append(item)
                    return
            record["scores"] = [{"name": name, "value": float(value)} for name, value in scores.items()]
        except Unusable as error:
            record["failure"] = case.failure = str(error)

    def _continue(self, opened: list[_Open], attempt: int) -> None:
        """Have the beginnings up to a "1" continued, and read those answers again."""
        probes = [(item, unclear) for item in opened for unclear in item.unclear]
        questions = [self._continuation(item.case, unclear, attempt) for item, unclear in probes]
        found: dict[int, dict[int, chat.Token]] = {}

        def take(index: int, reply: Reply) -> None:
            item, unclear = probes[index]
            _record(item.case, attempt, questions[index].seed, reply, continues=unclear.beginning)
            if reply.passes and reply.passes[0].tokens:
                found.setdefault(id(item), {})[unclear.which] = reply.passes[0].tokens[0]

        self._all(questions, take)
        for item in opened:
            still: list[_Open] = []
            self._read(item, still, found.get(id(item)))
            if still:
                reason = item.case.failure if item.case.hopeless else "no log-probabilities"
                item.record["failure"] = item.case.failure = f"the model does not tell 1 from 10: {reason}"
            self._keep(item.case)

    def _continuation(self, case: _Case, unclear: readout.Unclear, attempt: int) -> Question:
        settings = self._settings
        return Question(
            messages=[*case.messages, {"role": "assistant", "content": unclear.beginning}],
            seed=_seed(case, attempt),
            max_tokens=1,
            temperature=settings.temperature,
            regex=answers.rest_pattern(case.rubric, unclear.which) if settings.structured else None,
            logprobs=True,
            continues=True,
        )

    def _keep(self, case: _Case) -> None:
        if self._cache is not None and self._is_done(case):
            self._cache.put(case.key, case.requests)


def _seed(case: _Case, attempt: int) -> int:
    # Some servers take no more than 31 bits.
    return seeds.seed("judge", case.key, attempt) % 2**31


def _encode(pixels: "np.ndarray", size: int | None, pngs: dict[str, bytes]) -> str:
    """Put the PNG of an image, its longer side ``size`` pixels if given, into ``pngs``; return its digest there."""
    png = images.encode(pixels if size is None else images.resize(pixels, size))
    digest = hashlib.sha256(png).hexdigest()
    pngs[digest] = png
    return digest


def _record(case: _Case, attempt: int, seed: int, reply: Reply, continues: str | None = None) -> list[dict[str, Any]]:
    """Add a reply to what a question has been asked, as a row of `earl.files.tables.REQUEST`; return its passes."""
    passes = [
        {"raw": one.text, "finish_reason": one.finish_reason, "failure": None, "scores": []} for one in reply.passes
    ]
    case.requests.append(
        {
            "question": case.key,
            "rubric": case.rubric.name,
            "rubric_digest": case.rubric.digest,
            "attempt": attempt,
            "continues": continues,
            "seed": seed,
            "error": reply.error,
            "tokens_in": reply.tokens_in,
            "tokens_out": reply.tokens_out,
            "seconds": reply.seconds,
            "passes": passes,
        }
    )
    if reply.error is not None:
        # Whatever may pass has been tried again already, with the same seed.
        case.failure, case.hopeless = reply.error, True
    return passes


def _verdict(row: "list[_Case | str]", samples: int) -> Verdict:
    cases = [case for case in row if isinstance(case, _Case)]
    requests = [request for case in cases for request in case.requests]
    raw = "\n".join(one["raw"] for case in cases for one in case.passes or _last_passes(case))
    failures = [
        case if isinstance(case, str) else f"{case.rubric.name}: {case.failure}"
        for case in row
        if isinstance(case, str) or len(case.passes) < samples
    ]
    if failures:
        return Verdict("failed", raw, failure="; ".join(failures), requests=requests)
    means, variance = {}, {}
    for case in cases:
        for name in case.rubric.scores:
            values = [case.rubric.stretched(_value(one, name)) for one in case.passes]
            means[name], variance[name] = fmean(values), pvariance(values)
    return Verdict("ok", raw, **means, variance=variance, requests=requests)


def _last_passes(case: _Case) -> list[dict[str, Any]]:
    """The answers to the last try of a question, its continuations aside."""
    asked = [request for request in case.requests if request["continues"] is None]
    return asked[-1]["passes"] if asked else []


def _value(record: dict[str, Any], name: str) -> float:
    return next(score["value"] for score in record["scores"] if score["name"] == name)


def from_config(config: "Config") -> ModelJudge:
    """Return the judge `openai` or `vllm` of a configuration; no model is loaded and no server asked yet.

    Raises:
        EarlError: a rubric cannot be read, or the rubrics do not give the scores they are for.
    """
    settings = Settings(
        model=config.reward_function_api_model_name,
        revision=_revision(config),
        samples=config.judge_samples,
        expected=config.judge_readout == "expected",
        temperature=config.judge_temperature,
        max_tokens=config.judge_max_tokens,
        reasoning_length=config.judge_reasoning_length,
        image_size=config.judge_image_size,
        structured=config.judge_structured_output,
        random_seed=config.random_seed,
    )
    if config.judge == "openai":
        from earl.judges.openai_model import OpenAIModel

        model: ChatModel = OpenAIModel(
            api_base=config.reward_function_api_base,
            model=config.reward_function_api_model_name,
            concurrency=config.judge_concurrency,
            timeout=config.judge_timeout_seconds,
            startup=config.judge_startup_seconds,
        )
    else:
        from earl.judges.vllm_model import VllmModel

        model = VllmModel.from_config(config)
    cache = Cache(Path(config.base_exp_dir) / "shared" / "judgements.sqlite") if config.judge_cache else None
    return ModelJudge(config.judge, model, rubrics_of(config), settings, config.judge_retries, cache)


def rubrics_of(config: "Config") -> list[Rubric]:
    """Return the rubrics that a configuration asks by.

    Raises:
        EarlError: one cannot be read, or they do not give the scores that they are for, each once.
    """
    fields = []
    if config.reward_compute_viescore:
        fields += ["judge_rubric_semantic_consistency", "judge_rubric_perceptual_quality"]
    if config.reward_compute_ground_score:
        fields += ["judge_rubric_ground_score"]
    found = []
    for name in fields:
        path = paths.resolve(config, getattr(config, name))
        one = rubric.load(path)
        expected = rubric.SCORES_OF[name.removeprefix("judge_rubric_")]
        if set(one.scores) != set(expected):
            raise EarlError(f"{path}: scores: has {', '.join(one.scores)}, but {name} is to give {', '.join(expected)}")
        found.append(one)
    return found


def _revision(config: "Config") -> str | None:
    """The model's revision: the configured one, or for a sealed folder its digest."""
    folder = Path(config.reward_function_api_model_name)
    if config.reward_function_api_model_revision is None and (folder / manifest.NAME).is_file():
        return manifest.digest_folder(folder)
    return config.reward_function_api_model_revision
