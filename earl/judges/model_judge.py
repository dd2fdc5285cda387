"""The judge that asks a model: the same questions, the same reading of answers, however the model is reached.

A verdict is made of one question for each rubric. An answer that gives no scores is asked for again with another seed,
a bounded number of times; a judgement that is still without one then is failed, and no number is put in its place.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl.config import paths
from earl.files import manifest
from earl.judges import Judgement, Verdict, answers, chat, marks, readout, rubric, thinking
from earl.judges.answers import Unusable
from earl.judges.cache import Cache
from earl.judges.cases import Case, by_question, reads_alike, verdict
from earl.judges.chat import ChatModel, Pass, Question, Reply
from earl.judges.encoding import Pictures
from earl.judges.rubric import Rubric
from earl.messages.errors import EarlError

if TYPE_CHECKING:
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
class _Open:
    """An answer whose expected scores need to know what follows a "1"."""

    case: Case
    answer: Pass
    record: dict[str, Any]
    attempt: int
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

    def score(self, judgements: Sequence[Judgement], before: Sequence[Sequence[dict[str, Any]]] = ()) -> list[Verdict]:
        """See `earl.judges.Judge`. What is identical is asked once.

        Args:
            before: What was asked for these judgements earlier, rows of `earl.files.tables.REQUEST`: answers among it
                are kept, and the tries go on after the last one, with seeds of their own.
        """
        pictures = Pictures(self._settings.image_size)
        cases: dict[str, Case] = {}
        rows = [[self._case(judgement, one, pictures, cases) for one in self.rubrics] for judgement in judgements]
        for question, requests in by_question(before).items():
            if question in cases and reads_alike(requests, cases[question].rubric, self._settings.expected):
                cases[question].requests = requests
        try:
            self._answer(list(cases.values()))
        finally:
            if self._cache is not None:
                self._cache.flush()
        verdicts = [verdict(row, self._settings.samples) for row in rows]
        reasons = Counter(one.failure for one in verdicts if one.status == "failed")
        for reason, count in reasons.most_common(5):
            log.warning("judge: %d of %d judgements failed: %s", count, len(verdicts), reason)
        return verdicts

    def _case(self, judgement: Judgement, asked: Rubric, pictures: Pictures, cases: dict[str, Case]) -> "Case | str":
        """Return the question that a rubric makes of a judgement, or why there is none."""
        digests = {}
        for name in asked.images:
            pixels = getattr(judgement, name)
            if pixels is None:
                return f"the rubric {asked.name!r} shows the {name} image, and there is none"
            digests[name] = pictures.digest(pixels)
        key = self._key(asked, judgement.instruction, digests)
        if key not in cases:
            shown = {name: pictures.url(digest) for name, digest in digests.items()}
            cases[key] = Case(key, asked, chat.messages(asked, judgement.instruction, shown))
        return cases[key]

    def _key(self, asked: Rubric, instruction: str, digests: dict[str, str]) -> str:
        """Digest of everything that an answer depends on."""
        content = {
            "rubric": asked.digest,
            "instruction": marks.plain(instruction) if "{instruction}" in asked.prompt else None,
            "images": digests,
            "settings": vars(self._settings),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _answer(self, cases: list[Case]) -> None:
        for case in cases:
            if self._cache is not None and (kept := self._cache.get(case.key)) is not None:
                if reads_alike(kept, case.rubric, self._settings.expected):
                    case.requests = kept
                else:
                    self._cache.drop(case.key)
        before = sum(map(self._is_done, cases))
        kept = f", by {self.model} of revision {self.revision} (judge_cache)" if before else ""
        log.info("judge: %d questions, %d of them answered before%s", len(cases), before, kept)
        for _ in range(1 + self._retries):
            pending = [case for case in cases if not self._is_done(case) and not case.hopeless]
            if not pending:
                break
            self._ask(pending)

    def _is_done(self, case: Case) -> bool:
        return len(case.passes) == self._settings.samples

    def _ask(self, pending: list[Case]) -> None:
        """Ask for the passes that are missing, once."""
        opened: list[_Open] = []
        attempts = [case.attempt for case in pending]
        questions = [self._question(case) for case in pending]

        def take(index: int, reply: Reply) -> None:
            case, attempt = pending[index], attempts[index]
            passes = case.record(attempt, questions[index], reply)
            for answer, record in zip(reply.passes, passes, strict=True):
                self._read(_Open(case, answer, record, attempt, []), opened)
            self._keep(case)

        self._all(questions, take)
        self._continue(opened)

    def _all(self, questions: list[Question], take: Callable[[int, Reply], None]) -> None:
        if not questions:
            return
        missing = set(range(len(questions)))

        def count(index: int, reply: Reply) -> None:
            missing.remove(index)
            take(index, chat.storable(reply))

        self._chat_model.ask(questions, count)
        if missing:
            raise EarlError(f"judge {self.name!r} gave no reply to {len(missing)} of {len(questions)} questions")

    def _question(self, case: Case) -> Question:
        settings = self._settings
        return Question(
            messages=case.messages,
            seed=case.seed(case.attempt),
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
            if answer.refusal is not None:
                raise Unusable(answer.refusal)
            scores: dict[str, float] = answers.parse(answer.text, answer.finish_reason, case.rubric)
            if self._settings.expected:
                scores, item.unclear = readout.expected(answer, case.rubric, continued)
                if item.unclear:
                    opened.append(item)
                    return
            record["scores"] = [{"name": name, "value": float(value)} for name, value in scores.items()]
        except Unusable as error:
            record["failure"] = case.failure = str(error)

    def _continue(self, opened: list[_Open]) -> None:
        """Have the beginnings up to a "1" continued, and read those answers again."""
        probes = [(item, unclear) for item in opened for unclear in item.unclear]
        questions = [self._continuation(item, unclear) for item, unclear in probes]
        found: dict[int, dict[int, chat.Token]] = {}
        refusals: dict[int, str] = {}

        def take(index: int, reply: Reply) -> None:
            item, unclear = probes[index]
            item.case.record(item.attempt, questions[index], reply)
            if reply.passes and reply.passes[0].tokens:
                found.setdefault(id(item), {})[unclear.which] = reply.passes[0].tokens[0]
            elif reply.passes and reply.passes[0].refusal:
                refusals[id(item)] = reply.passes[0].refusal

        self._all(questions, take)
        for item in opened:
            still: list[_Open] = []
            self._read(item, still, found.get(id(item)))
            if still:
                refusal = refusals.get(id(item), "no log-probabilities")
                reason = item.case.failure if item.case.hopeless else refusal
                item.record["failure"] = item.case.failure = f"the model does not tell 1 from 10: {reason}"
            self._keep(item.case)

    def _continuation(self, item: _Open, unclear: readout.Unclear) -> Question:
        settings = self._settings
        beginning = marks.plain(unclear.beginning, but=thinking.TAG)
        return Question(
            messages=[*item.case.messages, {"role": "assistant", "content": beginning}],
            seed=item.case.seed(item.attempt),
            max_tokens=1,
            temperature=settings.temperature,
            regex=answers.rest_pattern(item.case.rubric, unclear.which) if settings.structured else None,
            logprobs=True,
            continues=True,
        )

    def _keep(self, case: Case) -> None:
        if self._cache is not None and self._is_done(case):
            self._cache.put(case.key, case.requests)


SERVED = 60.0
"""Seconds to wait for a segment's own server, which has answered before and does not come back once it is gone."""


def from_config(config: "Config", served_at: str | None = None) -> ModelJudge:
    """Return the judge `openai` or `vllm` of a configuration; no model is loaded and no server asked yet.

    Args:
        config: The run's resolved configuration.
        served_at: Where a server of the judge `vllm` answers, to be asked in place of a model in this process.

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
    if config.judge == "openai" or served_at is not None:
        from earl.judges.openai_model import OpenAIModel

        model: ChatModel = OpenAIModel(
            api_base=served_at or config.reward_function_api_base,
            model=config.reward_function_api_model_name,
            concurrency=config.judge_concurrency,
            timeout=config.judge_timeout_seconds,
            startup=config.judge_startup_seconds if served_at is None else SERVED,
            patience=config.judge_retry_seconds,
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
